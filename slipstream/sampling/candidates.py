"""Which tokens lead? The k largest logits of each row in a total order, without sorting the vocabulary.

Invariant: the order is (logit descending, token id ascending), so the first k of any longer list are the same
k: what a row sees does not depend on how many candidates its neighbours need, nor on how a library breaks
ties (which bfloat16 logits have plenty of). -0.0 stands behind 0.0.
Shapes: R rows, V vocabulary, K candidates, B blocks of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slipstream.kernels.cpu.argmax import find_argmax
from slipstream.kernels.registration import has_triton

BLOCK = 64


def greatest(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logit [R] and its lowest token id [R]; NaN wins where there is one.

    On a CPU a native kernel does it; without one the maximum over blocks, which vectorises, finds the block
    to search (10x faster than an argmax over the row). An accelerator does it in one kernel.
    """
    if x_RV.device.type == "cpu" and (native := find_argmax()) is not None:
        return _chosen(x_RV, native(x_RV))
    if x_RV.device.type != "cpu" or x_RV.shape[1] < BLOCK:
        values, ids = x_RV.max(-1)
        return values, ids
    block = _block_max(x_RV).argmax(-1, keepdim=True)
    values, ids = _expand(x_RV, block)
    place = values.argmax(-1, keepdim=True)
    return values.gather(1, place)[:, 0], ids.gather(1, place)[:, 0]


def _chosen(x_RV: Tensor, ids_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits and ids of an argmax that marks a row with NaN by -1."""
    found = ids_R.clamp(min=0)
    values = x_RV.gather(1, found.unsqueeze(1))[:, 0]
    return values.masked_fill_(ids_R < 0, torch.nan), found


def leading(x_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the logits [R, k] and ids [R, k] of the k leading tokens in order; k is at most V.

    The leaders lie in the k blocks with the largest maxima: any other block's tokens stand behind k maxima.
    """
    if has_kernels(x_RV, k):
        from slipstream.kernels.gpu.leaders import leaders

        return leaders(x_RV, k)
    vocab_size = x_RV.shape[1]
    num_blocks = -(-vocab_size // BLOCK)
    if searched(vocab_size, k) == vocab_size:
        ids = torch.arange(vocab_size, device=x_RV.device).expand(x_RV.shape[0], -1)
        return _first(x_RV, ids, k)
    maxima = _block_max(x_RV)
    numbers = torch.arange(num_blocks, device=x_RV.device).expand_as(maxima)
    _, blocks = _first(maxima, numbers, k)
    values, ids = _first(*_expand(x_RV, blocks), k)
    # Only a row of NaN can bring up a place beyond the vocabulary; its id must still be one to gather with.
    return values, ids.clamp_(max=vocab_size - 1)


def runs_kernels(x_RV: Tensor) -> bool:
    """Say whether these logits are a GPU's, and kernels can be compiled for it."""
    return x_RV.is_cuda and has_triton()


def has_kernels(x_RV: Tensor, k: int) -> bool:
    """Say whether kernels of a GPU find the k leaders; then a row with NaN is led by infinity."""
    if not runs_kernels(x_RV):
        return False
    from slipstream.kernels.gpu.leaders import can_lead

    return can_lead(x_RV, k)


def searched(vocab_size: int, k: int) -> int:
    """Return how many tokens of a row `leading` puts in order: those of k blocks, or all."""
    return k * BLOCK if k * BLOCK * 4 <= vocab_size else vocab_size


def heavy(x_NV: Tensor, is_heavy_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids [N, K] of each row's marked tokens in order, and where a shorter list is padded.

    Waits for the device: its size depends on the data. Each list has at least one entry.
    """
    lists: list[Tensor] = []
    for x, is_heavy in zip(x_NV, is_heavy_NV, strict=True):
        ids = is_heavy.nonzero()[:, 0]
        order = _keys(x.index_select(0, ids), ids).argsort(descending=True)
        lists.append(ids.index_select(0, order) if ids.numel() else ids.new_zeros(1))
    padded = pad_sequence(lists, batch_first=True, padding_value=-1)
    return padded.clamp(min=0), padded < 0


def _block_max(x_RV: Tensor) -> Tensor:
    """Return the maximum of each block [R, B]; the last block may be shorter."""
    num_rows, num_whole = x_RV.shape[0], x_RV.shape[1] // BLOCK
    whole = num_whole * BLOCK
    maxima = x_RV[:, :whole].reshape(num_rows, num_whole, BLOCK).amax(-1)
    if whole == x_RV.shape[1]:
        return maxima
    return torch.cat((maxima, x_RV[:, whole:].amax(-1, keepdim=True)), dim=1)


def _expand(x_RV: Tensor, blocks_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits and ids [R, K * BLOCK] of the given blocks.

    Places beyond the vocabulary hold -inf and ids of V and more: they stand behind every real token.
    """
    offsets = torch.arange(BLOCK, device=x_RV.device)
    ids = (blocks_RK[:, :, None] * BLOCK + offsets).flatten(1)
    last = x_RV.shape[1] - 1
    values = x_RV.gather(1, ids.clamp(max=last))
    if x_RV.shape[1] % BLOCK:
        values = values.masked_fill(ids > last, -torch.inf)
    return values, ids


def _first(values_RN: Tensor, ids_RN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Take the first k of the total order."""
    keys = _keys(values_RN, ids_RN)
    if k * 8 > keys.shape[1]:
        places = keys.sort(-1, descending=True).indices[:, :k]
    else:
        places = keys.topk(k).indices
    return values_RN.gather(1, places), ids_RN.gather(1, places)


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """Return unique int64 keys: the float32's bits in the order of its values, then the id downwards."""
    bits = values.contiguous().view(torch.int32)
    ordered = bits ^ (bits >> 31 & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32).sub_(ids)
