"""A SwiGLU kernel of your own: registered, held against the op's grid, and used by an engine."""

import torch

from slipstream import LLM, SamplingParams
from slipstream.kernels import KernelCapability, register_kernel
from slipstream.kernels.conformance import check_kernel

CALLS: list[int] = []


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) * up of [..., gate and up side by side], in float32 between."""
    CALLS.append(x.shape[0])
    gate, up = x.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


KERNEL = register_kernel(
    swiglu,
    op="silu_and_mul",
    name="swiglu-in-float32",
    capability=KernelCapability(devices=frozenset({"cpu", "cuda"}), max_tokens=512),
    priority=10,
)

if __name__ == "__main__":
    import sys

    found = check_kernel(KERNEL, device="cpu")
    print(*found.describe(), sep="\n")
    CALLS.clear()
    # In plain float32 a CPU runs op by op; packed weights run as one native call that no kernel can enter.
    with LLM(sys.argv[1], dtype="float32") as llm:
        print(*(line for line in llm.startup.report if "swiglu" in line), sep="\n")
        output = llm.generate("Once upon a time", SamplingParams(max_tokens=8))
        print(output.outputs[0].text)
    print(f"{len(CALLS)} calls of {KERNEL.name}")
