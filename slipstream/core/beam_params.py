"""How is a beam search asked for, and what may it be combined with?

Scores and endings are those of transformers' beam search; `early_stopping` also takes TensorRT-LLM's numbers.
Invariant: a search ranks the model's own log-probabilities over the tokens that are allowed, so whatever
would change these numbers, or needs one output to be known as it grows, is refused here by name.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, Literal, cast

from slipstream.core.checks import integer, number, refused, shown
from slipstream.core.limits import Limits
from slipstream.core.sampling_params import RowSampling, SamplingParams

EarlyStopping = bool | Literal["never"]

# Lengths to this power stay far inside a float.
MAX_LENGTH_PENALTY = 10.0
# What a search cannot serve: unset where None, and the neutral value of each penalty.
_UNSERVED = ("best_of", "logit_bias", "logits_processor", "stop")
_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_RANDOM = ("temperature", "top_p", "top_k", "min_p")
_OF_A_SEARCH = ("beam_width", "length_penalty", "early_stopping")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BeamParams:
    """A checked beam search: `width` hypotheses, ranked by sum of logprobs / length ** `length_penalty`.

    It ends once `width` hypotheses have ended (`early_stopping` True), once the best running one would no
    longer beat the worst of them at its present length (False), or at any length ("never").
    """

    width: int
    length_penalty: float
    early_stopping: EarlyStopping


def beam_params(params: SamplingParams, sampling: RowSampling, limits: Limits) -> BeamParams | None:
    """Return the search asked for beside the resolved `sampling`, or None. Raises RequestError."""
    if not isinstance(cast(object, params.use_beam_search), bool):
        raise refused("use_beam_search", f"must be True or False, not {shown(params.use_beam_search)}")
    if not params.use_beam_search:
        for name in _OF_A_SEARCH:
            if getattr(params, name) is not None:
                raise refused(name, f"belongs to a beam search; set use_beam_search=True or leave {name} out")
        return None
    _check_alone(params, sampling)
    width = _width(params, limits)
    if params.n > width:
        raise refused("n", f"may not exceed beam_width ({width}), not {shown(params.n)}")
    penalty = 1.0 if params.length_penalty is None else params.length_penalty
    bound = MAX_LENGTH_PENALTY
    return BeamParams(
        width=width,
        length_penalty=number(penalty, "length_penalty", -bound, bound, "0 ranks by the sum alone"),
        early_stopping=_early_stopping(params.early_stopping),
    )


def _check_alone(params: SamplingParams, sampling: RowSampling) -> None:
    clashing = [name for name in _UNSERVED if getattr(params, name) is not None]
    clashing += [name for name, neutral in _PENALTIES.items() if getattr(sampling, name) != neutral]
    if not sampling.is_greedy:
        clashing += [name for name in _RANDOM if getattr(params, name) is not None]
    if clashing:
        raise refused(
            clashing[0],
            f"does not combine with use_beam_search, which ranks the model's own log-probabilities of whole "
            f"outputs; leave out {' and '.join(clashing)}, or use sampling",
        )


def _width(params: SamplingParams, limits: Limits) -> int:
    """Return `beam_width`; unset it is n, as in TensorRT-LLM."""
    given = params.n if params.beam_width is None else params.beam_width
    if params.beam_width is None and given < 2:
        raise refused("beam_width", "must be set with use_beam_search; 4 is common, n of them are returned")
    bound = min(limits.max_beam_width, limits.vocab_size)
    return integer(given, "beam_width", 1, bound, "LLM(max_beam_width=..., max_batch_size=...) bound it")


def _early_stopping(given: Any) -> EarlyStopping:
    if given is None or isinstance(given, bool):
        return bool(given)
    if isinstance(given, str) and given == "never":
        return "never"
    if isinstance(given, numbers.Integral):
        return {0: False, 1: True}.get(int(given), "never")
    raise refused(
        "early_stopping", f"must be True, False or 'never' (or 1, 0, another integer), not {shown(given)}"
    )
