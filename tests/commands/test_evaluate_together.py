"""`python -m qalign.evaluate` in two processes: the figures are those of one."""

import json

import pytest

from qalign import evaluate
from qalign.config.load import load
from tests.helpers import TEST
from tests.reward_runs import DATA, run_stage
from tests.train.processes import run_together
from tests.train.runs import recipe_of

PAIRS = {"eval_data": {"path": TEST}}  # more tokens than one batch holds
KEYS = {"dpo": PAIRS, "reward": PAIRS | {"members": 2}, "ppo": {"eval_data": {"path": TEST, "limit": 5}}}
KEYS |= {"sft": {"eval_data": str(DATA / "house_style_dialogues_test.jsonl")}}


def numbers(figures: object, name: str = "") -> dict[str, object]:
    """The values of nested figures by the keys that lead to them."""
    parts = figures.items() if isinstance(figures, dict) else enumerate(figures) if isinstance(figures, list) else ()
    found = {key: value for place, part in parts for key, value in numbers(part, f"{name}/{place}").items()}
    return found if isinstance(figures, (dict, list)) else {name: figures}


@pytest.mark.slow
@pytest.mark.parametrize("stage", KEYS)
def test_two_processes_find_the_figures_of_one(stage, tiny_folder, tmp_path):
    path = recipe_of(tmp_path, tiny_folder, stage, max_steps=2, **KEYS[stage])
    file = run_stage(path).path / "evaluation.json"
    evaluate.report(load(path, stage=stage), stage)
    alone = numbers(json.loads(file.read_text()))
    file.unlink()
    assert "held-out" in run_together("evaluate", path, 2)
    together = numbers(json.loads(file.read_text()))
    assert together == {key: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for key, v in alone.items()}
