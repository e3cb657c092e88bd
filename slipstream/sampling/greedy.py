# pyright: reportUnknownMemberType=false
"""What does a batch draw of which every row takes its greatest logit, and nothing else?

On a CPU a native kernel finds it and numpy judges it: a dozen small tensor operations would cost as much as a
layer of a small model.
Invariant: both ways say the same. A maximum of NaN or infinity is the model's failure, one of minus infinity
means that nothing is allowed; the token of such a row is 0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from slipstream.kernels.cpu.argmax import find_argmax
from slipstream.sampling.base import ALL_MASKED, BAD_LOGITS, OK, SampleOutput
from slipstream.sampling.candidates import greatest


def draw_greatest(logits_RV: Tensor) -> SampleOutput:
    """Return each row's greatest logit as its token; waits for nothing on an accelerator."""
    argmax = find_argmax() if logits_RV.device.type == "cpu" else None
    if argmax is not None:
        return _judge_on_host(logits_RV, argmax(logits_RV))
    values, token_ids = greatest(logits_RV)
    status = status_of(values)
    return SampleOutput(token_ids.masked_fill(status != OK, 0), status)


def status_of(max_R: Tensor) -> Tensor:
    """Return the status, int8 [R], of rows whose greatest logit is `max_R`."""
    nothing = (max_R == -torch.inf).to(torch.int8).mul_(ALL_MASKED)
    return nothing.add_(~(max_R < torch.inf), alpha=BAD_LOGITS)


def _judge_on_host(logits_RV: Tensor, ids_R: Tensor) -> SampleOutput:
    """Return the output for the argmax `ids_R`, which is -1 for a row that holds NaN."""
    ids = ids_R.numpy()
    values = logits_RV.numpy()[np.arange(len(ids)), ids]
    is_good = (ids >= 0) & np.isfinite(values)
    if is_good.all():
        return SampleOutput(ids_R, torch.zeros(len(ids), dtype=torch.int8))
    status = np.where(is_good, OK, np.where((ids >= 0) & (values < 0), ALL_MASKED, BAD_LOGITS))
    ids[~is_good] = 0
    return SampleOutput(ids_R, torch.from_numpy(status.astype(np.int8)))
