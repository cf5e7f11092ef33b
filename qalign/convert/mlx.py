"""What mlx-lm loads on a Mac: the merged model, or the adapter alone beside a base that it has.

mlx-lm reads the folders of transformers, but not all of their `config.json` (its 0.32): without `rope_theta` beside
`model_type`, where transformers 5 no longer writes it, it computes other positions than the model was trained with, and
says nothing.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qalign.convert.adapters import Update
from qalign.errors import UserError

WEIGHTS, SETTINGS = "adapters.safetensors", "adapter_config.json"


def fit_config(folder: Path) -> None:
    """Writes the settings of a merged folder's `config.json` where mlx-lm reads them."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters")
    if rope is None:
        return
    if "rope_theta" not in rope:
        raise UserError(f"--to mlx: mlx-lm has no place for rotary positions by kind of layer ({', '.join(rope)})")
    config["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_adapter(found: dict[str, Update], layers: int, folder: Path) -> None:
    """Writes an adapter as mlx-lm loads it: `adapters.safetensors` and `adapter_config.json`. mlx-lm has one rank and
    one scale for all layers, so smaller ranks are filled up with zeros and scales are part of B."""
    rank = max(len(update.a) for update in found.values())
    tensors: dict[str, Tensor] = {}
    for layer, update in found.items():
        a, b = torch.zeros(rank, update.a.shape[1]), torch.zeros(update.b.shape[0], rank)
        a[: len(update.a)], b[:, : len(update.a)] = update.a, update.scale * update.b
        tensors |= {f"{layer}.lora_a": a.T.contiguous(), f"{layer}.lora_b": b.T.contiguous()}
    config = {
        "fine_tune_type": "lora",
        "num_layers": layers,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(found)},
    }
    save_file(tensors, folder / WEIGHTS)
    (folder / SETTINGS).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def with_adapter(lm: Any, folder: Path) -> Any:
    """The model with the adapter of such a folder merged into it, for measuring."""
    tensors = load_file(folder / WEIGHTS)
    scale = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["lora_parameters"]["scale"]
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            weight = cast(Tensor, lm.get_submodule(name.removesuffix(".lora_a")).weight)
            weight.data = weight.data.float() + scale * (a @ tensors[name.replace(".lora_a", ".lora_b")]).T
    return lm
