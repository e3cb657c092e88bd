"""Does `slipstream bench serve` measure a server, write what it found, and refuse what makes no sense?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.bench.fake_openai import Script, fake_server
from tests.cli.conftest import Finished, Slipstream

SMALL = ("--osl", 4, "--isl", 8, "--num-requests", 6, "--num-warmups", 1)


def measure(slipstream: Slipstream, *arguments: Any, script: Script | None = None) -> Finished:
    with fake_server(script) as server:
        return slipstream("bench", "serve", "--url", server.url, *SMALL, *arguments)


def test_a_sweep(slipstream: Slipstream, tmp_path: Path) -> None:
    paths = {name: tmp_path / f"out.{name}" for name in ("json", "png", "html")}
    files = [argument for name, path in paths.items() for argument in (f"--{name}", path)]
    arguments = ("--concurrency", "1,3", "--slo", "ttft=60s", "--api-key", "secret", "--seed", 5, *files)
    script = Script(base_tokens=3, gap_s=0.002, api_key="secret")
    finished = measure(slipstream, *arguments, script=script)
    assert finished.code == 0, finished.err
    assert "c=1" in finished.out and "c=3: 6 of 6 requests met the objectives" in finished.out
    record = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert [point["label"] for point in record["points"]] == ["c=1", "c=3"]
    for point in record["points"]:
        assert (point["num_completed"], point["prompt_tokens"], point["output_tokens"]) == (6, 48, 24)
        assert point["ttft_ms"]["count"] == 6 and point["itl_ms"]["count"] == 18
        assert point["tpot_ms"]["median"] >= 2
    assert (record["tokens_per_word"], record["target"]["model"]) == (1.0, "fake")
    assert record["workload"]["seed"] == 5
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert "secret" not in "".join(p.read_text(encoding="latin-1") for p in paths.values()) + finished.out
    check_page(paths["html"].read_text(encoding="utf-8"))


def check_page(page: str) -> None:
    assert "http://" not in page.replace("http://127.0.0.1", "") and "<script" not in page
    for part in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part.partition("</svg>")[0] + "</svg>")
    assert page.count("<circle") == 3 * (2 * 2 + 2) and "c=3: " in page


def test_a_chat_in_an_open_loop(slipstream: Slipstream) -> None:
    finished = measure(slipstream, "--endpoint", "chat", "--request-rate", "200,inf")
    assert finished.code == 0, finished.err
    assert "r=200/s" in finished.out and "r=inf/s" in finished.out


def test_a_trace(slipstream: Slipstream, tmp_path: Path) -> None:
    trace, out = tmp_path / "t.jsonl", tmp_path / "o.json"
    lines = [{"timestamp": t, "input_length": 5, "output_length": 2} for t in (0, 40, 80)]
    trace.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with fake_server() as server:
        arguments = ("--trace", trace, "--trace-speed", 2, "--json", out)
        finished = slipstream("bench", "serve", "--url", server.url, *arguments)
    assert finished.code == 0, finished.err
    (point,) = json.loads(out.read_text(encoding="utf-8"))["points"]
    assert (point["label"], point["num_requests"], point["output_tokens"]) == ("trace", 3, 6)


def test_failures_are_told(slipstream: Slipstream) -> None:
    # Two calibrations and one warm-up come first.
    finished = measure(slipstream, script=Script(fault="cut", fault_on=frozenset({4, 5})))
    assert finished.code == 0
    assert "2 failed: cut_stream" in finished.out


def test_a_load_point_that_nothing_survives_fails(slipstream: Slipstream, tmp_path: Path) -> None:
    out = tmp_path / "o.json"
    script = Script(fault="http_503", fault_on=frozenset(range(3, 100)))
    finished = measure(slipstream, "--json", out, script=script)
    assert finished.code == 1 and "no request of 6 completed (http_503: 6)" in finished.err
    assert json.loads(out.read_text(encoding="utf-8"))["points"][0]["errors"] == {"http_503": 6}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (Script(fault="http_500"), "fails before anything is measured: http_500"),
        (Script(has_usage=False), "sends no usage"),
        (Script(tokens_per_word=0, base_tokens=5), "no prompt of a given length"),
        (Script(models=("a", "b")), "give --model"),
    ],
)
def test_a_server_that_cannot_be_measured(slipstream: Slipstream, script: Script, message: str) -> None:
    finished = measure(slipstream, script=script)
    assert finished.code == 1 and message in finished.err.replace("\n", " ")


def test_no_server(slipstream: Slipstream) -> None:
    with fake_server() as server:
        url = server.url
    finished = slipstream("bench", "serve", "--url", url)
    assert finished.code == 1 and "No server answers at" in finished.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--concurrency", "1", "--request-rate", "1"),
        ("--concurrency", "0"),
        ("--request-rate", "-1"),
        ("--request-rate", "nan"),
        ("--endpoint", "embeddings"),
        ("--arrivals", "bursty"),
        ("--lengths", "normal"),
        ("--lengths", "sharegpt", "--isl", "4"),
        ("--num-prefixes", "2"),
        ("--trace-speed", "2"),
        ("--slo", "speed=1"),
        ("--extra-body", "[]"),
        ("--timeout", "0"),
        ("--num-requests", "0"),
        ("--prompt-ids", "1000", "--endpoint", "chat"),
        ("--json", "/nowhere/out.json"),
    ],
    ids=" ".join,
)
def test_what_makes_no_sense_is_refused(slipstream: Slipstream, arguments: tuple[str, ...]) -> None:
    finished = slipstream("bench", "serve", "--url", "http://127.0.0.1:9", *arguments)
    assert finished.code in (1, 2) and finished.err.startswith("Error: ")
    assert "No server answers" not in finished.err


@pytest.mark.parametrize(("module", "option"), [("aiohttp", None), ("matplotlib.figure", "--png")])
def test_a_missing_extra_is_named(
    slipstream: Slipstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, option: str | None
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    given = () if option is None else (option, tmp_path / "x.png")
    finished = slipstream("bench", "serve", "--url", "http://127.0.0.1:9", *given)
    assert finished.code == 1 and "slipstream-llm[bench]" in finished.err
