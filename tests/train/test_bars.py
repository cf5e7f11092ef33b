"""What a run writes to stderr: its progress bar, and nothing that breaks it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reward_runs import write_recipe
from tests.train.runs import EACH_STAGE, PPO_KEYS, recipe_of

REWARD = """
import warnings

def length(completions):
    warnings.warn("this is old;\\n  use another", FutureWarning)
    warnings.warn("Attempting to run cuBLAS, but there was no current CUDA context!")
    return [float(len(text)) for text in completions]
"""


def lines_of(recipe: str, environment: dict[str, str]) -> list[str]:
    """What the stage of a recipe writes to stderr, as a process of its own; a bar goes back to the line's beginning."""
    command = [sys.executable, "-m", f"qalign.{Path(recipe).stem}", recipe]
    ran = subprocess.run(command, capture_output=True, env=environment, check=False)
    found = ran.stderr.decode()
    assert ran.returncode == 0, found
    return [line for line in re.split(r"[\r\n]+", found) if line.strip()]


def is_bar(line: str, stage: str) -> bool:
    return re.match(rf"{stage}: +\d+%\|.*\| \d+/3 \[.*\] *$", line) is not None


@pytest.mark.slow
def test_a_warning_of_a_library_stands_above_the_bar_on_a_line_of_its_own(tiny_folder, tmp_path):
    """A reward function stands for the library."""
    (tmp_path / "mine.py").write_text(REWARD)
    recipe = write_recipe(tmp_path, tiny_folder, "ppo", reward=f"{tmp_path}/mine.py:length", **PPO_KEYS)
    lines = lines_of(recipe, dict(os.environ))
    assert {line for line in lines if not is_bar(line, "ppo")} == {"mine.py:5: FutureWarning: this is old; use another"}
    assert len(lines) > 3


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a GPU")
@pytest.mark.parametrize("stage", EACH_STAGE)
def test_on_a_gpu_nothing_breaks_the_bar(stage, tiny_folder, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    recipe = recipe_of(tmp_path, tiny_folder, stage)
    assert [line for line in lines_of(recipe, environment) if not is_bar(line, stage)] == []
