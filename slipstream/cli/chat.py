"""How does one talk with a model? `slipstream chat MODEL`: a prompt, streamed answers, and a few commands.

On a terminal: Ctrl-C during an answer stops that answer, Ctrl-C twice or Ctrl-D at the prompt leaves. With a
pipe each line is a turn, and Ctrl-C ends the program as any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli.console import describe, note, show_start, use_stdout_for_text, write_piece
from slipstream.cli.conversation import Conversation
from slipstream.cli.engine_import import import_llm
from slipstream.cli.options import EngineOptions, SamplingOptions, spread, text_option
from slipstream.core.errors import ConfigError, RequestError, nearest

if TYPE_CHECKING:
    from slipstream.llm import LLM

HELP = """\
/system TEXT  start afresh with this system message
/reset        forget the conversation so far, not the system message
/stats        tokens of the conversation and counters of the engine
/help         this list
/exit         leave (also Ctrl-D, or Ctrl-C twice)
//TEXT        say TEXT with a slash in front
"""
COMMANDS = ("/system", "/reset", "/stats", "/help", "/exit")
PROMPT = ">>> "


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatJob:
    """One chat to hold."""

    model: str
    engine: EngineOptions
    sampling: SamplingOptions
    system: str | None
    quiet: bool

    def __call__(self) -> None:
        use_stdout_for_text()
        llm_class = import_llm()

        bar = False if self.quiet else None
        with llm_class(self.model, use_tqdm=bar, **self.engine.to_llm_options()) as llm:
            if llm.tokenizer.chat_template is None:
                raise ConfigError(
                    f"{self.model} has no chat template, so it cannot chat; use `slipstream run --raw` to "
                    "continue a text."
                )
            if not self.quiet:
                show_start(llm)
            params = self.sampling.to_params(default_max_tokens=None)
            Repl(llm, Conversation(llm, params, system=self.system), is_quiet=self.quiet).run()


class Repl:
    """Reads turns, writes answers to standard output and everything else to standard error."""

    def __init__(self, llm: LLM, conversation: Conversation, *, is_quiet: bool) -> None:
        self._llm = llm
        self._conversation = conversation
        self._is_quiet = is_quiet
        self._is_terminal = sys.stdin.isatty()
        self._failed: RequestError | None = None

    def run(self) -> None:
        """Hold the chat to its end. Raises the last RequestError of a pipe, so that a script sees it."""
        if self._is_terminal:
            enable_line_editing()
            note("/help lists the commands")
        while (line := self._next_line()) is not None:
            if line.startswith("/") and not line.startswith("//"):
                if not self._obey(line):
                    break
            elif line.strip():
                self._answer(line.removeprefix("/") if line.startswith("//") else line)
        if self._failed is not None and not self._is_terminal:
            raise self._failed

    def _next_line(self) -> str | None:
        """Return the next line, or None at the end; on a terminal the second Ctrl-C in a row is the end."""
        interrupts = 0
        while True:
            try:
                return read_line(is_terminal=self._is_terminal)
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                interrupts += 1
                note("")
                if interrupts > 1:
                    return None
                note("Ctrl-C again, Ctrl-D or /exit leaves")

    def _answer(self, question: str) -> None:
        try:
            output = self._conversation.ask(question, write_piece)
        except KeyboardInterrupt:
            if not self._is_terminal:
                raise
            write_piece("\n")
            note("[stopped]")
            return
        except RequestError as error:
            note(f"Error: {error}")
            self._failed = error
            return
        write_piece("\n")
        if not self._is_quiet:
            note(f"[{describe(output)}]")
        if self._conversation.num_tokens >= self._conversation.max_tokens:
            note(
                f"The context of {self._conversation.max_tokens:,} tokens is full: the answer was cut off, "
                "and the next question will not fit; /reset starts afresh."
            )

    def _obey(self, line: str) -> bool:
        """Carry out a command; False ends the chat."""
        name, _, rest = line.partition(" ")
        actions: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/reset": lambda _: self._reset(),
            "/stats": lambda _: self._show_stats(),
            "/help": lambda _: note(HELP.rstrip()),
        }
        if name in actions:
            actions[name](rest.strip())
        elif name != "/exit":
            note(f"No command {name!r}; commands: {', '.join(COMMANDS)}.{nearest(name, COMMANDS)}")
        return name != "/exit"

    def _set_system(self, text: str) -> None:
        if not text:
            note(f"The system message is {self._conversation.system!r}; /system TEXT replaces it.")
            return
        self._conversation.reset(system=text)
        note("a new conversation with this system message")

    def _reset(self) -> None:
        self._conversation.reset()
        note("a new conversation")

    def _show_stats(self) -> None:
        conversation = self._conversation
        note(f"conversation: {conversation.num_tokens:,} of {conversation.max_tokens:,} tokens")
        for name, value in self._llm.get_stats().items():
            note(f"{name}: {value:,}" if isinstance(value, (int, float)) else f"{name}: {value}")


def enable_line_editing() -> None:
    """Give `input` its arrow keys and history; the module is absent on some systems."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


def read_line(*, is_terminal: bool) -> str | None:
    """Return the next line of standard input without its end, or None where there is no more.

    The prompt never goes into a standard output that is not the terminal.
    """
    if is_terminal and sys.stdout.isatty():
        try:
            return input(PROMPT)
        except EOFError:
            note("")
            return None
    if is_terminal:
        print(PROMPT, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.removesuffix("\n").removesuffix("\r") if line else None


@spread
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .gguf file, a folder or a hub id.")],
    *,
    system: Annotated[str | None, text_option("TEXT", "System message.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show the answers alone.")] = False,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> ChatJob:
    """Talk with a model; every line of a pipe is a turn.

    Earlier turns are found in the KV cache, so a later one computes only what is new.
    """
    return ChatJob(model=model, engine=engine, sampling=sampling, system=system, quiet=quiet)
