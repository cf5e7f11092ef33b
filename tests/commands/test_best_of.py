"""Best of n: what is kept, what it gains, that both files train, and that nothing sampled is lost."""

import itertools
import json
import math

import pytest
import yaml
from safetensors.torch import load_file, save_file

from qalign import best_of as module
from qalign import dpo, sft
from qalign.best_of import best_of, curve
from qalign.config.load import load
from qalign.data.formats import Prompt, canonical, canonical_dialogue
from qalign.data.tokenize import TokenAnswers
from qalign.errors import UserError
from qalign.rl.rollout_batch import SampledAnswers
from qalign.train.lock import locked
from qalign.train.run_folder import RunFolder
from tests.helpers import TRAIN, leaving

REWARD = """
def few(completion_ids):
    return [-float(len(ids)) for ids in completion_ids]

def many(completion_ids):
    return [float(len(ids)) for ids in completion_ids]
"""


@pytest.fixture
def recipe_path(tmp_path, tiny_folder, monkeypatch) -> str:
    """A recipe for the tiny model, of whose tokens a tenth ends an answer."""
    (tmp_path / "mine.py").write_text(REWARD)
    recipe = {
        "model": {"base": tiny_folder, "compute_dtype": "float32", "max_length": 256},
        "lora": {"r": 4, "alpha": 8},
        "output": str(tmp_path / "runs"),
        "sft": {"data": TRAIN, "batch_size": 2, "max_steps": 1},
        "dpo": {"data": TRAIN, "batch_size": 2, "max_steps": 1},
        "ppo": {
            "data": TRAIN, "limit": 6, "eval_data": [{"path": TRAIN, "skip": 6, "limit": 4}], "max_new_tokens": 12,
            "reward": f"{tmp_path / 'mine.py'}:few", "judge": f"{tmp_path / 'mine.py'}:many",
        },
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr("qalign.rl.ppo_setup.stop_ids_of", lambda *_: tuple(range(0, 2006, 10)))
    return str(path)


def made(path: str, n: int = 4, *overrides: str, resume: bool = False, overwrite: bool = False):
    recipe = load(path, list(overrides), "ppo")
    best_of(recipe, n, path, resume=resume, overwrite=overwrite)
    folder = RunFolder(recipe, "ppo").path.parent / "best_of"
    rows = {name: [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in FILES}
    return folder, rows["picks.jsonl"], rows["pairs.jsonl"], json.loads((folder / "summary.json").read_text())


FILES = ("picks.jsonl", "pairs.jsonl")


# --- what is kept ----------------------------------------------------------------------------------------------------


def kept(tmp_path, texts, ended, scores, tools=()) -> dict:
    prompt = Prompt(({"role": "user", "content": "Why?"},), "rows.jsonl:1", {}, tools)
    row = SampledAnswers(prompt, TokenAnswers([1], tuple([[2]] * len(texts))), tuple(texts), tuple(ended))
    (tmp_path / "parts").mkdir()
    module._write_part(tmp_path, 0, [row], [scores])
    return json.loads((tmp_path / "parts" / "0.json").read_text())


def test_the_best_and_the_worst_of_those_that_ended_are_kept(tmp_path):
    found = kept(tmp_path, ["a", "b", "c", "d"], [True, False, True, True], [1.0, 9.0, -2.0, 3.0])
    (pick,), (pair,) = found["picks"], found["pairs"]
    assert (pick["completion"], pick["reward"]) == ("d", 3.0)
    assert (pair["chosen"], pair["rejected"], pair["score_chosen"], pair["score_rejected"]) == ("d", "c", 3.0, -2.0)
    assert pair["prompt"] == [{"role": "user", "content": "Why?"}]


def test_the_tools_of_a_prompt_are_kept_for_training(tmp_path):
    weather = {"type": "function", "function": {"name": "weather"}}
    found = kept(tmp_path, ["a", "b"], [True, True], [1.0, 2.0], (weather,))
    assert canonical(found["pairs"][0], "").tools == (weather,)
    assert canonical_dialogue(found["picks"][0], "").tools == (weather,)


@pytest.mark.parametrize(
    ("texts", "ended", "scores", "picks", "without"),
    [
        (["a", "b"], [False, False], [1.0, 2.0], 0, 1),
        (["a", "b"], [True, False], [1.0, 2.0], 1, 0),  # nothing to compare with
        (["a", "b"], [True, True], [1.0, 1.0], 1, 0),  # neither is better
        (["a", "a "], [True, True], [1.0, 2.0], 1, 0),  # the same answer
        (["", "b"], [True, True], [9.0, 2.0], 1, 0),  # no answer at all
    ],
)
def test_where_there_is_no_pair(texts, ended, scores, picks, without, tmp_path):
    found = kept(tmp_path, texts, ended, scores)
    assert (len(found["picks"]), len(found["pairs"]), found["without"]) == (picks, 0, without)


# --- what n buys -----------------------------------------------------------------------------------------------------


def test_the_curve_is_the_mean_over_all_choices_of_k():
    proxy, judge = [[0.0, 3.0, 1.0, 2.0], [5.0, -1.0, 0.5, 2.5]], [[1.0, 0.0, 7.0, 2.0], [3.0, 3.5, -1.0, 0.0]]
    points = curve(proxy, judge, 4)
    assert [point["n"] for point in points] == [1, 2, 4]
    for point in points:
        best, judged = [], []
        for scores, others in zip(proxy, judge, strict=True):
            picked = [max(some, key=scores.__getitem__) for some in itertools.combinations(range(4), point["n"])]
            best.append(sum(scores[answer] for answer in picked) / len(picked))
            judged.append(sum(others[answer] for answer in picked) / len(picked))
        assert point["proxy"] == pytest.approx(sum(best) / 2)
        assert point["judge"] == pytest.approx(sum(judged) / 2)
        assert point["kl_nats"] == pytest.approx(math.log(point["n"]) - (point["n"] - 1) / point["n"])


def test_a_curve_without_a_judge_and_an_n_that_is_no_power_of_2():
    points = curve([[0.0, 1.0, 2.0]], None, 3)
    assert [(point["n"], point["judge"]) for point in points] == [(1, None), (2, None), (3, None)]
    assert [point["proxy"] for point in points] == pytest.approx([1.0, 5 / 3, 2.0])


# --- the command -----------------------------------------------------------------------------------------------------


def test_what_it_leaves_trains(recipe_path, tmp_path):
    folder, picks, pairs, summary = made(recipe_path)
    assert summary["n"] == 4
    assert summary["prompts"] == {"used": 6, "held_out": 4, "refused": 0}
    assert summary["picks"] == len(picks) > 3
    assert summary["pairs"] == len(pairs) > 2
    assert [point["n"] for point in summary["held_out"]] == [1, 2, 4]
    gains = [point["proxy"] for point in summary["held_out"]]
    assert gains == sorted(gains)
    assert gains[-1] > gains[0], "the best of four is better than one"
    assert all(point["judge"] == pytest.approx(-point["proxy"]) for point in summary["held_out"])
    for pair in pairs:
        assert pair["score_chosen"] > pair["score_rejected"]
        assert any(pick["completion"] == pair["chosen"] for pick in picks)

    for stage, train, name in (("dpo", dpo.train, "pairs.jsonl"), ("sft", sft.train, "picks.jsonl")):
        overrides = [f"{stage}.data={folder / name}", f"output={tmp_path / 'next'}"]
        recipe = load(recipe_path, overrides, stage)
        run = RunFolder(recipe, stage)
        train(recipe, run)
        assert json.loads(run.summary.read_text())["rows"]["used"] == len(pairs if stage == "dpo" else picks)


def test_it_goes_on_where_it_was_cut_off_to_the_same_files(recipe_path, monkeypatch):
    monkeypatch.setattr(module, "ANSWERS_PER_PART", 8)  # three parts of two prompts
    folder, *whole = made(recipe_path)
    for name in ("summary.json", *FILES, "parts/1.json", "parts/2.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"best_of: holds a run; --resume .* --overwrite"):
        made(recipe_path)
    with pytest.raises(UserError, match=r"best_of: --resume needs .* --overwrite"):
        made(recipe_path, 2, resume=True)
    assert list(made(recipe_path, resume=True)[1:]) == whole
    assert made(recipe_path, 2, overwrite=True)[3]["n"] == 2


def test_another_policy_or_reward_than_it_began_with_is_noticed(recipe_path, tmp_path):
    overrides = [f"output={tmp_path / 'start'}", "max_refused_share=0.5"]
    recipe = load(recipe_path, overrides, "dpo")
    run = RunFolder(recipe, "dpo")
    dpo.train(recipe, run)
    start = f"ppo.start_from={run.adapter}"
    folder, *whole = made(recipe_path, 4, start)
    assert list(made(recipe_path, 4, start, resume=True)[1:]) == whole
    weights = load_file(run.adapter / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, run.adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="was trained again since this run began"):
        made(recipe_path, 4, start, resume=True)
    assert len(list((folder / "parts").iterdir())) > 0


def test_what_was_sampled_is_kept_until_all_else_is_there(recipe_path, tmp_path):
    folder, *whole = made(recipe_path)
    with pytest.raises(UserError, match="lies in the folder that this run writes to"):
        made(recipe_path, 4, f"ppo.data={folder / 'picks.jsonl'}", overwrite=True)
    with pytest.raises(UserError, match="there is no finished reward run"):
        made(recipe_path, 4, "ppo.reward=reward", overwrite=True)
    assert [json.loads(line) for line in (folder / "picks.jsonl").read_text().splitlines()] == whole[0]
    with pytest.raises(UserError, match="there is no finished reward run"):  # leaves nothing that would be in the way
        made(recipe_path, 4, "ppo.reward=reward", f"output={tmp_path / 'new'}")
    assert not (tmp_path / "new" / "best_of").exists()


def test_a_folder_of_someone_elses_is_left_alone(recipe_path, tmp_path):
    (tmp_path / "runs" / "best_of").mkdir(parents=True)
    (tmp_path / "runs" / "best_of" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds files that are no run of best_of's"):
            made(recipe_path, overwrite=overwrite)
    assert (tmp_path / "runs" / "best_of" / "thesis.txt").exists()


def test_a_start_that_was_cut_short_or_damaged_may_begin_again(recipe_path, tmp_path, capsys):
    folder = tmp_path / "best_of"
    run = RunFolder(load(recipe_path, [f"output={tmp_path}"], "ppo"), "ppo")
    (folder / "parts").mkdir(parents=True)
    (folder / ".recipe.qalign-12.json").touch()
    module._claim(folder, run, {}, resume=False, overwrite=False)
    (folder / module.SETTINGS).write_text('{"n": 1')
    with pytest.raises(UserError, match=r"recipe\.json: is damaged; --overwrite starts again"):
        module._claim(folder, run, {}, resume=True, overwrite=False)
    with locked(folder):
        assert leaving(module.main, recipe_path, f"output={tmp_path}") == 2
    assert "is using this run folder" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["n=1", "n=x", "n=", "n=-4", "n=2.5"])
def test_a_wrong_n_is_one_line(word, recipe_path, capsys):
    assert leaving(module.main, recipe_path, word) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"command line: n is '{word[2:]}'")
    assert "n=16" in line
