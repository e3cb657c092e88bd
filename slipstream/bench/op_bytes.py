"""How many bytes must an op move? From its shapes alone, each input read once and each output written once.

Shapes are those the profiler records: one list of sizes per argument, empty where it is no tensor. Types are
not recorded, so tensors count in the model's type and what is float32 by definition (weights of norms) in
float32. Attention and native calls read what the step says, not what their arguments do: `StepBytes`.
Invariant: an op without a row has no figure; nothing is estimated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

Shapes = Sequence[Sequence[int]]
# (shapes, bytes of an element of the model's type) -> bytes of one call.
Formula = Callable[[Shapes, int], int]

FLOAT32 = 4


def _product(shapes: Shapes, size: int, x: int, weight: int, *, is_transposed: bool) -> int:
    """x [..., I] times a matrix, which a linear layer keeps as [O, I] and a product gets as [I, O]."""
    outputs = shapes[weight][0] if is_transposed else shapes[weight][1]
    rows = math.prod(shapes[x][:-1])
    return size * (math.prod(shapes[x]) + math.prod(shapes[weight]) + rows * outputs)


def _fused_linear(shapes: Shapes, size: int) -> int:
    x, weight, norm, _, bias, _, residual = (*shapes, *([[]] * 7))[:7]
    moved = size * (math.prod(x) + math.prod(weight) + x[0] * weight[0])
    moved += FLOAT32 * math.prod(norm) if norm else 0
    return moved + size * sum(math.prod(extra) for extra in (bias, residual) if extra)


def _norm(shapes: Shapes, size: int) -> int:
    return 2 * size * math.prod(shapes[0]) + FLOAT32 * shapes[0][-1]


def _gated(shapes: Shapes, size: int) -> int:
    return size * math.prod(shapes[0]) * 3 // 2


FORMULAS: dict[str, Formula] = {
    "aten::mm": lambda shapes, size: _product(shapes, size, 0, 1, is_transposed=False),
    "aten::addmm": lambda shapes, size: _product(shapes, size, 1, 2, is_transposed=False),
    "slipstream::fused_linear": _fused_linear,
    "slipstream::rms_norm": _norm,
    "aten::rms_norm": _norm,
    "aten::_fused_rms_norm": _norm,
    "slipstream::add_rms_norm": lambda shapes, size: 2 * _norm(shapes, size) - FLOAT32 * shapes[0][-1],
    "slipstream::silu_and_mul": _gated,
    "slipstream::gelu_and_mul": _gated,
    # q is read and written, k and v are read and stored.
    "slipstream::rotary_store": lambda shapes, size: 2 * size * math.prod(shapes[0]),
    "slipstream::store_slots": lambda shapes, size: 4 * size * math.prod(shapes[0]),
    "slipstream::store_kv": lambda shapes, size: 4 * size * math.prod(shapes[0]),
    "aten::embedding": lambda shapes, size: 2 * size * math.prod(shapes[1]) * shapes[0][1],
}

# Run all layers of a step, or the whole of it.
NATIVE_LAYERS, NATIVE_STEP = "native::decoder_blocks", "native::decode"


def bytes_of(op: str, shapes: Shapes, element_bytes: int) -> int | None:
    """Return the bytes of one call, None where they are not known from its shapes."""
    formula = FORMULAS.get(op)
    if formula is None:
        return None
    try:
        return formula(shapes, element_bytes)
    except IndexError:
        # Recorded without shapes, as what runs inside a captured step is.
        return None


@dataclasses.dataclass(slots=True)
class StepBytes:
    """What the profiled steps read beside activations, in bytes; `num_*` count steps of a kind.

    A decode step is one in which every row runs one token. Keys and values are counted apart for the rows of
    decode steps, one-token rows of other steps, and longer spans.
    """

    layer_weights: int
    head_weights: int
    num_steps: int = 0
    num_decode_steps: int = 0
    decode_kv: int = 0
    one_token_kv: int = 0
    span_kv: int = 0

    @property
    def total(self) -> int:
        weights = self.num_steps * (self.layer_weights + self.head_weights)
        return weights + self.decode_kv + self.one_token_kv + self.span_kv

    def add(self, lengths: Sequence[int], contexts: Sequence[int], *, token_bytes: int) -> None:
        """Count a step whose rows run so many tokens each, and are so long after it."""
        is_decode = all(length == 1 for length in lengths)
        ones = sum(context for length, context in zip(lengths, contexts, strict=True) if length == 1)
        spans = sum(contexts) - ones
        self.num_steps += 1
        self.num_decode_steps += is_decode
        self.decode_kv += ones * token_bytes if is_decode else 0
        self.one_token_kv += 0 if is_decode else ones * token_bytes
        self.span_kv += spans * token_bytes

    def bytes_of(self, op: str) -> int | None:
        """Return what all calls of an attention op or a native call read together, None for any other op."""
        num_others = self.num_steps - self.num_decode_steps
        all_kv = self.decode_kv + self.one_token_kv + self.span_kv
        weights = self.layer_weights + self.head_weights
        return {
            NATIVE_STEP: self.num_decode_steps * weights + self.decode_kv,
            NATIVE_LAYERS: num_others * self.layer_weights + self.one_token_kv + self.span_kv,
            "native::attention": all_kv,
            "slipstream::paged_attention": all_kv,
            "slipstream::paged_decode": self.decode_kv + self.one_token_kv,
            "slipstream::balanced_decode": self.decode_kv + self.one_token_kv,
            "slipstream::paged_prefill": self.span_kv,
        }.get(op)
