"""Does this model, or this kernel, compute what it should here? `slipstream verify MODEL`, `verify --kernel`.

Ends with 1 where a module departs from the float32 reference, and names the first one that does; or where a
kernel from outside departs from its op's definition.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from slipstream.cli.console import note
from slipstream.cli.engine_import import import_llm
from slipstream.cli.options import text_option
from slipstream.core.errors import ConfigError, EngineError


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyKernelJob:
    """One kernel from outside to hold against its op's grid, on one device."""

    kernel: str
    device: str

    def __call__(self) -> None:
        import_llm()
        import torch

        from slipstream.cli.kernel_import import import_kernel
        from slipstream.kernels.conformance import check_kernel

        plugin = import_kernel(self.kernel)
        device = self.device
        if device == "auto":
            has_gpu = torch.cuda.is_available() and "cuda" in plugin.capability.devices
            device = "cuda" if has_gpu else "cpu"
        if device not in plugin.capability.devices or (device == "cuda" and not torch.cuda.is_available()):
            raise ConfigError(
                f"The kernel {plugin.name!r} runs on {', '.join(sorted(plugin.capability.devices))}, and "
                f"{device} is what there is to check it on; give --device, on a machine that has it."
            )
        found = check_kernel(plugin, device=device)
        for line in found.describe():
            print(line)
        if not found.is_good:
            raise EngineError(f"{plugin.name} does not compute {plugin.op} as it is defined.")


def verify(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A .gguf file, a folder or a hub id.")
    ] = None,
    *,
    kernel: Annotated[
        str | None,
        text_option("PLACE", "Check a kernel from outside instead: module:name or file.py:name."),
    ] = None,
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
) -> VerifyJob | VerifyKernelJob:
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
    if kernel is not None:
        others = [name for name in options if name != "device"]
        if model is not None or others or json is not None:
            odd = "MODEL" if model is not None else others[0] if others else "json"
            raise typer.BadParameter(f"--kernel checks one kernel without a model; leave {odd} out.")
        return VerifyKernelJob(kernel=kernel, device=device or "auto")
    if model is None:
        raise typer.BadParameter("Give a MODEL, or --kernel with a kernel from outside.")
    return VerifyJob(
        model=model, options=options | {"skip_tokenizer_init": True}, tolerance=tolerance, json=json
    )
