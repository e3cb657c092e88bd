"""What does `slipstream ...` do, and with which exit code does it end?

typer only parses: a command returns a `Job`, which runs here, so that errors, Ctrl-C and a closed pipe are
treated alike for every command. Exit codes: 0 done, 1 an error of the model, the machine or a request, 2 a
command line that makes no sense, 130 Ctrl-C, 141 nobody reads standard output any more.
Invariant: nothing heavy is imported before a job runs, so `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from slipstream.cli.bench import latency, throughput
from slipstream.cli.bench_serve import serve as bench_serve
from slipstream.cli.chat import chat
from slipstream.cli.collect_env import collect_env
from slipstream.cli.engine_import import EXIT_INTERRUPTED
from slipstream.cli.models import models
from slipstream.cli.options import HABITS, normalize_name
from slipstream.cli.run import run
from slipstream.cli.serve import serve
from slipstream.cli.trace import trace
from slipstream.cli.verify import verify
from slipstream.cli.warmup import warmup
from slipstream.core import env
from slipstream.core.aliases import advice_on, aliases_of
from slipstream.core.errors import ConfigError, SlipstreamError, nearest

EXIT_FAILED, EXIT_USAGE, EXIT_PIPE_CLOSED = 1, 2, 141
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class CommandGroup(TyperGroup):
    """A group that answers to an unknown command with the nearest one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        given = args[0] if args else ""
        valid = self.list_commands(ctx)
        if given and not given.startswith("-") and normalize_name(given) not in valid:
            advice = advice_on(ctx.command_path, normalize_name(given))
            if advice:
                ctx.fail(f"{ctx.command_path} has no command {given!r}; {advice}")
            ctx.fail(f"No command {given!r}; commands: {', '.join(valid)}.{nearest(given, valid)}")
        return super().resolve_command(ctx, args)


def new_group(help: str) -> typer.Typer:
    return typer.Typer(
        cls=CommandGroup,
        help=help,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"token_normalize_func": normalize_name, "help_option_names": ["-h", "--help"]},
    )


app = new_group("Slipstream: LLM inference from a checkpoint to tokens.")
bench_app = new_group("Measure an engine, and check that it did the work.")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Show the version.")] = False,
) -> None:
    """Slipstream: LLM inference from a checkpoint to tokens."""
    if version:
        from slipstream import __version__

        print(f"slipstream {__version__}")
        raise typer.Exit


@bench_app.callback()
def bench() -> None:
    """Measure an engine, and check that it did the work."""


app.command()(run)
app.command()(chat)
app.command()(serve)
app.command()(verify)
app.command()(warmup)
app.command()(trace)
app.command()(models)
app.command()(collect_env)
bench_app.command()(throughput)
bench_app.command()(latency)
bench_app.command("serve")(bench_serve)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command line of this process and exit."""
    code = run_command(sys.argv[1:])
    sys.exit(code)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; what went wrong is written to standard error."""
    try:
        configure_logging()
        # Without arguments: help, not an error.
        job = app(list(arguments) or ["--help"], prog_name="slipstream", standalone_mode=False)
        code: Any = job() if callable(job) else job
        sys.stdout.flush()
        return int(code or 0)
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_PIPE_CLOSED
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except SlipstreamError as error:
        return _fail(str(error), EXIT_FAILED, error)
    except Exception as error:
        # typer keeps its exceptions in a private module, and renames it; their interface stays.
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        return _fail(usage_message(error), EXIT_USAGE, error)


def usage_message(error: Any) -> str:
    """Say in one line what is wrong with a command line, with the nearest option where one is unknown."""
    name = getattr(error, "option_name", None)
    possibilities = hasattr(error, "possibilities")
    if name is not None and possibilities and error.ctx is not None:
        valid = [option for param in error.ctx.command.get_params(error.ctx) for option in param.opts]
        # Spellings from habit that this command takes are as good as its own.
        valid += [f"--{habit}" for habit, ours in HABITS.items() if f"--{ours}" in valid]
        command = error.ctx.command_path
        advice = advice_on_option(name, valid)
        if advice:
            return f"{command} has no option {name!r}; {advice}"
        return f"{command} has no option {name!r}.{nearest(name, valid)} See {command} --help."
    message = " ".join(error.format_message().split()).removeprefix("Invalid value: ")
    if error.ctx is not None and message == "Missing command.":
        commands = ", ".join(error.ctx.command.list_commands(error.ctx))
        message = f"{error.ctx.command_path} needs a command: {commands}."
    return message


def advice_on_option(option: str, valid: Sequence[str]) -> str:
    """Return what to use instead of an option known from elsewhere or from `LLM`; empty for any other."""
    from slipstream.engine.config import EngineConfig

    flag = option.lstrip("-")
    advice = advice_on("command line", flag)
    if advice or "--config" not in valid:
        return advice
    name = flag.replace("-", "_")
    name = aliases_of("EngineConfig").get(name, name)
    if name in EngineConfig.__dataclass_fields__:
        return f"it is an argument of LLM: write `{name}: ...` into a file and give it with --config."
    return advice_on("EngineConfig", name)


def _fail(message: str, code: int, error: Exception) -> int:
    if env.log_level() == "DEBUG":
        logging.getLogger("slipstream").debug("the command failed", exc_info=error)
    print(f"Error: {message}", file=sys.stderr)
    return code


def _discard_stdout() -> None:
    """Keep the interpreter's last flush from failing on the closed pipe again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class PlainFormatter(logging.Formatter):
    """Log lines without tracebacks: they are for whoever asked for the debug level."""

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return super().formatException(ei) if env.log_level() == "DEBUG" else ""


def configure_logging() -> None:
    """Send the package's log to standard error at the level of SLIPSTREAM_LOG. Raises ConfigError."""
    level = env.log_level()
    if level not in LOG_LEVELS:
        valid = ", ".join(name.lower() for name in LOG_LEVELS)
        raise ConfigError(
            f"SLIPSTREAM_LOG={level.lower()!r} is no log level; valid: {valid}."
            + nearest(level.lower(), [name.lower() for name in LOG_LEVELS])
        )
    logger = logging.getLogger("slipstream")
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(levelname)s %(name)s: %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
