"""Does a sound model pass, and is a wrong weight, op or backend named where it sits, not behind it?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.attention.base import AttentionPlan
from slipstream.attention.torch_reference import TorchReference
from slipstream.cache.config import KvCacheConfig
from slipstream.core.errors import ConfigError
from slipstream.engine.assembly import assemble
from slipstream.engine.config import EngineConfig
from slipstream.verify import verification
from slipstream.verify.verification import Verdict, verify, verify_assembly
from tests.cli.conftest import run_process
from tests.engine.tiny import tiny_gemma3, tiny_llama, write_folder
from tests.models.twins import make_gptj, make_qwen3, save

TWINS = {"llama": tiny_llama, "gemma3": tiny_gemma3, "qwen3": make_qwen3, "gptj": make_gptj}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(make(), tmp_path_factory.mktemp(name)) for name, make in TWINS.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TWINS)
def test_a_sound_model_agrees(folders: dict[str, Path], name: str, dtype: str) -> None:
    verdict = verify(folders[name], device="cpu", dtype=dtype, skip_tokenizer_init=True)
    assert verdict.departed is None, verdict.sentence()
    names = {check.name for check in verdict.checks}
    assert {"embedding", "head", "norm", "layers.0", "layers.0.attention.qkv"} <= names
    assert all(check.calls >= verdict.num_forwards for check in verdict.checks if "layers" in check.name)
    # Prompts of 3, 40 and 96 tokens in steps of 64, then three more tokens each.
    assert verdict.num_forwards >= 5
    assert any(check.worst > 0 for check in verdict.checks) or dtype == "float32"


def verdict_with(folder: Path, change: Callable[[Any], None]) -> Verdict:
    """Judge an engine in which something was changed after its weights were loaded."""
    config = EngineConfig(
        model=folder,
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        max_num_tokens=64,
        disable_overlap_scheduler=True,
        kv_cache_config=KvCacheConfig(max_tokens=512),
    )
    assembly = assemble(config)
    change(assembly.engine.runner)
    return verify_assembly(assembly, config)


@pytest.mark.parametrize(
    "name", ["layers.1.mlp.down", "layers.2.attention.qkv", "layers.0.mlp_norm", "embedding", "head"]
)
def test_one_wrong_weight_is_named(folders: dict[str, Path], name: str) -> None:
    def change(runner: Any) -> None:
        weight = runner.model.get_submodule(name).weight.data
        weight *= 1.01

    verdict = verdict_with(folders["llama"], change)
    assert verdict.departed is not None and verdict.departed.name == name
    assert verdict.departed.worst == pytest.approx(0.01, rel=0.05)
    assert name in verdict.sentence() and name in "\n".join(verdict.describe())
    # What lies behind it computes rightly from what it is given.
    wrong = [check.name for check in verdict.checks if not check.is_good]
    assert all(name.startswith(other) for other in wrong)


class Forgetful(TorchReference):
    """Loses a little of every output of layer 1, but only of one-token rows."""

    def plan(self, *, query_lens: Any, max_seq_lens: Any) -> AttentionPlan:
        return AttentionPlan.create(self, query_lens, max_seq_lens)

    def run(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: Any, spec: Any) -> Tensor:
        out_TNH = super().run(q_TNH, k_TKH, v_TKH, batch, spec)
        if spec.layer_idx == 1:
            out_TNH[: batch.attention_plan.num_decodes, 0] *= 0.9
        return out_TNH


def test_a_faulty_backend_is_named(folders: dict[str, Path]) -> None:
    verdict = verdict_with(folders["gemma3"], lambda runner: setattr(runner, "backend", Forgetful()))
    assert verdict.departed is not None and verdict.departed.name == "layers.1.attention.attention"
    assert verdict.departed.forward > 1


def test_a_fused_layer_is_judged_as_a_whole(folders: dict[str, Path]) -> None:
    def change(runner: Any) -> None:
        layer = runner.model.layers[1]
        mlp = layer.mlp
        # Calls no child through its hook, and is a little wrong.
        layer.mlp.forward = lambda x: type(mlp).forward(mlp, x).mul_(1.05)

    verdict = verdict_with(folders["llama"], change)
    assert verdict.departed is not None and verdict.departed.name == "layers.1.mlp"


def test_nan_departs(folders: dict[str, Path]) -> None:
    def change(runner: Any) -> None:
        runner.model.layers[1].mlp.gate_up.weight.data[0] = float("nan")

    verdict = verdict_with(folders["llama"], change)
    assert verdict.departed is not None and verdict.departed.name == "layers.1.mlp.gate_up"


def test_hooks_are_gone_afterwards(folders: dict[str, Path]) -> None:
    runners: list[Any] = []
    verdict_with(folders["llama"], runners.append)
    for module in runners[0].model.modules():
        assert "forward" not in vars(module) and "add" not in vars(module)


def test_options_of_its_own_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="max_num_tokens was given"):
        verify(folders["llama"], max_num_tokens=7)


def test_random_weights_are_those_of_the_engine(folders: dict[str, Path]) -> None:
    verdict = verify(
        folders["llama"], device="cpu", dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True
    )
    assert verdict.departed is None, verdict.sentence()


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tiny_llama(), tmp_path / "model")
    out = tmp_path / "verdict.json"
    done = run_process("verify", folder, "--device", "cpu", "--json", out)
    assert done.returncode == 0, done.stderr
    assert "agree with the float32 reference" in done.stdout
    assert '"departed": null' in out.read_text()
    # A bound of next to nothing: rounding alone departs.
    done = run_process("verify", folder, "--device", "cpu", "--dtype", "bfloat16", "--tolerance", "1e-6")
    assert done.returncode == 1
    assert "does not compute what it should" in done.stderr and "departs first" in done.stdout


def test_every_prompt_length_has_a_purpose() -> None:
    assert max(verification.PROMPT_LENGTHS) > verification.MAX_NUM_TOKENS


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", TWINS)
def test_a_sound_model_agrees_on_a_gpu(folders: dict[str, Path], name: str, dtype: str) -> None:
    verdict = verify(folders[name], device="cuda", dtype=dtype, skip_tokenizer_init=True)
    assert verdict.departed is None, verdict.sentence()


@pytest.mark.gpu
def test_the_reference_uses_no_kernel_of_the_engine(folders: dict[str, Path]) -> None:
    """On a GPU ops have kernels of their own; a mode must keep the reference on the definitions."""
    from slipstream.kernels.registration import DEFINITIONS
    from slipstream.kernels.rms_norm import rms_norm_op
    from slipstream.verify.reference import PlainDefinitions

    x, weight = torch.randn(3, 64, device="cuda"), torch.rand(64, device="cuda")
    with PlainDefinitions():
        assert torch.equal(rms_norm_op(x, weight, 1e-6), DEFINITIONS[rms_norm_op](x, weight, 1e-6))
