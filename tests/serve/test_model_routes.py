"""Do `/tokenize`, `/detokenize`, `/v1/models`, `/version` and `/server_info` say what generation does?"""

from __future__ import annotations

from slipstream import __version__
from tests.serve.tiny_server import MODEL, RunningServer


def test_ids_and_text_go_both_ways(tiny: RunningServer) -> None:
    answer = tiny.ok("/tokenize", prompt="ba né 🦀", return_token_strs=True)
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 256
    assert answer["token_strs"][:2] == ["ba", " "] and len(answer["token_strs"]) == answer["count"]
    assert tiny.ok("/detokenize", model=MODEL, tokens=answer["tokens"])["prompt"] == "ba né 🦀"
    assert tiny.ok("/tokenize", prompt="ba")["token_strs"] is None
    assert tiny.ok("/tokenize", prompt="")["tokens"] == []
    assert tiny.ok("/detokenize", tokens=[])["prompt"] == ""


def test_special_tokens_show_in_a_text_and_are_read_in_a_raw_prompt(tiny: RunningServer) -> None:
    assert tiny.ok("/detokenize", tokens=[1, 70, 2])["prompt"].startswith("<s>")
    assert tiny.ok("/tokenize", prompt="<s>ba")["tokens"][0] == 1


def test_the_tokenizer_is_described(tiny: RunningServer) -> None:
    facts = tiny.client.get("/tokenizer_info").json()
    assert facts["bos_token"] == "<s>" and facts["eos_token"] == "</s>" and facts["vocab_size"] == 320
    assert "add_generation_prompt" in facts["chat_template"]


def test_fields_of_messages_do_not_go_with_a_prompt(tiny: RunningServer) -> None:
    for field in ("add_generation_prompt", "continue_final_message"):
        assert tiny.refusal("/tokenize", prompt="ba", **{field: True})["param"] == field
    both = tiny.refusal("/tokenize", prompt="ba", messages=[{"role": "user", "content": "x"}])
    assert "both" in both["message"]


def test_the_models_are_the_served_names(tiny: RunningServer) -> None:
    answer = tiny.client.get("/v1/models").json()
    assert answer["object"] == "list"
    [card] = answer["data"]
    assert card["id"] == MODEL and card["object"] == "model" and card["max_model_len"] == 256
    assert tiny.client.get(f"/v1/models/{MODEL}").json() == card


def test_facts_name_no_path(tiny: RunningServer) -> None:
    assert tiny.client.get("/version").json() == {"version": __version__}
    answer = tiny.client.get("/server_info")
    facts = answer.json()
    assert facts["models"] == [MODEL] and facts["limits"]["max_seq_len"] == 256
    assert facts["device"] == "cpu" and facts["dtype"] == "float32"
    assert tiny.service.info.model not in answer.text and "/" not in answer.text
