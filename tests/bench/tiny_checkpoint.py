"""Which model do the tests of the command line and of the benchmarks run? A random Llama of a few kilobytes.

Its tokenizer has one token per byte and a ChatML-like template, so every text has ids and every id a text.
Nothing of it is downloaded or needs transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SEED = 11
NUM_LAYERS, HIDDEN, INTER, HEADS, KV_HEADS, HEAD_DIM = 2, 32, 48, 4, 2, 8
NUM_BYTES = 256
SPECIAL = ("<|im_start|>", "<|im_end|>")
VOCAB_SIZE = NUM_BYTES + len(SPECIAL)
# Long enough that a generation outlasts a test that interrupts it.
MAX_POSITIONS = 16384
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_checkpoint(folder: Path, *, has_template: bool = True) -> Path:
    """Write config, weights and tokenizer into `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config()), encoding="utf-8")
    save_file(weights(), folder / "model.safetensors")
    write_tokenizer(folder, has_template=has_template)
    return folder


def config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": NUM_BYTES + 1,
        "dtype": "float32",
    }


def weights() -> dict[str, torch.Tensor]:
    """Return weights wide enough that greedy text does not settle on one token."""
    generator = torch.Generator().manual_seed(SEED)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.3

    tensors = {
        "model.embed_tokens.weight": matrix(VOCAB_SIZE, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": matrix(VOCAB_SIZE, HIDDEN),
    }
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            f"{prefix}.mlp.gate_proj.weight": matrix(INTER, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": matrix(INTER, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": matrix(HIDDEN, INTER),
        }
    return tensors


def write_tokenizer(folder: Path, *, has_template: bool) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == NUM_BYTES
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    settings: dict[str, object] = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    if has_template:
        settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
