"""Is no kernel compiled anew because a step has one row more? By the keys that Triton's own JIT would make.

A launch's key is the types of its arguments, which integers are 1 or divisible by 16, which pointers are to
whole 16 bytes, and all constants. Launchers run on the CPU for steps of many sizes; nothing is computed.
Views begin at places that move with the step, as those of a step's flat buffers do.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import slipstream.kernels.gpu

pytest.importorskip("triton")
jit = pytest.importorskip("triton.runtime.jit")
interpreter = pytest.importorskip("triton.runtime.interpreter")
compiler = pytest.importorskip("triton.backends.compiler")
if not hasattr(jit, "native_specialize_impl"):
    pytest.skip("this triton makes its keys elsewhere", allow_module_level=True)

LAUNCH = re.compile(r"^ +(_\w+)\[.+\]\(", re.M)
SIZES = [1, 2, 15, 16, 17, 31, 32, 100, 256, 300]
PAGE, BLOCKS, SMS = 32, 8, 132


@dataclasses.dataclass(frozen=True)
class Model:
    heads: int
    kv_heads: int
    hidden: int
    inner: int
    vocab: int


MODELS = [Model(32, 8, 4096, 14336, 128256), Model(16, 8, 1024, 3072, 151936)]
HEAD = 128


def key_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    options = getattr(function, "kwargs", None)
    kernel = function if options is None else jit.JITFunction(function.fn, **options)
    names = [p.name for p in kernel.params]
    bound = inspect.signature(function.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in names})
    key: list[Any] = sorted((k, v) for k, v in kwargs.items() if k not in names)
    for p in kernel.params:
        value = bound.arguments[p.name]
        if p.is_constexpr:
            key.append((p.name, value))
        else:
            flags = (not p.do_not_specialize, not p.do_not_specialize_on_alignment)
            key.append((p.name, jit.native_specialize_impl(compiler.BaseBackend, value, False, *flags)))
    wide = [part for part in key if isinstance(part[1], tuple) and part[1][0] == "i64"]
    assert not wide, wide
    return tuple(key)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = {}

    def launcher(function: Any, grid: Any) -> Callable[..., None]:
        name = f"{function.fn.__module__.rsplit('.', 1)[1]}.{function.fn.__name__}"
        return lambda *args, **kwargs: found.setdefault(name, set()).add(key_of(function, args, kwargs))

    for module in pkgutil.iter_modules(slipstream.kernels.gpu.__path__, "slipstream.kernels.gpu."):
        loaded = importlib.import_module(module.name)
        if hasattr(loaded, "sms_of"):
            monkeypatch.setattr(loaded, "sms_of", lambda x: SMS)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__getitem__", launcher)
    monkeypatch.setattr(jit.JITFunction, "__getitem__", launcher)
    return found


def view(*shape: int, dtype: torch.dtype, at: int) -> torch.Tensor:
    """Return a contiguous view that begins `at` elements into its memory."""
    size = torch.Size(shape).numel()
    return torch.empty(size + at, dtype=dtype)[at:].view(shape)


def kv() -> torch.Tensor:
    return torch.empty(4, 2, PAGE, 8, HEAD, dtype=torch.bfloat16)


def ints(*shape: int, at: int) -> torch.Tensor:
    return view(*shape, dtype=torch.int64, at=at)


def attend(m: Model, n: int) -> None:
    from slipstream.kernels.gpu import (
        balanced_decode,
        decode_borders,
        hopper_prefill,
        paged_prefill,
        rotary_store,
        shared_prefix_decode,
        store_slots,
    )

    q = torch.empty(n, m.heads, HEAD, dtype=torch.bfloat16)
    table = view(n, BLOCKS + n % 2, dtype=torch.int32, at=n)
    lens, starts, tiles = ints(n, at=n), ints(n + 1, at=n), view(n, 2, dtype=torch.int32, at=n)
    borders = decode_borders.decode_borders(lens, None, m.kv_heads, 64, 0, 132)
    decode_borders.decode_borders(lens, view(n, dtype=torch.int32, at=n), m.kv_heads, 64, 0, 132)
    counters = torch.zeros(1 << 16, dtype=torch.int32)
    balanced_decode.balanced_decode(q, kv(), table, lens, borders, q, counters, 0.1, 0, 0.0)
    count, entries = view(1, dtype=torch.int32, at=n), view(n, 5, dtype=torch.int32, at=n)
    members, rows = view(n, dtype=torch.int32, at=n), view(5, n, dtype=torch.int32, at=n)
    places = (count, entries, members, rows)
    shared_prefix_decode.num_programs(q.device)
    shared_prefix_decode.shared_prefix_decode(q, kv(), table, lens, borders, *places, q, counters, 0.1, 0.0)
    hopper_prefill.hopper_prefill(q, kv(), table, lens, starts, tiles, q, 0.1, 0, 0.0)
    paged_prefill.paged_prefill(q, kv(), table, lens, starts, tiles, q, 0.1, 0, 0.0, counters)
    tree = ints(n, at=n)
    paged_prefill.paged_prefill(q, kv(), table, lens, starts, tiles, q, 0.1, 0, 0.0, counters, tree)
    qkv = torch.empty(n, (m.heads + 2 * m.kv_heads) * HEAD, dtype=torch.bfloat16)
    angles, slots = torch.empty(64, 2, HEAD), ints(n, at=n)
    rotary_store.rotary_store(qkv, angles, ints(n, at=n), None, None, 1e-6, False, m.heads, kv(), slots)
    store_slots.store_slots(q[:, :8], q[:, :8], kv(), slots)


def decode_split(m: Model, n: int) -> None:
    from slipstream.kernels.gpu import paged_decode, rotary_decode

    counters = torch.zeros(1 << 16, dtype=torch.int32)
    q, slots, lens = torch.empty(n, m.heads, HEAD, dtype=torch.bfloat16), ints(n, at=n), ints(n, at=n)
    table = view(n, BLOCKS + n % 2, dtype=torch.int32, at=n)
    paged_decode.paged_decode(q, kv(), table, lens, q, counters, 4096, 0.1, 0, 0.0)
    qkv = torch.empty(1, (m.heads + 2 * m.kv_heads) * HEAD, dtype=torch.bfloat16)
    places = (kv(), slots[:1], table[:1], lens[:1])
    rotary_decode.rotary_decode(
        qkv, torch.empty(64, 2, HEAD), ints(1, at=n), None, None, 1e-6, False, m.heads, *places, counters,
        4096, 0.1, 0, 0.0,
    )  # fmt: skip


def compute(m: Model, n: int) -> None:
    from slipstream.kernels.gpu import (
        fixed_matmul,
        gated_activation,
        gemv,
        matmul,
        matmul_tiles,
        queued_matmul,
        rms_norm,
    )

    x, gate = (torch.empty(n, size, dtype=torch.bfloat16) for size in (m.hidden, 2 * m.inner))
    fixed_matmul.fixed_matmul(x, torch.empty(m.inner, m.hidden, dtype=torch.bfloat16))
    queued = queued_matmul.Tile(64, 64, 64, 4, 4, in_turn=True)
    queued_matmul.queued_matmul(x, torch.empty(m.inner, m.hidden, dtype=torch.bfloat16), tile=queued)
    gated_activation.gated_activation(gate, 0)
    weight = torch.empty(m.hidden, m.hidden, dtype=torch.bfloat16)
    gemv.gemv(x[n - 1 :], weight, tile=(4, 512, 4))
    tile = matmul_tiles.Tile(tokens=64, outputs=64, inputs=64, shares=1, warps=4, stages=4)
    matmul.matmul(x, weight, tile=tile, residual_TO=x)
    rms_norm.add_rms_norm(x, x, torch.empty(m.hidden), 1e-6)


def look_up(m: Model, n: int) -> None:
    from slipstream.kernels.gpu import decode_inputs, span_inputs

    tokens, tables = torch.empty(64, 512, dtype=torch.int32), torch.empty(1, 64, 32, dtype=torch.int32)
    table = view(1, n, 32, dtype=torch.int32, at=n)
    filled = (ints(n, at=n), ints(n, at=n), ints(n, at=n), ints(1, n, at=n), table)
    decode_inputs.decode_inputs(ints(2, n, at=n), tokens, ints(64, at=0), tables, PAGE, *filled)
    for spans in (n, max(1, n // 2)):
        filled = (ints(n, at=n), ints(n, at=n), ints(spans, at=n), ints(1, n, at=n), table)
        span_inputs.span_inputs(
            ints(2, n + spans, at=n), ints(n + 1, at=n), ints(n, at=n), tokens, tables, PAGE, *filled
        )


def sample(m: Model, n: int) -> None:
    from slipstream.kernels.gpu import (
        draw_append,
        full_draw,
        greedy_append,
        leaders,
        noise,
        nucleus,
        penalties,
        row_logprobs,
        step_extras,
    )

    x, rows, wide = torch.empty(n, m.vocab), ints(n, at=n), view(n, 3, dtype=torch.float64, at=n)
    temperature, mass = view(n, dtype=torch.float32, at=n), ints(n, at=n)
    for least in (None, mass):
        nucleus.draw_nucleus(x, temperature, wide[:, 1], least, wide[:, 2], bits=30)
        full_draw.draw_full(x, temperature, least, wide[:, 2], bits=30)
    leading = leaders.leaders(x, 5)
    status = view(n, dtype=torch.int8, at=n)
    row_logprobs.row_logprobs(x, rows, status, leading[0][:, 0], leading, bits=30)
    tokens = torch.empty(64, 512, dtype=torch.int32)
    greedy_append.greedy_append(x, rows, tokens, ints(64, at=0), ints(2, n, at=n))
    floats, table = torch.empty(64, 6, dtype=torch.float64), ints(64, 6, at=0)
    draw_append.draw_append(
        x, rows, (floats, table, ints(64, at=0)), tokens, ints(64, at=0), ints(2, n, at=n),
        columns=(0, 1, 2, 0, 2), bits=30,
    )  # fmt: skip
    columns = step_extras.ExtraColumns(repetition=3, presence=4, frequency=5, slot=5, num_top=6)
    asked = (floats, ints(64, 7, at=0), ints(5, at=0))
    extras = step_extras.StepExtras.prepare_rows(x, ints(2, n, at=n), asked, columns=columns, max_top=20)
    extras.finish_rows(ints(2, n, at=n), torch.empty(n, 44, dtype=torch.float64), bits=30)
    noise.uniform(rows, ints(64, 8, at=0), ints(64, at=0), key_column=0, sample_column=2)
    lists = (torch.empty(8, 64, dtype=torch.int32), torch.empty(8, 512, dtype=torch.int64), ints(8, at=0))
    columns = view(n, 3, dtype=torch.float32, at=n)
    amounts = (columns[:, 0], columns[:, 1], columns[:, 2])
    saved = penalties.penalise(x, rows, rows, lists, amounts, longest=n)
    penalties.restore(x, rows, rows, lists[1], lists[2], saved)
    penalties.count(rows, rows, rows, lists)


LAUNCHES = [attend, decode_split, compute, look_up, sample]

# How many keys each kernel may have for one model over all sizes, and why where it is more than one.
BOUNDS = {
    "balanced_decode._balanced": 2,  # with and without shared beginnings
    "decode_borders._cut": 8,  # a power of two of rows; with and without shared beginnings
    "shared_prefix_decode._attend_entries": 1,
    "hopper_prefill._hopper_prefill": 2,  # with and without shares
    "hopper_prefill._join_shares": 1,
    "paged_prefill._prefill": 4,  # how tiles are cut and shared, for trees and for others
    "rotary_store._turn_and_store": 1,
    "store_slots._store": 1,
    "paged_decode._decode": 5,  # into how many shares a context is cut
    "rotary_decode._rotary_decode": 1,
    "gemv._gemv": 1,
    "matmul._matmul": 4,  # how many tiles of 64 tokens, up to 300
    "fixed_matmul._fixed_matmul": 2,  # parts apart or together
    "fixed_matmul._join_parts": 1,
    "queued_matmul._queued": 1,
    "gated_activation._gated": 1,
    "rms_norm._norm": 1,
    "decode_inputs._look_up": 1,
    "span_inputs._look_up": 1,
    "nucleus._draw_nucleus": 1,
    "full_draw._draw_full": 1,
    "draw_append._draw_full_rows": 1,
    "draw_append._draw_nucleus_rows": 1,
    "step_extras._note_maxima": 1,
    "step_extras._lead_and_penalise": 1,
    "step_extras._finish": 1,
    "leaders._block_maxima": 1,
    "leaders._lead": 1,
    "row_logprobs._row_logprobs": 1,
    "greedy_append._lead_parts": 1,
    "greedy_append._append": 1,
    "noise._uniform": 1,
    "penalties._penalise": 1,
    "penalties._restore": 1,
    "penalties._count": 1,
}


@pytest.mark.parametrize("model", MODELS, ids=["llama", "qwen"])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_steps_of_other_sizes_need_no_other_kernels(
    launch: Callable[[Model, int], None], model: Model, keys: dict[str, set[Any]]
) -> None:
    for size in SIZES:
        launch(model, size)
    assert keys
    too_many = {name: len(found) for name, found in keys.items() if len(found) > BOUNDS[name]}
    assert not too_many


def test_every_kernel_is_entered_and_launched_here(keys: dict[str, set[Any]]) -> None:
    folder = Path(slipstream.kernels.gpu.__file__).parent
    launched = {
        f"{path.stem}.{name}" for path in folder.glob("*.py") for name in LAUNCH.findall(path.read_text())
    }
    assert launched == set(BOUNDS)
    for launch in LAUNCHES:
        launch(MODELS[0], 16)
    assert set(keys) == set(BOUNDS)
