"""What the tests of the page share: finished runs of the tiny model, made once, with adapters that do something."""

import json
from pathlib import Path

import yaml

from qalign.base import Base, Role, load
from qalign.lineage import write
from qalign.recipe import Lora
from qalign.recipe_file import dump
from qalign.recipe_file import load as load_recipe
from tests.conftest import ROOT
from tests.helpers import TEST, scramble
from tests.reward_runs import run_stage, write_recipe

DATA = str(ROOT / "recipes" / "data" / "house_style_train.jsonl")


def finished_run(output: Path, tiny: str, stage: str = "dpo", scale: float = 0.2) -> Path:
    """A run folder as its stage leaves it, with random adapter weights instead of trained ones."""
    output.mkdir(parents=True, exist_ok=True)
    recipe = {
        "model": {"base": tiny, "compute_dtype": "float32", "max_length": 256},
        "output": str(output),
        stage: {"data": DATA, "eval_data": TEST},
    }
    file = output / "given.yaml"
    file.write_text(yaml.safe_dump(recipe))
    read = load_recipe(str(file), stage=stage)
    base: Base = load(read.model)
    base.add_adapter(Role.POLICY, Lora(r=4, alpha=8))
    scramble(base, scale=scale)
    folder = output / stage
    base.save_adapter(Role.POLICY, folder / "adapter")
    write(folder / "adapter", base.lineage(stage))
    (folder / "recipe.yaml").write_text(dump(read))
    (folder / "summary.json").write_text(json.dumps({"steps": 1}))
    return folder


def reward_beside(output: Path, tiny: str) -> Path:
    """A reward run of the same output, trained for a few steps."""
    return run_stage(write_recipe(output, tiny)).path
