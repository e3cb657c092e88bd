"""Law 1 with blocks that run fused: the same greedy tokens as from composed blocks, in steps of any kind.

The definitions of the fused ops run here, in float32 on a CPU, where no step would be fused by itself; what
the test holds is how blocks hand prepared norms on, across chunks, mixed steps, prefix hits and decoding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM
from slipstream.layers import decoder_block
from tests.engine.test_laws import GREEDY, PROMPTS
from tests.engine.tiny import tiny_llama, write_folder

OPTIONS = {"device": "cpu", "dtype": "float32", "attn_backend": "torch"}
CHUNKED = {"max_num_tokens": 24, "max_batch_size": 8}


@pytest.mark.parametrize("options", [{}, CHUNKED], ids=["whole", "chunked"])
def test_tokens_are_those_of_composed_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    folder = write_folder(tiny_llama(), tmp_path)
    with LLM(folder, **OPTIONS) as llm:
        expected = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY, raise_on_error=True)]
    num_fused: list[int] = []

    def suits(x_TD: Any, batch: Any) -> bool:
        num_fused.append(len(x_TD))
        return True

    monkeypatch.setattr(decoder_block, "suits", suits)
    with LLM(folder, **OPTIONS, **options) as llm:
        for _ in range(2):  # the second time from prefix hits
            outputs = llm.generate(PROMPTS, GREEDY, raise_on_error=True)
            assert [out.outputs[0].token_ids for out in outputs] == expected
        alone = llm.generate(PROMPTS[0], GREEDY[0], raise_on_error=True)
        assert alone.outputs[0].token_ids == expected[0]
    assert min(num_fused) == 1 and max(num_fused) > 8
