"""Do the schemes of `batch_invariant=True` compute what the plain one does, and say what they can do?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slipstream.checkpoint.opening import open_checkpoint
from slipstream.models.llama import Llama, LlamaConfig
from slipstream.models.loading import load_weights
from slipstream.parallel.mesh import Mesh
from slipstream.quant.fixed_tiles import FixedTiles
from slipstream.quant.float32 import Float32
from slipstream.quant.registry import SCHEMES
from slipstream.quant.unquantized import Unquantized
from tests.models.twins import make_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_llama().save_pretrained(path)
    return path


def model_of(folder: Path, scheme: type) -> Llama:
    checkpoint = open_checkpoint(folder)
    try:
        config = LlamaConfig.from_hf(checkpoint.config)
        model = Llama(config, mesh=Mesh(), quant=scheme(), dtype=torch.float32, device="cpu")
        load_weights(model, checkpoint)
        return model
    finally:
        checkpoint.close()


@pytest.mark.parametrize("scheme", [Float32, FixedTiles])
def test_every_linear_computes_what_the_plain_one_does(folder: Path, scheme: type) -> None:
    plain, ours = (dict(model_of(folder, one).named_modules()) for one in (Unquantized, scheme))
    linears = [name for name, module in plain.items() if hasattr(module, "gemm")]
    assert len(linears) >= 8
    for name in [*linears, "head"]:
        x = torch.randn(7, plain[name].weight.shape[1], generator=torch.Generator().manual_seed(1))
        # Sums of at most 128 products in float32, in another order.
        torch.testing.assert_close(ours[name](x), plain[name](x), rtol=1e-5, atol=1e-5)
    ids = torch.tensor([0, 5, 90])
    assert torch.equal(ours["embedding"].look_up(ids), plain["embedding"].look_up(ids))


def test_they_promise_it_where_they_run() -> None:
    promising = {name for name in SCHEMES if SCHEMES.get(name).capability.batch_invariant}
    assert promising == {"gguf", "int8", "float32", "fixed_tiles"}
    assert SCHEMES.get("fixed_tiles").capability.devices == {"cuda"}
    # Kernels that read the matrix themselves, fused with what is around it, would choose their own order.
    assert not SCHEMES.get("fixed_tiles").capability.plain_weights
