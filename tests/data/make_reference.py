"""Which greedy tokens does transformers produce for prompts that the common reference file lacks?

Writes `own_reference.json` beside itself: a prompt beyond 600 tokens for each model (Gemma's window is 512),
a prompt outside ASCII for each, and a chat of several turns for SmolLM2. Run it once, with both models
fetched (`make models`) and `accelerate` installed, which transformers wants for GGUF files:

    python tests/data/make_reference.py .models
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2 = "smollm2-135m-instruct-q4_1"
GEMMA3 = "gemma-3-270m-q4_k_m"
NUM_NEW = 32
PLACES = ("harbour", "orchard", "mill", "library", "bridge", "bakery", "lighthouse", "market")
PEOPLE = ("Ada", "Bruno", "Chiara", "Dmitri", "Esther", "Farid", "Greta")
THINGS = ("a letter", "two lanterns", "an old map", "fresh bread", "a broken clock", "blue paint")


def long_prompt() -> str:
    """A diary of which no two entries are alike; the question at its end asks about the first one."""
    entries = [
        f"Day {day}: {PEOPLE[day % 7]} walked to the {PLACES[day % 8]} with {THINGS[day % 6]} and met "
        f"{PEOPLE[(3 * day + 1) % 7]} there at {day % 12 + 1} o'clock."
        for day in range(1, 29)
    ]
    return "\n".join(entries) + "\n\nQuestion: Who walked to the orchard on day 1?\nAnswer:"


RAW_PROMPTS = {
    "long": long_prompt(),
    "non-ASCII": "Die Straßen von Zürich – 東京の天気は、とても寒い。Привет, café 🙂👩‍🚀 naïve:",
}
CHAT = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "My cat is called Nimbus. What could I call my second cat?"},
    {"role": "assistant", "content": "You could call your second cat Cirrus."},
    {"role": "user", "content": "And what is my first cat called?"},
]


@torch.no_grad()
def greedy(model: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    """Return the greedy continuation and the gap between the two best logits at each position."""
    out = model.generate(
        torch.tensor([ids]),
        do_sample=False,
        max_new_tokens=NUM_NEW,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [logits[0].float().topk(2).values for logits in out.logits]
    return out.sequences[0, len(ids) :].tolist(), [round(float(b[0] - b[1]), 4) for b in best]


def cases_of(name: str, folder: Path) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=f"{name}.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"{name}.gguf", dtype=torch.float32)
    model.train(False)
    prompts: list[tuple[str, Any, list[int]]] = [
        (f"raw {label}", prompt, tokenizer(prompt).input_ids) for label, prompt in RAW_PROMPTS.items()
    ]
    if name == SMOLLM2:
        rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(rendered, add_special_tokens=False).input_ids
        prompts.append(("chat of several turns", CHAT, ids))
    cases = []
    for label, prompt, ids in prompts:
        output, gaps = greedy(model, ids)
        cases.append(
            {
                "model": name,
                "label": label,
                "prompt": prompt,
                "prompt_token_ids": ids,
                "output_token_ids": output,
                "text": tokenizer.decode(output, skip_special_tokens=True),
                "top1_top2_logit_gap": gaps,
            }
        )
    return cases


def main() -> None:
    folder = Path(sys.argv[1])
    made_with = f"transformers {transformers.__version__}, torch {torch.__version__}, float32, greedy"
    cases = [case for name in (SMOLLM2, GEMMA3) for case in cases_of(name, folder)]
    document = {"made_with": made_with, "made_by": "tests/data/make_reference.py", "cases": cases}
    text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
    Path(__file__).with_name("own_reference.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
