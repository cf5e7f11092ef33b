"""How the house is built: what is light to import, and how large its parts may be. (Directions: `make check`.)"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qalign

PACKAGE = Path(qalign.__file__).parent
LIGHT = ["cli", "sft", "reward", "dpo", "kto", "ppo", "grpo", "__main__", "evaluate", "fit", "score", "export"]
LIGHT += ["best_of", "compare", "constitution", "goodhart", "init", "data.formats", "model.lineage", "train.dataset"]
LIGHT += ["convert.hub"]
LIGHT += [
    "watch",
    "reports.curves",
    "h3",
    "judge.principles",
    "page.launch",
    "page.models",
    "page.session",
    "page.training.drawing",
    "page.votes",
    "train.run_folder",
]
HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "gradio"}
FILES = sorted(PACKAGE.rglob("*.py"))


def test_what_runs_before_the_recipe_is_checked_imports_nothing_heavy():
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(f'qalign.{name}')\n"
    code += f"    print(*(f'{{name}}: {{heavy}}' for heavy in {HEAVY!r} & set(sys.modules)))"

    found = subprocess.run([sys.executable, "-c", code, *LIGHT], capture_output=True, text=True, check=True)

    assert not found.stdout.split(), found.stdout


@pytest.mark.parametrize("folder", [PACKAGE, *(folder.parent for folder in PACKAGE.glob("*/__init__.py"))])
def test_folders_stay_small(folder):
    files = [file.name for file in folder.glob("*.py") if file.name != "__init__.py"]
    assert len(files) <= (22 if folder == PACKAGE else 10), sorted(files)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 50, f"{node.name} is too long"
