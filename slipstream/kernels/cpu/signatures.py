"""What are the C functions of the kernel library called with? One row per function: result, then arguments.

Invariant: every exported function has a row and every row names one; a test compares the two. Without types,
ctypes would cut a 64-bit address passed as a plain int to 32 bits. A record is passed by `ctypes.byref`,
memory by its address.
"""

from __future__ import annotations

import ctypes
from typing import Any

_ADDRESS = ctypes.c_void_p
_INT32 = ctypes.c_int32
_INT64 = ctypes.c_int64
_SIZE = ctypes.c_size_t

# name -> (result, argument types)
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ss_set_threads": (None, (_INT32,)),
    "ss_num_threads": (_INT32, ()),
    # kind, rows, cols
    "ss_matrix_bytes": (_SIZE, (_INT32, _INT32, _INT32)),
    # kind, source, rows, number of rows, cols, out
    "ss_pack": (_INT32, (_INT32, _INT32, _ADDRESS, _INT32, _INT32, _ADDRESS)),
    # kind, cols, tokens
    "ss_linear_scratch_bytes": (_SIZE, (_INT32, _INT32, _INT32)),
    # matrix, x, y, tokens, bias, scratch
    "ss_linear": (None, (_ADDRESS, _ADDRESS, _ADDRESS, _INT32, _ADDRESS, _ADDRESS)),
    # matrix, ids, tokens, scale, out
    "ss_embedding": (_INT32, (_ADDRESS, _ADDRESS, _INT32, ctypes.c_float, _ADDRESS)),
    # x, rows, cols, out
    "ss_argmax": (None, (_ADDRESS, _INT32, _INT32, _ADDRESS)),
    # block, tokens, longest sequence
    "ss_block_scratch_bytes": (_INT64, (_ADDRESS, _INT64, _INT64)),
    # blocks, number of blocks, step, x, scratch
    "ss_decoder_blocks": (_INT32, (_ADDRESS, _INT32, _ADDRESS, _ADDRESS, _ADDRESS)),
    # record
    "ss_record_bytes": (_INT64, (_INT32,)),
    # x, weight, bias, eps, rows, cols, y
    "ss_norm": (None, (_ADDRESS, _ADDRESS, _ADDRESS, ctypes.c_float, _INT64, _INT64, _ADDRESS)),
    # step
    "ss_decode_scratch_bytes": (_INT64, (_ADDRESS,)),
    # step, scratch
    "ss_decode": (_INT32, (_ADDRESS, _ADDRESS)),
    # block, step, q, k, v, out, scratch
    "ss_attention": (_INT32, (_ADDRESS,) * 7),
}


def declare(library: ctypes.CDLL) -> None:
    """Give each function of the table its types."""
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name, None)
        if function is not None:
            function.restype = result
            function.argtypes = list(arguments)
