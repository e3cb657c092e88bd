"""Which kernel computes an op, where others than ours are installed?

An outsider states a function, the op it computes and what it can serve; `choose_kernel` decides, a pure
function of (the call's facts, the kernels registered), and says why. Our own kernel has the priority 0.
Invariant: only a call that a kernel's capability covers reaches it, every other one goes where it always
went; without plugins the dispatcher is left as it is. `conformance.py` holds what a kernel is checked with.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from slipstream.core.capability import Capability
from slipstream.core.errors import ConfigError, SlipstreamError, nearest

ENTRY_POINTS = "slipstream.kernels"
DTYPES = ("float32", "float16", "bfloat16")
# Calls whose kernel is remembered; those of an op differ in their tokens alone.
MAX_REMEMBERED = 4096
BOTH = frozenset({"cpu", "cuda"})
GPU_ONLY = frozenset({"cuda"})

# Where `paged_prefill` has the bits of trees of drafts; no other op that is open has as many arguments.
TREE_PLACE = 11

# The ops that a plugin may compute, and on which devices a step calls them as ops.
OPEN_OPS: dict[str, frozenset[str]] = {
    "rms_norm": BOTH,
    "add_rms_norm": BOTH,
    "silu_and_mul": BOTH,
    "gelu_and_mul": BOTH,
    "fused_linear": GPU_ONLY,
    "rotary_store": GPU_ONLY,
    "store_slots": GPU_ONLY,
    "paged_decode": GPU_ONLY,
    "paged_prefill": GPU_ONLY,
    "greedy_append": GPU_ONLY,
}


class KernelError(SlipstreamError, RuntimeError):
    """A kernel from outside raised while it computed an op; `summary` names both and nothing of the cause."""

    def __init__(self, plugin: KernelPlugin, error: Exception) -> None:
        self.summary = f"op {plugin.op!r} in the kernel {plugin.name!r}: {type(error).__name__}"
        advice = "Check it with `slipstream verify --kernel`, or unregister it."
        super().__init__(f"{self.summary}: {error}. {advice}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCapability(Capability):
    """Which calls a kernel serves; 0 means no limit.

    A call's `dtype` is that of its first floating tensor; its tokens and columns are the first and the last
    size of its first tensor. `tree` says that a kernel for `paged_prefill` takes `tree_T`.
    `batch_invariant` promises that a token's bits do not depend on its neighbours.
    """

    dtypes: frozenset[str] = frozenset(DTYPES)
    max_tokens: int = 0
    max_columns: int = 0
    column_multiple: int = 1
    tree: bool = False
    batch_invariant: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KernelFacts:
    """One call, as far as the choice goes; 0 or "" where it is not known yet."""

    device: str
    sm: int = 0
    dtype: str = ""
    tokens: int = 0
    columns: int = 0
    tree: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KernelPlugin:
    """A function that computes an op for the calls its capability covers. Make one with `register_kernel`."""

    op: str
    name: str
    function: Callable[..., Any]
    capability: KernelCapability
    priority: int

    def __call__(self, *arguments: Any) -> Any:
        """Compute the op. Raises KernelError naming kernel and op for whatever the function raises."""
        try:
            return self.function(*arguments)
        except MemoryError:
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            raise KernelError(self, error) from error


def obstacle_to(capability: KernelCapability, facts: KernelFacts) -> str:
    """Return the first demand of a call that a kernel does not meet, "" where it serves the call."""
    if facts.device not in capability.devices:
        return f"it runs on {', '.join(sorted(capability.devices))}, not on {facts.device}"
    if 0 < facts.sm < capability.min_sm:
        return f"it needs compute capability {capability.min_sm / 10}, and this GPU has {facts.sm / 10}"
    if facts.dtype and facts.dtype not in capability.dtypes:
        return f"it serves {', '.join(sorted(capability.dtypes))}, not {facts.dtype}"
    if capability.max_tokens and facts.tokens > capability.max_tokens:
        return f"it serves at most {capability.max_tokens} tokens, not {facts.tokens}"
    if capability.max_columns and facts.columns > capability.max_columns:
        return f"it serves at most {capability.max_columns} columns, not {facts.columns}"
    if facts.columns % capability.column_multiple:
        return f"it serves multiples of {capability.column_multiple} columns, not {facts.columns}"
    if facts.tree and not capability.tree:
        return "it serves no trees of drafts"
    return ""


def choose_kernel(
    op: str, facts: KernelFacts, plugins: Iterable[KernelPlugin]
) -> tuple[KernelPlugin | None, str]:
    """Return the kernel for a call of `op`, None for our own, and one sentence saying why.

    The highest priority that serves the call wins, ours being 0; among equals the first name.
    """
    skipped: list[str] = []
    candidates = [plugin for plugin in plugins if plugin.op == op]
    for plugin in sorted(candidates, key=lambda plugin: (-plugin.priority, plugin.name)):
        obstacle = obstacle_to(plugin.capability, facts)
        if not obstacle and plugin.priority <= 0:
            obstacle = f"its priority {plugin.priority} is not above ours, 0"
        passed_over = f"; passed over: {'; '.join(skipped)}" if skipped else ""
        if not obstacle:
            return plugin, f"kernel {plugin.name!r} for {op}: priority {plugin.priority}{passed_over}"
        skipped.append(f"{plugin.name}: {obstacle}")
    return None, f"our kernel for {op}" + (f"; passed over: {'; '.join(skipped)}" if skipped else "")


class KernelTable:
    """The kernels registered in this process, and their places in torch's dispatcher."""

    def __init__(self) -> None:
        self._plugins: dict[str, KernelPlugin] = {}
        self._places: dict[tuple[str, str], Any] = {}
        self._chosen: dict[tuple[str, KernelFacts], KernelPlugin | None] = {}
        self._loaded: set[tuple[str, str]] = set()
        self._lock = threading.RLock()
        # Ops that layers call as plain functions on a CPU, unless they stand here.
        self.on_cpu: frozenset[str] = frozenset()
        # Ops that a GPU's larger fused ops must leave to themselves.
        self.on_gpu: frozenset[str] = frozenset()

    def plugins(self) -> list[KernelPlugin]:
        return list(self._plugins.values())

    def add(self, plugin: KernelPlugin) -> None:
        with self._lock:
            taken = self._plugins.get(plugin.name)
            if taken is not None:
                raise ConfigError(
                    f"A kernel named {plugin.name!r} is registered already, for {taken.op}; give another "
                    "name, or call unregister_kernel first."
                )
            self._plugins[plugin.name] = plugin
            for device in plugin.capability.devices:
                self._occupy(plugin.op, device)
            self._note_ops()

    def remove(self, name: str) -> None:
        with self._lock:
            if name not in self._plugins:
                valid = ", ".join(sorted(self._plugins)) or "none is registered"
                raise ConfigError(f"No kernel is named {name!r}; valid: {valid}.")
            gone = self._plugins.pop(name)
            for device in gone.capability.devices:
                if not self._among(gone.op, device):
                    self._places.pop((gone.op, device))._destroy()
            self._note_ops()

    def load_entry_points(self) -> None:
        """Let every installed package that has the entry point register its kernels, once."""
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
            key = (point.name, point.value)
            if key in self._loaded:
                continue
            try:
                loaded = point.load()
                if not isinstance(loaded, KernelPlugin):
                    loaded()
            except Exception as error:
                package = point.dist.name if point.dist is not None else "an unknown package"
                raise ConfigError(
                    f"The kernel plugin {point.name!r} ({point.value}) of {package} cannot be loaded: "
                    f"{error}. Update or uninstall that package."
                ) from error
            self._loaded.add(key)

    def _among(self, op: str, device: str) -> list[KernelPlugin]:
        return [p for p in self._plugins.values() if p.op == op and device in p.capability.devices]

    def choose(self, op: str, facts: KernelFacts) -> KernelPlugin | None:
        """Return what `choose_kernel` does, remembered until a kernel comes or goes."""
        key, chosen = (op, facts), self._chosen
        try:
            return chosen[key]
        except KeyError:
            found = choose_kernel(op, facts, self._among(op, facts.device))[0]
        if len(chosen) >= MAX_REMEMBERED:
            chosen.clear()
        chosen[key] = found
        return found

    def _note_ops(self) -> None:
        self._chosen = {}
        self.on_cpu = frozenset(p.op for p in self._plugins.values() if "cpu" in p.capability.devices)
        self.on_gpu = frozenset(p.op for p in self._plugins.values() if "cuda" in p.capability.devices)

    def _occupy(self, op: str, device: str) -> None:
        """Put the choice in front of our kernel for a device; what stood there is called as before."""
        if (op, device) in self._places:
            return
        import torch

        from slipstream.kernels.open_ops import our_kernel

        ours = our_kernel(op, device)

        def dispatch(*arguments: Any) -> Any:
            plugin = self.choose(op, facts_of_call(arguments))
            return ours(*arguments) if plugin is None else plugin(*arguments)

        place = torch.library.Library("slipstream", "IMPL")
        with warnings.catch_warnings():
            # That our kernel is overridden is the purpose.
            warnings.simplefilter("ignore")
            place.impl(op, dispatch, device.upper(), allow_override=True)
        self._places[(op, device)] = place


KERNELS = KernelTable()


def facts_of_call(arguments: Iterable[Any]) -> KernelFacts:
    """Look at the tensors of a call; only sizes and types, never values."""
    arguments = tuple(arguments)
    tensors = [argument for argument in arguments if hasattr(argument, "is_floating_point")]
    first = tensors[0]
    floating = next((tensor for tensor in tensors if tensor.is_floating_point()), first)
    return KernelFacts(
        device=first.device.type,
        sm=sm_of(first.device.index or 0) if first.is_cuda else 0,
        dtype=str(floating.dtype).removeprefix("torch."),
        tokens=first.shape[0] if first.ndim else 1,
        columns=first.shape[-1] if first.ndim else 1,
        tree=len(arguments) > TREE_PLACE and arguments[TREE_PLACE] is not None,
    )


@functools.cache
def sm_of(device_index: int) -> int:
    import torch

    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


def register_kernel(
    function: Callable[..., Any],
    *,
    op: str,
    name: str,
    capability: KernelCapability,
    priority: int = 1,
) -> KernelPlugin:
    """Register an outside kernel for one of our ops, in this process, and return its record.

    `function` takes the op's arguments and returns, or writes, what the op's definition does. With a priority
    above 0 it replaces our kernel for the calls that `capability` covers. Raises ConfigError for an unknown
    op, a name that is taken, and a capability that no call can meet.
    """
    if op not in OPEN_OPS:
        raise ConfigError(
            f"No op {op!r} is open to plugins; valid: {', '.join(OPEN_OPS)}.{nearest(op, OPEN_OPS)}"
        )
    if not callable(function):
        raise ConfigError(f"The kernel {name!r} is {function!r}; give a function that computes {op}.")
    _require_servable(op, name, capability)
    plugin = KernelPlugin(op=op, name=name, function=function, capability=capability, priority=priority)
    KERNELS.add(plugin)
    return plugin


def unregister_kernel(name: str) -> None:
    """Take a kernel away again; captured steps keep it until they are captured anew."""
    KERNELS.remove(name)


def _require_servable(op: str, name: str, capability: KernelCapability) -> None:
    served = OPEN_OPS[op]
    given = f"The kernel {name!r} for {op}"
    if not capability.devices or capability.devices - served:
        raise ConfigError(
            f"{given} names the devices {sorted(capability.devices)}; steps call this op on "
            f"{', '.join(sorted(served))} only."
        )
    unknown = capability.dtypes - set(DTYPES)
    if unknown or not capability.dtypes:
        raise ConfigError(f"{given} names the types {sorted(capability.dtypes)}; valid: {', '.join(DTYPES)}.")
    limits = (capability.max_tokens, capability.max_columns, capability.min_sm)
    if min(limits) < 0 or capability.column_multiple < 1:
        raise ConfigError(
            f"{given} states a negative limit; 0 means none, and column_multiple is at least 1."
        )


def require_batch_invariant(facts: KernelFacts) -> None:
    """Raise ConfigError for a kernel that would be chosen and does not promise batch invariance."""
    plugins = KERNELS.plugins()
    for op in dict.fromkeys(plugin.op for plugin in plugins):
        chosen, _ = choose_kernel(op, facts, plugins)
        if chosen is not None and not chosen.capability.batch_invariant:
            raise ConfigError(
                f"batch_invariant=True is set, and the kernel {chosen.name!r} for {op} does not promise it; "
                f"unregister it, or state batch_invariant=True in its capability if it keeps the promise."
            )


def describe_choices(facts: KernelFacts, *, obstacle: str = "") -> list[str]:
    """Return one line per op that has a plugin: which kernel computes it here, and why.

    `obstacle` says why no op is called at all on this machine for this model, "" where ops are.
    """
    plugins = KERNELS.plugins()
    lines: list[str] = []
    for op in dict.fromkeys(plugin.op for plugin in plugins):
        if obstacle:
            names = ", ".join(plugin.name for plugin in plugins if plugin.op == op)
            lines.append(f"our kernel for {op}; passed over: {names}: {obstacle}")
        else:
            lines.append(choose_kernel(op, facts, plugins)[1] + _limits_of(op, facts, plugins))
    return lines


def _limits_of(op: str, facts: KernelFacts, plugins: Iterable[KernelPlugin]) -> str:
    """Say which calls of the op go elsewhere after all, "" where none do."""
    chosen, _ = choose_kernel(op, facts, plugins)
    if chosen is None:
        return ""
    limits = {
        "at most {} tokens": chosen.capability.max_tokens,
        "at most {} columns": chosen.capability.max_columns,
        "multiples of {} columns": chosen.capability.column_multiple
        if chosen.capability.column_multiple > 1
        else 0,
    }
    stated = [text.format(limit) for text, limit in limits.items() if limit]
    return f" (for calls of {', '.join(stated)})" if stated else ""
