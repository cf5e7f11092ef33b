"""What may stand under a stage's `trainer:`: the keys of TRL's config that qalign neither sets itself nor replaces.

The keys that are refused by name are in `trainer_keys.yaml`.
"""

import ast
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import yaml

from qalign.config.stages import DPO, PPO, SFT, Reward

OWN_KEYS = {"sft": SFT.model_fields, "reward": Reward.model_fields, "dpo": DPO.model_fields, "ppo": PPO.model_fields}
_TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
OWNED: dict[str, dict[str, str]] = _TABLES["owned"]
WITHOUT_EFFECT: dict[str, list[str]] = _TABLES["without_effect"]
REFUSED: dict[str, dict[str, str]] = _TABLES["refused"]


@cache
def trainer_keys(stage: str) -> frozenset[str]:
    """The fields of TRL's config for a stage, parsed from the installed source because importing it takes seconds. For
    PPO, which TRL doesn't have, the settings of the optimiser."""
    if stage == "ppo":
        return frozenset(_TABLES["optimiser"])
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
    return frozenset(field for field in fields if not field.startswith("_"))
