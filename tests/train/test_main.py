"""`python -m qalign RECIPE`: the chain SFT → reward → DPO on one base."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from qalign.__main__ import run_all
from qalign.config.load import load as load_recipe
from qalign.errors import UserError
from qalign.model.base import Role, load
from qalign.score import score
from tests.conftest import ROOT
from tests.helpers import house_style, train_recipe
from tests.reward_runs import DATA, SHORT, write_recipe


@pytest.fixture(scope="module")
def chain(tiny_folder, tmp_path_factory):
    """A recipe of three stages, run once with the command a user types: (recipe file, what was printed)."""
    folder = tmp_path_factory.mktemp("chain")
    pairs = {"data": str(DATA / "house_style_train.jsonl"), **SHORT, "start_from": "sft"}
    recipe = {
        "model": {"base": tiny_folder, "compute_dtype": "float32", "max_length": 512},
        "lora": {"r": 4, "alpha": 8},
        "output": str(folder / "runs"),
        "sft": {"data": str(DATA / "house_style_dialogues_train.jsonl"), **SHORT},
        "reward": pairs | {"eval_data": str(DATA / "house_style_test.jsonl")},
        "dpo": pairs,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    done = subprocess.run([sys.executable, "-m", "qalign", str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


@pytest.mark.slow
def test_all_stages_run_in_order_end_with_one_table_and_are_skipped_when_complete(chain, capfd):
    path, said = chain
    places = [said.index(f"qalign {stage} →") for stage in ("sft", "reward", "dpo")]
    assert places == sorted(places)
    table = said[said.rindex("all stages") :].splitlines()[1:4]
    assert [line.split()[:2] for line in table] == [["sft", "trained"], ["reward", "trained"], ["dpo", "trained"]]
    assert "held-out accuracy" in table[1]
    assert all("3 steps" in line for line in table)
    run_all(str(path), [], [])
    said = capfd.readouterr().out
    assert said.count("complete, skipped") == 3
    assert said.count("skipped  3 steps") == 3


@pytest.mark.slow
def test_dpo_begins_at_ln_2_against_the_sft_adapter_to_the_bit(chain):
    """The reference is the base with the SFT adapter, bit for bit as it is when it is loaded alone."""
    path, said = chain
    recipe = load_recipe(str(path))
    sft = f"{recipe.output}/sft/adapter"
    assert f"reference      the base with a frozen copy of the adapter {sft}" in said
    first = json.loads((path.parent / "runs" / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)

    alone, base = load(recipe.model), load(recipe.model)
    ids = torch.tensor([pair.prompt_ids + pair.chosen_ids for pair in house_style(base.tokenizer, 1)])
    alone.load_adapter(Role.POLICY, sft, trainable=False)
    base.load_adapter(Role.POLICY, f"{recipe.output}/dpo/adapter", trainable=True)
    base.load_reference(sft)
    logits = {}
    for name, one, role in (("sft", alone, Role.POLICY), ("reference", base, Role.REFERENCE),
                            ("policy", base, Role.POLICY), ("base", base, Role.BASE)):  # fmt: skip
        with torch.no_grad(), one.acting_as(role) as lm:
            logits[name] = lm(ids).logits
    assert torch.equal(logits["sft"], logits["reference"])
    assert not torch.equal(logits["sft"], logits["policy"]), "three steps of DPO moved it"
    assert not torch.equal(logits["sft"], logits["base"])


@pytest.mark.slow
def test_a_recipe_that_changed_since_or_has_no_stages_is_refused(chain, tiny_folder, tmp_path):
    path, _ = chain
    with pytest.raises(UserError, match=r"runs/dpo: is complete, but .*changed since: dpo\.beta is 0\.3, was 0\.1"):
        run_all(str(path), ["dpo.beta=0.3"], [])
    empty = tmp_path / "recipe.yaml"
    empty.write_text(f"model: {{base: {tiny_folder}}}\noutput: {tmp_path / 'runs'}\n")
    with pytest.raises(UserError, match="none of the sections sft:, reward:, dpo:, kto:, ppo:, grpo:,"):
        run_all(str(empty), [], [])


@pytest.mark.slow
def test_a_held_out_loss_that_was_not_finite_is_left_out_of_the_table(chain, capfd):
    """`metrics.jsonl` has null for it."""
    path, _ = chain
    logged = path.parent / "runs" / "dpo" / "metrics.jsonl"
    kept = logged.read_text()
    logged.write_text(kept + '{"step": 3, "eval_loss": null}\n')
    try:
        run_all(str(path), [], [])
    finally:
        logged.write_text(kept)
    assert "held-out loss" not in capfd.readouterr().out.splitlines()[-2]


@pytest.mark.slow
def test_damaged_figures_of_a_complete_run_are_named(chain, capfd):
    path, _ = chain
    files = [path.parent / "runs" / "dpo" / name for name in ("metrics.jsonl", "summary.json")]
    kept = [file.read_bytes() for file in files]
    try:
        files[0].write_bytes(b"\0\0\n\xff junk\n")
        run_all(str(path), [], [])
        for damaged in (b'{"steps": 3, ', b"{}", b"null", b'{"steps": "3"}', b'{"steps": 3, "wall_seconds": []}'):
            files[1].write_bytes(damaged)
            run_all(str(path), [], [])
    finally:
        for file, content in zip(files, kept, strict=True):
            file.write_bytes(content)
    first, *others = (line for line in capfd.readouterr().out.splitlines() if line.startswith("  dpo "))
    assert "3 steps" in first
    assert len(others) == 5
    assert all(f"{files[1]} is damaged" in line for line in others)


@pytest.mark.slow
def test_a_parent_that_was_trained_again_is_noticed(chain, tmp_path):
    path, _ = chain
    weights = path.parent / "runs" / "sft" / "adapter" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept + b" ")
    try:
        with pytest.raises(
            UserError, match=r"runs/reward: started from an adapter \w{16}, but .*sft/adapter is \w{16} now"
        ):
            run_all(str(path), [], [])
    finally:
        weights.write_bytes(kept)


def test_a_stage_that_fails_stops_the_chain_with_its_code(tiny_folder, tmp_path, capfd):
    path = write_recipe(tmp_path, tiny_folder, "dpo", start_from="sft")
    with pytest.raises(SystemExit) as left:
        run_all(path, [], [])
    assert left.value.code == 2
    assert "there is no finished sft run" in capfd.readouterr().err


def test_what_is_complete_is_skipped_from_another_folder_too(tiny_folder, tmp_path, monkeypatch, capfd):
    """Base and rows are named as seen from the recipe, and the commands that take a run find the base from anywhere."""
    place = tmp_path / "project"
    shutil.copytree(tiny_folder, place / "model")
    shutil.copy(DATA / "house_style_train.jsonl", place / "rows.jsonl")
    path = Path(write_recipe(place, "model", data="rows.jsonl", max_steps=1)).rename(place / "recipe.yaml")
    path.write_text(path.read_text().replace(str(place), str(tmp_path / "runs")))
    monkeypatch.chdir(place)
    train_recipe(load_recipe("recipe.yaml", stage="reward"), "recipe.yaml", stage="reward")
    assert "complete, skipped" not in capfd.readouterr().out
    monkeypatch.chdir(tmp_path)
    run_all("project/recipe.yaml", [], [])
    assert capfd.readouterr().out.count("complete, skipped") == 1
    score("runs/reward", str(place / "rows.jsonl"), "scored.jsonl", 2)
    assert len((tmp_path / "scored.jsonl").read_text().splitlines()) == 2
