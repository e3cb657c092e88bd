"""Is attention from the projection on, in one op, what its two ops compute one after the other?"""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels.paged_decode import NUM_COUNTERS, paged_decode_op
from slipstream.kernels.rotary_decode import rotary_decode_op
from slipstream.kernels.rotary_store import rotary_store_op

PAGE = 16
# heads, kv heads, head size, length, window, soft cap, norms, interleaved.
CASES = {
    "first token": (4, 2, 16, 1, 0, 0.0, False, False),
    "one share": (4, 2, 32, 37, 0, 0.0, True, False),
    "page full": (4, 4, 64, 64, 0, 0.0, False, True),
    "shares": (16, 8, 128, 1000, 0, 30.0, True, False),
    "window": (6, 2, 24, 700, 130, 0.0, False, False),
    "long": (32, 8, 128, 5000, 0, 0.0, False, False),
}


def arguments(name: str, dtype: torch.dtype, device: str) -> dict[str, object]:
    heads, kv_heads, size, length, window, softcap, has_norms, interleaved = CASES[name]
    generator = torch.Generator().manual_seed(len(name))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    pages = -(-length // PAGE)
    table = torch.randperm(pages, generator=generator).to(torch.int32)[None] + 1
    slot = table[0, (length - 1) // PAGE].long() * PAGE + (length - 1) % PAGE
    norms = [draw(size).abs() + 0.5 if has_norms else None for _ in range(2)]
    kv = draw(pages + 1, 2, PAGE, kv_heads, size).to(dtype)
    # What stands where the token belongs, and behind it, must not be read.
    kv.view(pages + 1, 2, PAGE, -1)[slot // PAGE, :, slot % PAGE :] = torch.nan
    given = {
        "qkv": draw(1, (heads + 2 * kv_heads) * size).to(dtype),
        "rotary": draw(length + 1, 2, size),
        "position": torch.tensor([length - 1]),
        "norms": norms,
        "kv": kv,
        "slot": slot[None],
        "table": table,
        "lens": torch.tensor([length]),
        "counters": torch.zeros(NUM_COUNTERS, dtype=torch.int32),
    }
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    moved["norms"] = [norm if norm is None else norm.to(device) for norm in norms]
    moved["settings"] = (length + 100, size**-0.5, window, softcap)
    return moved | {"heads": heads, "interleaved": interleaved}


def both(name: str, dtype: torch.dtype, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    a, b = arguments(name, dtype, device), arguments(name, dtype, device)
    front = lambda x: (x["qkv"], x["rotary"], x["position"], *x["norms"], 1e-6, x["interleaved"], x["heads"])  # noqa: E731
    fused = rotary_decode_op(
        *front(a), a["kv"], a["slot"], a["table"], a["lens"], a["counters"], *a["settings"]
    )
    q = rotary_store_op(*front(b), b["kv"], b["slot"])
    out = torch.full_like(q, torch.nan)
    paged_decode_op(q, b["kv"], b["table"], b["lens"], out, b["counters"], *b["settings"])
    assert not bool(a["counters"].any())
    return [fused, a["kv"].nan_to_num(7.0)], [out, b["kv"].nan_to_num(7.0)]


@pytest.mark.parametrize("name", CASES)
def test_the_definition(name: str) -> None:
    fused, parts = both(name, torch.float32, "cpu")
    assert all(torch.equal(x, y) for x, y in zip(fused, parts, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel(name: str, dtype: torch.dtype) -> None:
    fused, parts = both(name, dtype, "cuda")
    assert bool(fused[0].isfinite().all())
    # The same arithmetic, though a compiler may contract a product and a sum in one kernel and not the other.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for x, y in zip(fused, parts, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    reference, _ = both(name, torch.float32, "cpu")
    torch.testing.assert_close(fused[0].float().cpu(), reference[0], rtol=0.05, atol=0.05)
