"""Which tokenizer do the metadata of a GGUF file describe?

Two kinds are served: "gpt2" (byte-level BPE with merges) and "llama" (SentencePiece BPE, whose merges follow
from the scores). Ids are positions in `tokenizer.ggml.tokens`, so every token must be unique. Control tokens
never come out of merges: a vocabulary may hold pieces that spell one, and user text must not reach it.
Source: the GGUF specification, section `Tokenizer` (ggml, docs/gguf.md).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from slipstream.core.errors import CheckpointError
from slipstream.text.byte_pieces import ALPHABET, BYTE_OF, SPACE_MARK
from slipstream.text.eos_tokens import turn_end_ids
from slipstream.text.merge_rules import merge_rules
from slipstream.text.pre_tokenizers import word_cut
from slipstream.text.tokenizer import FastTokenizer, add_tokens
from slipstream.text.vocab_checks import check_unique

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
WHOLE = (UNKNOWN, CONTROL, USER_DEFINED)
NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Whose tokenizer puts the first space into the text itself, so that "  a" begins with three, not two.
PREPENDING = ("phi3",)
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


@contextlib.contextmanager
def paused_collector() -> Generator[None]:
    """A million small objects without cycles: the garbage collector would walk them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@paused_collector()
def load_tokenizer_gguf(metadata: Mapping[str, Any]) -> FastTokenizer:
    """Build the tokenizer of a GGUF file from its metadata, keys as in the file.

    Raises CheckpointError for a tokenizer or pre-tokenizer that is not served, and for metadata that do not
    fit together.
    """
    vocabulary = Vocabulary(metadata)
    kind = vocabulary.get("model")
    if kind == "gpt2":
        backend, adds_bos = build_byte_level(vocabulary), vocabulary.cut.adds_bos
    elif kind == "llama":
        backend, adds_bos = build_sentencepiece(vocabulary), True
    else:
        raise CheckpointError(
            f"The GGUF file's tokenizer is of kind {kind!r} (tokenizer.ggml.model); supported: gpt2, llama. "
            "Load the model from its original folder (with tokenizer.json) instead."
        )
    add_whole_tokens(backend, vocabulary)
    frame(backend, vocabulary, adds_bos)
    template = metadata.get("tokenizer.chat_template")
    ends = [i for key in END_KEYS if (i := vocabulary.token_id(key)) is not None]
    return FastTokenizer(
        backend,
        special_tokens=vocabulary.named,
        eos_token_ids=[*ends, *turn_end_ids(template, backend.token_to_id)],
        chat_template=template,
        vocab_size=len(vocabulary.tokens),
    )


class Vocabulary:
    """The tokenizer's part of the metadata, checked for agreement with itself."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.architecture = metadata.get("general.architecture")
        self.is_byte_level = self.get("model") == "gpt2"
        self.cut = word_cut(self.get("pre", "default")) if self.is_byte_level else word_cut("default")
        tokens = self.get("tokens")
        if tokens is None or not len(tokens):
            raise CheckpointError(
                "The GGUF file holds no tokens (tokenizer.ggml.tokens); convert the model again."
            )
        self.types = self._numbers("token_type", len(tokens), int(NORMAL))
        self.tokens = spell_bytes(tokens, self.types) if self.is_byte_level else spell_spaces(tokens)
        check_unique(self.tokens, "tokenizer.ggml.tokens of the GGUF file")
        self.scores = self._numbers("scores", len(tokens), 0.0)
        self.named = {
            name: self.tokens[i] for name, key in NAMES.items() if (i := self.token_id(key)) is not None
        }
        self.ids = dict(zip(self.tokens, range(len(self.tokens)), strict=True))

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def token_id(self, key: str) -> int | None:
        """Return the id stored under `key`, None where the file has none (-1 and 2^32 - 1 say so too)."""
        value = self.get(key)
        if value is None or value in (-1, 0xFFFF_FFFF):
            return None
        if not 0 <= value < len(self.tokens):
            raise CheckpointError(
                f"tokenizer.ggml.{key} of the GGUF file is {value}, but it lists {len(self.tokens)} tokens. "
                "Convert the model again."
            )
        return int(value)

    def _numbers(self, key: str, length: int, default: Any) -> list[Any]:
        values = self.get(key)
        if values is None or not len(values):
            return [default] * length
        if len(values) != length:
            raise CheckpointError(
                f"tokenizer.ggml.{key} of the GGUF file has {len(values)} entries for {length} tokens. "
                "Convert the model again."
            )
        return values.tolist() if hasattr(values, "tolist") else list(values)


def spell_spaces(tokens: Sequence[str]) -> list[str]:
    """Return SentencePiece's own spelling; some files write runs of spaces plainly."""
    return [
        SPACE_MARK * len(token) if token[:2] == "  " and not token.strip(" ") else token for token in tokens
    ]


def spell_bytes(tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """Return normal tokens in the byte alphabet; some files write characters outside it plainly."""
    known = BYTE_OF.keys()
    return [
        token if kind != NORMAL or known >= set(token) else "".join(ALPHABET[byte] for byte in token.encode())
        for token, kind in zip(tokens, types, strict=True)
    ]


def build_byte_level(vocabulary: Vocabulary) -> Backend:
    merges = split_merges(vocabulary.get("merges"))
    if merges is None:
        raise CheckpointError(
            "The GGUF file's byte-level tokenizer has no tokenizer.ggml.merges. Convert the model again."
        )
    backend = Backend(build_bpe(vocabulary, merges, ignore_merges=vocabulary.cut.ignore_merges))
    backend.pre_tokenizer = vocabulary.cut.build()
    backend.decoder = decoders.ByteLevel()
    return backend


def build_sentencepiece(vocabulary: Vocabulary) -> Backend:
    merges = split_merges(vocabulary.get("merges"))
    if merges is None:
        kinds = vocabulary.types
        # SentencePiece matches user-defined pieces before it merges anything.
        top = max(vocabulary.scores) + 1
        priority = [
            top if kind == USER_DEFINED else score
            for kind, score in zip(kinds, vocabulary.scores, strict=True)
        ]
        merges = merge_rules(vocabulary.tokens, priority, [k not in (UNKNOWN, CONTROL, BYTE) for k in kinds])
    has_bytes = "<0x00>" in vocabulary.ids
    model = build_bpe(
        vocabulary,
        merges,
        byte_fallback=has_bytes,
        fuse_unk=True,
        unk_token=vocabulary.named.get("unk_token"),
    )
    backend = Backend(model)
    adds_space = bool(vocabulary.get("add_space_prefix", True))
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if not adds_space:
        backend.normalizer = normalizers.Replace(" ", SPACE_MARK)
    elif vocabulary.architecture in PREPENDING:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE_MARK), normalizers.Replace(" ", SPACE_MARK)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if adds_space else [])])
    return backend


def split_merges(merges: Sequence[str] | None) -> list[tuple[str, str]] | None:
    if merges is None:
        return None
    pairs = [(parts[0], parts[2]) for merge in merges if (parts := merge.partition(" "))[2]]
    if len(pairs) != len(merges):
        raise CheckpointError(
            f"{len(merges) - len(pairs)} merges of the GGUF file (tokenizer.ggml.merges) are not two tokens "
            "with a space between. Convert the model again."
        )
    return pairs


def build_bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocabulary.ids, merges=merges, **options)
    except Exception as error:
        raise CheckpointError(
            f"The merges of the GGUF file do not fit its tokens: {error}. Convert the model again."
        ) from error


def add_whole_tokens(backend: Backend, vocabulary: Vocabulary) -> None:
    """Keep control and user-defined tokens whole; flag the former, and every named one, as special."""
    named = set(vocabulary.named.values())
    kinds = zip(vocabulary.tokens, vocabulary.types, strict=True)
    candidates = [(token, kind) for token, kind in kinds if kind in WHOLE or token in named]
    added: list[AddedToken] = []
    for token, kind in candidates:
        is_control = kind != USER_DEFINED or token in named
        # Runs of spaces are found by merging: normalisation rewrites them before added tokens could match.
        if is_control or token.strip(SPACE_MARK):
            added.append(AddedToken(token, normalized=False, special=is_control))
    add_tokens(backend, added)


def frame(backend: Backend, vocabulary: Vocabulary, adds_bos: bool) -> None:
    """Let `encode` put BOS in front, and EOS behind, where the file asks for it."""
    bos, eos = (vocabulary.named.get(name) for name in ("bos_token", "eos_token"))
    before = [bos] if bos is not None and vocabulary.get("add_bos_token", adds_bos) else []
    after = [eos] if eos is not None and vocabulary.get("add_eos_token", False) else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(token, vocabulary.ids[token]) for token in {*before, *after}],
    )
