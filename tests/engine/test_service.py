"""Does a service give each door what it promises: checked requests, one wake-up a batch, health, an end?"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from slipstream.core.collector import FROZEN
from slipstream.core.errors import ConfigError, EngineError, RequestError
from slipstream.core.outputs import RequestOutput
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.client import InProcessClient
from slipstream.engine.pooling import hidden_states_only
from slipstream.engine.prompts import Encoded
from slipstream.engine.service import EngineService
from tests.engine.served import DEADLINE_S, INFO, Stream, eventually, fake_client, prompt


@pytest.fixture
def client() -> InProcessClient:
    return fake_client(step_s=0.001)


@pytest.fixture
def service(client: InProcessClient) -> Iterator[EngineService]:
    service = EngineService(INFO, client, None)
    yield service
    service.close()


def test_requests_are_checked_and_named(service: EngineService) -> None:
    request = service.create_request(Encoded([5]), SamplingParams())
    other = service.create_request(Encoded([5]), SamplingParams(), request_id="mine")
    assert request.request_id.startswith(service.service_id) and other.request_id == "mine"
    changed = service.create_request(Encoded([5]), SamplingParams(), change=hidden_states_only)
    assert changed.max_tokens == 0
    with pytest.raises(RequestError, match="prompt_token_ids"):
        service.create_request(Encoded([1000]), SamplingParams())
    with pytest.raises(RequestError, match="no good"):
        service.create_request(Encoded([], error=RequestError("no good")), SamplingParams())
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        service.create_request(Encoded([5]), SamplingParams(stop="x"))


def test_one_wake_up_follows_each_batch(service: EngineService) -> None:
    """However many streams an engine's step feeds, `after_batch` comes once, after all their listeners."""
    log: list[str] = []
    threads: set[int] = set()
    done = threading.Event()

    def listener(output: RequestOutput) -> None:
        log.append("output")
        threads.add(threading.get_ident())

    def after_batch() -> None:
        log.append("wake")
        threads.add(threading.get_ident())
        if log.count("output") >= 8 * 20:
            done.set()

    service.after_batch = after_batch
    params = SamplingParams(max_tokens=20, seed=7, detokenize=False)
    for i in range(8):
        service.submit(service.create_request(Encoded(prompt(i)), params), listener, streams=True)
    assert done.wait(DEADLINE_S)
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert "wake,wake" not in ",".join(log) and log[-1] == "wake"
    # All eight streams run together, so a batch is about eight outputs.
    assert log.count("wake") < log.count("output") / 2


def test_the_collector_is_given_back_once(service: EngineService) -> None:
    FROZEN.hold()
    service.hold_collector()
    service.close()
    service.close()
    assert gc.get_freeze_count() > 0
    FROZEN.release()
    assert gc.get_freeze_count() == 0


def test_health_tells_what_the_engine_does(service: EngineService, client: InProcessClient) -> None:
    assert service.health().is_ready
    Stream(service, prompt(1), 9).check()
    assert service.health().num_steps >= 9
    client.engine.refusal = RequestError("it sleeps", code="engine_asleep")
    assert (service.health().state, service.health().cause) == ("asleep", "it sleeps")
    client.engine.refusal = None
    client._max_step_s = 0.05
    hanging = service.command("hang", seconds=0.5)
    eventually(lambda: service.health().state == "stuck", "a hung step looks fine")
    assert "step has taken" in service.health().cause
    hanging.result(DEADLINE_S)
    eventually(lambda: service.health().is_ready, "it does not come back")
    service.close()
    assert service.health().state == "stopped"


def test_a_stopped_service_refuses_with_the_cause(service: EngineService, client: InProcessClient) -> None:
    stream = Stream(service, prompt(1), 5000).begin()

    def explode() -> None:
        raise RuntimeError("the device is gone")

    client.engine.step = explode  # type: ignore[method-assign,assignment]
    error = stream.wait().error
    assert error is not None and error.code == "engine_stopped" and "the device is gone" in error.message
    health = service.health()
    assert health.state == "stopped" and "the device is gone" in health.cause
    with pytest.raises(EngineError, match="the device is gone"):
        Stream(service, prompt(1), 5)
    with pytest.raises(EngineError, match="the device is gone"):
        service.command("echo")
    # What was counted can still be looked at.
    stats = service.stats().result(DEADLINE_S)
    assert stats["finish_reasons"] == {"error": 1} and stats["num_pages"] == 4000


def test_commands_are_known_by_name(service: EngineService) -> None:
    assert service.command("echo", a=1).result(DEADLINE_S) == {"a": 1}
    with pytest.raises(ConfigError, match=r"no command 'stat'.*Did you mean 'stats'"):
        service.command("stat")
    with pytest.raises(ConfigError, match="missing a required argument"):
        service.command("hang")
