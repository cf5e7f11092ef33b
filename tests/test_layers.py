"""Imports go one way: a module may import only what stands before it in this list, and stages never each other."""

import ast
from pathlib import Path

import qalign

LAYERS = [
    (
        "ground",
        [
            "errors",
            "recipe",
            "places",
            "trainer_keys",
            "recipe_file",
            "lineage",
            "losses",
            "reward_report",
            "watch",
            "ppo_report",
            "command",
        ],
    ),
    ("data", ["files", "rows", "votes", "dialogues", "prompts", "tokens", "layout", "batch"]),
    (
        "model",
        [
            "attention",
            "heads",
            "logps",
            "memory",
            "weights",
            "starts",
            "base",
            "references",
            "rollout",
            "streams",
            "scoring",
        ],
    ),
    (
        "run",
        [
            "run",
            "stage",
            "finished",
            "intake",
            "journal",
            "loop",
            "supervised",
            "trainer",
            "rewards",
            "experience",
            "ppo_setup",
            "ppo_trainer",
            "looks",
            "ppo_loop",
        ],
    ),
    ("stage", ["sft", "reward", "dpo", "ppo"]),
    (
        "top",
        [
            "evaluate",
            "fit",
            "score",
            "best_of",
            "merge",
            "__main__",
            "contenders",
            "worker",
            "shades",
            "duel",
            "guard",
            "chat",
            "page",
            "widgets",
        ],
    ),
]
LIGHT = [
    *(
        "errors",
        "recipe",
        "places",
        "trainer_keys",
        "recipe_file",
        "lineage",
        "command",
        "files",
        "rows",
        "votes",
        "dialogues",
        "prompts",
    ),
    *(
        "run",
        "stage",
        "finished",
        "intake",
        "sft",
        "reward",
        "dpo",
        "ppo",
        "fit",
        "evaluate",
        "score",
        "merge",
        "__main__",
        "contenders",
        "worker",
        "shades",
        "duel",
        "guard",
    ),
]
HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "gradio"}
PACKAGE = Path(qalign.__file__).parent


def imported(module: str, *, nested: bool) -> set[str]:
    """Dotted names that a module imports; those inside functions too if `nested`."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "qalign" else set()
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_every_module_has_a_layer():
    listed = {module for _, row in LAYERS for module in row}
    assert {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"} == listed


def test_imports_go_one_way():
    before: set[str] = set()
    for layer, row in LAYERS:
        for module in row:
            own = {name.split(".")[1] for name in imported(module, nested=True) if name.startswith("qalign.")} - {
                "__version__"
            }
            allowed = before - ({*row} if layer == "stage" else set())
            assert own <= allowed, f"{module} ({layer}) may not import {sorted(own - allowed)}"
            before.add(module)


def test_what_runs_before_the_recipe_is_checked_imports_nothing_heavy():
    for module in LIGHT:
        roots = {name.split(".")[0] for name in imported(module, nested=False)}
        assert not roots & HEAVY, f"{module} imports {sorted(roots & HEAVY)} at its top"
