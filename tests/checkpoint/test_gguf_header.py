"""The header parser agrees with the `gguf` package on good files and refuses bad ones quickly and by name.

Seconds are CPU time, so that a busy machine does not fail a test; what blocks meets the suite's timeout.
"""

from __future__ import annotations

import math
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from raw_gguf import (
    ARRAY,
    BOOL,
    F32,
    I64,
    STRING,
    U8,
    U32,
    U64,
    RawGguf,
    array,
    field,
    string,
    tensor,
    u32,
    u64,
)

from slipstream.checkpoint.gguf_header import GgufHeader, read_gguf_header
from slipstream.checkpoint.weight_file import WeightFile
from slipstream.core.errors import CheckpointError

HUGE = 2**63


def parse(path: Path, content: bytes) -> GgufHeader:
    path.write_bytes(content)
    return read_gguf_header(WeightFile(path))


def assert_agrees(header: GgufHeader, oracle: gguf.GGUFReader) -> None:
    fields = {key: value for key, value in oracle.fields.items() if not key.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for key, value in header.metadata.items():
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        np.testing.assert_equal(plain, fields[key].contents(), err_msg=key)
    expected = {
        item.name: (
            tuple(reversed(item.shape.tolist())),
            item.tensor_type.name,
            item.data_offset,
            item.n_bytes,
        )
        for item in oracle.tensors
    }
    found = {item.name: (item.shape, item.block.name, item.offset, item.num_bytes) for item in header.tensors}
    assert found == expected and len(found) > 0


def test_every_value_type_agrees_with_the_oracle(tmp_path: Path) -> None:
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    numbers = {"uint8": 200, "int8": -5, "uint16": 60000, "int16": -300, "uint32": 2**31, "int32": -(2**31)}
    numbers |= {"uint64": 2**63, "int64": -(2**62)}
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(f"x.{name}", value)
    writer.add_float32("x.float32", 1e-5)
    writer.add_float64("x.float64", math.inf)
    writer.add_bool("x.yes", True)
    writer.add_string("x.empty", "")
    writer.add_string("x.text", "naïve 東京 🙂")
    writer.add_array("x.strings", ["a", "", "ß" * 1000])
    writer.add_array("x.scores", [0.5, -1.5])
    writer.add_array("x.ints", [1, -2, 3])
    writer.add_array("x.flags", [True, False])
    generator = np.random.default_rng(0)
    for index, shape in enumerate([(3,), (2, 5), (2, 3, 4), (2, 1, 3, 2)]):
        writer.add_tensor(f"t{index}", generator.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(WeightFile(path))
    assert_agrees(header, gguf.GGUFReader(path))
    assert header.metadata["x.yes"] is True and type(header.metadata["x.uint8"]) is int
    assert header.metadata["x.scores"].dtype == np.float32 and header.metadata["x.flags"].dtype == np.bool_
    assert header.metadata["x.scores"].flags.writeable


def test_a_real_model_agrees_with_the_oracle(smollm2_path: Path, smollm2_oracle: gguf.GGUFReader) -> None:
    header = read_gguf_header(WeightFile(smollm2_path))
    assert_agrees(header, smollm2_oracle)
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 49152


def test_a_large_vocabulary_opens_without_touching_the_weights(gemma3_path: Path) -> None:
    start = time.process_time()
    header = read_gguf_header(WeightFile(gemma3_path))
    assert time.process_time() - start < 2.0  # a hang, not a speed: it takes 0.2 s
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 262144
    assert header.metadata["tokenizer.ggml.scores"].dtype == np.float32
    assert header.metadata["tokenizer.ggml.scores"].shape == (262144,)
    assert {item.block.name for item in header.tensors} == {"F32", "Q5_0", "Q8_0", "Q4_K", "Q6_K"}


def test_strings_cross_the_steps_in_which_the_header_is_fetched(tmp_path: Path) -> None:
    # Lengths around the 1 MB of the first fetch, and a string longer than a doubling.
    words = ["x" * (2**20 - 40), "y" * 17, "", "z" * (5 * 2**20), "end"]
    items = b"".join(string(word) for word in words)
    raw = RawGguf(fields=[field("words", ARRAY, array(STRING, 5, items)), field("n", U32, u32(7))])
    assert parse(tmp_path / "x.gguf", raw.to_bytes()).metadata == {"words": words, "n": 7}


def test_bytes_that_are_no_utf8_stay_distinct_and_come_back(tmp_path: Path) -> None:
    tokens = [b"\xff", b"\xfe", b"\xe6\x9d", "東".encode()]
    items = b"".join(string(token) for token in tokens)
    header = parse(
        tmp_path / "x.gguf", RawGguf(fields=[field("t", ARRAY, array(STRING, 4, items))]).to_bytes()
    )
    decoded = header.metadata["t"]
    assert len(set(decoded)) == 4 and decoded[3] == "東"
    assert [token.encode("utf-8", "surrogateescape") for token in decoded] == tokens


def fields(*items: bytes, **counts: int) -> RawGguf:
    return RawGguf(fields=list(items), **counts)


def tensors(*items: bytes, data: int = 64, **counts: int) -> RawGguf:
    return RawGguf(tensors=list(items), data=bytes(data), **counts)


HOSTILE: dict[str, tuple[RawGguf, str]] = {
    "magic": (RawGguf(magic=b"GGML"), "b'GGML'"),
    "version 1": (RawGguf(version=1), "version 1"),
    "version 4": (RawGguf(version=4), "version 4"),
    "big-endian": (RawGguf(version=3 << 24), "big-endian"),
    "tensor count": (RawGguf(num_tensors=HUGE), "tensor count is 9223372036854775808"),
    "metadata count": (RawGguf(num_fields=HUGE), "metadata count is 9223372036854775808"),
    "one field too many": (fields(field("a", U32, u32(1)), num_fields=2), "metadata key"),
    "one tensor too many": (tensors(tensor("t", (4,)), num_tensors=2), "tensor name"),
    "key length": (fields(string(b"key", length=HUGE)), "metadata key has 9223372036854775808 bytes"),
    "empty key": (fields(field("", U32, u32(1))), "metadata key has 0 bytes"),
    "key beyond the end": (fields(string(b"key", length=60000) + bytes(8)), "metadata key ends"),
    "key not utf-8": (fields(field(b"\xff\xfe", U32, u32(1))), "not valid UTF-8"),
    "key twice": (fields(field("a", U32, u32(1)), field("a", U32, u32(2))), "'a' appears twice"),
    "value type": (fields(field("a", 13, u32(1))), "'a' has the unknown value type 13"),
    "value type 2^32-1": (fields(field("a", 2**32 - 1, u32(1))), "unknown value type 4294967295"),
    "string length": (fields(field("a", STRING, string("x", length=HUGE))), "metadata 'a' ends at"),
    "string length 2^64-1": (
        fields(field("a", STRING, string("x", length=2**64 - 1))),
        "metadata 'a' ends at",
    ),
    "array length": (fields(field("a", ARRAY, array(F32, HUGE, bytes(4)))), "length of metadata 'a'"),
    "array length overflows": (
        fields(field("a", ARRAY, array(U64, 2**61, bytes(8)))),
        "length of metadata 'a'",
    ),
    "string array length": (fields(field("a", ARRAY, array(STRING, HUGE))), "length of metadata 'a'"),
    "string in array": (
        fields(field("a", ARRAY, array(STRING, 2, string("x") + string("y", length=HUGE)))),
        "metadata 'a' ends at",
    ),
    "array type": (fields(field("a", ARRAY, array(99, 1, bytes(8)))), "'a' has the unknown value type 99"),
    "empty array of no type": (fields(field("a", ARRAY, array(99, 0))), "unknown value type 99"),
    "nested arrays": (
        fields(field("a", ARRAY, array(ARRAY, 1, array(ARRAY, 1)))),
        "'a' is an array of arrays",
    ),
    "truth value": (fields(field("a", BOOL, b"\x02")), "'a' holds a truth value of 2"),
    "truth values": (fields(field("a", ARRAY, array(BOOL, 3, b"\x00\x01\xff"))), "truth value of 255"),
    "alignment 0": (fields(field("general.alignment", U32, u32(0))), "general.alignment is 0"),
    "alignment 24": (fields(field("general.alignment", U32, u32(24))), "general.alignment is 24"),
    "alignment 2^63": (fields(field("general.alignment", U64, u64(HUGE))), "general.alignment is 9223"),
    "alignment -32": (fields(field("general.alignment", I64, u64(2**64 - 32))), "general.alignment is -32"),
    "alignment text": (fields(field("general.alignment", STRING, string("32"))), "general.alignment is '32'"),
    "alignment true": (fields(field("general.alignment", BOOL, b"\x01")), "general.alignment is True"),
    "split": (fields(field("split.count", U8, b"\x03")), "split GGUF .*3.*merge"),
    "split of text": (fields(field("split.count", STRING, string("3"))), "split GGUF"),
    "tensor twice": (tensors(tensor("t", (4,)), tensor("t", (4,), offset=32)), "tensor 't' appears twice"),
    "tensor name length": (tensors(string(b"t", length=HUGE)), "tensor name has 9223372036854775808 bytes"),
    "tensor name not utf-8": (tensors(tensor(b"\xc3", (4,))), "not valid UTF-8"),
    "no dimensions": (tensors(tensor("t", ())), "tensor 't' has 0 dimensions"),
    "five dimensions": (tensors(tensor("t", (1,) * 5)), "tensor 't' has 5 dimensions"),
    "2^32-1 dimensions": (tensors(tensor("t", (1,), num_dims=2**32 - 1)), "tensor 't' has 4294967295 dim"),
    "zero dimension": (tensors(tensor("t", (4, 0))), "tensor 't' has dimensions"),
    "product overflows to 0": (tensors(tensor("t", (2**32, 2**32))), "tensor 't' has dimensions"),
    "product overflows": (tensors(tensor("t", (2**63 - 1, 2**63 - 1))), "tensor 't' has dimensions"),
    "row not whole blocks": (tensors(tensor("t", (33, 2), kind=2)), "'t' has rows of 33.*multiples of 32"),
    "row not whole superblocks": (tensors(tensor("t", (32,), kind=12)), "Q4_K needs multiples of 256"),
    "unread type": (
        tensors(tensor("t", (256,), kind=16)),
        "'t' has the type IQ2_XXS, .*supported: F32, .*Q6_K",
    ),
    "unknown type": (tensors(tensor("t", (256,), kind=77)), "'t' has the type number 77"),
    "past the end": (tensors(tensor("t", (17,))), "tensor 't' ends at byte"),
    "offset past the end": (tensors(tensor("t", (4,), offset=2**40)), "tensor 't' ends at byte"),
    "offset 2^64-32": (tensors(tensor("t", (4,), offset=2**64 - 32)), "tensor 't' ends at byte"),
    "offset unaligned": (tensors(tensor("t", (4,), offset=4)), "tensor 't' at 4 is not aligned to 32"),
    "overlap": (tensors(tensor("a", (12,)), tensor("b", (4,), offset=32)), "tensor 'b' overlaps 'a'"),
    "same place": (tensors(tensor("a", (4,)), tensor("b", (4,))), "tensor 'b' overlaps 'a'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_by_name_fast_and_small(case: str, tmp_path: Path) -> None:
    raw, said = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw.to_bytes())
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(CheckpointError, match=said) as caught:
            read_gguf_header(WeightFile(path))
        seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "bad.gguf" in str(caught.value)
    # 64 kB covers the traceback and the message; the files are under 1 kB.
    assert seconds < 1.0 and peak < 64 * 1024


@pytest.mark.parametrize("size", [0, 3, 4, 7, 8, 16, 23])
def test_a_file_shorter_than_its_front_is_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="of a file of"):
        parse(tmp_path / "x.gguf", RawGguf().to_bytes()[:size])


def test_a_valid_file_is_cut_at_every_byte(tmp_path: Path) -> None:
    raw = RawGguf(
        fields=[
            field("a", STRING, string("text")),
            field("b", ARRAY, array(STRING, 2, string("x") + string("y"))),
        ],
        tensors=[tensor("t", (4,)), tensor("u", (4,), offset=32)],
        data=bytes(48),
    ).to_bytes()
    path = tmp_path / "x.gguf"
    assert [item.name for item in parse(path, raw).tensors] == ["t", "u"]
    for size in range(len(raw)):
        with pytest.raises(CheckpointError):
            parse(path, raw[:size])


def test_millions_of_strings_are_refused_within_a_second(tmp_path: Path) -> None:
    count = 3 * 2**20
    path = tmp_path / "x.gguf"
    path.write_bytes(fields(field("a", ARRAY, array(STRING, count, bytes(8 * count)))).to_bytes())
    start = time.process_time()
    with pytest.raises(CheckpointError, match="'a' brings the metadata to more than 1048576 strings"):
        read_gguf_header(WeightFile(path))
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("what", ["fields", "tensors"])
def test_endless_entries_are_refused_before_they_are_parsed(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    counts: dict[str, Any] = {f"num_{what}": 2**24}
    path.write_bytes(RawGguf(**counts).to_bytes())
    with path.open("r+b") as file:
        file.truncate(2**32)  # sparse: the counts would fit
    start = time.process_time()
    with pytest.raises(CheckpointError, match="count is 16777216; at most"):
        read_gguf_header(WeightFile(path))
    assert time.process_time() - start < 1.0


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(fields(field("a", ARRAY, array(U8, 2**31))).to_bytes())
    with path.open("r+b") as file:
        file.truncate(2**33)
    with pytest.raises(CheckpointError, match="the header goes beyond 268435456 bytes at metadata 'a'"):
        read_gguf_header(WeightFile(path))
