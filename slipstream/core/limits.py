"""Which bounds does every number of a request have to keep?"""

from __future__ import annotations

import msgspec

MAX_BEAM_WIDTH = 64


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds that `Request.create` checks, resolved once at start.

    `max_seq_len` bounds prompt + generated tokens of one request; `vocab_size` is the number of rows of the
    embedding; `eos_token_ids` end a request that does not ignore them.
    """

    vocab_size: int
    max_seq_len: int
    eos_token_ids: tuple[int, ...] = ()
    max_n: int = 1024
    max_beam_width: int = MAX_BEAM_WIDTH
    max_logprobs: int = 64
    max_stop_strings: int = 64
    max_stop_length: int = 1024
    max_token_list: int = 4096
    max_salt_length: int = 256
    max_ngram_size: int = 256
    max_penalty: float = 100.0
    max_temperature: float = 100.0
    max_logit_bias: float = 100.0
    min_temperature: float = 1e-3
