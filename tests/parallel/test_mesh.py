"""Does a mesh build anywhere, communicate nothing at size 1, and need its process group at a larger one?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slipstream.core.errors import ConfigError, EngineError
from slipstream.parallel.mesh import AXES, Mesh

ROOT = Path(__file__).resolve().parents[2]
RANK_PROGRAM = """
import sys, torch, torch.distributed as dist
from slipstream.core.errors import EngineError
from slipstream.parallel.mesh import Mesh
rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
mesh = Mesh(tp_size=2, tp_rank=rank)
x = torch.tensor([[1.0, 2.0]]) * (rank + 1)
assert torch.equal(mesh.all_gather(x, 1), torch.tensor([[1.0, 2.0, 2.0, 4.0]]))
assert torch.equal(mesh.all_gather(x, 0), torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
assert torch.equal(mesh.all_reduce(x), torch.tensor([[3.0, 6.0]]))
try:
    Mesh(tp_size=4, tp_rank=rank).all_reduce(x)
except EngineError as error:
    assert "of 2; the mesh is" in str(error), error
else:
    raise AssertionError("a mesh of another size was accepted")
print("ok")
"""


def test_size_one_returns_its_argument() -> None:
    x = torch.ones(3)
    assert Mesh().all_reduce(x) is x
    assert Mesh().all_gather(x, 0) is x


@pytest.mark.parametrize("axis", AXES)
def test_bad_sizes_and_ranks_are_refused(axis: str) -> None:
    with pytest.raises(ConfigError, match=f"{axis}_size is 0"):
        Mesh(**{f"{axis}_size": 0})
    with pytest.raises(ConfigError, match=f"{axis}_rank is 2; with {axis}_size 2"):
        Mesh(**{f"{axis}_size": 2, f"{axis}_rank": 2})
    with pytest.raises(ConfigError, match=f"{axis}_rank is -1"):
        Mesh(**{f"{axis}_rank": -1})


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather"])
def test_a_collective_without_a_process_group_says_so(collective: str) -> None:
    mesh = Mesh(tp_size=2, tp_rank=1)
    arguments = (torch.ones(2),) if collective == "all_reduce" else (torch.ones(2), 0)
    with pytest.raises(EngineError, match=f"{collective} over 2 tensor ranks needs a process group"):
        getattr(mesh, collective)(*arguments)


def test_two_processes_reduce_and_gather(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.strip() == "ok", err
