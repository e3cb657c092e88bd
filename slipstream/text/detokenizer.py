"""Which text is final after each token?

Text continues the prompt: a SentencePiece tokenizer drops the space in front of the very first word of a
text, so an output's first space is dropped only where the prompt shows no text (no prompt, or special tokens
alone). Hence prompt text + pieces is the text of prompt + output, and without a prompt the pieces add up to
`tokenizer.decode(output)`. A character that spans tokens is held until it is complete, so no piece ends in
half of one; what never completes comes out as U+FFFD, at the latest from `flush`.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from slipstream.text.base import BytePieces, Tokenizer

# A character has at most 4 bytes, and special tokens aside every token has at least one.
PROMPT_TAIL = 8
# A window of broken text longer than this is released: no character takes so many tokens.
MAX_WINDOW = 32
BROKEN = "\ufffd"


class IncrementalDetokenizer:
    """Text of a growing list of ids, O(1) a token. One per output; not thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        skipped: frozenset[int] = tokenizer.special_ids if skip_special_tokens else frozenset()
        pieces = tokenizer.byte_pieces
        if pieces is not None:
            self._stream = ByteStream(pieces, prompt_ids, skipped)
        else:
            self._stream = WindowStream(tokenizer, prompt_ids, skipped, spaces_between_special_tokens)

    def append(self, ids: Sequence[int]) -> str:
        """Return the text that `ids` make final."""
        return self._stream.append(ids)

    def flush(self) -> str:
        """Return the rest, now that no more ids will come."""
        return self._stream.flush()


class ByteStream:
    """For tokenizers whose tokens are bytes: an incremental UTF-8 decoder does the holding."""

    def __init__(self, pieces: BytePieces, prompt_ids: Sequence[int], skipped: frozenset[int]) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b"".join(pieces[token_id] for token_id in visible_tail(prompt_ids, skipped))
        self._strips = pieces.strips_leading_space and not tail
        # UTF-8 synchronises itself: what stays in the decoder is the character the prompt left unfinished.
        self._decoder.decode(tail)

    def append(self, ids: Sequence[int]) -> str:
        pieces, skipped = self._pieces, self._skipped
        data = b"".join([pieces[token_id] for token_id in ids if token_id not in skipped])
        return self._strip(self._decoder.decode(data))

    def flush(self) -> str:
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if not self._strips or not text:
            return text
        self._strips = False
        return text.removeprefix(" ")


class WindowStream:
    """For every other tokenizer: decode a short window again, release what it adds once it looks whole."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skipped: frozenset[int], spaces: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._spaces = spaces
        # Ids before `_shown` give context and have been released.
        self._ids = visible_tail(prompt_ids, skipped)
        self._shown = len(self._ids)

    def append(self, ids: Sequence[int]) -> str:
        released: list[str] = []
        for token_id in ids:
            if token_id not in self._skipped:
                self._ids.append(token_id)
                released.append(self._release(is_last=False))
        return "".join(released)

    def flush(self) -> str:
        return self._release(is_last=True)

    def _release(self, *, is_last: bool) -> str:
        before = self._text(self._ids[: self._shown])
        text = self._text(self._ids)
        num_pending = len(self._ids) - self._shown
        if text.endswith(BROKEN) and num_pending <= MAX_WINDOW and not is_last:
            return ""
        if len(text) > len(before) or num_pending > MAX_WINDOW:
            self._ids = self._ids[self._shown :]
            self._shown = len(self._ids)
        return text[len(before) :]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, spaces_between_special_tokens=self._spaces
        )


def visible_tail(prompt_ids: Sequence[int], skipped: frozenset[int]) -> list[int]:
    """Return the last few ids of a prompt that show as text."""
    tail: list[int] = []
    for token_id in reversed(prompt_ids):
        if token_id not in skipped:
            tail.append(token_id)
            if len(tail) == PROMPT_TAIL:
                break
    return tail[::-1]
