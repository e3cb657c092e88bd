"""How fast is this model on this machine? `slipstream bench throughput|latency MODEL`.

This file parses; what is measured, and when a measurement fails, stands in the `bench` room.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli.console import note, show_start
from slipstream.cli.engine_import import import_llm
from slipstream.cli.options import EngineOptions, spread, text_option, tokens_option
from slipstream.cli.sizes import parse_counts
from slipstream.cli.trace import write_page

if TYPE_CHECKING:
    from slipstream.bench.measure import Load
    from slipstream.bench.workload import BenchRequest, Workload
    from slipstream.llm import LLM

DEFAULT_LENGTH = 128
DEFAULT_NUM_REQUESTS = {"throughput": 32, "latency": 8}
# What `EngineConfig` resolves to on a CPU where nothing is said.
CPU_MAX_BATCH_SIZE = 64
CPU_POOL_TOKENS = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """What is asked of the engine: random prompts, or the lines of a file."""

    isl: Annotated[int | None, tokens_option("Prompt tokens a request (128).")] = None
    osl: Annotated[int | None, tokens_option("Output tokens a request (128).")] = None
    min_isl: Annotated[int | None, tokens_option("Draw prompt lengths from here to --max-isl.")] = None
    max_isl: Annotated[int | None, tokens_option("See --min-isl.")] = None
    min_osl: Annotated[int | None, tokens_option("Draw output lengths from here to --max-osl.")] = None
    max_osl: Annotated[int | None, tokens_option("See --min-osl.")] = None
    num_requests: Annotated[
        int | None, text_option("N", "Requests a run (throughput 32, latency 8, a dataset all).")
    ] = None
    seed: Annotated[int, typer.Option(metavar="N", help="Draw the same prompts each time.")] = 0
    dataset: Annotated[
        Path | None,
        text_option("FILE", "JSON lines of prompt or prompt_token_ids, and output_tokens or max_tokens."),
    ] = None
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="Runs; the median counts.")] = 3
    reuse: Annotated[bool, typer.Option("--reuse", help="Let requests of a run share prefixes.")] = False
    json: Annotated[Path | None, text_option("FILE", "Write the record here.")] = None
    profile: Annotated[
        Path | None,
        text_option("FILE.json", "Run once more under a profiler: a trace for Perfetto, and a table."),
    ] = None
    trace: Annotated[
        Path | None, text_option("FILE.html", "Draw what the engine's steps and requests did, as one page.")
    ] = None

    def to_workload(self, kind: str) -> Workload:
        from slipstream.bench.workload import RandomWorkload, read_dataset

        if self.dataset is not None:
            lengths = ("isl", "osl", "min_isl", "max_isl", "min_osl", "max_osl")
            given = [name for name in lengths if getattr(self, name) is not None]
            if given:
                option = given[0].replace("_", "-")
                raise typer.BadParameter(f"--dataset brings its own lengths; leave --{option} out.")
            return read_dataset(self.dataset, limit=self.num_requests)
        num_requests = DEFAULT_NUM_REQUESTS[kind] if self.num_requests is None else self.num_requests
        return RandomWorkload(
            num_requests=num_requests,
            isl=length_range("isl", self.isl, self.min_isl, self.max_isl),
            osl=length_range("osl", self.osl, self.min_osl, self.max_osl),
            seed=self.seed,
        )


def length_range(name: str, fixed: int | None, low: int | None, high: int | None) -> tuple[int, int]:
    """Return the lowest and highest length; a fixed one is both."""
    if low is None and high is None:
        value = fixed or DEFAULT_LENGTH
        return value, value
    if fixed is not None or low is None or high is None:
        raise typer.BadParameter(f"Give --{name}, or both --min-{name} and --max-{name}.")
    return low, high


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchJob:
    """One engine to measure, under one load or several. `loads` maps a result's name to its concurrency."""

    kind: str
    model: str
    engine: EngineOptions
    options: WorkloadOptions
    workload: Workload
    max_running: int | None
    batch_sizes: tuple[int, ...] = ()

    def __call__(self) -> None:
        from slipstream.bench.measure import measure
        from slipstream.bench.peak_memory import peak_memory_bytes
        from slipstream.bench.report import engine_facts, require_writable, show_table, summarize, write_json

        for path in (self.options.json, self.options.profile, self.options.trace):
            if path is not None:
                require_writable(path)
        results = []
        with self._start() as llm:
            show_start(llm)
            facts = engine_facts(llm.startup, self.model)
            requests = self._requests(llm)
            for name, load in self._loads().items():
                runs = measure(
                    llm,
                    requests,
                    load,
                    num_runs=self.options.runs,
                    has_reuse=llm.startup.resolved.kv_cache.enable_block_reuse,
                    notify=lambda what, name=name: note(f"{name}: {what}"),
                )
                peak = peak_memory_bytes(llm.startup.resolved.device)
                results.append(summarize(name, facts, requests, runs, peak_memory_bytes=peak))
            if self.options.json is not None:
                write_json(self.options.json, results, device=llm.startup.resolved.device)
            if self.options.trace is not None:
                write_page(self.options.trace, llm.get_trace(), model=Path(self.model).name)
        show_table(results)
        if self.options.profile is not None:
            self._profile(self.options.profile, requests)

    def _profile(self, trace: Path, requests: Sequence[BenchRequest]) -> None:
        """Run the workload on an engine of the same options under the profiler, and show what took time."""
        from slipstream.bench.profile import profile_requests
        from slipstream.bench.profile_table import describe_profile, table_path
        from slipstream.engine.assembly import assemble
        from slipstream.engine.config import EngineConfig

        note("profiling")
        assembly = assemble(EngineConfig(model=self.model, **self._options()[0]))
        size = max(self.batch_sizes) if self.batch_sizes else self.max_running or len(requests)
        profile = profile_requests(assembly, requests[:size], trace=trace)
        table_path(trace).write_text(profile.to_json() + "\n", encoding="utf-8")
        for line in describe_profile(profile, trace):
            print(line)

    def _requests(self, llm: LLM) -> list[BenchRequest]:
        limits = llm.startup.limits
        return self.workload.draw(
            llm.tokenizer, vocab_size=limits.vocab_size, eos_token_ids=limits.eos_token_ids
        )

    def _loads(self) -> dict[str, Load]:
        from slipstream.bench.measure import all_at_once, at_concurrency, in_batches

        if self.kind == "latency":
            return {f"latency-b{size}": in_batches(size) for size in self.batch_sizes}
        if self.max_running is None:
            return {"throughput": all_at_once}
        return {f"throughput-c{self.max_running}": at_concurrency(self.max_running)}

    def _start(self) -> LLM:
        from slipstream.core.errors import OutOfMemoryError

        llm_class = import_llm()
        options, pool = self._options()
        try:
            return llm_class(self.model, **options)
        except OutOfMemoryError as error:
            if pool is None:
                raise
            raise OutOfMemoryError(
                f"{error} It was sized for all requests to run at once; give --kv-cache-max-tokens, or lower "
                "--num-requests or --max-batch-size."
            ) from error

    def _options(self) -> tuple[dict[str, Any], int | None]:
        """Return the options of `LLM`, and the tokens of the KV cache where they were set here."""
        # Off unless asked for, here or in the file of --config: equal prompts would measure the cache.
        reuse = {"enable_block_reuse": True} if self.options.reuse else {}
        options = self.engine.to_llm_options(kv_defaults={"enable_block_reuse": False}, **reuse)
        pool = self._cpu_pool_tokens(options)
        if pool is not None:
            options["kv_cache_config"] = dataclasses.replace(options["kv_cache_config"], max_tokens=pool)
        return options, pool

    def _cpu_pool_tokens(self, options: Mapping[str, Any]) -> int | None:
        """Return how large the KV cache must be where a CPU's default is too small and nothing is said."""
        import torch

        from slipstream.bench.workload import pool_tokens

        device, kv = options.get("device", "auto"), options["kv_cache_config"]
        is_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
        if not is_cpu or kv.max_tokens is not None or kv.max_gpu_total_bytes is not None:
            return None
        max_batch_size = options.get("max_batch_size") or CPU_MAX_BATCH_SIZE
        max_running = min(self.max_running or CPU_MAX_BATCH_SIZE, max_batch_size)
        needed = pool_tokens(self.workload.largest_sizes(), max_running=max_running)
        return needed if needed > CPU_POOL_TOKENS else None


MODEL = typer.Argument(metavar="MODEL", help="A .gguf file, a folder or a hub id.")


@spread
def throughput(
    model: Annotated[str, MODEL],
    *,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Requests in flight (all).", show_default=False)
    ] = None,
    workload: WorkloadOptions,
    engine: EngineOptions,
) -> BenchJob:
    """Measure tokens per second with all requests at once, or --concurrency of them in flight.

    The prompts are random ids, or those of --dataset; outputs are greedy and ignore the end token. Fails
    unless the engine executed exactly the tokens that were asked for.
    """
    return BenchJob(
        kind="throughput",
        model=model,
        engine=engine,
        options=workload,
        workload=workload.to_workload("throughput"),
        max_running=concurrency,
    )


@spread
def latency(
    model: Annotated[str, MODEL],
    *,
    batch_sizes: Annotated[
        Any,
        typer.Option(
            parser=parse_counts,
            metavar="N,N,...",
            help="Requests at a time, e.g. 1,4,8 (1).",
            show_default=False,
        ),
    ] = None,
    workload: WorkloadOptions,
    engine: EngineOptions,
) -> BenchJob:
    """Measure the time to the first token and between tokens, one request (or batch) after the other.

    The prompts are random ids, or those of --dataset; outputs are greedy and ignore the end token. Fails
    unless the engine executed exactly the tokens that were asked for.
    """
    sizes = batch_sizes or (1,)
    return BenchJob(
        kind="latency",
        model=model,
        engine=engine,
        options=workload,
        workload=workload.to_workload("latency"),
        max_running=max(sizes),
        batch_sizes=sizes,
    )
