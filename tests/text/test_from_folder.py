"""Folders with tokenizer.json: transformers' rules for BOS and flags, files that contradict each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slipstream.core.errors import CheckpointError
from slipstream.text.from_folder import load_tokenizer_folder
from slipstream.text.tokenizer import FastTokenizer
from tests.text.small_models import added_token, tokenizer_json, write_folder

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}


def load(folder: Path, **files: Any) -> FastTokenizer:
    files.setdefault("tokenizer", tokenizer_json())
    tokenizer = load_tokenizer_folder(write_folder(folder, **files))
    assert isinstance(tokenizer, FastTokenizer)
    return tokenizer


SETTINGS: dict[str, dict[str, Any]] = {
    "only the post-processor": {},
    "BOS switched off": {"add_bos_token": False},
    "BOS switched on": {"add_bos_token": True},
    "EOS as well": {"add_bos_token": True, "add_eos_token": True},
    "EOS alone": {"add_eos_token": True},
    "null": {"add_bos_token": None},
    "names as objects": {"bos_token": {"__type": "AddedToken", "content": "<s>"}},
    "flags overruled": {"added_tokens_decoder": {"259": added_token(259, "<|im_end|>", rstrip=True)}},
    "one more special": {"additional_special_tokens": ["he"]},
    "one more token": {"added_tokens_decoder": {"260": added_token(260, "<new>", special=False)}},
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("has_post_processor", [True, False])
def test_ids_are_those_of_transformers(tmp_path: Path, case: str, has_post_processor: bool) -> None:
    from transformers import AutoTokenizer

    model = tokenizer_json() if has_post_processor else tokenizer_json(post_processor=None)
    ours = load(tmp_path, tokenizer=model, tokenizer_config=NAMES | SETTINGS[case])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("he said", "a <|im_end|> b", "<s>x</s>", "<new> he", "", "日本 😀"):
        for add in (True, False):
            expected = theirs.encode(text, add_special_tokens=add)
            if text.startswith("<s>") and expected[:2] == [257, 257]:
                expected = expected[1:]  # theirs doubles a BOS that the text brings
            assert ours.encode(text, add_special_tokens=add) == expected
        ids = theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1


def test_names_may_stand_in_the_special_tokens_map(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, special_tokens_map={"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (257, (258,))


def test_every_end_of_turn_ends_a_request(tmp_path: Path) -> None:
    files = {"tokenizer_config": NAMES, "generation_config": {"eos_token_id": [258, 256]}}
    assert load(tmp_path / "a", **files).eos_token_ids == (258, 256)
    files["generation_config"] = {"eos_token_id": 256}
    assert load(tmp_path / "b", **files).eos_token_ids == (258, 256)
    assert load(tmp_path / "c", **files, chat_template__jinja="<|im_end|>").eos_token_ids == (258, 256, 259)


def test_where_the_chat_template_comes_from(tmp_path: Path) -> None:
    config = NAMES | {"chat_template": "from config"}
    assert load(tmp_path / "a", tokenizer_config=config).chat_template == "from config"
    both = {"tokenizer_config": config, "chat_template": {"chat_template": "from json"}}
    assert load(tmp_path / "b", **both).chat_template == "from json"
    assert load(tmp_path / "c", **both, chat_template__jinja="from jinja").chat_template == "from jinja"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert load(tmp_path / "d", tokenizer_config=NAMES | {"chat_template": named}).chat_template == "d"
    assert load(tmp_path / "e", tokenizer_config=NAMES).chat_template is None


def test_names_without_a_token_get_no_id(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, tokenizer_config=NAMES | {"pad_token": "[PAD]"})
    assert tokenizer.vocab_size == 260
    assert tokenizer.token_id("[PAD]") is None


def with_added(*added: dict[str, Any]) -> dict[str, Any]:
    return tokenizer_json(added_tokens=list(added))


def with_vocab(**entries: int) -> dict[str, Any]:
    model = tokenizer_json()["model"]
    return tokenizer_json(model=model | {"vocab": model["vocab"] | entries})


CLASHES: dict[str, tuple[dict[str, Any], str]] = {
    "two tokens, one added id": (with_added(added_token(257, "<a>"), added_token(257, "<b>")), "clashes"),
    "one token, two added ids": (with_added(added_token(257, "<a>"), added_token(258, "<a>")), "clashes"),
    "added id of another token": (with_added(added_token(5, "<a>")), "'<a>' with id 5, which clashes"),
    "added token with another id": (with_added(added_token(257, "he")), "'he' with id 257, which clashes"),
    "added id far beyond": (with_added(added_token(10**6, "<a>")), "clashes"),
    "two tokens, one id": (with_vocab(zz=5), "one id to several tokens"),
    "negative id": (with_vocab(zz=-5), "not a valid tokenizer.json|negative"),
}


@pytest.mark.parametrize("case", CLASHES)
def test_clashing_tokens_are_refused(tmp_path: Path, case: str) -> None:
    content, message = CLASHES[case]
    content["post_processor"] = None
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, tokenizer=content)


@pytest.mark.parametrize(
    "entries",
    [
        {"5": added_token(5, "<a>")},
        {"256": added_token(256, "<a>")},
        {"300": added_token(300, "<s>")},
        {"300": added_token(300, "<gap>")},
        {"x": added_token(300, "<a>")},
        {"260": {}},
        {"260": "<a>"},
    ],
)
def test_settings_that_contradict_the_tokenizer_are_refused(tmp_path: Path, entries: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load(tmp_path, tokenizer_config=NAMES | {"added_tokens_decoder": entries})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"model": {"type": "BPE", "vocab": {"a": "b"}}}', "\x00"]
)
def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=r"not a valid tokenizer\.json"):
        load_tokenizer_folder(write_folder(tmp_path, tokenizer__json=text))


@pytest.mark.parametrize(
    "name", ["tokenizer_config__json", "generation_config__json", "special_tokens_map__json"]
)
@pytest.mark.parametrize("text", ["{", "[1]", "\x00", "[" * 100_000])
def test_settings_that_are_no_object_are_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(CheckpointError, match=name.replace("__", ".")):
        load(tmp_path, **{name: text})


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_tokenizer_folder(tmp_path / "missing")


def test_code_beside_tokenizer_json_is_not_needed_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    config = NAMES | {"auto_map": {"AutoTokenizer": ["code.Evil", "code.Evil"]}}
    code = f"open({json.dumps(str(marker))}, 'w')\nclass Evil: pass\n"
    assert load(tmp_path, tokenizer_config=config, code__py=code).encode("he") == [257, 256]
    assert not marker.exists()
