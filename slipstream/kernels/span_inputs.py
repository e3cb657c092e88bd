"""What do the longer spans of a step read? Their tokens, positions, lengths, slots and pages: the definition.

`decode_inputs` looks the same up for one-token rows; here the host says which line of the plan each token
belongs to, and where a span begins.
T tokens, B lines of the plan, R one-token rows, which stand in its first lines, P longer spans in the others;
L tokens a row of the engine can hold, G cache groups, C blocks of a row.
Invariant: a token whose line is below 0 is padding: it gets slots of -1, and token and position 0. A line
whose row is below 0 is nobody's: it gets length 0. Entries of a block table behind what a span reaches are
not touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels.registration import register_op


def span_inputs(
    plan_2B: Tensor,
    query_start: Tensor,
    line_T: Tensor,
    tokens_RL: Tensor,
    tables_GRC: Tensor,
    page_tokens: int,
    token_ids_T: Tensor,
    positions_T: Tensor,
    seq_lens_P: Tensor,
    slots_GT: Tensor,
    table_GPC: Tensor,
) -> None:
    """Fill the last five tensors for the spans in the last P lines of the plan.

    Line i holds the row `plan_2B[0, i]`, whose tokens from position `plan_2B[1, i]` on are the step's tokens
    [query_start[i], query_start[i + 1]); `line_T` counts from the step's token R. The definition blocks.
    """
    num_rows = plan_2B.shape[1] - len(seq_lens_P)
    is_real_T = line_T >= 0
    at_T = line_T.clamp(min=0)
    row_T = plan_2B[0, at_T].clamp(min=0)
    place_T = num_rows + torch.arange(len(line_T), device=line_T.device)
    position_T = (plan_2B[1, at_T] + place_T - query_start[at_T]).where(is_real_T, 0)
    positions_T.copy_(position_T)
    token_ids_T.copy_(tokens_RL[row_T, position_T].where(is_real_T, 0))
    pages_GT = tables_GRC[:, row_T, position_T // page_tokens].long()
    slots_GT.copy_((pages_GT * page_tokens + position_T % page_tokens).where(is_real_T, -1))
    rows_P, start_P = plan_2B[:, num_rows:]
    seq_lens_P.copy_((start_P + query_start.diff()[num_rows:]).where(rows_P >= 0, 0))
    for i, row in enumerate(rows_P.tolist()):
        if row >= 0:
            blocks = -(-int(seq_lens_P[i]) // page_tokens)
            table_GPC[:, i, :blocks] = tables_GRC[:, row, :blocks]


def _cuda(*arguments: object) -> None:
    from slipstream.kernels.gpu.span_inputs import span_inputs as kernel

    kernel(*arguments)  # type: ignore[arg-type]


def _fake(*arguments: object) -> None:
    return None


span_inputs_op = register_op(
    "span_inputs(Tensor plan_2B, Tensor query_start, Tensor line_T, Tensor tokens_RL, Tensor tables_GRC, "
    "int page_tokens, Tensor(a!) token_ids_T, Tensor(b!) positions_T, Tensor(c!) seq_lens_P, "
    "Tensor(d!) slots_GT, Tensor(e!) table_GPC) -> ()",
    span_inputs,
    _fake,
    cuda=_cuda,
)
