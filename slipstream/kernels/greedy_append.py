"""Which token leads each line of logits, and how does it get into its row? The definition.

Invariant: among equal logits the lowest id wins; a line whose maximum is NaN or +Inf has status 1, one of
-Inf has status 2, and either gets token 0. A line whose row number is below 0 is not read: it gets token and
status 0, and nothing is appended.
R lines, V vocabulary, L tokens a row can hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels.registration import register_op


def greedy_append(
    logits_RV: Tensor, rows_R: Tensor, tokens_RL: Tensor, lengths_R: Tensor, out_2R: Tensor
) -> None:
    """Write token ids, then statuses, to `out_2R` int64, and append each token to its (distinct) row.

    `tokens_RL` int32 and `lengths_R` int64 have one line per row of the engine.
    """
    is_real = rows_R >= 0
    values, ids = logits_RV.float().max(-1)
    # Not `max`'s own choice among equal ones, which differs by device.
    ids = (logits_RV == values[:, None]).int().argmax(-1).where(~values.isnan(), ids)
    status = torch.where(values < torch.inf, 0, 1).where(values != -torch.inf, 2)
    status = status.where(is_real, 0)
    out_2R[0], out_2R[1] = ids.where(is_real & (status == 0), 0), status
    rows = rows_R[is_real]
    tokens_RL[rows, lengths_R[rows]] = out_2R[0][is_real].to(torch.int32)
    lengths_R[rows] += 1


def _cuda(*arguments: Tensor) -> None:
    from slipstream.kernels.gpu.greedy_append import greedy_append as kernel

    kernel(*arguments)


def _fake(*arguments: Tensor) -> None:
    return None


greedy_append_op = register_op(
    "greedy_append(Tensor logits_RV, Tensor rows_R, Tensor(a!) tokens_RL, Tensor(b!) lengths_R, "
    "Tensor(c!) out_2R) -> ()",
    greedy_append,
    _fake,
    cuda=_cuda,
)
