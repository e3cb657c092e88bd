"""Are `/v1/embeddings` the vectors that `LLM.encode` gives, in every form that clients ask for?"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from slipstream import LLM
from slipstream.engine.config import EngineConfig
from tests.serve.tiny_server import MODEL, RunningServer

PATH = "/v1/embeddings"


def vectors(server: RunningServer, **body: Any) -> np.ndarray[Any, Any]:
    answer = server.ok(PATH, **body)
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    return np.array([entry["embedding"] for entry in answer["data"]], dtype=np.float32)


def test_an_answer_has_the_fields_clients_read(tiny: RunningServer) -> None:
    answer = tiny.ok(PATH, model=MODEL, input=["ba de", "fi"])
    assert answer["object"] == "list" and answer["model"] == MODEL
    assert [entry["object"] for entry in answer["data"]] == ["embedding"] * 2
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_vectors_are_those_of_the_python_door(tiny: RunningServer, pooling: str) -> None:
    info = tiny.service.info
    assert isinstance(EngineConfig(model=info.model), EngineConfig)
    with LLM(info.model, device="cpu", dtype="float32", max_seq_len=256) as llm:
        expected = [llm.encode(text, pooling=pooling, normalize=True).embedding for text in ("ba de", "fi")]
    # The same float32 arithmetic; sums may differ by the rows of a step.
    np.testing.assert_allclose(vectors(tiny, input=["ba de", "fi"], pooling=pooling), expected, atol=1e-5)


def test_every_form_of_input_is_taken(tiny: RunningServer) -> None:
    ids = tiny.ok("/tokenize", prompt="ba de")["tokens"]
    [plain] = vectors(tiny, input="ba de")
    for given in (ids, [ids], ["ba de"]):
        np.testing.assert_allclose(vectors(tiny, input=given)[0], plain, atol=1e-5)
    assert float(np.linalg.norm(plain)) == pytest.approx(1.0, abs=1e-5)
    [raw] = vectors(tiny, input="ba de", normalize=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw), plain, atol=1e-5)


def test_base64_is_the_same_vector(tiny: RunningServer) -> None:
    text = tiny.ok(PATH, input="ba de", encoding_format="base64")["data"][0]["embedding"]
    decoded = np.frombuffer(base64.b64decode(text), dtype="<f4")
    np.testing.assert_allclose(decoded, vectors(tiny, input="ba de")[0], atol=1e-6)


def test_fewer_dimensions_are_the_first_ones_at_length_1(tiny: RunningServer) -> None:
    [plain] = vectors(tiny, input="ba de")
    [short] = vectors(tiny, input="ba de", dimensions=5)
    np.testing.assert_allclose(short, plain[:5] / np.linalg.norm(plain[:5]), atol=1e-5)
    [raw] = vectors(tiny, input="ba de", dimensions=5, normalize=False)
    assert float(np.linalg.norm(raw)) != pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [("dimensions", 0), ("dimensions", -1), ("dimensions", 10**6), ("dimensions", True), ("pooling", "max"),
     ("encoding_format", "hex"), ("normalize", "yes"), ("truncate_prompt_tokens", 0)],
)  # fmt: skip
def test_what_cannot_be_is_refused(tiny: RunningServer, field: str, value: Any) -> None:
    assert tiny.refusal(PATH, input="ba", **{field: value})["param"] == field


def test_an_input_beyond_the_context_is_refused_or_cut(tiny: RunningServer) -> None:
    ids = [70 + i % 200 for i in range(300)]
    assert tiny.refusal(PATH, input=ids)["code"] == "context_length_exceeded"
    [cut] = vectors(tiny, input=ids, truncate_prompt_tokens=10)
    np.testing.assert_allclose(cut, vectors(tiny, input=ids[-10:])[0], atol=1e-5)
