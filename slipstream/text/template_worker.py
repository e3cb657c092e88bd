"""How is a template from an untrusted file rendered? In a process of its own that holds nothing worth taking.

Run by `template_process` as `python -m slipstream.text.template_worker`. It speaks JSON lines: writes `{}`
when it is ready, reads `{"source", "max_output", "deadline_s"}` once, then answers every line of variables
with `{"text"}` or `{"error"}`. The sandbox is Jinja's immutable one; memory, CPU time per rendering and files
are limited where the OS can. It ends when its input does, and leaves Ctrl-C to its parent. The environment
(whitespace rules, loop controls, `raise_exception`, `strftime_now`, plain `tojson`) is the one chat templates
are written for: Hugging Face, `Chat templates` documentation.
"""

from __future__ import annotations

import datetime
import json
import math
import signal
import sys
import time
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

try:
    import resource
except ImportError:  # not on Windows: the parent's deadline remains
    resource = None

MAX_MEMORY_BYTES = 512 << 20
MAX_OPEN_FILES = 32


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit_process()
    answer({})
    settings = json.loads(sys.stdin.readline() or "null")
    if settings is None:
        return
    template: jinja2.Template | None = None
    for line in sys.stdin:
        limit_cpu(settings["deadline_s"])
        try:
            template = template or build_environment().from_string(settings["source"])
            answer({"text": render(template, json.loads(line), settings["max_output"])})
        except (Exception, MemoryError, RecursionError) as error:
            answer({"error": explain(error)})


def render(template: jinja2.Template, variables: dict[str, Any], max_output: int) -> str:
    parts: list[str] = []
    length = 0
    for part in template.generate(**variables):
        length += len(part)
        if length > max_output:
            raise jinja2.TemplateError(f"it wrote more than {max_output:,} characters")
        parts.append(part)
    return "".join(parts)


def build_environment() -> jinja2.Environment:
    environment: Any = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, loud: it would print what is out of bounds as nothing."""

    def unsafe_undefined(self, obj: object, attribute: str) -> NoReturn:
        raise jinja2.exceptions.SecurityError(f"{attribute!r} of {type(obj).__name__!r} is out of bounds")


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what a model wrote, for training; here its body stands for itself."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, which models have never seen."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def explain(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"it needed more than {MAX_MEMORY_BYTES >> 20} MiB of memory"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    place = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
    return f"{kind}{error}{place}"[:2000]


def answer(record: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def limit_process() -> None:
    if resource is not None:
        lower("RLIMIT_AS", MAX_MEMORY_BYTES)
        lower("RLIMIT_FSIZE", 0)
        lower("RLIMIT_CORE", 0)
        lower("RLIMIT_NOFILE", MAX_OPEN_FILES)


def lower(name: str, value: int) -> None:
    """Lower one limit for good, if the OS has it and allows it."""
    kind = getattr(resource, name, None)
    if resource is None or kind is None:
        return
    try:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):
        return


def limit_cpu(deadline_s: float) -> None:
    """Let the OS end this process should the parent be gone before its deadline fires."""
    if resource is not None:
        used = math.ceil(time.process_time() + deadline_s) + 1
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        soft = used if hard == resource.RLIM_INFINITY else min(used, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


if __name__ == "__main__":
    main()
