"""Which tokenizer do the files of a model folder describe?

`tokenizer.json` is the tokenizer, its post-processor alone decides about BOS and EOS around a text;
`tokenizer_config.json` and `special_tokens_map.json` name special tokens and may overrule the flags of added
ones. `add_bos_token` and `add_eos_token` are for tokenizers built from other files and have no say here, as
in transformers 5. No code of the folder is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from slipstream.core.errors import CheckpointError
from slipstream.text.base import Tokenizer
from slipstream.text.eos_tokens import turn_end_ids
from slipstream.text.tokenizer import FastTokenizer, add_tokens
from slipstream.text.vocab_checks import MAX_SETTINGS_BYTES, MAX_TOKENIZER_BYTES, read_bounded

TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
EXTRA_LISTS = ("additional_special_tokens", "extra_special_tokens")
DEFAULT_TEMPLATE = "default"


class ListedToken(msgspec.Struct):
    id: int
    content: str


class ListedModel(msgspec.Struct):
    """The vocabulary: token to id, or (Unigram) a list of (token, score)."""

    vocab: dict[str, int] | list[Any] = []


class ListedTokenizer(msgspec.Struct):
    """The parts of tokenizer.json that are checked before it is used."""

    model: ListedModel
    added_tokens: list[ListedToken] = []


def load_tokenizer_folder(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a model folder.

    A folder without `tokenizer.json` is loaded through transformers (extra `transformers`). Raises
    CheckpointError for files that are missing, malformed, too large or contradict themselves.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that holds tokenizer.json.")
    settings = read_settings(folder)
    ends = end_ids(read_json(folder / "generation_config.json").get("eos_token_id"))
    template = read_template(folder, settings)
    if not (folder / "tokenizer.json").exists():
        # Imported here: most folders never need it.
        from slipstream.text.from_transformers import load_with_transformers

        return load_with_transformers(folder, settings, ends, template)
    backend = read_backend(folder / "tokenizer.json")
    add_listed_tokens(backend, settings)
    named = {name: text for name in TOKEN_NAMES if (text := token_text(settings.get(name))) is not None}
    flag_special(backend, [*named.values(), *extra_tokens(settings)])
    eos = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
    known_ends = [] if eos is None else [eos]
    return FastTokenizer(
        backend,
        special_tokens=named,
        eos_token_ids=[*known_ends, *ends, *turn_end_ids(template, backend.token_to_id)],
        chat_template=template,
    )


def read_backend(path: Path) -> Backend:
    data = read_bounded(path, MAX_TOKENIZER_BYTES)
    try:
        listed = msgspec.json.decode(data, type=ListedTokenizer)
        backend = Backend.from_buffer(data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise CheckpointError(f"{path} is not a valid tokenizer.json: {error}. Download it again.") from error
    check_listed(backend, listed, path)
    return backend


def check_listed(backend: Backend, listed: ListedTokenizer, path: Path) -> None:
    """Raise CheckpointError where tokens clash: the library would renumber them without a word."""
    vocab = listed.model.vocab
    if isinstance(vocab, dict):
        if len(set(vocab.values())) != len(vocab):
            raise CheckpointError(f"{path} gives one id to several tokens. Download it again.")
        if min(vocab.values(), default=0) < 0:
            raise CheckpointError(f"{path} holds a negative token id. Download it again.")
    seen: set[int] = set()
    for token in listed.added_tokens:
        actual = backend.token_to_id(token.content)
        if actual != token.id or token.id in seen or backend.id_to_token(token.id) != token.content:
            raise CheckpointError(
                f"{path} adds token {token.content!r} with id {token.id}, which clashes with another entry "
                f"(that token has id {actual}, that id is {backend.id_to_token(token.id)!r}). "
                "Use the files the model was published with."
            )
        seen.add(token.id)


def add_listed_tokens(backend: Backend, settings: Mapping[str, Any]) -> None:
    """Apply `added_tokens_decoder`: its flags overrule those of tokenizer.json, its ids must agree."""
    present = backend.get_added_tokens_decoder()
    for token_id, token in listed_tokens(settings):
        if token_id in present and repr(present[token_id]) == repr(token):
            continue
        before = (backend.token_to_id(token.content), backend.id_to_token(token_id))
        add_tokens(backend, [token])
        is_new_or_same = before in ((None, None), (token_id, token.content))
        if not is_new_or_same or backend.token_to_id(token.content) != token_id:
            raise clash(token.content, token_id, before)


def listed_tokens(settings: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    """Return the entries of `added_tokens_decoder` in the order of their ids."""
    listed: dict[str, Any] = settings.get("added_tokens_decoder") or {}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        tokens = [
            (int(key), AddedToken(entry["content"], **{flag: bool(entry.get(flag)) for flag in flags}))
            for key, entry in listed.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"added_tokens_decoder of tokenizer_config.json is malformed ({error!r}). Download it again."
        ) from error
    return sorted(tokens, key=lambda item: item[0])


def clash(content: str, token_id: int, before: tuple[int | None, str | None]) -> CheckpointError:
    return CheckpointError(
        f"tokenizer_config.json gives token {content!r} id {token_id}; in tokenizer.json that token has id "
        f"{before[0]} and that id is {before[1]!r}. Use the files the model was published with."
    )


def flag_special(backend: Backend, texts: list[str]) -> None:
    """Flag named tokens as special; names the vocabulary does not hold have no id to give."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    held = [text for text in dict.fromkeys(texts) if backend.token_to_id(text) is not None]
    missing = [text for text in held if text not in special]
    add_tokens(backend, [AddedToken(text, special=True, normalized=False) for text in missing])


def read_settings(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, with what only special_tokens_map.json names."""
    return {
        **read_json(folder / "special_tokens_map.json"),
        **read_json(folder / "tokenizer_config.json"),
    }


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} where there is no file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(read_bounded(path, MAX_SETTINGS_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object. Download it again.")
    return cast(dict[str, Any], value)


def read_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the chat template: a file of its own comes before the one in the settings."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return read_bounded(path, MAX_SETTINGS_BYTES).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8 text. Download it again.") from error
    value = read_json(folder / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(value, list):
        named = {str(entry["name"]): entry["template"] for entry in cast(list[dict[str, Any]], value)}
        value = named.get(DEFAULT_TEMPLATE)
    return value if isinstance(value, str) else None


def token_text(value: object) -> str | None:
    """Return the text of a token named in the settings: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = cast(dict[str, Any], value).get("content")
    return value if isinstance(value, str) else None


def extra_tokens(settings: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for name in EXTRA_LISTS:
        listed: dict[str, Any] | list[Any] = settings.get(name) or []
        values = listed.values() if isinstance(listed, dict) else listed
        found += [text for value in values if (text := token_text(value)) is not None]
    return found


def end_ids(value: object) -> list[int]:
    """Return `eos_token_id` of a generation config, one id or several, as a list."""
    values = cast(list[object], value) if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]
