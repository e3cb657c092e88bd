"""How does text become ids and back, over the `tokenizers` library?

Invariant: with `parse_special=False` no control token comes out of a text. Control tokens are those flagged
special; user-defined tokens (runs of newlines, `<think>`) are vocabulary and stay whole everywhere.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, cast

from tokenizers import AddedToken, Encoding, models
from tokenizers import Tokenizer as Backend

from slipstream.core.errors import RequestError
from slipstream.text.base import BytePieces, ControlSpan
from slipstream.text.byte_pieces import byte_pieces


class FastTokenizer:
    """`Tokenizer` over one `tokenizers.Tokenizer`, which it owns: hand it over and leave it alone.

    `special_tokens` maps names (`bos_token`, `eos_token`, `unk_token`, ...) to texts. Whether `encode` puts
    BOS in front is the backend's post-processor's decision; a text that already begins with BOS never gets
    a second one.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        # Settings baked into a file would silently cut or pad prompts.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        self._backend = backend
        self.special_tokens: Mapping[str, str] = dict(special_tokens or {})
        self.chat_template = chat_template
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.bos_token_id = self._named("bos_token")
        self._unk_id = self._named("unk_token")
        self._added = sorted(backend.get_added_tokens_decoder().items())
        self.special_ids = frozenset(token_id for token_id, token in self._added if token.special)
        self.vocab_size = vocab_size or max(backend.get_vocab().values(), default=-1) + 1
        self.byte_pieces: BytePieces | None = byte_pieces(backend)

    def _named(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of `text`. Raises RequestError for text that is not valid Unicode."""
        if not parse_special:
            prefix, suffix = self._frame if add_special_tokens else ([], [])
            return [*prefix, *self.encode_ordinary(text, is_start=True), *suffix]
        ids = run(self._backend, text, add_special_tokens=add_special_tokens).ids
        has_two = add_special_tokens and ids[:2] == [self.bos_token_id] * 2 and bool(self._frame[0])
        return ids[1:] if has_two else ids

    def encode_ordinary(self, text: str, *, is_start: bool) -> list[int]:
        """Encode text without control tokens or BOS; with `is_start=False` it continues a text."""
        backend = self._ordinary if is_start else self._continuing
        return self._without_control(text, run(backend, text).ids, backend)

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Return the text of `ids`.

        Decoders that put spaces around special tokens stop doing so with
        `spaces_between_special_tokens=False`; those that are plain joins never do.
        """
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id not in self.special_ids]
        pieces = self.byte_pieces
        if pieces is not None:
            text = b"".join([pieces[token_id] for token_id in ids]).decode("utf-8", "replace")
            return text.removeprefix(" ") if pieces.strips_leading_space else text
        if spaces_between_special_tokens:
            return self._backend.decode(ids, skip_special_tokens=False)
        return "".join(self._decode_apart(ids))

    def _decode_apart(self, ids: Sequence[int]) -> list[str]:
        runs = groupby(ids, key=lambda token_id: token_id in self.special_ids)
        texts: list[str] = []
        for is_special, group in runs:
            if is_special:
                texts += [self._backend.id_to_token(token_id) or "" for token_id in group]
            else:
                texts.append(self._backend.decode(list(group), skip_special_tokens=False))
        return texts

    def token_text(self, token_id: int) -> str:
        """Return one token's own text for display; broken UTF-8 shows as U+FFFD."""
        if self.byte_pieces is None:
            return self._backend.decode([token_id], skip_special_tokens=False)
        return self.byte_pieces[token_id].decode("utf-8", "replace")

    def token_id(self, text: str) -> int | None:
        """Return the id of the token spelled `text` in the vocabulary."""
        return self._backend.token_to_id(text)

    def find_control(self, text: str) -> list[ControlSpan]:
        """Return the control tokens that `encode(text)` would see, in order."""
        found = run(self._scanner, text)
        ids = (self._backend.token_to_id(token) for token in found.tokens)
        return [
            ControlSpan(start, stop, cast(int, token_id))
            for token_id, (start, stop) in zip(ids, found.offsets, strict=True)
        ]

    @functools.cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The ids the post-processor puts before and after a text."""
        framed = run(self._backend, "a", add_special_tokens=True)
        inner = [i for i, is_special in enumerate(framed.special_tokens_mask) if not is_special]
        if not inner:
            return framed.ids, []
        return framed.ids[: inner[0]], framed.ids[inner[-1] + 1 :]

    @functools.cached_property
    def _ordinary(self) -> Backend:
        """The same model, blind to control tokens."""
        return self._twin(self._backend.pre_tokenizer)

    @functools.cached_property
    def _continuing(self) -> Backend:
        """As `_ordinary`, for text in the middle: no space before the first word."""
        pre_tokenizer: Any = self._backend.pre_tokenizer
        state: bytes = b"" if pre_tokenizer is None else pre_tokenizer.__getstate__()
        if b'"prepend_scheme":"first"' not in state:
            return self._ordinary
        pre_tokenizer = copy.deepcopy(pre_tokenizer)
        pre_tokenizer.__setstate__(state.replace(b'"prepend_scheme":"first"', b'"prepend_scheme":"never"'))
        return self._twin(pre_tokenizer)

    @functools.cached_property
    def _scanner(self) -> Backend:
        """An empty model that sees control tokens only, at the speed of one Aho-Corasick pass."""
        scanner = Backend(models.BPE())
        add_tokens(scanner, [token for _, token in self._added if token.special])
        return scanner

    def _twin(self, pre_tokenizer: Any) -> Backend:
        """Return a second pipeline over the same model (shared, not copied) that skips special tokens."""
        twin = Backend(self._backend.model)
        twin.normalizer = self._backend.normalizer
        add_tokens(twin, [token for _, token in self._added])
        if any(twin.token_to_id(token.content) != token_id for token_id, token in self._added):
            # Ids with holes are numbered anew when tokens are added one by one; a full copy keeps them.
            twin = Backend.from_str(self._backend.to_str())
        twin.pre_tokenizer = pre_tokenizer
        twin.post_processor = self._backend.post_processor
        twin.encode_special_tokens = True
        return twin

    def _without_control(self, text: str, ids: list[int], backend: Backend) -> list[int]:
        """Return `ids`, encoded again in halves if the model itself spells a control token.

        A vocabulary that holds control tokens may reach one through its merges; cutting the token's text in
        two prevents that, since what remains is shorter than any control token in it.
        """
        control = self.special_ids - {self._unk_id}
        if control.isdisjoint(ids):
            return ids
        cuts = [0, *(span.start + 1 for span in self.find_control(text)), len(text)]
        parts = [text[a:b] for a, b in pairwise(cuts) if a < b]
        return [i for part in parts for i in run(backend, part).ids if i not in control]


def add_tokens(backend: Any, tokens: list[AddedToken]) -> None:
    """Add tokens with the flags they carry; one that the model holds keeps its id."""
    backend.add_tokens(tokens)


def run(backend: Backend, text: str, *, add_special_tokens: bool = False) -> Encoding:
    try:
        return backend.encode(text, add_special_tokens=add_special_tokens)
    except (TypeError, UnicodeEncodeError) as error:
        raise RequestError(
            f"A prompt must be valid Unicode text; got {describe(text)}. Pass text without lone surrogates.",
            param="prompt",
        ) from error


def describe(text: object) -> str:
    if not isinstance(text, str):
        return type(text).__name__
    place = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), -1)
    return f"a lone surrogate at character {place}" if place >= 0 else "text that cannot be encoded"
