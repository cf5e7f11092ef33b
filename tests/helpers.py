"""What several test files do: read the demo's pairs, give an adapter weights, run the stage, look at what it left."""

import hashlib
import json

import torch
from trl import DPOConfig

from qalign import dpo
from qalign.config.load import load
from qalign.config.recipe import Recipe
from qalign.config.stages import Source
from qalign.data.formats import preferences
from qalign.data.tokenize import encode_pairs
from qalign.model.base import Role
from qalign.train.run_folder import RunFolder
from tests.conftest import ROOT

TRAIN, TEST = (str(ROOT / "recipes" / "data" / f"house_style_{split}.jsonl") for split in ("train", "test"))


def house_style(tokenizer, count: int, max_length: int = 512):
    """The first real pairs of the demo's data, as ids."""
    rows, _ = preferences((Source(path=TEST),), "train", count, seed=0)
    pairs, refused = encode_pairs(tokenizer, rows, max_length, {})
    assert not refused
    return pairs


def scramble(base, adapter: Role = Role.POLICY, scale: float = 0.05) -> None:
    """Gives an adapter weights that do something: LoRA begins as a no-op."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in base.model.named_parameters():
        if f".{adapter}." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def digest(base) -> str:
    """A hash over everything that must never change: all weights but the policy's."""
    found = hashlib.sha256()
    for name, tensor in sorted(base.model.state_dict().items()):
        if f".{Role.POLICY}." not in name:
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def train(path: str, *, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """The DPO stage of a recipe file, as its command runs it."""
    return train_recipe(load(path, stage="dpo"), path, resume=resume, overwrite=overwrite)


def train_recipe(recipe: Recipe, command_line: str = "", *, resume: bool = False, overwrite: bool = False) -> RunFolder:
    run = RunFolder(recipe, "dpo", command_line)
    run.claim(resume=resume, overwrite=overwrite)
    dpo.train(recipe, run)
    return run


def dpo_config(folder, **values) -> DPOConfig:
    """TRL's config for a few plain steps on the CPU."""
    plain = {
        "output_dir": str(folder), "bf16": False, "use_cpu": True, "activation_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False, "logging_steps": 1,
        "dataloader_pin_memory": False, "save_strategy": "no", "lr_scheduler_type": "constant", "learning_rate": 1e-3,
    }  # fmt: skip
    return DPOConfig(**plain | values)


def metrics(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]
