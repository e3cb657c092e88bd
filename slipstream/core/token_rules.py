"""Which tokens may a request never generate, or only? Checks of lists, texts, n-grams and processors.

Invariant: what comes out is resolved (ids sorted and unique, texts encoded, signatures known), so nothing
below reads the user's own objects again, except the processors, which it calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from slipstream.core.checks import check_text, checked_ids, integer, listed, refused, shown
from slipstream.core.limits import Limits

# Every way in which a text may come out as tokens: at the start of a word, inside one, ...
EncodeBad = Callable[[str], Sequence[Sequence[int]]]
LogitsProcessor = Callable[..., Any]
ProcessorStyle = Literal["generated", "prompt_and_generated", "in_place"]

# Number of positional parameters -> how a processor is called; see `SamplingParams`.
PROCESSOR_STYLES: dict[int, ProcessorStyle] = {2: "generated", 3: "prompt_and_generated", 5: "in_place"}
MAX_PROCESSORS = 64


def allowed_ids(given: Sequence[int] | None, limits: Limits) -> tuple[int, ...]:
    """Return the only ids that may be generated, sorted; empty where all may."""
    if given is None:
        return ()
    ids = listed(given, "allowed_token_ids", limits.vocab_size, "the vocabulary")
    if not ids:
        raise refused("allowed_token_ids", "is empty; name at least one token, or leave it None to allow all")
    return tuple(sorted(set(checked_ids(ids, limits, "allowed_token_ids"))))


def bad_tokens(
    given_ids: Sequence[int] | None,
    texts: str | Sequence[str] | None,
    limits: Limits,
    encode: EncodeBad | None,
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return (ids that may never be generated, sequences of several ids that may not be completed)."""
    ids: set[int] = set()
    if given_ids is not None:
        listed_ids = listed(given_ids, "bad_token_ids", limits.max_token_list, "the cap")
        ids.update(checked_ids(listed_ids, limits, "bad_token_ids"))
    sequences: set[tuple[int, ...]] = set()
    for text in bad_texts(texts, limits):
        if encode is None:
            raise refused("bad", "needs a tokenizer, and there is none; use bad_token_ids")
        for encoded in encode(text):
            if len(encoded) == 1:
                ids.add(encoded[0])
            elif encoded:
                sequences.add(tuple(encoded))
    return tuple(sorted(ids)), tuple(sorted(sequences))


def bad_texts(given: str | Sequence[str] | None, limits: Limits) -> list[str]:
    if given is None:
        return []
    texts = listed([given] if isinstance(given, str) else given, "bad", limits.max_stop_strings, "the cap")
    for i, text in enumerate(texts):
        check_text(text, f"bad[{i}]", limits.max_stop_length)
    return texts


def check_something_left(allowed: Sequence[int], bad: Sequence[int], limits: Limits) -> None:
    """Refuse rules that leave no token at all, before a step finds out."""
    num_left = len(set(allowed).difference(bad)) if allowed else limits.vocab_size - len(bad)
    if not num_left:
        param = "allowed_token_ids" if allowed else "bad_token_ids"
        raise refused(param, "leaves no token to generate once bad tokens are masked; allow at least one")


def ngram_size(given: int | None, limits: Limits) -> int:
    if given is None:
        return 0
    return integer(given, "no_repeat_ngram_size", 0, limits.max_ngram_size, "0 turns it off")


def processors(
    given: LogitsProcessor | Sequence[LogitsProcessor] | None,
) -> tuple[tuple[ProcessorStyle, LogitsProcessor], ...]:
    """Return each callable with how it wants to be called, in the order of their application."""
    if given is None:
        return ()
    found = [given] if callable(given) else listed(given, "logits_processor", MAX_PROCESSORS, "the cap")
    return tuple((_style(one, i), one) for i, one in enumerate(found))


def _style(processor: object, place: int) -> ProcessorStyle:
    name = f"logits_processor[{place}]"
    if not callable(processor):
        raise refused(name, f"must be callable, not {shown(processor)}")
    try:
        parameters = inspect.signature(cast(LogitsProcessor, processor)).parameters.values()
    except (TypeError, ValueError):
        raise refused(name, "has no signature to read; wrap it in a function with named parameters") from None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    for count in (len(required), len(positional)):
        if count in PROCESSOR_STYLES:
            return PROCESSOR_STYLES[count]
    raise refused(
        name,
        f"takes {len(required)} arguments; it must take (token_ids, logits), "
        "(prompt_token_ids, token_ids, logits) or (req_id, logits, token_ids, stream_ptr, client_id)",
    )
