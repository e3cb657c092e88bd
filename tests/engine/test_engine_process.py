"""Is an engine's process started, watched and ended so that nobody waits for a dead one, and none stays?"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from slipstream.core.env import child_environment
from slipstream.core.errors import CheckpointError, ConfigError, EngineError, MissingExtraError
from slipstream.core.outputs import TokenEvent
from slipstream.engine import sockets
from slipstream.engine.config import EngineConfig
from slipstream.engine.engine_process import EngineProcess, start_engine_process
from slipstream.engine.liveness import LivenessLimits
from slipstream.engine.process_client import ProcessClient
from slipstream.engine.router_client import RouterClient
from slipstream.engine.service import EngineService
from slipstream.engine.wire import Events, Failure
from tests.engine.served import DEADLINE_S, INFO, Stream, door, eventually, prompt

CHILD = "tests.engine.fault_child"
# What the table asks for: a dead engine is known within this.
KNOWN_S = 5.0
# For the tests of silence; the others go by the defaults, so that a busy machine fails none of them.
SHORT = LivenessLimits(max_step_s=0.5, max_silence_s=1.2, kill_after_s=0.6)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")


def start(model: str = "fake", **options: Any) -> EngineProcess:
    return start_engine_process(EngineConfig(model=model), module=CHILD, **options)


@pytest.fixture
def limits() -> LivenessLimits:
    return LivenessLimits()


@pytest.fixture
def process(limits: LivenessLimits) -> Iterator[EngineProcess]:
    process = start(limits=limits)
    yield process
    process.stop()
    assert process.wait(0.0)


@pytest.fixture
def service(process: EngineProcess, limits: LivenessLimits) -> Iterator[EngineService]:
    with door(process.endpoint, limits=limits) as service:
        yield service


def pid_of(process: EngineProcess) -> int:
    assert process.pid is not None
    return process.pid


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_it_serves_and_leaves_nothing(process: EngineProcess, service: EngineService) -> None:
    pid = pid_of(process)
    folder = Path(process.endpoint.address.removeprefix("ipc://")).parent
    assert pid != os.getpid() and process.health().is_ready and process.info is not None
    streams = [Stream(service, prompt(i), 10, n=1 + i % 2) for i in range(6)]
    for stream in streams:
        stream.check()
    eventually(lambda: service.health().num_steps > 0, "no heartbeat tells of steps")
    process.stop()
    assert is_gone(pid) and not folder.exists()
    assert process.health().state == "stopped"
    process.stop()


def test_progress_is_told_and_what_a_library_prints_is_not_taken_for_it(capfd: Any) -> None:
    told: list[tuple[str, float]] = []
    process = start("prints", progress=lambda what, share: told.append((what, share)))
    process.stop()
    assert told[0] == ("loading weights", 0.5) and told[-1] == ("loading weights", 1.0)
    captured = capfd.readouterr()
    assert captured.out == "" and "a library says hello" in captured.err


FAILURES = [
    ("refused", CheckpointError, "damaged at byte 7"),
    ("raises", EngineError, "did not start: ValueError: a surprise"),
    ("killed", EngineError, "ended by SIGKILL while loading weights"),
    ("exits", EngineError, "ended with status 3 while loading weights"),
    ("mumbles", EngineError, "could not be started: DecodeError"),
]


@pytest.mark.parametrize(("model", "kind", "message"), FAILURES, ids=[row[0] for row in FAILURES])
def test_r37_a_start_that_fails_says_why_at_once(
    model: str, kind: type[Exception], message: str, capfd: Any
) -> None:
    before = {child.pid for child in psutil.Process().children()}
    started = time.monotonic()
    with pytest.raises(kind, match=message):
        start(model)
    assert time.monotonic() - started < DEADLINE_S / 2
    assert {child.pid for child in psutil.Process().children()} == before
    assert threading.active_count() < 20 and "Traceback" not in capfd.readouterr().out


def test_r37_a_start_that_hangs_can_be_given_up() -> None:
    process = EngineProcess(EngineConfig(model="hangs"), module=CHILD)
    raised: list[Exception] = []

    def start() -> None:
        try:
            process.start()
        except EngineError as error:
            raised.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    eventually(lambda: process.pid is not None, "no process")
    pid = pid_of(process)
    process.kill()
    thread.join(DEADLINE_S)
    assert not thread.is_alive() and is_gone(pid)
    assert "SIGKILL" in str(raised[0])


def test_without_pyzmq_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(sockets.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'slipstream-llm\[serve\]'"):
        start()


def test_a_folder_too_deep_for_a_socket_is_refused_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr(sockets.tempfile, "tempdir", str(deep))
    with pytest.raises(ConfigError, match="set TMPDIR to a shorter one"):
        start()
    assert list(deep.iterdir()) == []


def test_a_configuration_that_cannot_cross_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="tokenizer is a object, which cannot cross"):
        start_engine_process(EngineConfig(model="fake", tokenizer=object()), module=CHILD)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_r35_a_killed_engine_fails_what_runs_and_is_known(
    process: EngineProcess, service: EngineService, is_loaded: bool
) -> None:
    streams = [Stream(service, prompt(i), 20_000).begin() for i in range(4 * is_loaded)]
    command = service.command("hang", seconds=60.0) if is_loaded else None
    killed = time.monotonic()
    os.kill(pid_of(process), signal.SIGKILL)
    for stream in streams:
        error = stream.wait(KNOWN_S).error
        assert error is not None and error.code == "engine_stopped" and "process has ended" in error.message
    eventually(lambda: service.health().state == "stopped", "it is not known", deadline_s=KNOWN_S)
    eventually(lambda: process.health().state == "stopped", "its owner does not know", deadline_s=KNOWN_S)
    assert time.monotonic() - killed < KNOWN_S
    assert "SIGKILL" in process.cause and "ended" in service.health().cause
    if command is not None:
        with pytest.raises(EngineError, match="ended"):
            command.result(KNOWN_S)
    with pytest.raises(EngineError, match="ended"):
        Stream(service, prompt(1), 5)


def test_r35_an_engine_that_is_started_again_serves_again() -> None:
    process = start(restart=True)
    try:
        with door(process.endpoint, awaits_restart=True) as service:
            old = pid_of(process)
            stream = Stream(service, prompt(1), 20_000).begin()
            service.command("die")
            error = stream.wait(KNOWN_S).error
            assert error is not None and error.code == "engine_stopped"
            eventually(lambda: process.num_starts == 2, "it is not started again")
            eventually(lambda: service.health().is_ready, "it does not come back")
            assert pid_of(process) != old and is_gone(old)
            Stream(service, prompt(1), 10).check()
            assert process.num_starts == 2 and "status 7" in process.cause
    finally:
        process.stop()


@pytest.mark.parametrize("limits", [SHORT], ids=["short"])
@pytest.mark.parametrize("is_loaded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_r36_a_frozen_process_is_seen_and_then_killed(
    process: EngineProcess, service: EngineService, is_loaded: bool
) -> None:
    stream = Stream(service, prompt(1), 20_000).begin() if is_loaded else None
    pid = pid_of(process)
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: service.health().state == "stuck", "nobody notices", deadline_s=KNOWN_S)
    assert "not been heard" in service.health().cause
    assert process.wait(KNOWN_S), "it stays in limbo"
    assert is_gone(pid) and "not been heard" in process.cause
    if stream is not None:
        error = stream.wait(KNOWN_S).error
        assert error is not None and error.code == "engine_stopped"
    eventually(lambda: service.health().state == "stopped", "it is not known", deadline_s=KNOWN_S)


@pytest.mark.parametrize("limits", [SHORT], ids=["short"])
@pytest.mark.slow
def test_r36_a_process_that_comes_back_goes_on(process: EngineProcess, service: EngineService) -> None:
    stream = Stream(service, prompt(1), 100).begin()
    os.kill(pid_of(process), signal.SIGSTOP)
    eventually(lambda: service.health().state == "stuck", "nobody notices", deadline_s=KNOWN_S)
    # Its owner kills it some time later, not at once.
    os.kill(pid_of(process), signal.SIGCONT)
    eventually(lambda: service.health().is_ready, "it is not seen to come back")
    stream.check()


@pytest.mark.parametrize("limits", [SHORT], ids=["short"])
def test_r36_a_step_that_does_not_end_is_seen_and_then_killed(
    process: EngineProcess, service: EngineService
) -> None:
    """The heartbeat goes on, from a thread beside the one that hangs."""
    pid = pid_of(process)
    hanging = service.command("hang", seconds=600.0)
    eventually(lambda: service.health().state == "stuck", "nobody notices", deadline_s=KNOWN_S)
    assert "step has taken" in service.health().cause
    assert process.wait(KNOWN_S), "it stays in limbo"
    assert is_gone(pid)
    with pytest.raises(EngineError):
        hanging.result(KNOWN_S)


OWNER = """
import sys, time
from slipstream.engine.config import EngineConfig
from slipstream.engine.engine_process import start_engine_process
process = start_engine_process(EngineConfig(model="fake"), module={child!r})
print(process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_r38_an_engine_does_not_outlive_its_owner(number: int) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(child=CHILD)], stdout=subprocess.PIPE, env=child_environment()
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert psutil.pid_exists(pid)
    owner.send_signal(number)
    owner.wait(DEADLINE_S)
    owner.stdout.close()
    eventually(lambda: is_gone(pid), "the engine stays behind", deadline_s=KNOWN_S)


@pytest.mark.slow
def test_r38_a_frozen_owner_that_is_killed_takes_its_engine_along() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(child=CHILD)], stdout=subprocess.PIPE, env=child_environment()
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    os.kill(pid, signal.SIGSTOP)
    owner.kill()
    owner.wait(DEADLINE_S)
    owner.stdout.close()
    eventually(lambda: is_gone(pid), "a frozen engine stays behind", deadline_s=KNOWN_S)


def test_signals_of_a_terminal_are_the_owners_to_decide(
    process: EngineProcess, service: EngineService
) -> None:
    stream = Stream(service, prompt(1), 30)
    os.kill(pid_of(process), signal.SIGINT)
    stream.check()
    assert os.getpgid(pid_of(process)) != os.getpgid(0)
    assert process.health().is_ready


def test_r47_a_drained_engine_ends_what_runs(process: EngineProcess, service: EngineService) -> None:
    streams = [Stream(service, prompt(i), 40).begin() for i in range(3)]
    # Its answer comes after the requests before it have been taken.
    service.stats().result(DEADLINE_S)
    os.kill(pid_of(process), signal.SIGTERM)
    for stream in streams:
        stream.check()
    assert process.wait(DEADLINE_S) and "status 0" in process.cause


def test_r47_last_events_that_come_with_the_end_are_not_lost(process: EngineProcess) -> None:
    client = ProcessClient(process.endpoint)
    try:
        last = TokenEvent("r", 0, [7], finish_reason="length")
        client._inbox += [Events([last]), Failure("The engine is shut down.")]
        assert client._take() == [last]
        with pytest.raises(EngineError, match="shut down"):
            client._take()
    finally:
        client.close()


def test_r47_stop_waits_for_what_runs_only_as_long_as_it_may(
    process: EngineProcess, service: EngineService
) -> None:
    short, long = Stream(service, prompt(1), 40).begin(), Stream(service, prompt(2), 20_000).begin()
    service.stats().result(DEADLINE_S)
    process.stop(drain_s=0.8)
    short.check()
    error = long.wait(KNOWN_S).error
    assert error is not None and error.code == "engine_stopped"


def test_r34_a_door_whose_process_ends_is_forgotten(process: EngineProcess, service: EngineService) -> None:
    endpoint = process.endpoint
    code = f"""
import os
from slipstream.engine.sockets import Endpoint
from tests.engine.served import Stream, door, prompt
with door(Endpoint{(endpoint.address, endpoint.heartbeat, endpoint.secret)!r}) as other:
    Stream(other, prompt(3), 20_000).begin()
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], env=child_environment(), timeout=DEADLINE_S)
    stats = service.stats
    eventually(lambda: stats().result(DEADLINE_S)["num_doors"] == 1, "a dead door stays", deadline_s=KNOWN_S)
    eventually(lambda: stats().result(DEADLINE_S)["num_running"] == 0, "its request runs on")
    found = stats().result(DEADLINE_S)
    assert found["num_free_pages"] == found["num_pages"]


@pytest.mark.slow
def test_r35_engines_killed_at_random_leave_nobody_waiting() -> None:
    """Two engines behind a router, one of them killed every 1.5 s: each request is whole or has its error."""
    rng = random.Random(1)
    processes = [start(restart=True) for _ in range(2)]
    clients = [ProcessClient(process.endpoint, awaits_restart=True) for process in processes]
    service = EngineService(INFO, RouterClient(clients), None)
    streams: list[Stream] = []
    num_kills, killed_s = 0, time.monotonic()
    try:
        while num_kills < 6:
            with contextlib.suppress(EngineError):  # both are down
                streams.append(Stream(service, prompt(rng.randrange(50)), rng.randrange(1, 60)))
            if rng.random() < 0.1:
                rng.choice(streams).abort()
            if time.monotonic() - killed_s > 1.5:
                rng.choice(processes).kill()
                num_kills, killed_s = num_kills + 1, time.monotonic()
            time.sleep(0.01)
        outcomes: Counter[str] = Counter()
        for stream in streams:
            output = stream.wait()
            if output.error is not None:
                assert output.error.code == "engine_stopped"
            elif output.outputs[0].finish_reason == "length":
                stream.check()
            outcomes[str(output.outputs[0].finish_reason)] += 1
        assert outcomes["length"] > 100 and outcomes["error"] > 0 and outcomes["cancelled"] > 0
        eventually(lambda: not service.health().cause, "they do not come back")
        stats = service.stats().result(DEADLINE_S)
        assert stats["num_running"] == 0 and stats["num_free_pages"] == stats["num_pages"] == 8000
    finally:
        service.close()
        for process in processes:
            process.stop()
