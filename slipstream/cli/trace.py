"""What did a server's engine do lately? `slipstream trace URL_OR_FILE -o out.html` draws it as one page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli.console import note
from slipstream.cli.options import text_option
from slipstream.core import env
from slipstream.core.errors import ConfigError

if TYPE_CHECKING:
    from slipstream.engine.step_records import EngineTrace

DEFAULT_PAGE = Path("trace.html")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceJob:
    """One trace to draw, as a page, for Perfetto, or to keep as it is."""

    source: str
    output: Path | None
    perfetto: Path | None
    save: Path | None
    api_key: str

    def __call__(self) -> None:
        from slipstream.trace.page import to_html
        from slipstream.trace.perfetto import to_perfetto
        from slipstream.trace.reading import encode_trace, read_trace
        from slipstream.trace.timeline import timeline_of

        found = read_trace(self.source, api_key=self.api_key)
        timeline = timeline_of(found.trace, model=found.model)
        output = self.output or (None if self.perfetto or self.save else DEFAULT_PAGE)
        if output is not None:
            _write(output, to_html(timeline).encode("utf-8"))
        if self.perfetto is not None:
            _write(self.perfetto, to_perfetto(timeline))
        if self.save is not None:
            _write(self.save, encode_trace(found.trace, model=found.model))
        note(
            f"{len(timeline.lanes)} requests and {len(timeline.steps)} steps in {timeline.duration_s:.2f} s, "
            f"written to {', '.join(str(path) for path in (output, self.perfetto, self.save) if path)}"
        )


def write_page(path: Path, trace: EngineTrace, *, model: str) -> None:
    """Draw a trace of this process. Raises ConfigError where the file cannot be written."""
    from slipstream.trace.page import to_html
    from slipstream.trace.timeline import timeline_of

    _write(path, to_html(timeline_of(trace, model=model)).encode("utf-8"))


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); name a file in a folder that exists."
        ) from None


def trace(
    source: Annotated[
        str, typer.Argument(metavar="URL_OR_FILE", help="A running server, or a file saved from /trace.json.")
    ],
    *,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="The page (trace.html).", show_default=False),
    ] = None,
    perfetto: Annotated[Path | None, text_option("FILE", "Also, or only, for ui.perfetto.dev.")] = None,
    save: Annotated[Path | None, text_option("FILE", "Keep the records, to draw them later.")] = None,
    api_key: Annotated[
        str | None,
        text_option("KEY", "The server's key, if it asks for one (else SLIPSTREAM_API_KEY)."),
    ] = None,
) -> TraceJob:
    """Draw what an engine's steps and requests did lately as one HTML page that needs no network."""
    key = api_key or env.api_key()
    return TraceJob(source=source, output=output, perfetto=perfetto, save=save, api_key=key)
