"""What can be compiled before an engine is needed? `slipstream warmup MODEL` fills the caches and says which.

Invariant: the engine that runs here is the one that the same options start later, so what it compiles is what
that one finds. Captured steps belong to a process and are captured anew in each.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated, Any

import typer

from slipstream.cli.console import note
from slipstream.cli.engine_import import import_llm
from slipstream.cli.options import EngineOptions, spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupJob:
    """One model whose kernels are to be compiled."""

    model: str
    engine: EngineOptions

    def __call__(self) -> None:
        import_llm()
        from slipstream.engine.assembly import assemble
        from slipstream.engine.config import EngineConfig
        from slipstream.engine.shape_tour import visit_shapes
        from slipstream.kernels.compiled_caches import growth, look

        before, started = look(), time.perf_counter()
        options: dict[str, Any] = {**self.engine.to_llm_options(), "skip_tokenizer_init": True}
        assembly = assemble(EngineConfig(model=self.model, **options))
        for line in assembly.report:
            note(line)
        num_steps = visit_shapes(assembly, notify=note)
        for cache in growth(before):
            print(cache.line())
        captured = assembly.engine.runner.counters["num_graphs"]
        graphs = f"; {captured} steps were captured, which each process does anew" if captured else ""
        seconds = time.perf_counter() - started
        print(f"{num_steps} steps in {seconds:.1f} s on the {assembly.resolved.device}{graphs}")


@spread
def warmup(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .gguf file, a folder or a hub id.")],
    *,
    engine: EngineOptions,
) -> WarmupJob:
    """Compile what an engine with these options would compile at its start, and say where it is kept.

    Kernels depend on shapes and types, not on weights: --load-format dummy spares reading them.
    """
    return WarmupJob(model=model, engine=engine)
