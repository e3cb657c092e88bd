"""What does llama.cpp do with the same tokens? Run by the Python of an environment with llama-cpp-python.

Its low-level API at its fastest settings: flash attention, logits only where they are wanted, one batch for
all prompts (n_batch 2048, n_ubatch 512), greedy choice by numpy.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp as lib
import numpy as np
from protocol import serve

NUM_BATCH = 2048
NUM_MICRO_BATCH = 512
# Of a score: one row of logits per token, a megabyte where the vocabulary is large.
NUM_SCORED = 128
Q4_0 = 2  # LLAMA_FTYPE_MOSTLY_Q4_0


class Model:
    """One loaded file and one context over it."""

    def __init__(self, path: str, *, num_threads: int, num_sequences: int, context: int) -> None:
        started = time.perf_counter()
        parameters = lib.llama_model_default_params()
        self.model = lib.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            raise ValueError(f"llama.cpp does not load {path}")
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        settings = lib.llama_context_default_params()
        settings.n_ctx = context * num_sequences
        settings.n_batch = NUM_BATCH
        settings.n_ubatch = NUM_MICRO_BATCH
        settings.n_seq_max = num_sequences
        settings.n_threads = settings.n_threads_batch = num_threads
        settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = lib.llama_init_from_model(self.model, settings)
        if not self.context:
            raise ValueError("llama.cpp makes no context with these settings")
        self.load_s = time.perf_counter() - started
        self.batch = lib.llama_batch_init(NUM_BATCH, 0, num_sequences)

    def free(self) -> None:
        lib.llama_batch_free(self.batch)
        lib.llama_free(self.context)
        lib.llama_model_free(self.model)

    def clear(self) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> None:
        """Run (token, position, sequence, wants logits) entries as one batch."""
        batch = self.batch
        for place, (token, position, sequence, wants_logits) in enumerate(entries):
            batch.token[place] = token
            batch.pos[place] = position
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            batch.logits[place] = wants_logits
        batch.n_tokens = len(entries)
        status = lib.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def logits(self, place: int) -> np.ndarray:
        pointer = lib.llama_get_logits_ith(self.context, place)
        return np.ctypeslib.as_array(
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape=(self.vocab_size,)
        )


models: dict[str, Model] = {}


def load(name: str, path: str, num_threads: int, num_sequences: int, context: int) -> dict[str, Any]:
    models[name] = Model(path, num_threads=num_threads, num_sequences=num_sequences, context=context)
    return {"load_s": models[name].load_s}


def unload(name: str) -> None:
    models.pop(name).free()


def requantize(source: str, target: str, num_threads: int) -> None:
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype = Q4_0
    parameters.nthread = num_threads
    parameters.allow_requantize = True
    if lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)) != 0:
        raise RuntimeError(f"llama.cpp does not requantise {source}")


def run(name: str, prompts: list[list[int]], output_tokens: int) -> dict[str, Any]:
    """Prefill all prompts, then decode them together; return times and tokens."""
    model = models[name]
    model.clear()
    outputs: list[list[int]] = [[] for _ in prompts]
    started = time.perf_counter()
    prefill(model, prompts, outputs)
    first_token_s = time.perf_counter() - started
    for step in range(1, output_tokens):
        entries = [(outputs[i][-1], len(prompt) + step - 1, i, True) for i, prompt in enumerate(prompts)]
        model.decode(entries)
        for i, out in enumerate(outputs):
            out.append(int(model.logits(i).argmax()))
    wall_s = time.perf_counter() - started
    decode_s = wall_s - first_token_s
    return {
        "wall_s": wall_s,
        "ttft_s": first_token_s,
        "tpot_s": decode_s / (output_tokens - 1) if output_tokens > 1 else None,
        "tokens": outputs,
    }


def prefill(model: Model, prompts: list[list[int]], outputs: list[list[int]]) -> None:
    entries = [
        (token, position, sequence, position == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    for start in range(0, len(entries), NUM_BATCH):
        part = entries[start : start + NUM_BATCH]
        model.decode(part)
        for place, (_, _, sequence, wants_logits) in enumerate(part):
            if wants_logits:
                outputs[sequence].append(int(model.logits(place).argmax()))


def score(name: str, token_ids: list[int]) -> dict[str, list[Any]]:
    """Return the log-probability of each token but the first, and the likeliest token in its place."""
    model = models[name]
    model.clear()
    logprobs: list[float] = []
    top: list[int] = []
    for start in range(0, len(token_ids) - 1, NUM_SCORED):
        part = token_ids[start : min(start + NUM_SCORED, len(token_ids) - 1)]
        model.decode([(token, start + place, 0, True) for place, token in enumerate(part)])
        for place in range(len(part)):
            logits = model.logits(place).astype(np.float64)
            highest = logits.max()
            log_sum = highest + math.log(np.exp(logits - highest).sum())
            logprobs.append(float(logits[token_ids[start + place + 1]] - log_sum))
            top.append(int(logits.argmax()))
    return {"logprobs": logprobs, "top": top}


def describe() -> dict[str, str]:
    return {
        "llama-cpp-python": lib.__version__,
        "system": lib.llama_print_system_info().decode().strip(),
    }


if __name__ == "__main__":
    lib.llama_backend_init()
    serve(
        {
            "load": load,
            "unload": unload,
            "requantize": requantize,
            "run": run,
            "score": score,
            "describe": describe,
        }
    )
