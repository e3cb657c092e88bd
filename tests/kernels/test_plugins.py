"""Are kernels from outside chosen by what they state, called for just that, and refused by name otherwise?"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from slipstream.core.errors import ConfigError
from slipstream.kernels import plugins
from slipstream.kernels.open_ops import definition_of, op_of
from slipstream.kernels.plugins import (
    KERNELS,
    KernelCapability,
    KernelError,
    KernelFacts,
    KernelPlugin,
    choose_kernel,
    describe_choices,
    register_kernel,
    require_batch_invariant,
    unregister_kernel,
)

CPU = frozenset({"cpu"})
FACTS = KernelFacts(device="cpu", dtype="float32", tokens=3, columns=64)


@pytest.fixture(autouse=True)
def leave_nothing_behind() -> Iterator[None]:
    yield
    for plugin in KERNELS.plugins():
        unregister_kernel(plugin.name)


def constant(value: float) -> Any:
    return lambda x, *rest: torch.full_like(x, value)


def stated(name: str, *, op: str = "rms_norm", priority: int = 1, **capability: Any) -> KernelPlugin:
    record = KernelCapability(**capability)
    return KernelPlugin(op=op, name=name, function=constant(0), capability=record, priority=priority)


@pytest.mark.parametrize(
    ("capability", "facts", "reason"),
    [
        ({"devices": frozenset({"cuda"})}, FACTS, "it runs on cuda, not on cpu"),
        (
            {"min_sm": 90},
            KernelFacts(device="cuda", sm=80),
            "needs compute capability 9.0, and this GPU has 8.0",
        ),
        ({"dtypes": frozenset({"float16"})}, FACTS, "it serves float16, not float32"),
        ({"max_tokens": 2}, FACTS, "at most 2 tokens, not 3"),
        ({"max_columns": 32}, FACTS, "at most 32 columns, not 64"),
        ({"column_multiple": 48}, FACTS, "multiples of 48 columns, not 64"),
    ],
)
def test_an_incapable_kernel_is_passed_over_with_the_reason(
    capability: dict[str, Any], facts: KernelFacts, reason: str
) -> None:
    chosen, why = choose_kernel("rms_norm", facts, [stated("mine", **capability)])
    assert chosen is None and why.startswith("our kernel for rms_norm; passed over: mine: ") and reason in why


def test_the_highest_priority_that_serves_wins() -> None:
    table = [stated("low"), stated("high", priority=5), stated("narrow", priority=9, max_tokens=1)]
    chosen, why = choose_kernel("rms_norm", FACTS, table)
    assert chosen is not None and chosen.name == "high" and "narrow: it serves at most 1 tokens" in why
    assert choose_kernel("silu_and_mul", FACTS, table) == (None, "our kernel for silu_and_mul")
    equal = [stated("b"), stated("a")]
    assert choose_kernel("rms_norm", FACTS, equal)[0] is equal[1]


def test_ours_stays_before_a_priority_of_zero() -> None:
    assert (
        "its priority 0 is not above ours" in choose_kernel("rms_norm", FACTS, [stated("x", priority=0)])[1]
    )


def test_only_covered_calls_reach_a_kernel_until_it_goes() -> None:
    op, x, weight = op_of("rms_norm"), torch.randn(3, 8), torch.ones(8)
    expected = definition_of("rms_norm")(x, weight, 1e-6)
    capability = KernelCapability(devices=CPU, max_tokens=2)
    register_kernel(constant(7.0), op="rms_norm", name="sevens", capability=capability)
    assert KERNELS.on_cpu == {"rms_norm"}
    assert op(x[:2], weight, 1e-6).eq(7.0).all() and torch.equal(op(x, weight, 1e-6), expected)
    best = KernelCapability(devices=CPU, max_tokens=1)
    register_kernel(constant(8.0), op="rms_norm", name="eights", capability=best, priority=2)
    assert op(x[:1], weight, 1e-6).eq(8.0).all() and op(x[:2], weight, 1e-6).eq(7.0).all()
    unregister_kernel("sevens")
    assert torch.equal(op(x[:2], weight, 1e-6), expected[:2])
    unregister_kernel("eights")
    assert torch.equal(op(x[:1], weight, 1e-6), expected[:1]) and not KERNELS.on_cpu


def test_a_kernel_of_another_owner_underneath_is_still_called() -> None:
    """On a GPU our own kernels stand in the dispatcher; what a plugin does not cover has to reach them."""
    library = torch.library.Library("slipstream", "IMPL")
    try:
        library.impl("silu_and_mul", lambda x: torch.full((2, 2), 5.0), "CPU")
        capability = KernelCapability(devices=CPU, max_tokens=1)
        register_kernel(lambda x: x[..., :2] * 0, op="silu_and_mul", name="zeros", capability=capability)
        op = op_of("silu_and_mul")
        assert op(torch.ones(2, 4)).eq(5.0).all() and op(torch.ones(1, 4)).eq(0.0).all()
    finally:
        unregister_kernel("zeros")
        library._destroy()
    assert op(torch.ones(2, 4)).ne(5.0).all()


def test_arguments_with_defaults_arrive() -> None:
    seen: list[str] = []

    def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
        seen.append(approximate)
        return definition_of("gelu_and_mul")(x, approximate)

    register_kernel(gelu, op="gelu_and_mul", name="gelu", capability=KernelCapability(devices=CPU))
    op = op_of("gelu_and_mul")
    op(torch.ones(1, 4))
    op(torch.ones(1, 4), approximate="tanh")
    assert seen == ["none", "tanh"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"op": "rms_nrom"}, "Did you mean 'rms_norm'?"),
        ({"op": "paged_decode", "capability": KernelCapability(devices=CPU)}, "call this op on cuda only"),
        ({"capability": KernelCapability(devices=frozenset())}, "names the devices []"),
        ({"capability": KernelCapability(dtypes=frozenset({"int8"}))}, "names the types ['int8']"),
        ({"capability": KernelCapability(max_tokens=-1)}, "states a negative limit"),
        ({"capability": KernelCapability(column_multiple=0)}, "states a negative limit"),
        ({"function": 3}, "give a function"),
    ],
)
def test_what_no_step_could_call_is_refused_by_name(arguments: dict[str, Any], complaint: str) -> None:
    given = {"function": constant(0), "op": "rms_norm", "name": "mine", "capability": KernelCapability()}
    given |= arguments
    function = given.pop("function")
    with pytest.raises(ConfigError) as refused:
        register_kernel(function, **given)
    assert complaint in str(refused.value)
    assert not KERNELS.plugins()


def test_a_name_is_taken_once() -> None:
    capability = KernelCapability(devices=CPU)
    register_kernel(constant(0), op="rms_norm", name="mine", capability=capability)
    with pytest.raises(ConfigError, match="registered already, for rms_norm"):
        register_kernel(constant(0), op="silu_and_mul", name="mine", capability=capability)
    with pytest.raises(ConfigError, match="No kernel is named 'yours'; valid: mine"):
        unregister_kernel("yours")


def test_a_raising_kernel_is_named_with_its_op() -> None:
    def broken(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        raise ValueError("no such tile")

    register_kernel(broken, op="rms_norm", name="broken", capability=KernelCapability(devices=CPU))
    with pytest.raises(KernelError, match=r"op 'rms_norm' in the kernel 'broken': ValueError: no such"):
        op_of("rms_norm")(torch.ones(1, 4), torch.ones(4), 1e-6)


def test_choices_are_told_with_their_limits() -> None:
    capability = KernelCapability(devices=CPU, max_tokens=4, column_multiple=8)
    register_kernel(constant(0), op="rms_norm", name="mine", capability=capability, priority=3)
    facts = KernelFacts(device="cpu", dtype="float32")
    assert describe_choices(facts) == [
        "kernel 'mine' for rms_norm: priority 3 (for calls of at most 4 tokens, multiples of 8 columns)"
    ]
    assert describe_choices(facts, obstacle="layers run as one call") == [
        "our kernel for rms_norm; passed over: mine: layers run as one call"
    ]
    with pytest.raises(ConfigError, match="the kernel 'mine' for rms_norm does not promise it"):
        require_batch_invariant(facts)


class Point:
    """What importlib.metadata returns for an entry point, as far as it is used."""

    def __init__(self, value: Any, name: str = "fast") -> None:
        self.name, self.value, self.dist, self.num_loads = name, f"package:{name}", None, 0
        self._loaded = value

    def load(self) -> Any:
        self.num_loads += 1
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


def test_installed_packages_register_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def register() -> None:
        register_kernel(constant(0), op="rms_norm", name="fast", capability=KernelCapability(devices=CPU))

    point = Point(register)
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda *, group: {plugins.ENTRY_POINTS: [point]}[group]
    )
    table = plugins.KernelTable()
    table.load_entry_points()
    table.load_entry_points()
    assert point.num_loads == 1 and [plugin.name for plugin in KERNELS.plugins()] == ["fast"]


def test_a_package_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [Point(ImportError("no module named cutlass"))]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: points)
    with pytest.raises(ConfigError, match=r"'fast' \(package:fast\).*no module named cutlass.*uninstall"):
        plugins.KernelTable().load_entry_points()


def test_a_choice_is_remembered_until_a_kernel_comes_or_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counting(op: str, facts: KernelFacts, among: Any) -> Any:
        asked.append(facts.tokens)
        return choose_kernel(op, facts, among)

    monkeypatch.setattr(plugins, "choose_kernel", counting)
    monkeypatch.setattr(plugins, "MAX_REMEMBERED", 3)
    register_kernel(constant(1.0), op="rms_norm", name="one", capability=KernelCapability(devices=CPU))
    op, weight = op_of("rms_norm"), torch.ones(8)
    for tokens in (1, 2, 1, 2, 3, 4, 1):
        assert op(torch.randn(tokens, 8), weight, 1e-6).eq(1.0).all()
    # The fourth made room for itself.
    assert asked == [1, 2, 3, 4, 1]
    better = KernelCapability(devices=CPU)
    register_kernel(constant(2.0), op="rms_norm", name="two", capability=better, priority=2)
    assert op(torch.randn(1, 8), weight, 1e-6).eq(2.0).all() and asked[-2:] == [1, 1]
