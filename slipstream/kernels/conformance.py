"""Does an outside kernel compute what the op's definition does, in every type and at ragged sizes?

Each op open to plugins has a grid of cases, drawn from one seed. A case runs twice: through the kernel, and
through the definition on the same numbers in float32; outputs and whatever the op writes are compared, and
what it must not write has to be untouched.
Invariant: a case that the kernel's capability does not cover is counted, never run, and a kernel of which no
case can run is not approved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from slipstream.kernels.fused_linear import GATED
from slipstream.kernels.open_ops import op_of
from slipstream.kernels.paged_decode import NUM_COUNTERS
from slipstream.kernels.plugins import DTYPES, KernelPlugin, facts_of_call, obstacle_to
from slipstream.kernels.query_tiles import tile_queries
from slipstream.kernels.registration import DEFINITIONS
from slipstream.kernels.rotary import rotary_table
from slipstream.kernels.tree_masks import tree_of

# Of a value's size, and of 1 where it is smaller: the rounding of the result and of sums in the wide type.
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One call of an op. Tensors are on the CPU in float32; `narrow` are the places that take the type."""

    label: str
    arguments: tuple[Any, ...]
    narrow: tuple[int, ...]

    def arguments_as(self, dtype: torch.dtype, device: str, *, is_wide: bool) -> list[Any]:
        """Return fresh arguments: the numbers rounded to `dtype`, kept in it or widened to float32 again."""
        made: list[Any] = []
        for place, argument in enumerate(self.arguments):
            if isinstance(argument, Tensor):
                argument = argument.clone()
                if place in self.narrow:
                    argument = argument.to(dtype)
                    argument = argument.float() if is_wide else argument
                argument = argument.to(device)
            made.append(argument)
        return made


@dataclasses.dataclass(slots=True)
class Conformance:
    """What the grid said of one kernel on one device."""

    kernel: str
    op: str
    device: str
    num_passed: int = 0
    num_not_covered: int = 0
    failures: list[str] = dataclasses.field(default_factory=list[str])

    @property
    def is_good(self) -> bool:
        return self.num_passed > 0 and not self.failures

    def describe(self) -> Iterator[str]:
        yield (
            f"kernel {self.kernel!r} for {self.op} on {self.device}: {self.num_passed} cases agree with the "
            f"definition, {len(self.failures)} do not, {self.num_not_covered} are outside its capability"
        )
        yield from (f"  {failure}" for failure in self.failures)
        if not self.num_passed and not self.failures:
            yield "  nothing of the grid is inside its capability, so nothing is known of it"


def check_kernel(plugin: KernelPlugin, *, device: str) -> Conformance:
    """Run the op's grid on a kernel; blocks. The kernel need not be the one that is chosen."""
    found = Conformance(plugin.name, plugin.op, device)
    op = op_of(plugin.op)
    for dtype_name in DTYPES:
        dtype = getattr(torch, dtype_name)
        for case in GRIDS[plugin.op](dtype):
            arguments = case.arguments_as(dtype, device, is_wide=False)
            if obstacle_to(plugin.capability, facts_of_call(arguments)):
                found.num_not_covered += 1
                continue
            problem = _problem_of(plugin, op, case, dtype, device, arguments)
            if problem:
                found.failures.append(f"{case.label}, {dtype_name}: {problem}")
            else:
                found.num_passed += 1
    return found


def _problem_of(
    plugin: KernelPlugin, op: Any, case: Case, dtype: torch.dtype, device: str, arguments: list[Any]
) -> str:
    """Return what is wrong with the kernel's answer to a case, "" where nothing is."""
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    wide = case.arguments_as(dtype, device, is_wide=True)
    expected = DEFINITIONS[op](*wide)
    try:
        with torch.inference_mode():
            given = plugin.function(*arguments)
    except Exception as error:
        return f"it raised {type(error).__name__}: {error}"
    declared = op._schema.arguments
    for place, argument in enumerate(declared[: len(arguments)]):
        if not isinstance(arguments[place], Tensor):
            continue
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        wanted = wide[place] if is_written else before[place]
        problem = _difference(arguments[place], wanted, TOLERANCE if is_written else None)
        if problem:
            return f"argument {argument.name!r} {'' if is_written else 'was changed: '}{problem}"
    pairs = zip(_outputs(given), _outputs(expected), strict=False)
    if len(_outputs(given)) != len(_outputs(expected)):
        return f"it returns {len(_outputs(given))} tensors, not {len(_outputs(expected))}"
    for number, (one, other) in enumerate(pairs):
        if one.dtype != dtype:
            return f"output {number} is {one.dtype}, not {dtype}"
        problem = _difference(one, other, TOLERANCE)
        if problem:
            return f"output {number} {problem}"
    return ""


def _outputs(value: Any) -> list[Tensor]:
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(value)


def _difference(given: Tensor, expected: Tensor, tolerances: dict[str, float] | None) -> str:
    """Say how two tensors differ, "" where they do not. Without tolerances every bit counts."""
    if given.shape != expected.shape:
        return f"has the shape {tuple(given.shape)}, not {tuple(expected.shape)}"
    if not given.is_floating_point() or tolerances is None:
        same = given.eq(expected) | (given.isnan() & expected.isnan())
        return "" if bool(same.all()) else f"differs in {int((~same).sum())} of {given.numel()} places"
    bound = tolerances[str(given.dtype).removeprefix("torch.")]
    wide, target = given.double(), expected.double()
    is_odd = wide.isfinite() != target.isfinite()
    if bool(is_odd.any()):
        return f"is not finite where it should be, or the reverse, in {int(is_odd.sum())} places"
    error = ((wide - target).abs() / target.abs().clamp_min(1.0)).nan_to_num(0.0)
    worst = float(error.max()) if error.numel() else 0.0
    return "" if worst <= bound else f"is off by {worst:.1e} of its size; at most {bound:.0e} is allowed"


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


NORM_SHAPES = ((1, 8), (7, 576), (3, 4, 64), (2, 1), (2, 4096), (5, 4097), (300, 128))


def _rms_norm(dtype: torch.dtype) -> Iterator[Case]:
    for shape in NORM_SHAPES:
        yield Case(f"x {shape}", (3 * _draw(*shape), _draw(shape[-1], seed=1), 1e-5), (0,))


def _add_rms_norm(dtype: torch.dtype) -> Iterator[Case]:
    for shape in NORM_SHAPES:
        # The sum is rounded before it is normed: multiples of 1/4 add up exactly in every type.
        x, residual = ((4 * _draw(*shape, seed=seed)).round() / 4 for seed in (2, 3))
        yield Case(f"x {shape}", (x, residual, _draw(shape[-1], seed=1), 1e-5), (0, 1))


ACTIVATION_SHAPES = ((1, 2), (5, 192), (2, 3, 2050), (300, 64), (4, 8192))


def _silu_and_mul(dtype: torch.dtype) -> Iterator[Case]:
    for shape in ACTIVATION_SHAPES:
        yield Case(f"x {shape}", (2 * _draw(*shape),), (0,))


def _gelu_and_mul(dtype: torch.dtype) -> Iterator[Case]:
    for shape in ACTIVATION_SHAPES:
        for approximate in ("none", "tanh"):
            yield Case(f"x {shape}, {approximate}", (2 * _draw(*shape), approximate), (0,))


def _fused_linear(dtype: torch.dtype) -> Iterator[Case]:
    for tokens, outputs, inputs in ((1, 8, 64), (1, 96, 1500), (5, 12, 300)):
        x, weight = _draw(tokens, inputs), _draw(outputs, inputs, seed=1) * inputs**-0.5
        norm, bias = _draw(inputs, seed=2), _draw(outputs, seed=3)
        label = f"{tokens} x {inputs} to {outputs}"
        yield Case(label, (x, weight, None, 0.0, None, "", None), (0, 1))
        for activation in ("", *GATED):
            residual = _draw(tokens, outputs // 2 if activation else outputs, seed=4)
            arguments = (x, weight, norm, 1e-5, bias, activation, residual)
            yield Case(f"{label}, norm, bias, {activation or 'no'} activation", arguments, (0, 1, 4, 6))


def _store_slots(dtype: torch.dtype) -> Iterator[Case]:
    for heads, size in ((1, 16), (3, 80), (8, 128)):
        pages, slots = torch.zeros(4, 2, 8, heads, size), torch.tensor([9, -1, 31, 0, 16])
        k, v = _draw(5, heads, size), _draw(5, heads, size, seed=1)
        yield Case(f"{heads} heads of {size}", (k, v, pages, slots), (0, 1, 2))


def _rotary_store(dtype: torch.dtype) -> Iterator[Case]:
    positions, slots = torch.tensor([3, 0, 39, 7, 7]), torch.tensor([9, -1, 31, 0, 16])
    for heads, kv_heads, size in ((4, 2, 64), (9, 3, 80), (1, 1, 16)):
        for interleaved in (False, True):
            for norms in ((None, None), (_draw(size, seed=2), _draw(size, seed=3))):
                qkv = _draw(5, (heads + 2 * kv_heads) * size)
                table = rotary_table(_draw(40, size // 2, seed=1), interleaved)
                pages = torch.zeros(4, 2, 8, kv_heads, size)
                label = f"{heads} and {kv_heads} heads of {size}, interleaved {interleaved}"
                yield Case(
                    f"{label}, norms {norms[0] is not None}",
                    (qkv, table, positions, *norms, 1e-6, interleaved, heads, pages, slots),
                    (0, 8),
                )


HEADS = ((4, 1, 64), (2, 2, 80), (6, 2, 128), (2, 1, 256))
SCORING = ((0, 0.0), (7, 0.0), (0, 30.0))


def _pages(lengths: list[int], kv_heads: int, size: int, page_tokens: int) -> tuple[Tensor, Tensor]:
    """Return pages and a table in which every position behind a row's length holds NaN."""
    blocks = [-(-length // page_tokens) for length in lengths]
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    pages = torch.full((1 + sum(blocks), 2, page_tokens, kv_heads, size), math.nan)
    order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(4)) + 1
    numbers = iter(order.tolist())
    for row, length in enumerate(lengths):
        for block in range(blocks[row]):
            page = next(numbers)
            table[row, block] = page
            live = min(page_tokens, length - block * page_tokens)
            pages[page, :, :live] = _draw(2, live, kv_heads, size, seed=page)
    return pages, table


def _paged_decode(dtype: torch.dtype) -> Iterator[Case]:
    lengths = [1, 2, 17, 64, 129, 33]
    for heads, kv_heads, size in HEADS:
        for window, softcap in SCORING:
            pages, table = _pages(lengths, kv_heads, size, 16)
            q, out = _draw(len(lengths), heads, size), torch.full((len(lengths), heads, size), math.nan)
            counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32)
            label = f"{heads} and {kv_heads} heads of {size}, window {window}, soft cap {softcap}"
            tail = (torch.tensor(lengths), out, counters, max(lengths), size**-0.5, window, softcap)
            yield Case(label, (q, pages, table, *tail), (0, 1, 4))


def _paged_prefill(dtype: torch.dtype) -> Iterator[Case]:
    queries, lengths = [2, 7, 40, 70], [2, 40, 40, 111]
    step = tile_queries(dtype)
    tiles = [(row, at) for row, count in enumerate(queries) for at in range(0, count, step)]
    start = torch.tensor([0, *queries]).cumsum(0)
    for heads, kv_heads, size in HEADS:
        for window, softcap in SCORING:
            pages, table = _pages(lengths, kv_heads, size, 16)
            q, out = _draw(sum(queries), heads, size), torch.full((sum(queries), heads, size), math.nan)
            label = f"{heads} and {kv_heads} heads of {size}, window {window}, soft cap {softcap}"
            rows = (torch.tensor(lengths), start, torch.tensor(tiles, dtype=torch.int32), out)
            tail = (*rows, size**-0.5, window, softcap, torch.zeros(NUM_COUNTERS, dtype=torch.int32))
            yield Case(label, (q, pages, table, *tail), (0, 1, 6))
    yield from _paged_trees(dtype)


def _paged_trees(dtype: torch.dtype) -> Iterator[Case]:
    """Trees of drafts beside an ordinary span, some behind a context; one token of each holds NaN."""
    trees = (None, (-1, 0, 0, 1, 2), (-1, -1, *range(38)), tuple((i - 1) // 2 for i in range(64)))
    queries, lengths = [6, 5, 40, 64], [20, 40, 40, 140]
    step = tile_queries(dtype)
    tiles = [(row, at) for row, count in enumerate(queries) for at in range(0, count, step)]
    start = torch.tensor([0, *queries]).cumsum(0)
    bits = [bit for parents, n in zip(trees, queries, strict=True) for bit in _bits_of(parents, n)]
    for heads, kv_heads, size in HEADS:
        for window, softcap in SCORING:
            pages, table = _pages(lengths, kv_heads, size, 16)
            for row, length in enumerate(lengths[1:], start=1):
                pages[table[row, (length - 1) // 16], :, (length - 1) % 16] = math.nan
            q, out = _draw(sum(queries), heads, size), torch.full((sum(queries), heads, size), math.nan)
            label = f"trees, {heads} and {kv_heads} heads of {size}, window {window}, soft cap {softcap}"
            rows = (torch.tensor(lengths), start, torch.tensor(tiles, dtype=torch.int32), out)
            counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32)
            tail = (*rows, size**-0.5, window, softcap, counters, torch.tensor(bits))
            yield Case(label, (q, pages, table, *tail), (0, 1, 6))


def _bits_of(parents: tuple[int, ...] | None, num_tokens: int) -> tuple[int, ...]:
    return (0,) * num_tokens if parents is None else tree_of(parents).bits


def _greedy_append(dtype: torch.dtype) -> Iterator[Case]:
    for vocab in (5, 4096, 9001):
        logits = _draw(7, vocab, seed=vocab)
        logits[1, 3] = logits[1, vocab - 1] = 9.0
        logits[2, 4], logits[3, 2], logits[4], logits[5, 1:] = math.nan, math.inf, -math.inf, -math.inf
        rows, tokens = torch.tensor([2, 0, 1, 4, 5, -1, 3]), torch.zeros(6, 12, dtype=torch.int32)
        out = torch.full((2, 7), 77)
        yield Case(f"vocabulary of {vocab}", (logits, rows, tokens, torch.arange(3, 9), out), (0,))


GRIDS: dict[str, Callable[[torch.dtype], Iterator[Case]]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "silu_and_mul": _silu_and_mul,
    "gelu_and_mul": _gelu_and_mul,
    "fused_linear": _fused_linear,
    "rotary_store": _rotary_store,
    "store_slots": _store_slots,
    "paged_decode": _paged_decode,
    "paged_prefill": _paged_prefill,
    "greedy_append": _greedy_append,
}
