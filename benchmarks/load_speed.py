"""How fast do weights get to where they are computed with? Files in the page cache, and random ones.

A checkpoint of several shards is written once, in the shape of Llama-3.1-8B with fewer layers, and read back
by the loader of the engine, file by file still in the page cache; dummy weights are those of all 32 layers.
A figure is the median of the runs; a GPU is waited for.

    python benchmarks/load_speed.py [--gigabytes 4] [--devices cpu,cuda] [--folder /tmp] [--out load.json]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from slipstream.checkpoint.opening import open_checkpoint
from slipstream.models.loading import load_weights
from slipstream.models.placing import NUM_THREADS
from slipstream.models.registry import model_class, read_config
from slipstream.parallel.mesh import Mesh
from slipstream.quant.unquantized import Unquantized

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LAYER_BYTES = 2 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
LAYERS_8B = 32


def build(checkpoint: Any, device: str) -> Any:
    cls = model_class(checkpoint)
    config = read_config(cls, checkpoint)
    return cls(config, mesh=Mesh(), quant=Unquantized(), dtype=torch.bfloat16, device=torch.device(device))


def write_checkpoint(folder: Path, num_layers: int) -> int:
    """Write a shard for every four layers, and return the bytes of all."""
    folder.mkdir()
    config = CONFIG | {"num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    checkpoint = open_checkpoint(folder, load_format="dummy")
    places = build(checkpoint, "meta").weight_map("hf")
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, place in places.items():
        if place.parameter is None:
            continue
        number = int(name.split(".")[2]) // 4 if ".layers." in name else 0
        shape = place.parameter.expected_shape(place.slot)
        made = torch.ones(shape) if len(shape) == 1 else torch.full(shape, 0.01)
        shards.setdefault(f"model-{number:05}.safetensors", {})[name] = made.to(torch.bfloat16)
    index = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    return sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())


def seconds_of(folder: Path, load_format: str, device: str) -> float:
    """Return how long the weights of a model that is there already take to load."""
    checkpoint = open_checkpoint(folder, load_format=load_format)
    try:
        model = build(checkpoint, device)
        wait(device)
        started = time.perf_counter()
        load_weights(model, checkpoint)
        wait(device)
        return time.perf_counter() - started
    finally:
        checkpoint.close()
        model = None
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(folder: Path, num_bytes: int, device: str, runs: int) -> dict[str, Any]:
    # Once before: the files come into the page cache, a GPU starts.
    seconds_of(folder, "auto", device)
    files = [seconds_of(folder, "auto", device) for _ in range(runs)]
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "bytes": num_bytes,
        "safetensors_s": files,
        "safetensors_gb_per_s": num_bytes / statistics.median(files) / 1e9,
        "threads": NUM_THREADS if device == "cuda" else 1,
    }
    if device == "cuda":
        with tempfile.TemporaryDirectory() as empty:
            config = CONFIG | {
                "num_hidden_layers": LAYERS_8B,
                "vocab_size": 128256,
                "tie_word_embeddings": False,
            }
            Path(empty, "config.json").write_text(json.dumps(config), encoding="utf-8")
            dummy = [seconds_of(Path(empty), "dummy", device) for _ in range(runs)]
        found |= {"dummy_8b_s": dummy}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--devices", default="cpu,cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", default=None, help="where the checkpoint is written (a temporary folder)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary) / "model"
        num_bytes = write_checkpoint(folder, max(1, round(given.gigabytes * 1e9 / LAYER_BYTES)))
        found = [measure(folder, num_bytes, device, given.runs) for device in given.devices.split(",")]
    record = {"torch": torch.__version__, "results": found}
    print(json.dumps(record, indent=1))
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
