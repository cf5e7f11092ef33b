"""What commands say to type next is right: each hint goes through its command's parser, its recipe and its folders."""

import importlib
import shlex
from pathlib import Path

import pytest
import yaml

from qalign import best_of, dpo
from qalign.cli import recipe_parser, stage_parser
from qalign.config.load import load
from qalign.config.stages import STAGES
from qalign.train.run_folder import RunFolder, open_run
from tests.conftest import ROOT
from tests.helpers import leaving

DATA = ROOT / "recipes" / "data"
REWARD = """
def few(completion_ids):
    return [-float(len(ids)) for ids in completion_ids]

def flat(completions):
    return [1.0] * len(completions)
"""


@pytest.fixture
def recipe_path(tmp_path, tiny_folder) -> str:
    """All stages for the tiny model, DPO and PPO from SFT, in a folder with a space in its name."""
    (tmp_path / "my runs").mkdir()
    (tmp_path / "mine.py").write_text(REWARD)
    pairs = {"data": str(DATA / "house_style_train.jsonl"), "limit": 4, "batch_size": 2, "max_steps": 1}
    held_out = {"path": str(DATA / "house_style_test.jsonl"), "limit": 2}
    recipe = {
        "model": {"base": tiny_folder, "compute_dtype": "float32", "max_length": 512},
        "lora": {"r": 4, "alpha": 8},
        "output": str(tmp_path / "my runs" / "demo"),
        "sft": pairs | {"data": str(DATA / "house_style_dialogues_train.jsonl")},
        "reward": pairs,
        "dpo": pairs | {"start_from": "sft", "eval_data": held_out},
        "kto": pairs | {"start_from": "sft", "eval_data": held_out},
        "ppo": {
            **pairs, "start_from": "sft", "max_new_tokens": 12, "batch_size": 4, "samples_per_prompt": 2,
            "reward": f"{tmp_path / 'mine.py'}:few",
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return str(tmp_path / "recipe.yaml")


@pytest.fixture
def endings(monkeypatch):
    """Every tenth token of the tiny model ends an answer."""
    monkeypatch.setattr("qalign.rl.ppo_setup.stop_ids_of", lambda *_: tuple(range(0, 2006, 10)))


def trained(path: str, stage: str, *overrides: str) -> None:
    assert leaving(importlib.import_module(f"qalign.{stage}").main, path, *overrides) == 0


def hint(capsys) -> str:
    """What the last command said to do next."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  next ")]
    return lines[-1].removeprefix("  next").strip()


def checked(command: str) -> list[str]:
    """The words after `python -m qalign.X` of a hint that its command would accept."""
    python, m, module, *words = shlex.split(command)
    assert (python, m) == ("python", "-m")
    name = module.removeprefix("qalign.")
    if name in ("score", "export"):
        assert open_run(words[0]).complete
        return words
    parser = stage_parser(name, "") if name in STAGES or name == "best_of" else recipe_parser(name, "")
    if name == "evaluate":
        parser.add_argument("--stage", default="dpo")
    args = parser.parse_args(words)
    stage = args.stage if name == "evaluate" else {"best_of": "ppo"}.get(name, name)
    overrides = [word for word in args.overrides if not word.startswith("n=")]
    run = RunFolder(load(args.recipe, overrides, stage), stage, shlex.join([args.recipe, *overrides]))
    if name in STAGES:
        run.claim(resume=False, overwrite=False)  # its folder is free, and what it starts from is there
    else:
        run.check_parent()
    return words


def test_the_hint_of_every_stage_is_a_command(recipe_path, capsys):
    for stage, following in (
        ("sft", "reward"),
        ("reward", "score"),
        ("dpo", "evaluate"),
        ("kto", "evaluate"),
        ("ppo", "best_of"),
    ):
        trained(recipe_path, stage)
        command = hint(capsys)
        assert command.startswith(f"python -m qalign.{following} ")
        checked(command)


def test_hints_are_what_the_user_called(recipe_path, capsys, monkeypatch):
    """With uvx there is no `python -m qalign.dpo`."""
    monkeypatch.setattr("sys.argv", ["/some/bin/qalign"])
    assert leaving(dpo.main, recipe_path) == 2  # nothing has made its SFT adapter
    assert f"run qalign sft {recipe_path} first" in " ".join(capsys.readouterr().err.split())

    trained(recipe_path, "dpo", "dpo.start_from=null")
    assert hint(capsys).startswith(f"qalign evaluate {recipe_path} ")


def test_dpo_without_held_out_pairs_points_to_the_page(recipe_path, capsys):
    trained(recipe_path, "dpo", "dpo.start_from=null", "dpo.eval_data=null")
    *_, module, folder = shlex.split(hint(capsys))
    assert module == "qalign.page"
    assert open_run(folder, ("dpo",)).complete


@pytest.mark.parametrize("start", ["sft", "null"])
def test_best_ofs_hint_trains_on_its_pairs_from_the_policy_that_sampled(start, recipe_path, tmp_path, capsys, endings):
    """The recipe starts DPO from SFT, whose run isn't in the new output."""
    trained(recipe_path, "sft")
    assert leaving(best_of.main, recipe_path, "n=4", f"ppo.start_from={start}") == 0
    command = hint(capsys)
    words = checked(command)
    assert f"dpo.start_from={tmp_path}/my runs/demo/sft/adapter" in words
    assert f"output={tmp_path}/my runs/demo_2" in words
    assert leaving(dpo.main, *words) == 0
    assert (tmp_path / "my runs" / "demo_2" / "dpo" / "summary.json").is_file()


def test_best_of_proposes_no_training_on_nothing(recipe_path, tmp_path, capsys, endings, monkeypatch):
    base = ("n=2", "ppo.start_from=null", "ppo.limit=2", "--overwrite")
    assert leaving(best_of.main, recipe_path, *base, f"ppo.reward={tmp_path / 'mine.py'}:flat") == 0
    assert hint(capsys).startswith("no pair to train on: the reward tells no answers to a prompt apart")
    monkeypatch.setattr("qalign.rl.ppo_setup.text_of", lambda *_: "")
    assert leaving(best_of.main, recipe_path, *base) == 0
    said = capsys.readouterr().out
    assert "2 prompts have no answer that ended by itself and says something" in said
    assert "next           nothing to train on: raise ppo.max_new_tokens" in said
    assert "qalign.dpo" not in said


def test_best_of_without_a_dpo_section_says_to_add_one(recipe_path, tmp_path, capsys, endings):
    recipe = yaml.safe_load(Path(recipe_path).read_text())
    path = tmp_path / "ppo_only.yaml"
    path.write_text(yaml.safe_dump({key: recipe[key] for key in recipe if key not in ("sft", "dpo")}))
    assert leaving(best_of.main, str(path), "n=4", "ppo.start_from=null") == 0
    assert hint(capsys).startswith(
        f"add a dpo section to {path}, with data: {tmp_path}/my runs/demo/best_of/pairs.jsonl"
    )
