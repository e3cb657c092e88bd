"""What is the answer to one prompt? `slipstream run MODEL PROMPT` streams it to standard output."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli.console import describe, note, read_stdin, show_start, use_stdout_for_text, write_piece
from slipstream.cli.engine_import import import_llm
from slipstream.cli.options import EngineOptions, SamplingOptions, spread, text_option
from slipstream.core.errors import ConfigError

if TYPE_CHECKING:
    from slipstream.core.outputs import RequestOutput
    from slipstream.engine.generation import Generation
    from slipstream.llm import LLM

# A completion may never end by itself; a chat model ends its answers, and may fill the context.
DEFAULT_RAW_TOKENS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunJob:
    """One prompt to answer."""

    model: str
    prompt: str | None
    engine: EngineOptions
    sampling: SamplingOptions
    raw: bool
    system: str | None
    quiet: bool

    def __call__(self) -> None:
        use_stdout_for_text()
        prompt = read_stdin() if self.prompt in (None, "-") else str(self.prompt)

        from slipstream.bench.peak_memory import peak_memory_bytes

        llm_class = import_llm()

        bar = False if self.quiet else None
        with llm_class(self.model, use_tqdm=bar, **self.engine.to_llm_options()) as llm:
            if not self.quiet:
                show_start(llm)
            output = stream(self._start(llm, prompt), write_piece)
            write_piece("\n")
            if not self.quiet:
                note(describe(output, peak_bytes=peak_memory_bytes(llm.startup.resolved.device)))

    def _start(self, llm: LLM, prompt: str) -> Generation:
        has_template = llm.tokenizer.chat_template is not None
        if has_template and not self.raw:
            messages = [{"role": "user", "content": prompt}]
            if self.system is not None:
                messages.insert(0, {"role": "system", "content": self.system})
            params = self.sampling.to_params(default_max_tokens=None)
            return llm.chat_async(messages, params, streaming=True)
        if self.system is not None:
            raise ConfigError(
                f"--system was given, and {self.model} has no chat template to put it in; write it into the "
                "prompt."
            )
        if not self.raw and not self.quiet:
            note("no chat template in this model: the prompt is continued as it stands (as with --raw)")
        ids = llm.tokenizer.encode(prompt)
        room = llm.startup.limits.max_seq_len - len(ids)
        params = self.sampling.to_params(default_max_tokens=max(1, min(DEFAULT_RAW_TOKENS, room)))
        # An empty prompt goes as text, so that it is refused in the words all doors use.
        asked: Any = {"prompt": prompt, "prompt_token_ids": ids} if prompt else prompt
        return llm.generate_async(asked, params, streaming=True)


def stream(generation: Generation, write: Callable[[str], None]) -> RequestOutput:
    """Write each piece of an answer as it comes and return the last output. Raises its RequestError.

    Whatever interrupts the writing (Ctrl-C, a closed pipe) aborts the request.
    """
    last = None
    try:
        for last in generation:
            if last.outputs[0].text_diff:
                write(last.outputs[0].text_diff)
    except BaseException:
        generation.abort()
        raise
    assert last is not None
    if last.error is not None:
        raise last.error
    return last


@spread
def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .gguf file, a folder or a hub id.")],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="'-', or none with a pipe, reads standard input."),
    ] = None,
    *,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt, without chat template.")] = False,
    system: Annotated[str | None, text_option("TEXT", "System message of the chat.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show the answer alone.")] = False,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> RunJob:
    """Answer one prompt and stream the answer to standard output.

    Figures go to standard error. Greedy unless told otherwise. A chat answer may fill the context; with --raw
    it ends after 128 tokens unless --max-tokens says otherwise.
    """
    if raw and system is not None:
        raise typer.BadParameter(
            "--raw uses no chat template, so it cannot take --system; give one of the two."
        )
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("PROMPT is missing; give it, or pipe it into standard input.")
    return RunJob(
        model=model,
        prompt=prompt,
        engine=engine,
        sampling=sampling,
        raw=raw,
        system=system,
        quiet=quiet,
    )
