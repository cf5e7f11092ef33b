"""`python -m qalign RECIPE` on constitution → reward → PPO: constitutional AI with a reward model (RLAIF)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from qalign.config.load import load
from qalign.judge.comparison.sides import rewards_behind
from qalign.model import lineage
from qalign.score import score
from qalign.train.run_folder import open_run
from tests.commands.test_constitution import LABELLERS, PRINCIPLES
from tests.conftest import ROOT, tiny_model
from tests.helpers import TEST, TRAIN, train_recipe

pytestmark = pytest.mark.slow
SURE = 0.8 + 0.1 / 6  # what the labeller says of every pair: the mean over three principles and both orders


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, str]:
    """A recipe of three stages, run with the command a user types: (its folder, what was printed)."""
    folder = tmp_path_factory.mktemp("chain")
    recipe = {
        "model": {"base": ending_model(folder / "model"), "compute_dtype": "float32", "max_length": 512},
        "lora": {"r": 4, "alpha": 8},
        "output": str(folder / "runs"),
        "ppo": {
            "data": TRAIN, "limit": 12, "eval_data": {"path": TEST, "limit": 24}, "batch_size": 8,
            "micro_batch_size": 4, "samples_per_prompt": 2, "max_steps": 2, "max_new_tokens": 12, "reward": "reward",
        },
        "reward": {
            "data": "constitution", "max_steps": 2, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2,
        },
        "constitution": {
            "data": TRAIN, "limit": 12, "principles": "mine.yaml", "revisions": 0, "candidates": 8,
            "labeller": "mine.py:shorter", "agree_with": "human.jsonl", "max_new_tokens": 24,
        },
    }  # fmt: skip
    (folder / "mine.py").write_text(LABELLERS)
    (folder / "mine.yaml").write_text(yaml.safe_dump({"principles": PRINCIPLES}))
    human = [{"prompt": f"Why {n}?", "chosen": "a" * (n % 6 + 1), "rejected": "b" * 9} for n in range(36)]
    (folder / "human.jsonl").write_text("".join(json.dumps(row) + "\n" for row in human))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    words = [sys.executable, "-m", "qalign", str(folder / "recipe.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def ending_model(folder: Path) -> str:
    """The tiny model, but its answers end after a few tokens."""
    tiny_model(folder)
    file = folder / "model.safetensors"
    weights, eos = load_file(file), json.loads((folder / "config.json").read_text())["eos_token_id"]
    weights["lm_head.weight"][eos] *= 6
    save_file(weights, file, {"format": "pt"})
    return str(folder)


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_stages_run_in_the_order_in_which_they_need_each_other(chain):
    _, said = chain
    places = [said.index(f"qalign {stage} →") for stage in ("constitution", "reward", "ppo")]
    assert places == sorted(places)
    table = said[said.rindex("all stages") :].splitlines()[1:4]
    assert [line.split()[:2] for line in table] == [[s, "trained"] for s in ("constitution", "reward", "ppo")]


def test_the_reward_is_trained_on_every_pair_with_its_probability(chain):
    """-log σ(d) with a probability p is -p log σ(d) - (1 - p) log σ(-d) = -log σ(d) + (1 - p) d. In the first step the
    margins d are those of a run on the same pairs without probabilities."""
    folder, said = chain
    pairs = rows_of(folder / "runs" / "constitution" / "pairs.jsonl")
    assert {row["chosen_probability"] for row in pairs} == {round(SURE, 6)}
    assert f"{len(pairs)} of {len(pairs)} rows have a chosen_probability below 1" in " ".join(said.split())
    for row in pairs:
        del row["chosen_probability"]
    (folder / "hard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    recipe = load(str(folder / "recipe.yaml"), ["reward.data=hard.jsonl", f"output={folder / 'hard'}"], "reward")
    hard = train_recipe(recipe, stage="reward")

    (first, *_), (other, *_) = (rows_of(run / "metrics.jsonl") for run in (folder / "runs" / "reward", hard.path))
    assert first["margin"] == pytest.approx(other["margin"], abs=1e-6)
    assert abs(first["margin"]) > 0.01
    assert first["loss"] == pytest.approx(other["loss"] + (1 - SURE) * other["margin"], abs=1e-5)


def test_ppo_learns_from_the_scores_of_that_reward(chain):
    folder, _ = chain
    reward, ppo = (open_run(str(folder / "runs" / stage), (stage,)) for stage in ("reward", "ppo"))
    assert [*rewards_behind(ppo)] == [lineage.adapter_hash(reward.adapter)]
    for step in (0, 2):
        scored = folder / f"scored-{step}.jsonl"
        score(str(reward.path), str(ppo.path / "samples" / f"step-{step}.jsonl"), str(scored), None, "alone")
        # Not all: the text of a random model's answer is often read back as other tokens than were sampled.
        equal = {row["alone"] for row in rows_of(scored) if row["reward"] == pytest.approx(row["alone"], abs=1e-5)}
        assert len(equal) > 3
    learned = load_file(ppo.adapter / "adapter_model.safetensors")
    assert any(weight.abs().sum() > 0 for name, weight in learned.items() if "lora_B" in name)
