"""Does this model compute what it should on this machine? `slipstream verify MODEL`.

Ends with 1 where a module departs from the float32 reference, and names the first one that does.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from slipstream.cli.console import note
from slipstream.cli.engine_import import import_llm
from slipstream.cli.options import text_option
from slipstream.core.errors import EngineError


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyJob:
    """One model to judge. `options` are those of `LLM` that were given."""

    model: str
    options: dict[str, Any]
    tolerance: float
    json: Path | None

    def __call__(self) -> None:
        import_llm()
        from slipstream.bench.report import require_writable
        from slipstream.verify.verification import verify as judge

        if self.json is not None:
            require_writable(self.json)
        verdict = judge(self.model, notify=note, tolerance=self.tolerance, **self.options)
        if self.json is not None:
            self.json.write_text(verdict.to_json() + "\n", encoding="utf-8")
        for line in verdict.describe():
            print(line)
        if verdict.departed is not None:
            raise EngineError(f"{self.model} does not compute what it should: {verdict.sentence()}")


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .gguf file, a folder or a hub id.")],
    *,
    device: Annotated[str | None, text_option("NAME", "auto (the default), cpu or cuda.")] = None,
    dtype: Annotated[str | None, text_option("TYPE", "auto (the default), float32, bfloat16 or float16.")] = (
        None
    ),
    attn_backend: Annotated[
        str | None,
        text_option("NAME", "Attention backend: auto (the default) or one of `slipstream models`."),
    ] = None,
    load_format: Annotated[
        str | None, text_option("NAME", "auto (the default), safetensors, gguf or dummy (random weights).")
    ] = None,
    revision: Annotated[str | None, text_option("NAME", "Revision of a model on the hub.")] = None,
    tolerance: Annotated[float, typer.Option(metavar="X", min=0.0, help="Multiply every bound by X.")] = 1.0,
    json: Annotated[Path | None, text_option("FILE", "Write every module's figures here.")] = None,
) -> VerifyJob:
    """Judge every layer and op of a model against a float32 reference on the same device.

    Takes memory for a second copy of the weights, in float32. Prints the worst error of each kind of module.
    """
    given = {
        "device": device,
        "dtype": dtype,
        "attn_backend": attn_backend,
        "load_format": load_format,
        "revision": revision,
    }
    options = {name: value for name, value in given.items() if value is not None}
    return VerifyJob(
        model=model, options=options | {"skip_tokenizer_init": True}, tolerance=tolerance, json=json
    )
