"""Does the grid of an op approve what computes it, and see each way of computing something else?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from slipstream.kernels.conformance import GRIDS, check_kernel
from slipstream.kernels.open_ops import definition_of, our_kernel
from slipstream.kernels.plugins import OPEN_OPS, KernelCapability, KernelPlugin


def plugin(function: Callable[..., Any], op: str, **capability: Any) -> KernelPlugin:
    return KernelPlugin(
        op=op, name="mine", function=function, capability=KernelCapability(**capability), priority=1
    )


def test_every_open_op_has_a_grid() -> None:
    assert set(GRIDS) == set(OPEN_OPS)


@pytest.mark.parametrize("op", OPEN_OPS)
def test_a_definition_is_approved_by_its_own_grid(op: str) -> None:
    found = check_kernel(plugin(definition_of(op), op, tree=True), device="cpu")
    assert found.is_good and found.num_passed >= 9 and not found.num_not_covered, list(found.describe())


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPEN_OPS)
def test_our_kernels_are_approved_on_a_gpu(op: str) -> None:
    found = check_kernel(plugin(our_kernel(op, "cuda"), op, tree=True), device="cuda")
    assert found.is_good, list(found.describe())


def forgets_epsilon(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * wide.square().mean(-1, keepdim=True).rsqrt() * weight * 1.0001).to(x.dtype)


def returns_float32(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rms_norm(x.float(), weight.shape, weight, eps)


def scales_in_place(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    result = definition_of("rms_norm")(x, weight, eps)
    x.mul_(2)
    return result


def loses_columns(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return definition_of("rms_norm")(x, weight, eps)[..., :-1]


def raises(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    raise ValueError("not today")


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (forgets_epsilon, "is off by"),
        (returns_float32, "is torch.float32, not torch.float16"),
        (scales_in_place, "argument 'x' was changed"),
        (loses_columns, "has the shape"),
        (raises, "it raised ValueError: not today"),
    ],
)
def test_a_wrong_kernel_is_told_what_is_wrong(function: Callable[..., Any], complaint: str) -> None:
    found = check_kernel(plugin(function, "rms_norm", devices=frozenset({"cpu"})), device="cpu")
    assert not found.is_good and any(complaint in failure for failure in found.failures)


def test_reading_behind_a_sequence_is_seen() -> None:
    """The pages hold NaN where no row has a token."""

    def reads_everything(q, pages, table, lens, out, *rest: Any) -> None:
        definition_of("paged_decode")(q, pages, table, (lens + 1).clamp(max=129), out, *rest)

    found = check_kernel(plugin(reads_everything, "paged_decode"), device="cpu")
    assert not found.is_good and "not finite" in found.failures[0]


def test_a_kernel_takes_trees_or_is_not_asked_to() -> None:
    """One that knows of none serves the rest; one that says it takes them and does not is seen."""

    def in_order(*arguments: Any) -> None:
        definition_of("paged_prefill")(*arguments[:11])

    wide = frozenset({"float32"})
    found = check_kernel(plugin(in_order, "paged_prefill", dtypes=wide), device="cpu")
    assert found.is_good and found.num_passed == 12 and found.num_not_covered == 60
    found = check_kernel(plugin(in_order, "paged_prefill", dtypes=wide, tree=True), device="cpu")
    assert len(found.failures) == 12 and all(one.startswith("trees") for one in found.failures)


def test_only_covered_cases_run_and_none_is_no_approval() -> None:
    limits = {"dtypes": frozenset({"float32"}), "max_tokens": 2, "column_multiple": 8}
    found = check_kernel(plugin(definition_of("rms_norm"), "rms_norm", **limits), device="cpu")
    assert found.num_passed == 2 and found.num_not_covered == 19 and found.is_good
    none = check_kernel(plugin(definition_of("rms_norm"), "rms_norm", column_multiple=10**6), device="cpu")
    assert not none.is_good and "nothing is known" in list(none.describe())[-1]
