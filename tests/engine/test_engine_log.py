"""Does an engine in a process of its own log in the form that its server asks for?"""

from __future__ import annotations

import json
import os
import time

import pytest

from slipstream.core.errors import EngineError
from slipstream.engine.config import EngineConfig
from slipstream.engine.engine_process import start_engine_process
from tests.engine.served import DEADLINE_S, door

pytestmark = pytest.mark.skipif(os.name != "posix", reason="as the other tests of the process")


@pytest.mark.parametrize("as_json", [True, False])
def test_r80_a_line_of_the_engine_s_process(
    as_json: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIPSTREAM_LOG", "info")
    process = start_engine_process(
        EngineConfig(model="fake"), module="tests.engine.fault_child", log_json=as_json
    )
    said = ""
    try:
        with door(process.endpoint) as service:
            with pytest.raises(EngineError):
                service.command("fail").result(DEADLINE_S)
            deadline = time.monotonic() + DEADLINE_S
            while "the command fail failed" not in said:
                assert time.monotonic() < deadline, said
                said += capfd.readouterr().err
                time.sleep(0.01)
    finally:
        process.stop()
    (line,) = (line for line in said.splitlines() if "the command fail failed" in line)
    if as_json:
        entry = json.loads(line)
        assert entry["level"] == "info" and entry["logger"].startswith("slipstream.engine")
    else:
        assert " INFO slipstream.engine" in line
