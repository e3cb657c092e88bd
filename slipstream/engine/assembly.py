"""How is an engine put together? Checkpoint, tokenizer, model, pages, scheduler, in that order, once.

What a configuration can be refused for is refused before weights are read; the tokenizer is read beside them.
What is chosen is written into the report, one line a choice with its reason, and one line a ledger entry in
bytes.
"""

from __future__ import annotations

# First, since it starts the clock of what is imported here.
from slipstream.engine.startup_phases import PhaseClock, seconds_since_import_began

# isort: split
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch

from slipstream.attention.base import AttentionBackend
from slipstream.attention.device_facts import facts_of
from slipstream.attention.registry import choose_backend
from slipstream.cache.groups import resolve as resolve_groups
from slipstream.cache.kv_cache import KvCache
from slipstream.checkpoint.base import Checkpoint
from slipstream.checkpoint.dummy import DummyCheckpoint
from slipstream.checkpoint.opening import open_checkpoint
from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import ConfigError, OutOfMemoryError
from slipstream.core.limits import Limits
from slipstream.engine.config import EngineConfig
from slipstream.engine.engine import Engine
from slipstream.engine.faults import describe_fault
from slipstream.engine.invariance import require_invariance
from slipstream.engine.kernel_choice import kernel_lines, load_plugins
from slipstream.engine.ledger import DeviceMemory, Ledger, memory_of, tensor_bytes
from slipstream.engine.pacing import Pacing
from slipstream.engine.resolution import Capacity, ModelFacts, ResolvedConfig, fit_capacity, resolve
from slipstream.engine.runner import Runner
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.shared_rows import shares_beginnings
from slipstream.engine.step_shapes import StepShapes
from slipstream.engine.warm_up import NUM_PAGES, Measured, StepBounds, measure_worst_case
from slipstream.kernels.cpu.library import LibraryUnavailable, library
from slipstream.models.loading import load_weights
from slipstream.models.registry import model_class, read_config
from slipstream.parallel.mesh import Mesh
from slipstream.quant.registry import SCHEMES
from slipstream.text.base import Tokenizer
from slipstream.text.from_folder import load_tokenizer_folder
from slipstream.text.from_gguf import load_tokenizer_gguf
from slipstream.text.vocab_checks import check_vocab

logger = logging.getLogger(__name__)

IMPORT_S = seconds_since_import_began()

T = TypeVar("T")

# What a publisher may recommend for requests that do not say.
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

# Called with (what is being done, share done so far from 0 to 1).
Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """An engine ready to run, and what was decided on the way. `report` is for people.

    `phases` are the seconds of each part of the start; "tokenizer" ran beside the others, and "import" counts
    once for the process. `build_model` makes another model like the engine's, its parameters allocated and
    empty.
    `default_sampling` are the settings that the model's publisher recommends.
    """

    engine: Engine
    tokenizer: Tokenizer | None
    limits: Limits
    resolved: ResolvedConfig
    capacity: Capacity
    weight_bytes: int
    ledger: Ledger
    load_s: float
    phases: dict[str, float]
    report: list[str]
    build_model: Callable[[torch.device], Any]
    default_sampling: dict[str, float]


def assemble(config: EngineConfig, *, progress: Progress | None = None) -> Assembly:
    """Build the engine for a configuration; blocks until the weights are loaded."""
    clock = PhaseClock(import_s=IMPORT_S)
    with clock.phase("open"):
        load_plugins()
        checkpoint = open_checkpoint(
            config.model,
            load_format=config.load_format,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    try:
        with clock.phase("config"):
            cls = model_class(checkpoint)
            model_config = read_config(cls, checkpoint)
            facts = ModelFacts(
                vocab_size=model_config.vocab_size,
                max_position_embeddings=model_config.max_position_embeddings,
                dtype=stored_dtype(checkpoint),
                is_quantized=checkpoint.format == "gguf",
            )
            has_cuda = torch.cuda.is_available()
        with clock.phase("kernels"):
            native_obstacle = find_native_obstacle(config, has_cuda)
        resolved = resolve(config, facts, has_cuda=has_cuda, native_obstacle=native_obstacle)
        read = clock.timed("tokenizer", lambda: _checked_tokenizer(config, checkpoint, facts.vocab_size))
        reading = in_background(read)
        device = torch.device(resolved.device)
        dtype = getattr(torch, resolved.dtype)
        quant = SCHEMES.get(resolved.quantization)()
        build = functools.partial(cls, model_config, mesh=Mesh(), quant=quant, dtype=dtype)
        with clock.phase("build"):
            memory = memory_of(device)
            require_room_for_weights(build, checkpoint, memory, resolved)
            model = build(device=device)
        groups = resolve_groups(
            model.cache_groups(),
            block_tokens=resolved.kv_cache.tokens_per_block,
            element_bytes=getattr(torch, resolved.kv_dtype).itemsize,
        )
        seen = facts_of(
            device,
            kv_dtype=resolved.kv_dtype,
            native_obstacle=native_obstacle,
            is_batch_invariant=resolved.batch_invariant,
        )
        backend, why = choose_backend(resolved.attn_backend, seen, groups)
        with clock.phase("weights"):
            load_weights(model, checkpoint, progress=_weights_progress(progress))
        if resolved.batch_invariant:
            require_invariance(model, backend, device, resolved.dtype)
        with clock.phase("wait for the tokenizer"):
            tokenizer = reading.result()
        eos = _eos_token_ids(tokenizer, checkpoint)
    finally:
        checkpoint.close()
    shares = shares_beginnings(backend, model, groups, resolved.max_batch_size)
    shapes = _shapes(config, resolved, backend, shares=shares)
    engine, capacity, limits, ledger = _build_engine(
        model, groups, backend, resolved, config, facts, eos, memory, clock, shapes
    )
    graphs = _capture(engine, shapes, resolved, clock)
    kernels = kernel_lines(model, backend, groups, device, resolved.dtype)
    report = _report(resolved, capacity, limits, ledger, [why, *kernels], graphs, clock.line())
    for line in report:
        logger.info(line)
    return Assembly(
        engine=engine,
        tokenizer=tokenizer,
        limits=limits,
        resolved=resolved,
        capacity=capacity,
        weight_bytes=ledger.weight_bytes,
        ledger=ledger,
        load_s=clock.total_s,
        phases={"import": clock.import_s, **clock.seconds},
        report=report,
        build_model=lambda device: build(device=device),
        default_sampling=recommended_sampling(checkpoint),
    )


def _build_engine(
    model: Any,
    groups: list[CacheGroup],
    backend: AttentionBackend,
    resolved: ResolvedConfig,
    config: EngineConfig,
    facts: ModelFacts,
    eos: tuple[int, ...],
    memory: DeviceMemory,
    clock: PhaseClock,
    shapes: StepShapes,
) -> tuple[Engine, Capacity, Limits, Ledger]:
    """Measure memory, size the pool, and join cache, scheduler and runner."""
    device = torch.device(resolved.device)

    def make_runner(num_pages: int, max_seq_len: int) -> Runner:
        return Runner(
            model,
            groups,
            num_pages=num_pages,
            max_batch_size=resolved.max_batch_size,
            max_seq_len=max_seq_len,
            kv_dtype=getattr(torch, resolved.kv_dtype),
            device=device,
            backend=backend,
            shapes=shapes,
        )

    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    with clock.phase("warm-up"):
        bounds = _bounds_of(resolved, groups, backend)
        make_small = functools.partial(make_runner, NUM_PAGES, resolved.max_seq_len)
        measured = _measure(make_small, memory, bounds, shapes)
    free_bytes = memory.free()
    entries = _entries(resolved, memory, measured, weight_bytes)
    try:
        capacity = fit_capacity(
            resolved,
            page_bytes=groups[0].page_bytes,
            num_groups=len(groups),
            free_bytes=free_bytes,
            total_bytes=memory.total,
            reserved_bytes=measured.num_bytes if measured is not None else 0,
        )
    except OutOfMemoryError as error:
        raise OutOfMemoryError(f"{error} As it stands, {Ledger(**entries, kv_bytes=0).line()}.") from error
    cache = KvCache(
        groups,
        capacity.num_pages,
        enable_block_reuse=resolved.kv_cache.enable_block_reuse,
        enable_partial_reuse=resolved.kv_cache.enable_partial_reuse,
        event_buffer_max_size=resolved.kv_cache.event_buffer_max_size,
    )
    max_seq_len = fit_seq_len(cache, resolved, asked=config.max_seq_len)
    limits = Limits(
        vocab_size=facts.vocab_size,
        max_seq_len=max_seq_len,
        eos_token_ids=eos,
        max_beam_width=resolved.max_beam_width,
    )
    scheduler = Scheduler(
        cache,
        max_batch_size=resolved.max_batch_size,
        max_num_tokens=resolved.max_num_tokens,
        enable_chunked_prefill=resolved.enable_chunked_prefill,
        policy=resolved.capacity_policy,
        chunking_policy=resolved.chunking_policy,
        pacing=_pacing(resolved, shapes),
    )
    with clock.phase("pool"):
        runner = make_runner(capacity.num_pages, max_seq_len)
    if measured is None:
        entries["state_bytes"] = tensor_bytes(runner.rows)
    ledger = Ledger(**entries, kv_bytes=capacity.pool_bytes)
    runner.describe_fault = functools.partial(describe_fault, ledger=ledger)
    return Engine(scheduler, runner, depth=resolved.depth), capacity, limits, ledger


def _measure(
    make_runner: Callable[[], Runner], memory: DeviceMemory, bounds: StepBounds, shapes: StepShapes
) -> Measured | None:
    """Run the worst steps where what they take can be measured."""
    if not memory.can_measure:
        return None
    return measure_worst_case(make_runner, memory, bounds, shapes=shapes)


def _bounds_of(resolved: ResolvedConfig, groups: list[CacheGroup], backend: AttentionBackend) -> StepBounds:
    return StepBounds(
        max_batch_size=resolved.max_batch_size,
        max_num_tokens=resolved.max_num_tokens,
        max_seq_len=resolved.max_seq_len,
        num_groups=len(groups),
        block_tokens=groups[0].block_tokens,
        depth=resolved.depth,
        # Whose steps can be captured reads pages where they lie, whatever their number.
        is_context_free=backend.capability.graph,
    )


def _entries(
    resolved: ResolvedConfig, memory: DeviceMemory, measured: Measured | None, weight_bytes: int
) -> dict[str, Any]:
    """Return what the ledger holds before the pool is there."""
    taken = memory.total - memory.free() - weight_bytes
    return {
        "device": resolved.device,
        "total_bytes": memory.total,
        "other_bytes": max(0, taken),
        "weight_bytes": weight_bytes,
        "state_bytes": measured.state_bytes if measured is not None else 0,
        "workspace_bytes": measured.workspace_bytes if measured is not None else None,
        "graph_bytes": measured.graph_bytes if measured is not None else 0,
    }


# What a stored byte becomes at most: two bits a weight, as float32.
MAX_EXPANSION = 16


def require_room_for_weights(
    build: Callable[..., Any], checkpoint: Checkpoint, memory: DeviceMemory, resolved: ResolvedConfig
) -> None:
    """Raise OutOfMemoryError where the weights alone exceed what is free, before any is allocated.

    They are counted on a model without memory, unless the file is so small that there can be no doubt.
    """
    free = memory.free()
    stored = sum(tensor.num_bytes for tensor in checkpoint.tensors())
    if 0 < stored < free // MAX_EXPANSION:
        return
    needed = sum(parameter.nbytes for parameter in build(device="meta").parameters())
    if needed > free:
        raise OutOfMemoryError(
            f"The weights need {needed:,} bytes in {resolved.dtype}, and {free:,} of {memory.total:,} are "
            f"free on the {resolved.device}; free memory, or choose a smaller model or type (dtype=, "
            "or a quantised file)."
        )


def _pacing(resolved: ResolvedConfig, shapes: StepShapes) -> Pacing | None:
    """Return what keeps prompts from stalling streams, where that is asked for."""
    if resolved.max_decode_stretch is None:
        return None
    # Shorter chunks would cost more in overhead than they take from anybody's wait: launches where nothing is
    # captured, and weights, which are read for a few tokens as for many.
    least = shapes.token_steps[0] if shapes.token_steps else resolved.max_num_tokens // 32
    return Pacing(
        max_decode_stretch=resolved.max_decode_stretch,
        min_chunk=max(resolved.kv_cache.tokens_per_block, least),
        even_chunks=shapes.token_steps,
    )


def _shapes(
    config: EngineConfig, resolved: ResolvedConfig, backend: AttentionBackend, *, shares: bool
) -> StepShapes:
    """Return the steps to capture. Raises ConfigError where they were asked for and cannot be."""
    if backend.capability.graph:
        return StepShapes.create(
            resolved.graph_sizes,
            has_padding=resolved.has_graph_padding,
            max_num_tokens=resolved.max_num_tokens,
            max_seq_len=resolved.max_seq_len,
            shares=shares,
            draws=True,
        )
    if config.cuda_graph_config is not None:
        raise ConfigError(
            f"cuda_graph_config is set, and the steps of {type(backend).__name__} cannot be captured; leave "
            "it unset, or attn_backend='auto'."
        )
    return StepShapes()


def _capture(engine: Engine, shapes: StepShapes, resolved: ResolvedConfig, clock: PhaseClock) -> str:
    """Capture what the budget allows, before there are requests; returns the report's line."""
    if shapes.has_padding and len(shapes):
        with clock.phase("capture"):
            engine.runner.capture_within(resolved.capture_budget_s)
    return _graph_line(resolved, shapes, engine.runner.counters["num_graphs"])


def _graph_line(resolved: ResolvedConfig, shapes: StepShapes, num_captured: int) -> str:
    """Say which steps are replayed, "" where nobody would expect any to be."""
    sizes = shapes.sizes
    if resolved.device == "cpu":
        return ""
    if not sizes:
        why = "this attention backend" if resolved.graph_sizes else "enforce_eager"
        return f"captured steps: none ({why})"
    padded = ", smaller ones padded" if shapes.has_padding else ""
    decoding = f"decoding {sizes[0]} to {sizes[-1]} requests ({len(sizes)} sizes{padded})"
    if not shapes.has_padding:
        return f"captured steps: {decoding} and prompts alone, each when it is first met"
    return (
        f"captured steps: {num_captured} of {len(shapes)}, {decoding}, with pieces of prompts beside them "
        f"({len(shapes.mixed)}) and prompts alone ({len(shapes.lone)}); the others while nothing runs "
        "or once they are missed often"
    )


def _weights_progress(progress: Progress | None) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress("loading weights", done / total)


def fit_seq_len(cache: KvCache, resolved: ResolvedConfig, *, asked: int | None) -> int:
    """Return the longest sequence that the model and the whole pool can hold.

    Raises OutOfMemoryError where the user asked for more than the pool holds.
    """
    low, high = 0, resolved.max_seq_len
    while low < high:
        middle = (low + high + 1) // 2
        if cache.pages_for(middle, max_span=resolved.max_num_tokens) <= cache.pool.num_usable:
            low = middle
        else:
            high = middle - 1
    if asked is not None and low < asked:
        raise OutOfMemoryError(
            f"max_seq_len={asked} was asked for and the KV cache holds {low} tokens of one request; lower "
            "max_seq_len or raise KvCacheConfig(max_tokens=...)."
        )
    return low


def find_native_obstacle(config: EngineConfig, has_cuda: bool) -> str:
    """Return why the CPU kernels cannot be had, "" where they can or a GPU runs; builds them on first use."""
    if config.device == "cuda" or (config.device == "auto" and has_cuda):
        return ""
    try:
        library()
    except LibraryUnavailable as error:
        return f"{error.reason} {error.fix}".replace("\n", " ")
    return ""


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the type that a checkpoint's activations are meant for; GGUF files leave it open: bfloat16."""
    if checkpoint.format == "gguf":
        return "bfloat16"
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    return str(name).removeprefix("torch.")


def recommended_sampling(checkpoint: Checkpoint) -> dict[str, float]:
    """Return what `generation_config.json` says of sampling, where it is a number."""
    found: dict[str, float] = {}
    for name in RECOMMENDED:
        value = checkpoint.generation_config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
        elif value is not None:
            logger.warning("generation_config.json: %s is no number and counts as unset", name)
    return found


def in_background(work: Callable[[], T]) -> Future[T]:
    """Run `work` on a thread of its own: a large vocabulary takes as long to read as the weights do."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="slipstream-tokenizer", daemon=True).start()
    return future


def _checked_tokenizer(config: EngineConfig, checkpoint: Checkpoint, vocab_size: int) -> Tokenizer | None:
    tokenizer = _load_tokenizer(config, checkpoint)
    if tokenizer is not None:
        check_vocab(tokenizer, vocab_size)
    return tokenizer


def read_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """Read the tokenizer alone, as `assemble` would, for a process without the engine."""
    checkpoint = open_checkpoint(config.model, load_format=config.load_format, revision=config.revision)
    try:
        return _load_tokenizer(config, checkpoint)
    finally:
        checkpoint.close()


def _load_tokenizer(config: EngineConfig, checkpoint: Checkpoint) -> Tokenizer | None:
    if config.skip_tokenizer_init:
        return None
    if config.tokenizer is not None and not isinstance(config.tokenizer, (str, Path)):
        return config.tokenizer
    if config.tokenizer is not None:
        return load_tokenizer_folder(Path(config.tokenizer))
    if checkpoint.format == "gguf":
        return load_tokenizer_gguf(checkpoint.config)
    if isinstance(checkpoint, DummyCheckpoint) and not checkpoint.has_tokenizer():
        return None
    return load_tokenizer_folder(checkpoint.path)


def _eos_token_ids(tokenizer: Tokenizer | None, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Collect every id that ends a request: the tokenizer's and the generation configuration's."""
    ids: list[int] = list(tokenizer.eos_token_ids) if tokenizer is not None else []
    sources = [checkpoint.generation_config]
    if tokenizer is None and checkpoint.format == "hf":
        sources.append(checkpoint.config)
    for source in sources:
        given = source.get("eos_token_id")
        ids += given if isinstance(given, list) else [given] if isinstance(given, int) else []
    return tuple(dict.fromkeys(ids))


def _report(
    resolved: ResolvedConfig,
    capacity: Capacity,
    limits: Limits,
    ledger: Ledger,
    reasons_of_kernels: list[str],
    graphs: str,
    budget: str,
) -> list[str]:
    reasons = resolved.reasons

    def choice(name: str, value: object) -> str:
        return f"{name} {value} ({reasons[name]})" if name in reasons else f"{name} {value} (asked for)"

    return [
        f"{choice('device', resolved.device)}, {choice('dtype', resolved.dtype)}, "
        f"{choice('quantization', resolved.quantization)}, keys and values in {resolved.kv_dtype}",
        *reasons_of_kernels,
        ledger.line(f"{capacity.num_tokens:,} tokens: {capacity.reason}"),
        f"limits: {limits.max_seq_len:,} tokens a request, {resolved.max_batch_size} requests and "
        f"{resolved.max_num_tokens:,} tokens a step, up to {resolved.depth} steps outstanding",
        *([graphs] if graphs else []),
        budget,
    ]
