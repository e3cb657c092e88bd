"""Is this tokenizer sane, before it can do harm?

Every id it can produce must have a row in the embedding, every token one id; a file is read only if it is a
regular file of bounded size. What is wrong here would otherwise be an index fault in the middle of a batch.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from slipstream.core.errors import CheckpointError
from slipstream.text.base import Tokenizer

MAX_TOKENIZER_BYTES = 200 << 20
MAX_SETTINGS_BYTES = 16 << 20

# Text-only exports of multimodal models keep these without a row; a prompt that spells one is refused by the
# check of its token ids.
MEDIA_PLACEHOLDERS = ("<image_soft_token>",)


def check_vocab(tokenizer: Tokenizer, num_embeddings: int) -> None:
    """Raise CheckpointError if the tokenizer can produce an id without an embedding row."""
    placeholders = {tokenizer.token_id(text) for text in MEDIA_PLACEHOLDERS}
    highest = tokenizer.vocab_size - 1
    while highest >= num_embeddings and highest in placeholders:
        highest -= 1
    if highest >= num_embeddings:
        raise CheckpointError(
            f"The tokenizer's highest id is {highest} ({tokenizer.token_text(highest)!r}), but the model has "
            f"{num_embeddings} embedding rows (ids 0 to {num_embeddings - 1}). The tokenizer files belong to "
            "another model or were edited; use the ones the model was published with."
        )
    outside = [i for i in tokenizer.eos_token_ids if not 0 <= i < num_embeddings]
    if outside:
        raise CheckpointError(
            f"End-of-sequence ids {outside} are outside the model's {num_embeddings} embedding rows; correct "
            "eos_token_id in generation_config.json or the GGUF metadata."
        )


def check_unique(tokens: Sequence[str], source: str) -> None:
    """Raise CheckpointError if a token appears at two ids."""
    if len(set(tokens)) == len(tokens):
        return
    seen: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        first = seen.setdefault(token, token_id)
        if first != token_id:
            raise CheckpointError(
                f"{source} lists token {token!r} at ids {first} and {token_id}; a token has one id. "
                "Convert or download the file again."
            )


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Return a file's content; raise CheckpointError unless it is a regular file of at most `max_bytes`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(
                f"{path} is not a regular file; a tokenizer is read from regular files only."
            )
        if status.st_size > max_bytes:
            raise CheckpointError(
                f"{path} has {status.st_size:,} bytes, at most {max_bytes:,} are allowed. No known model has "
                "such a file; download it again."
            )
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
    if len(data) > max_bytes:
        raise CheckpointError(f"{path} grew past {max_bytes:,} bytes while it was read; download it again.")
    return data
