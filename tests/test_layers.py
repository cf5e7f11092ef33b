"""Imports go one way: a folder may import only what stands before it, and stages never each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qalign

FLOORS = ["errors", "losses", "config", "data", "model", "train", "reports", "rl", "cli"]
STAGES = {"sft", "reward", "dpo", "ppo"}
LIGHT = [
    "config",
    "data.readers",
    "data.formats",
    "model.lineage",
    "train.run_folder",
    "cli",
    *sorted(STAGES),
    "__main__",
]
LIGHT += ["evaluate", "fit", "score", "merge", "best_of", "page.models", "page.session", "page.votes", "page.security"]
HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "gradio"}
PACKAGE = Path(qalign.__file__).parent


def imports() -> dict[str, set[str]]:
    """What each module of qalign imports of qalign, imports inside functions included, as dotted names without it."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        found[name] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qalign":
                module = node.module.removeprefix("qalign").lstrip(".")
                found[name] |= {module} if module else {alias.name for alias in node.names} - {"__version__"}
    return found


def test_folders_import_only_what_stands_below_them():
    for module, used in imports().items():
        floor = module.split(".")[0]
        for other in {name.split(".")[0] for name in used} - {floor}:
            if floor in FLOORS:
                allowed = FLOORS[: FLOORS.index(floor)]
                assert other in allowed, f"{module} may not import {other}"
            assert not ({floor, other} <= STAGES), f"{module} imports the stage {other}"


@pytest.mark.parametrize("module", LIGHT)
def test_what_runs_before_the_recipe_is_checked_imports_nothing_heavy(module):
    code = f"import sys, qalign.{module}; print(*{HEAVY!r} & {{name.split('.')[0] for name in sys.modules}})"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not found.stdout.split(), f"qalign.{module} imports {found.stdout}"
