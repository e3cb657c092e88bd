"""Tokenizers small enough to reason about: GGUF metadata and tokenizer.json folders built by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slipstream.text.byte_pieces import ALPHABET

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def sentencepiece_metadata(**overrides: Any) -> dict[str, Any]:
    """Llama-like: <unk>, BOS, EOS, 256 bytes, then pieces with falling scores; adds BOS and a first space."""
    head = [
        ("<unk>", 0.0, UNKNOWN),
        ("<s>", 0.0, CONTROL),
        ("</s>", 0.0, CONTROL),
        ("<think>", 0.0, USER_DEFINED),
    ]
    bytes_ = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    words = ["lo", "llo", "he", "▁he", "▁hello", "▁w", "or", "▁wor", "ld", "▁world", "▁▁", "s>", "<s", "<"]
    letters = list("▁helowrd<>s/abc")
    texts = list(dict.fromkeys([*words, *letters]))
    rows = [*head, *bytes_, *((text, -float(i), NORMAL) for i, text in enumerate(texts))]
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [row[0] for row in rows],
        "tokenizer.ggml.scores": [row[1] for row in rows],
        "tokenizer.ggml.token_type": [row[2] for row in rows],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return metadata | overrides


def byte_level_metadata(**overrides: Any) -> dict[str, Any]:
    """GPT-2-like: 256 bytes, a few merges, two control tokens and one user-defined token."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ w"]
    joined = [merge.replace(" ", "") for merge in merges]
    added = ["<|im_start|>", "<|im_end|>", "<think>"]
    tokens = [*ALPHABET, *joined, *added]
    types = [NORMAL] * (len(tokens) - 3) + [CONTROL, CONTROL, USER_DEFINED]
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    }
    return metadata | overrides


def added_token(token_id: int, content: str, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **plain, "special": special, **flags}


def bos_frame(token: str, token_id: int) -> dict[str, Any]:
    """The post-processor of tokenizer.json that puts one token in front."""
    special, sequence = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    known = {token: {"id": token, "ids": [token_id], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [special, sequence], "pair": [], "special_tokens": known}


def tokenizer_json(**overrides: Any) -> dict[str, Any]:
    """Byte-level BPE as a tokenizer.json: 256 bytes, "he", then <s> 257, </s> 258 and <|im_end|> 259."""
    vocab = {text: i for i, text in enumerate([*ALPHABET, "he"])}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(257, "<s>"), added_token(258, "</s>"), added_token(259, "<|im_end|>")],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": bos_frame("<s>", 257),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["h", "e"]], "ignore_merges": False},
    }
    return content | overrides


def write_folder(folder: Path, **files: Any) -> Path:
    """Write `name=content` as name.json, or as text for a name that already says how it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, str):
            (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")
        else:
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
