"""How is a folder served that has no tokenizer.json?

SentencePiece files, vocabularies with separate merges and tokenizers written in Python are converted or run
by transformers, an optional extra imported only here. Python code that a checkpoint brings is never run.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slipstream.core.errors import CheckpointError, MissingExtraError
from slipstream.text.base import BytePieces, ControlSpan, Tokenizer
from slipstream.text.eos_tokens import turn_end_ids
from slipstream.text.tokenizer import FastTokenizer


def load_with_transformers(
    folder: Path, settings: Mapping[str, Any], eos_token_ids: Sequence[int], chat_template: str | None
) -> Tokenizer:
    """Load the tokenizer of `folder`. Raises MissingExtraError without transformers."""
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder} is empty; give the folder that holds tokenizer.json.")
    code: dict[str, Any] = settings.get("auto_map") or {}
    if "AutoTokenizer" in code:
        raise CheckpointError(
            f"The tokenizer in {folder} is Python code of the checkpoint (auto_map), which is never run. "
            "Use a version of the model that brings tokenizer.json."
        )
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError(
            f"{folder} has no tokenizer.json; other tokenizer files are loaded through transformers. Run "
            "`pip install slipstream-llm[transformers]`."
        ) from error
    try:
        loaded: Any = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot load a tokenizer from {folder}: {error}. Give a folder with tokenizer.json."
        ) from error
    specials: dict[str, Any] = loaded.special_tokens_map
    named = {name: text for name, text in specials.items() if isinstance(text, str)}
    own: list[int] = [] if loaded.eos_token_id is None else [loaded.eos_token_id]
    template: str | None = chat_template or loaded.chat_template
    ends = tuple(dict.fromkeys([*own, *eos_token_ids, *turn_end_ids(template, loaded.get_vocab().get)]))
    if loaded.is_fast:
        return FastTokenizer(
            loaded.backend_tokenizer, special_tokens=named, eos_token_ids=ends, chat_template=template
        )
    return SlowTokenizer(loaded, named, ends, template)


class SlowTokenizer:
    """`Tokenizer` over a tokenizer that transformers runs in Python."""

    byte_pieces: BytePieces | None = None

    def __init__(
        self, slow: Any, named: Mapping[str, str], eos_token_ids: tuple[int, ...], chat_template: str | None
    ) -> None:
        self._slow = slow
        self._vocab: dict[str, int] = slow.get_vocab()
        self.special_tokens = named
        self.chat_template = chat_template
        self.eos_token_ids = eos_token_ids
        self.bos_token_id: int | None = slow.bos_token_id
        self.special_ids = frozenset[int](slow.all_special_ids)
        self.vocab_size = max(self._vocab.values()) + 1
        control = sorted((text for text in slow.all_special_tokens if text), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        return self._slow.encode(
            text, add_special_tokens=add_special_tokens, split_special_tokens=not parse_special
        )

    def encode_ordinary(self, text: str, *, is_start: bool) -> list[int]:
        """As `Tokenizer.encode_ordinary`; a Python tokenizer cannot be told that a text goes on."""
        return self.encode(text, add_special_tokens=False, parse_special=False)

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        return self._slow.decode(
            list(ids),
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def token_id(self, text: str) -> int | None:
        return self._vocab.get(text)

    def find_control(self, text: str) -> list[ControlSpan]:
        found = self._control.finditer(text)
        return [ControlSpan(match.start(), match.end(), self._vocab[match.group()]) for match in found]
