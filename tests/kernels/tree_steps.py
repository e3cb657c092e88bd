"""What should attention return for trees of drafts? Walks up the parents, in float64, and steps to ask about.

Invariant: nothing here reads a bit set: a token's path is walked, and only the keys on it enter its sums.
Pages are NaN wherever nobody may look, and where a test says that a draft came out as NaN.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from slipstream.kernels.paged_decode import NUM_COUNTERS
from slipstream.kernels.query_tiles import tile_queries
from slipstream.kernels.tree_masks import tree_of

Parents = tuple[int, ...]


def chain(num_tokens: int) -> Parents:
    return tuple(range(-1, num_tokens - 1))


def star(num_tokens: int) -> Parents:
    """One token, and all others drafted behind it."""
    return (-1, *[0] * (num_tokens - 1))


def random_tree(num_tokens: int, *, seed: int, roots: int = 1) -> Parents:
    """Deep and bushy by turns: half of the tokens follow one of the last three."""
    rng = random.Random(seed)
    parents = [-1] * min(roots, num_tokens)
    while len(parents) < num_tokens:
        n = len(parents)
        parents.append(rng.randrange(n) if rng.random() < 0.5 else rng.randrange(max(0, n - 3), n))
    return tuple(parents)


def path_of(parents: Parents, offset: int) -> list[int]:
    """Return the offsets from the root to a token, itself last."""
    path: list[int] = []
    while offset >= 0:
        path.insert(0, offset)
        offset = parents[offset]
    return path


@dataclasses.dataclass(frozen=True)
class Row:
    """A row that runs `count` tokens, a tree or an ordinary span, and is `length` long behind them."""

    count: int
    length: int
    parents: Parents | None = None
    # Offsets whose values are NaN, and at even ones the keys.
    bad: tuple[int, ...] = ()

    def visible(self, offset: int, window: int) -> list[int]:
        """Return the positions whose keys a token sees."""
        start = self.length - self.count
        on_path = range(offset + 1) if self.parents is None else path_of(self.parents, offset)
        # As if the path were all there is: what counts is how many keys lie between.
        seen = [*range(start), *(start + one for one in on_path)]
        return seen[-window:] if window else seen


@dataclasses.dataclass
class TreeStep:
    """The arguments of `paged_prefill` for some rows; those of one token get no tile."""

    rows: tuple[Row, ...]
    heads: int = 4
    kv_heads: int = 2
    size: int = 32
    page: int = 16
    window: int = 0
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        counts = [row.count for row in self.rows]
        self.q = torch.randn(sum(counts), self.heads, self.size, generator=draw).to(self.dtype)
        widths = [-(-row.length // self.page) for row in self.rows]
        pages = torch.full((sum(widths) + 1, 2, self.page, self.kv_heads, self.size), math.nan)
        self.table = torch.zeros(len(widths), max(widths) + 2, dtype=torch.int32)
        free = iter((torch.randperm(sum(widths), generator=draw) + 1).tolist())
        self.kv: list[Tensor] = []
        for row, width, line in zip(self.rows, widths, self.table, strict=True):
            kv = torch.randn(2, row.length, self.kv_heads, self.size, generator=draw).to(self.dtype).float()
            for one in row.bad:
                kv[one % 2 :, row.length - row.count + one] = math.nan
            start = row.length - row.count
            seen = max(0, start - self.window + 1) if self.window else 0
            for block in range(seen // self.page, width):
                line[block] = number = next(free)
                low, high = max(seen, block * self.page), min(row.length, (block + 1) * self.page)
                pages[number, :, low - block * self.page : high - block * self.page] = kv[:, low:high]
            self.kv.append(kv)
        self.pages = pages.to(self.dtype)
        bits: list[int] = []
        for row in self.rows:
            bits += [0] * row.count if row.parents is None else tree_of(row.parents).bits
        self.tree = torch.tensor(bits)
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=self.device)

    def arguments(self, *, is_cut: bool = True) -> list[object]:
        counts = [row.count for row in self.rows]
        step = tile_queries(self.dtype)
        tiles = [
            (row, at)
            for row, count in enumerate(counts)
            if count > 1
            for at in reversed(range(0, count, step))
        ]
        lengths = [row.length for row in self.rows]
        tensors = [
            *(self.q, self.pages, self.table, torch.tensor(lengths), torch.tensor([0, *counts]).cumsum(0)),
            *(torch.tensor(tiles, dtype=torch.int32), torch.full_like(self.q, math.nan)),
        ]
        given = [tensor.to(self.device) for tensor in tensors]
        settings = (self.size**-0.5, self.window, self.softcap)
        return [*given, *settings, self.counters if is_cut else None, self.tree.to(self.device)]

    def run(self, function: Callable[..., None], *, is_cut: bool = True, **options: object) -> Tensor:
        """Return what a kernel writes; rows that no tile names stay NaN."""
        arguments = self.arguments(is_cut=is_cut)
        function(*arguments, **options)
        out = arguments[6]
        assert isinstance(out, Tensor)
        return out.cpu()

    def expected(self) -> Tensor:
        """Return [T, N, H] in float64, NaN for one-token rows and whoever sees a NaN."""
        out = torch.full(self.q.shape, math.nan, dtype=torch.float64)
        first = 0
        for row, kv in zip(self.rows, self.kv, strict=True):
            k, v = kv.double().repeat_interleave(self.heads // self.kv_heads, dim=2)
            for offset in range(row.count if row.count > 1 else 0):
                seen = row.visible(offset, self.window)
                scores = torch.einsum("nh,lnh->nl", self.q[first + offset].double(), k[seen])
                scores *= self.size**-0.5
                if self.softcap:
                    scores = self.softcap * torch.tanh(scores / self.softcap)
                out[first + offset] = torch.einsum("nl,lnh->nh", scores.softmax(-1), v[seen])
            first += row.count
        return out
