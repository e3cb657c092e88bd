"""What does a bad model file do? It is refused by name, in seconds, and nothing of it runs or stays.

One end-to-end case and more of each row about files in our reliability table, through `LLM(...)`, beside an
engine that serves four victims meanwhile. The readers' own fuzz and grids are in `tests/checkpoint`,
`tests/text` and `tests/models`.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream import LLM, SamplingParams
from slipstream.core.errors import CheckpointError, ConfigError, SlipstreamError
from tests.engine.oracle import DEADLINE_S, VICTIM_PARAMS, VICTIMS, Oracle
from tests.engine.tiny import VOCAB, byte_tokenizer, one_thread, tiny_llama, wait_idle, write_folder
from tests.models.gguf_twins import write_gguf

# Far above what any refusal takes on a busy machine; a reader that hangs or allocates shows.
REFUSED_WITHIN_S = 20.0
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tiny_llama(), tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_llama(), tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.fixture(scope="module")
def oracle(good: Path) -> Iterator[Oracle]:
    with LLM(good) as llm:
        yield Oracle(llm)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What a payload would leave behind if it ran."""
    return tmp_path / "executed"


@pytest.fixture(autouse=True)
def victims_beside(oracle: Oracle) -> Iterator[None]:
    """Every test here runs beside the victims."""
    with oracle.victims():
        yield


@pytest.fixture(scope="module", autouse=True)
def no_tensor_stays(oracle: Oracle) -> Iterator[None]:
    """Some 150 models are refused in this file, and the tensors of none of them stay."""
    before = num_tensors()
    yield
    assert num_tensors() <= before, "a refused model stays in memory"


def refuse(path: Path, *names: str, kind: type[SlipstreamError] = CheckpointError, **options: Any) -> str:
    """Assert that a model is refused in time, by a message that says all of `names`."""
    started = time.monotonic()
    message = error_of(path, kind, options)
    assert time.monotonic() - started < REFUSED_WITHIN_S
    for name in names:
        assert name in message, f"{name!r} is not named in: {message}"
    assert len(message) < 2000
    return message


def error_of(path: Path, kind: type[SlipstreamError], options: dict[str, Any]) -> str:
    with pytest.raises(kind) as caught:
        LLM(path, **options)
    return str(caught.value)


def num_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file, its data left alone."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_the_good_files_load(oracle: Oracle, folder: Path, good_gguf: Path) -> None:
    """What the rows below spoil is fine before."""
    for path, options in ((folder, {}), (good_gguf, {"skip_tokenizer_init": True})):
        with LLM(path, **options) as llm:
            assert llm.generate(VICTIMS[0], VICTIM_PARAMS).outputs[0].token_ids == oracle.expected[0]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_r49_pickled_weights_are_never_opened(folder: Path, marker: Path, name: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    pickle.loads((folder / name).read_bytes())
    assert marker.is_dir()  # the payload works
    marker.rmdir()
    refuse(folder, name, "safetensors")
    refuse(folder / name, name, load_format="auto")
    assert not marker.exists()


def test_r50_code_of_a_repository_is_never_run(oracle: Oracle, folder: Path, marker: Path) -> None:
    (folder / "modeling_own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Own: pass\n")
    auto = {"auto_map": {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}}
    edit_json(folder / "config.json", lambda config: config.update(auto))
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(auto))
    with LLM(folder) as llm:
        assert llm.generate(VICTIMS[0], VICTIM_PARAMS).outputs[0].token_ids == oracle.expected[0]
    refuse(folder, "trust_remote_code", kind=ConfigError, trust_remote_code=True)
    edit_json(folder / "config.json", lambda config: config.update(architectures=["Own"], model_type="own"))
    refuse(folder, "Own")
    assert not marker.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir(MARKER) }}",
        "{{ self.__init__.__globals__ }}{{ raise_exception.__globals__['os'].mkdir(MARKER) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * (10 ** 10) }}",
        "{% for",
    ],
    ids=["subclasses", "globals", "functions", "endless", "10GB", "syntax"],
)
def test_r51_a_hostile_chat_template_fails_its_chats_only(
    oracle: Oracle, folder: Path, marker: Path, template: str
) -> None:
    source = template.replace("MARKER", repr(str(marker)))
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template=source))
    with LLM(folder) as llm:
        started = time.monotonic()
        output = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=2))
        assert time.monotonic() - started < REFUSED_WITHIN_S
        assert output.error is not None and output.error.code == "template_error"
        assert "Traceback" not in output.error.message
        assert llm.generate(VICTIMS[0], VICTIM_PARAMS).outputs[0].token_ids == oracle.expected[0]
    assert not marker.exists()


def reverse_offsets(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"].reverse()


def go_past_the_end(header: dict[str, Any]) -> None:
    last = max((v["data_offsets"][1], k) for k, v in header.items() if k != "__metadata__")[1]
    header[last]["data_offsets"][1] += 4096


def overlap(header: dict[str, Any]) -> None:
    first, second = sorted(
        (k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"]
    )[:2]
    header[second]["data_offsets"][0] -= 4
    assert first != second


def change_dtype(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["dtype"] = "F64"


def make_shape_huge(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["shape"] = [2**62, 4]


@pytest.mark.parametrize("change", [reverse_offsets, go_past_the_end, overlap, change_dtype, make_shape_huge])
def test_r52_headers_that_lie_are_refused(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_header(folder / WEIGHTS, change)
    message = refuse(folder, WEIGHTS)
    assert change in (overlap, go_past_the_end) or "model.norm.weight" in message


@pytest.mark.parametrize("size", [2**63, 2**40, 0, 7])
def test_r52_header_sizes_that_lie_are_refused(folder: Path, size: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + data[8:])
    refuse(folder, WEIGHTS)


def shard(folder: Path, **renamed: str) -> dict[str, str]:
    """Split the weights into two shards with an index; returns its weight map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / part, metadata={"format": "pt"})
    weight_map = {name: renamed.get(part[6], part) for part, held in parts.items() for name in held}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_r53_shards_outside_the_folder_are_refused(oracle: Oracle, folder: Path) -> None:
    weight_map = shard(folder)
    with LLM(folder) as llm:
        assert llm.generate(VICTIMS[0], VICTIM_PARAMS).outputs[0].token_ids == oracle.expected[0]
    outside = folder.parent / "model-2.safetensors"
    shutil.move(folder / "model-2.safetensors", outside)
    refuse(folder, "model-2.safetensors")  # missing
    for target in ("../model-2.safetensors", str(outside), "a/../../model-2.safetensors"):
        moved = {k: target if v == "model-2.safetensors" else v for k, v in weight_map.items()}
        write_index(folder, moved)
        refuse(folder, "model-2.safetensors")
    write_index(folder, weight_map)
    (folder / "model-2.safetensors").symlink_to(outside)
    refuse(folder, "model-2.safetensors")


def test_r53_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shard(folder)
    first, second = (load_file(folder / f"model-{i}.safetensors") for i in (1, 2))
    name = next(iter(first))
    save_file({**second, name: first[name]}, folder / "model-2.safetensors")
    refuse(folder, name)


def test_r54_gguf_files_that_lie_are_refused(good_gguf: Path, tmp_path: Path) -> None:
    data = good_gguf.read_bytes()
    path = tmp_path / "bad.gguf"
    huge = struct.pack("<Q", 2**63)
    spoiled = {
        "magic": b"GGML" + data[4:],
        "version": data[:4] + struct.pack("<I", 9) + data[8:],
        "tensor count": data[:8] + huge + data[16:],
        "key count": data[:16] + huge + data[24:],
        "key length": data[:24] + huge + data[32:],
        "end": data[: len(data) - 4096],
        "header only": data[:24],
        "empty": b"",
    }
    for what, content in spoiled.items():
        path.write_bytes(content)
        assert refuse(path, "bad.gguf", skip_tokenizer_init=True), what


BAD_FIELDS: list[tuple[str, Any]] = [
    ("hidden_size", 0),
    ("hidden_size", -64),
    ("hidden_size", 2**40),
    ("hidden_size", "64"),
    ("hidden_size", None),
    ("num_hidden_layers", 10**9),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 3),
    ("vocab_size", -1),
    ("vocab_size", 1.5),
    ("max_position_embeddings", 0),
    ("rms_norm_eps", "tiny"),
]


def test_r55_bad_fields_of_a_configuration_are_named(folder: Path) -> None:
    """Whatever the value, it is refused before anything of its size is allocated."""
    text = (folder / "config.json").read_text()
    for field, value in BAD_FIELDS:
        config = json.loads(text)
        config[field] = value
        (folder / "config.json").write_text(json.dumps(config))
        refuse(folder, field)
    config = json.loads(text)
    del config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, "num_hidden_layers")
    for content in ("", "[]", "{", "[" * 100_000, '{"a": ' * 50_000):
        (folder / "config.json").write_text(content)
        refuse(folder, "config.json")


def test_r55_unknown_quantisation_is_refused(folder: Path) -> None:
    edit_json(
        folder / "config.json", lambda c: c.update(quantization_config={"quant_method": "bogus", "bits": 4})
    )
    message = error_of(folder, SlipstreamError, {})
    assert "bogus" in message or "quantization_config" in message


def test_r56_a_tokenizer_that_does_not_fit_is_refused(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["beyond"])
    tokenizer.save(str(folder / "tokenizer.json"))
    refuse(folder, "beyond", str(VOCAB))


def test_r56_a_tokenizer_that_contradicts_itself_is_refused(folder: Path) -> None:
    def clash(document: dict[str, Any]) -> None:
        document["added_tokens"][1]["id"] = document["added_tokens"][0]["id"]

    def repeat(document: dict[str, Any]) -> None:
        document["model"]["vocab"]["A"] = document["model"]["vocab"]["B"]

    text = (folder / "tokenizer.json").read_text()
    for change in (clash, repeat):
        (folder / "tokenizer.json").write_text(text)
        edit_json(folder / "tokenizer.json", change)
        refuse(folder, "tokenizer.json")
    (folder / "tokenizer.json").write_text(text[:-100])
    refuse(folder, "tokenizer.json")
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(2**30)  # sparse
    refuse(folder, "tokenizer.json")


def test_r57_weights_that_do_not_fit_are_all_listed(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
    tensors["model.norm.weight"] = torch.zeros(7)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    refuse(
        folder,
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.9.mlp.up_proj.weight",
        "model.norm.weight",
    )


def test_r57_norms_that_are_not_finite_are_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    refuse(folder, "model.layers.1.input_layernorm.weight")


def test_r58_truncated_weights_are_refused(folder: Path, good_gguf: Path) -> None:
    gguf = folder.parent / "cut.gguf"
    for path, target, options in (
        (folder / WEIGHTS, folder, {}),
        (gguf, gguf, {"skip_tokenizer_init": True}),
    ):
        if path == gguf:
            shutil.copy(good_gguf, gguf)
        size = path.stat().st_size
        for keep in (size - 1, size // 2, 100, 8, 0):
            os.truncate(path, keep)
            refuse(target, path.name, **options)


def test_r58_files_may_vanish_once_the_engine_serves(oracle: Oracle, folder: Path, good_gguf: Path) -> None:
    """Weights are read, not mapped: a file cut short under the engine cannot raise SIGBUS."""
    gguf = folder.parent / "served.gguf"
    shutil.copy(good_gguf, gguf)
    for path, target, options in (
        (folder / WEIGHTS, folder, {}),
        (gguf, gguf, {"skip_tokenizer_init": True}),
    ):
        with LLM(target, **options) as llm:
            running = llm.generate_async(VICTIMS[0], VICTIM_PARAMS, streaming=True)
            os.truncate(path, 0)
            assert running.result(DEADLINE_S).outputs[0].token_ids == oracle.expected[0]
            path.unlink()
            assert llm.generate(VICTIMS[1], VICTIM_PARAMS).outputs[0].token_ids == oracle.expected[1]
            wait_idle(llm)


@pytest.mark.skipif(sys.platform == "win32", reason="makes FIFOs")
def test_r60_only_regular_files_are_read(folder: Path, tmp_path: Path) -> None:
    fifo, directory = tmp_path / "fifo.gguf", tmp_path / "directory.gguf"
    os.mkfifo(fifo)
    directory.mkdir()
    device = tmp_path / "device.gguf"
    device.symlink_to("/dev/zero")
    for path in (fifo, directory, device, tmp_path / "missing.gguf", Path("/dev/random")):
        refuse(path, path.name)
    for name in ("config.json", "tokenizer.json", WEIGHTS):
        aside = tmp_path / "aside"
        shutil.move(folder / name, aside)
        os.mkfifo(folder / name)
        refuse(folder, name)
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        refuse(folder, name)
        (folder / name).unlink()
        shutil.move(aside, folder / name)
    with LLM(folder) as llm:
        assert llm.generate(VICTIMS[0], VICTIM_PARAMS).error is None
