"""Do a conversation's turns stay well-formed whatever happens to an answer?"""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.cli.conversation import Conversation
from slipstream.core.errors import RequestError
from slipstream.core.sampling_params import SamplingParams
from slipstream.llm import LLM

BRIEF = SamplingParams(max_tokens=6, ignore_eos=True)


def silent(text: str) -> None:
    pass


def interrupt_after(count: int) -> Any:
    """Return a writer that is interrupted, as by Ctrl-C, after `count` pieces."""
    pieces: list[str] = []

    def write(text: str) -> None:
        if len(pieces) == count:
            raise KeyboardInterrupt
        pieces.append(text)

    return write


def test_an_answer_is_streamed_and_remembered(tiny_llm: LLM) -> None:
    conversation = Conversation(tiny_llm, BRIEF, system="be kind")
    shown: list[str] = []
    output = conversation.ask("hello", shown.append)
    assert "".join(shown) == output.outputs[0].text != ""
    assert conversation.turns == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": output.outputs[0].text},
    ]
    assert conversation.num_tokens == len(output.prompt_token_ids) + 6


def test_each_turn_sees_the_earlier_ones(tiny_llm: LLM) -> None:
    conversation = Conversation(tiny_llm, BRIEF, system="be kind")
    first = conversation.ask("hello", silent).outputs[0].text
    second = conversation.ask("and you?", silent)
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and you?"},
    ]
    expected = tiny_llm.chat(messages, BRIEF)
    assert second.prompt_token_ids == expected.prompt_token_ids
    assert second.outputs[0].token_ids == expected.outputs[0].token_ids


def test_later_turns_compute_only_what_is_new(tiny_llm: LLM) -> None:
    conversation = Conversation(tiny_llm, BRIEF, system=None)
    first = conversation.ask("a question that fills several blocks of the cache " * 4, silent)
    before = tiny_llm.get_stats()["executed_tokens"]
    second = conversation.ask("more", silent)
    executed = tiny_llm.get_stats()["executed_tokens"] - before
    # At the worst the answer's text encodes differently, and the last block begun is computed again.
    assert second.num_cached_tokens >= len(first.prompt_token_ids) - 32
    assert executed == len(second.prompt_token_ids) - second.num_cached_tokens + 6 - 1


def test_an_interrupted_answer_keeps_what_was_shown(tiny_llm: LLM) -> None:
    conversation = Conversation(tiny_llm, BRIEF, system=None)
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("hello", interrupt_after(2))
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
    assert conversation.turns[1]["content"]
    # The engine is done with it by then.
    assert tiny_llm.get_stats()["num_running"] == 0
    assert conversation.num_tokens > len("hello")
    conversation.ask("go on", silent)
    assert len(conversation.turns) == 4


def test_an_answer_interrupted_before_its_first_token_leaves_no_turn(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(tiny_llm, BRIEF, system=None)

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiny_llm, "chat_async", interrupt)
        with pytest.raises(KeyboardInterrupt):
            conversation.ask("hello", silent)
    assert conversation.turns == []


def test_what_does_not_fit_is_refused_with_both_numbers(tiny_llm: LLM) -> None:
    conversation = Conversation(tiny_llm, BRIEF, system=None)
    answered = conversation.ask("hello", silent)
    limit = conversation.max_tokens
    with pytest.raises(RequestError) as refused:
        conversation.ask("x" * limit, silent)
    assert refused.value.code == "context_length_exceeded"
    # Each character is a token: the question alone fills the context.
    given = str(refused.value)
    assert f"{limit:,}" in given and "/reset" in given and "--max-seq-len" in given
    assert any(int(word) > limit for word in given.split() if word.isdigit())
    # The question is taken back; a shorter one goes on from where the conversation stood.
    assert conversation.turns[-1]["content"] == answered.outputs[0].text
    conversation.ask("shorter", silent)


def test_an_answer_too_long_for_the_rest_is_refused(tiny_llm: LLM) -> None:
    limit = tiny_llm.startup.limits.max_seq_len
    conversation = Conversation(tiny_llm, SamplingParams(max_tokens=limit), system=None)
    with pytest.raises(RequestError, match=r"no longer fits .*max_tokens is"):
        conversation.ask("hello", silent)
    assert conversation.turns == []


def test_other_refusals_keep_their_words(tiny_llm: LLM) -> None:
    conversation = Conversation(tiny_llm, SamplingParams(temperature=-1.0), system=None)
    with pytest.raises(RequestError, match=r"^temperature must be"):
        conversation.ask("hello", silent)
    assert conversation.turns == []


def test_reset_forgets_the_turns_and_keeps_the_system_message(tiny_llm: LLM) -> None:
    conversation = Conversation(tiny_llm, BRIEF, system="be kind")
    first = conversation.ask("hello", silent)
    conversation.reset()
    assert (conversation.turns, conversation.num_tokens, conversation.system) == ([], 0, "be kind")
    assert conversation.ask("hello", silent).prompt_token_ids == first.prompt_token_ids
    conversation.reset(system="be brief")
    assert conversation.system == "be brief" and conversation.turns == []
