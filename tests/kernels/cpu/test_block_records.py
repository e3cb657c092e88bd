"""Are Python's mirrors of the C++ records as large as those, to the byte?"""

from __future__ import annotations

import ctypes

from slipstream.kernels.cpu import block_records as records
from slipstream.kernels.cpu.library import library
from slipstream.kernels.cpu.packed_matrix import Matrix

MIRRORS = (
    Matrix,
    records.KvPages,
    records.GroupStep,
    records.Step,
    records.Block,
    records.Decoder,
    records.RowTables,
    records.DecodeStep,
)


def test_sizes_agree() -> None:
    sizes = [library().ss_record_bytes(i) for i in range(len(MIRRORS) + 1)]
    assert sizes == [*(ctypes.sizeof(mirror) for mirror in MIRRORS), 0]
