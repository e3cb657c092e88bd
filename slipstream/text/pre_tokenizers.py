"""How does each byte-level vocabulary of a GGUF file cut text into words before merging?

`tokenizer.ggml.pre` names the cut a vocabulary was trained with. A wrong cut gives plausible but different
ids, so an unknown name is an error, never a default. The expressions are those the models' own tokenizer.json
files (or their tiktoken definitions) hold; the names are the GGUF format's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenizers import Regex, pre_tokenizers

from slipstream.core.errors import CheckpointError, nearest

# GPT-2: contractions, an optional space with letters, digits or symbols, then white space.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class WordCut:
    """`splits` are applied in turn, each isolating its matches.

    `ignore_merges` takes a word that is in the vocabulary whole, whatever the merges say. `adds_bos` is what
    holds where the file does not say whether BOS goes in front.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False

    def build(self) -> Any:
        steps = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in self.splits]
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])


PLAIN = WordCut((GPT2,))
DIGITS = WordCut((DIGIT, GPT2))
LLAMA = WordCut((LLAMA3,), ignore_merges=True, adds_bos=True)
QWEN = WordCut((QWEN2,))
O200K = WordCut((GPT4O,))

WORD_CUTS: dict[str, WordCut] = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe"), PLAIN),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), DIGITS),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), LLAMA
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), WordCut((LLAMA3,))),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "kormo", "megrez"), QWEN),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), O200K),
    "tekken": WordCut((TEKKEN,), ignore_merges=True),
    "deepseek-v3": WordCut((r"\p{N}{1,3}", DEEPSEEK3_CJK, DEEPSEEK3)),
}


def word_cut(pre: str) -> WordCut:
    """Return the cut named `pre`; raise CheckpointError for a name that is not known."""
    if pre not in WORD_CUTS:
        raise CheckpointError(
            f"The GGUF file names pre-tokenizer {pre!r}; supported: {', '.join(sorted(WORD_CUTS))}."
            f"{nearest(pre, WORD_CUTS)} Load the original folder (with tokenizer.json) instead."
        )
    return WORD_CUTS[pre]
