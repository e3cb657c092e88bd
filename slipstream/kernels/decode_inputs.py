"""What does a step of one-token rows read? Its tokens, positions, lengths, slots and pages: the definition.

Everything but the numbers of the rows is on the device already, so a captured step looks it up there.
R rows of the step, L tokens a row can hold, G cache groups, C blocks of a row.
Invariant: a row number below 0 is padding: it gets length 0, slots of -1, and token and position 0. Entries
of a block table behind what a row has reached are not touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels.registration import register_op


def decode_inputs(
    plan_2R: Tensor,
    tokens_RL: Tensor,
    lengths_R: Tensor,
    tables_GRC: Tensor,
    page_tokens: int,
    token_ids_R: Tensor,
    positions_R: Tensor,
    seq_lens_R: Tensor,
    slots_GR: Tensor,
    table_GRC: Tensor,
) -> None:
    """Fill the last five tensors for the rows `plan_2R[0]`, whose tokens stand at most at `plan_2R[1]`.

    `tokens_RL`, `lengths_R` and `tables_GRC` have a line for every row of the engine. The definition blocks.
    """
    rows_R, start_R = plan_2R
    is_real = rows_R >= 0
    rows = rows_R.clamp(min=0)
    position_R = torch.minimum(start_R, lengths_R[rows] - 1).where(is_real, 0)
    positions_R.copy_(position_R)
    token_ids_R.copy_(tokens_RL[rows, position_R].where(is_real, 0))
    seq_lens_R.copy_((position_R + 1).where(is_real, 0))
    pages_GR = tables_GRC[:, rows, position_R // page_tokens].long()
    slots_GR.copy_((pages_GR * page_tokens + position_R % page_tokens).where(is_real, -1))
    for i, row in enumerate(rows_R.tolist()):
        blocks = int(position_R[i]) // page_tokens + 1
        if row >= 0:
            table_GRC[:, i, :blocks] = tables_GRC[:, row, :blocks]


def _cuda(*arguments: object) -> None:
    from slipstream.kernels.gpu.decode_inputs import decode_inputs as kernel

    kernel(*arguments)  # type: ignore[arg-type]


def _fake(*arguments: object) -> None:
    return None


decode_inputs_op = register_op(
    "decode_inputs(Tensor plan_2R, Tensor tokens_RL, Tensor lengths_R, Tensor tables_GRC, int page_tokens, "
    "Tensor(a!) token_ids_R, Tensor(b!) positions_R, Tensor(c!) seq_lens_R, Tensor(d!) slots_GR, "
    "Tensor(e!) table_GRC) -> ()",
    decode_inputs,
    _fake,
    cuda=_cuda,
)
