"""A recipe of the tiny model for rounds of sampling and DPO, and a run of it."""

import pytest
import yaml

from qalign.best_of import BestOfRun
from qalign.config.load import load
from qalign.rounds import learn_online
from tests.helpers import TRAIN

REWARD = """
def few(completion_ids):
    return [-float(len(ids)) for ids in completion_ids]

def many(completion_ids):
    return [float(len(ids)) for ids in completion_ids]

def same(completion_ids):
    return [0.0 for _ in completion_ids]
"""


@pytest.fixture
def recipe_path(tmp_path, tiny_folder, monkeypatch) -> str:
    """A recipe for the tiny model, of whose tokens a tenth ends an answer."""
    (tmp_path / "mine.py").write_text(REWARD)
    recipe = {
        "model": {"base": tiny_folder, "compute_dtype": "float32", "max_length": 256},
        "lora": {"r": 4, "alpha": 8},
        "output": str(tmp_path / "runs"),
        "dpo": {"data": TRAIN, "limit": 3, "batch_size": 4, "max_steps": 2, "save_every": 1, "learning_rate": 1e-2},
        "ppo": {
            "data": TRAIN, "limit": 6, "eval_data": [{"path": TRAIN, "skip": 6, "limit": 4}], "max_new_tokens": 12,
            "reward": f"{tmp_path / 'mine.py'}:few", "judge": f"{tmp_path / 'mine.py'}:many",
        },
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr("qalign.rl.ppo_setup.stop_ids_of", lambda *_: tuple(range(0, 2006, 10)))
    monkeypatch.setattr("qalign.best_of.ANSWERS_PER_PART", 8)  # several parts
    return str(path)


def rounds_run(path: str, rounds: int = 2, *overrides: str, resume: bool = False, overwrite: bool = False) -> BestOfRun:
    """Rounds of four answers, as the command runs them."""
    words = " ".join([path, *overrides])
    run = BestOfRun(load(path, list(overrides), "ppo"), 4, words, rounds)
    with run.held():
        run.claim(resume=resume, overwrite=overwrite)
        learn_online(run.recipe, run)
    return run
