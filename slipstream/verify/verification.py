"""Which op or layer of a model departs first from what it should compute?

A few requests run through an engine (chunks, prompts of several lengths, decoding side by side) while hooks
judge the output of every module against the reference, on the inputs that the module got. `run_layers` and
the modules' own calls are where the hooks sit, so a fused layer that calls no child is judged as a whole.
Invariant: modules are judged in the order in which they finish, a child before its parent; the first one
beyond its tolerance is the one that is named.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slipstream.attention.base import AttentionBackend
from slipstream.cache.config import KvCacheConfig
from slipstream.core.errors import ConfigError
from slipstream.core.request import Request
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.assembly import Assembly, assemble
from slipstream.engine.config import EngineConfig
from slipstream.verify.comparison import BLOCK_TOLERANCE, OP_TOLERANCE, Check, relative_error
from slipstream.verify.reference import Reference

PROMPT_LENGTHS = (3, 40, 96)
# Fewer than the longest prompt, so that it runs in chunks.
MAX_NUM_TOKENS = 64
NEW_TOKENS = 4
# Methods that compute beside `forward`, and are judged like it.
OTHER_METHODS = ("add",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Every module that ran, in order of its first end, and the first that departed, if one did."""

    checks: list[Check]
    departed: Check | None
    num_forwards: int
    report: list[str]

    def describe(self) -> Iterator[str]:
        """Yield lines for people: the worst of each kind, then the verdict."""
        kinds: dict[str, list[Check]] = {}
        for check in self.checks:
            kinds.setdefault(check.kind, []).append(check)
        yield f"{'kind':<22}{'modules':>8}{'calls':>8}{'worst error':>14}{'tolerance':>12}  where"
        for kind, checks in kinds.items():
            worst = max(checks, key=_severity)
            calls = sum(check.calls for check in checks)
            figures = f"{worst.worst:>14.2e}{worst.tolerance:>12.1e}"
            yield f"{kind:<22}{len(checks):>8}{calls:>8}{figures}  {worst.name}"
        yield self.sentence()

    def to_json(self) -> str:
        checks = [dataclasses.asdict(check) for check in self.checks]
        departed = None if self.departed is None else self.departed.name
        return json.dumps({"departed": departed, "steps": self.num_forwards, "modules": checks}, indent=1)

    def sentence(self) -> str:
        if self.departed is None:
            return (
                f"{len(self.checks)} modules agree with the float32 reference in {self.num_forwards} steps."
            )
        check = self.departed
        return (
            f"{check.name} ({check.kind}) departs first: its relative error is {check.worst:.2e} in step "
            f"{check.forward}, at most {check.tolerance:.1e} is allowed. What runs before it agrees, so look "
            "at its weights, its kernel, or its loading."
        )


def _severity(check: Check) -> float:
    share = check.worst / check.tolerance
    return float("inf") if share != share else share


def verify(
    model: Any, *, notify: Callable[[str], None] = lambda line: None, tolerance: float = 1.0, **options: Any
) -> Verdict:
    """Start an engine with the options of `LLM` and judge its modules; blocks until done.

    `tolerance` multiplies every bound. `notify` is told what the engine chose. Raises ConfigError for options
    that the check needs for itself.
    """
    longest = max(PROMPT_LENGTHS) + NEW_TOKENS
    fixed = {
        "max_num_tokens": MAX_NUM_TOKENS,
        "max_batch_size": len(PROMPT_LENGTHS),
        "kv_cache_config": KvCacheConfig(max_tokens=4 * longest, enable_block_reuse=False),
        "disable_overlap_scheduler": True,
        "enforce_eager": True,
    }
    taken = [name for name in fixed if options.get(name) is not None]
    if taken:
        raise ConfigError(f"verify sets {', '.join(fixed)} itself, and {taken[0]} was given; leave it out.")
    config = EngineConfig(model=model, **(options | fixed))
    assembly = assemble(config)
    for line in assembly.report:
        notify(line)
    return verify_assembly(assembly, config, tolerance=tolerance)


def verify_assembly(
    assembly: Assembly,
    config: EngineConfig,
    *,
    tolerance: float = 1.0,
    backend: AttentionBackend | None = None,
) -> Verdict:
    """Judge an engine that is ready and idle; `backend` replaces its attention."""
    runner: Any = assembly.engine.runner
    if backend is not None:
        runner.backend = backend
    device = torch.device(assembly.resolved.device)
    reference = Reference(
        runner.model, config.model, load_format=config.load_format, revision=config.revision, device=device
    )
    judge = _Judge(reference, dtype=assembly.resolved.dtype, factor=tolerance)
    with judge.watching(runner.model):
        _run_requests(assembly)
    return Verdict(
        checks=list(judge.checks.values()),
        departed=judge.departed,
        num_forwards=reference.num_batches,
        report=assembly.report,
    )


def _run_requests(assembly: Assembly) -> None:
    """Run the requests to their end. One that fails (NaN) ends, and its modules have been judged by then."""
    rng, vocab_size = random.Random(0), assembly.limits.vocab_size
    for i, length in enumerate(PROMPT_LENGTHS):
        ids = [rng.randrange(vocab_size) for _ in range(length)]
        params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
        assembly.engine.submit(Request.create(ids, params, assembly.limits, request_id=f"verify-{i}"))
    while assembly.engine.has_work:
        assembly.engine.step()


class _Judge:
    """Hooks on every module of a model, and what they found."""

    def __init__(self, reference: Reference, *, dtype: str, factor: float) -> None:
        self._reference = reference
        self._tolerances = (OP_TOLERANCE[dtype] * factor, BLOCK_TOLERANCE[dtype] * factor)
        self.checks: dict[str, Check] = {}
        self.departed: Check | None = None
        self._undo: list[Callable[[], None]] = []

    def watching(self, model: nn.Module) -> _Judge:
        for name, module in model.named_modules():
            if name and not isinstance(module, nn.ModuleList):
                self._wrap(name, module, "forward")
                for method in OTHER_METHODS:
                    if hasattr(module, method):
                        self._wrap(name, module, method)
        return self

    def __enter__(self) -> _Judge:
        return self

    def __exit__(self, *exception: object) -> None:
        for undo in self._undo:
            undo()

    def _wrap(self, name: str, module: nn.Module, method: str) -> None:
        """Put a watching function in front of the class's method, on this instance alone."""
        original = getattr(module, method)

        @functools.wraps(original)
        def watched(*arguments: Any) -> Any:
            # Copies, since an op may work in place on what it is given or on what it returned.
            given = tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)
            output = original(*arguments)
            copies = [part.clone() for part in _tensors(output)]
            self._judge(name, module, method, given, copies)
            return output

        setattr(module, method, watched)
        self._undo.append(functools.partial(delattr, module, method))

    def _judge(
        self, name: str, module: nn.Module, method: str, arguments: tuple[Any, ...], outputs: list[Tensor]
    ) -> None:
        check = self.checks.get(name)
        if check is None:
            has_parts = next(module.children(), None) is not None
            check = Check(name, type(module).__name__, self._tolerances[has_parts])
            self.checks[name] = check
        expected = _tensors(self._reference.run(name, method, arguments))
        for given, wanted in zip(outputs, expected, strict=True):
            check.add(relative_error(given.float(), wanted), self._reference.num_batches)
        if self.departed is None and not check.is_good:
            self.departed = dataclasses.replace(check)


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)
