"""Which tiny models does the engine run in its tests? Random twins with a tokenizer, written as folders.

Invariants: the two best logits of a position lie far apart (the tests that compare tokens assert it), and
nearly every token that a model chooses is a printable piece of text, so that stop strings can be cut from it.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from slipstream import LLM
from slipstream.core.request import Request
from slipstream.engine.engine import Engine
from tests.models.twins import make_gemma3, make_llama

SPECIALS = ("<pad>", "<s>", "</s>", "<end_of_turn>")
PAD, BOS, EOS, END_OF_TURN = range(4)
PAIRS = tuple(first + vowel for first in ("Ġ", *"bcdfhlmnrst") for vowel in "aeiou")
VOCAB = len(SPECIALS) + 256 + len(PAIRS)
FIRST_BYTE = len(SPECIALS)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<end_of_turn>{% endfor %}"
    "{% if add_generation_prompt %}model: {% endif %}"
)
# The logits of a random twin spread by about 2; this much louder, two tokens of 320 rarely come within 1e-3,
# while float32 still resolves a few 1e-5.
LOUD = 12.0
QUIET = 0.02


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE over 256 bytes and some pairs; any text has ids, any ids have a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIALS, *alphabet, *PAIRS]
    assert len(set(tokens)) == VOCAB
    vocab = {token: idx for idx, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [(pair[0], pair[1]) for pair in PAIRS]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def quiet_ids() -> list[int]:
    """Special tokens and bytes that are no printable ASCII by themselves."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    odd = [idx for idx, char in enumerate(alphabet, start=FIRST_BYTE) if not (char.isascii() or char == "Ġ")]
    return [*range(FIRST_BYTE), *odd]


def tiny_llama(*, seed: int = 2, **changes: Any) -> Any:
    twin = make_llama(seed=seed, **({"vocab_size": VOCAB} | changes))
    with torch.no_grad():
        twin.lm_head.weight *= LOUD
        twin.lm_head.weight[quiet_ids()] *= QUIET
    return twin


def tiny_gemma3(*, seed: int = 5, **changes: Any) -> Any:
    """Two local layers with windows of 12 and two global ones: two groups share the pool."""
    layers = ["sliding_attention", "full_attention"] * 2
    fields = {"vocab_size": VOCAB, "sliding_window": 12, "num_hidden_layers": 4, "layer_types": layers}
    twin = make_gemma3(seed=seed, **(fields | changes))
    with torch.no_grad():
        # What a layer adds has to outweigh the tied embedding, or tokens repeat themselves.
        for name, parameter in twin.named_parameters():
            if "post_" in name:
                parameter += 27.0
        # Tied: rows are quieted for the input too, where a norm makes them as loud as any other.
        twin.model.norm.weight += 1.0
        twin.model.norm.weight *= LOUD
        twin.model.norm.weight -= 1.0
        twin.model.embed_tokens.weight[quiet_ids()] *= QUIET
    return twin


def write_folder(twin: Any, folder: Path, *, eos_token_ids: Sequence[int] = (EOS,)) -> Path:
    """Write a model folder as it would be published: weights, tokenizer, template, generation settings."""
    twin.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(eos_token_ids)}))
    return folder


@torch.no_grad()
def smallest_gap(twin: Any, prompt: Sequence[int], output: Sequence[int]) -> float:
    """Assert that `output` is what transformers chooses greedily after `prompt`; return the smallest gap.

    One forward over all of it: each token is the best one after everything before it.
    """
    logits = twin(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1].float()
    best = logits.topk(2)
    assert best.indices[:, 0].tolist() == list(output)
    return float((best.values[:, 0] - best.values[:, 1]).min())


def prompt_ids(length: int, *, seed: int) -> list[int]:
    """Random ordinary tokens."""
    rng = random.Random(seed)
    return [rng.randrange(FIRST_BYTE, VOCAB) for _ in range(length)]


def run_requests(
    engine: Engine, requests: Sequence[Request], *, max_steps: int = 5000
) -> dict[tuple[str, int], list[int]]:
    """Drive an engine by hand until nothing is left; returns the tokens per (request id, sample)."""
    tokens: dict[tuple[str, int], list[int]] = {}
    for request in requests:
        engine.submit(request)
    for _ in range(max_steps):
        if not engine.has_work:
            return tokens
        for event in engine.step():
            assert event.error is None, event.error
            tokens.setdefault((event.request_id, event.index), []).extend(event.new_token_ids)
    raise AssertionError(f"not done after {max_steps} steps")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: for models this small, a second one costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def anonymous_bytes() -> int:
    """Return the resident memory of this process that no file backs. Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def wait_idle(llm: LLM, *, deadline_s: float = 60.0) -> None:
    """Wait until an engine has nothing to do, and assert that it holds no page then."""
    scheduler = llm.startup.engine.scheduler
    deadline = time.monotonic() + deadline_s
    while scheduler.has_work or llm._service.client._inbox:
        assert time.monotonic() < deadline, f"never idle: {llm.get_stats()}"
        time.sleep(0.002)
    stats = llm.get_stats()
    assert stats["num_free_pages"] == stats["num_pages"], stats
    scheduler.cache.pool.check()
