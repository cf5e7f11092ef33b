"""What may stand under a stage's `trainer:`: the keys of TRL's config that qalign neither sets itself nor replaces.

The keys that are refused by name are in `trainer_keys.yaml`.
"""

import ast
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import yaml

from qalign.config.paths import Keys, Problem, as_keys
from qalign.config.recipe import Recipe
from qalign.config.stages import DPO, PPO, SFT, STAGES, Reward
from qalign.errors import did_you_mean

OWN_KEYS = {"sft": SFT.model_fields, "reward": Reward.model_fields, "dpo": DPO.model_fields, "ppo": PPO.model_fields}
_TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
OWNED: dict[str, dict[str, str]] = _TABLES["owned"]
WITHOUT_EFFECT: dict[str, list[str]] = _TABLES["without_effect"]
REFUSED: dict[str, dict[str, str]] = _TABLES["refused"]


def trainer_keys(stage: str) -> set[str]:
    """The fields of TRL's config for a stage, parsed from the installed source because importing it takes seconds. For
    PPO, which TRL doesn't have, the settings of the optimiser."""
    if stage == "ppo":
        return {*_TABLES["optimiser"]}
    fields: set[str] = set()
    for package, file in (
        ("transformers", "training_args.py"),
        ("trl", "trainer/base_config.py"),
        ("trl", f"trainer/{stage}_config.py"),
    ):
        source = Path(str(distribution(package).locate_file(f"{package}/{file}"))).read_text(encoding="utf-8")
        classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
        targets = (item.target for node in classes for item in node.body if isinstance(item, ast.AnnAssign))
        fields |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {field for field in fields if not field.startswith("_")}


def unknown_trainer_keys(raw: Keys) -> Iterator[Problem]:
    """(place, message) of every key under `trainer:` that TRL doesn't have, or that would have no effect."""
    for stage in STAGES:
        trainer = as_keys(as_keys(raw.get(stage)).get("trainer"))
        known = trainer_keys(stage) if trainer else set[str]()
        for key in trainer:
            place = (stage, "trainer", key)
            owner = key if key in OWN_KEYS[stage] else OWNED[stage].get(key) or OWNED["*"].get(key)
            if owner:
                inside = "" if "." in owner or owner in Recipe.model_fields else f"{stage}."
                yield place, f"trainer.{key}: set it as {inside}{owner}"
            elif key in [*WITHOUT_EFFECT["*"], *WITHOUT_EFFECT.get(stage, ())]:
                yield place, f"trainer.{key}: has no effect, because qalign replaces this part of TRL; remove it"
            elif reason := REFUSED["*"].get(key) or REFUSED.get(stage, {}).get(key):
                yield place, f"trainer.{key}: can't be used here; {reason}"
            elif key not in known:
                few = f"; it takes the optimiser's settings: {', '.join(sorted(known))}" if stage == "ppo" else ""
                yield place, f"unknown key '{key}' in {stage}.trainer" + (did_you_mean(key, known) or few)
