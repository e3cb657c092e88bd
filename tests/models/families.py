"""Which twin stands for each row of the registry? A row without one fails the tests that read this table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.models.twins import make_gemma3, make_gptj, make_llama, make_mistral, make_qwen2, make_qwen3

FAMILIES: dict[str, Callable[..., Any]] = {
    "LlamaForCausalLM": make_llama,
    "MistralForCausalLM": make_mistral,
    "Qwen2ForCausalLM": make_qwen2,
    "Qwen3ForCausalLM": make_qwen3,
    "Gemma3ForCausalLM": make_gemma3,
    "GPTJForCausalLM": make_gptj,
}
