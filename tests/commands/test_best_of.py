"""Best of n: what is kept, what it gains, that both files train, and that nothing sampled is lost."""

import itertools
import json
import math
import shutil
import signal
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from qalign import best_of as module
from qalign import dpo, sft
from qalign.best_of import BestOfRun, best_of, curve
from qalign.config.load import load
from qalign.data.formats import Prompt, canonical, canonical_dialogue
from qalign.data.store.sequences import TokenAnswers
from qalign.errors import Stopped, UserError
from qalign.rl.rollout_batch import SampledAnswers
from qalign.train.checkpoints import mark_whole
from qalign.train.lock import locked
from qalign.train.run_folder import RunFolder
from tests.helpers import TRAIN, leaving

REWARD = """
def few(completion_ids):
    return [-float(len(ids)) for ids in completion_ids]

def many(completion_ids):
    return [float(len(ids)) for ids in completion_ids]

def broken(**_):
    return 1 / 0
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


FILES = ("picks.jsonl", "pairs.jsonl")


def made(path: str, n: int = 4, *overrides: str, resume: bool = False, overwrite: bool = False):
    """The run's folder, its picks, its pairs and its summary."""
    run = BestOfRun(load(path, list(overrides), "ppo"), n, path)
    with run.held():
        run.claim(resume=resume, overwrite=overwrite)
        if not (resume and run.complete):
            best_of(run.recipe, run)
    rows = [[json.loads(line) for line in (run.path / name).read_text().splitlines()] for name in FILES]
    return run.path, *rows, json.loads(run.summary.read_text())


# --- what is kept ----------------------------------------------------------------------------------------------------


def kept(texts, ended, scores, tools=()) -> dict:
    prompt = Prompt(({"role": "user", "content": "Why?"},), "rows.jsonl:1", {}, tools)
    row = SampledAnswers(prompt, TokenAnswers([1], tuple([[2]] * len(texts))), tuple(texts), tuple(ended))
    return module.kept([row], [scores])


def test_the_best_and_the_worst_of_those_that_ended_are_kept():
    found = kept(["a", "b", "c", "d"], [True, False, True, True], [1.0, 9.0, -2.0, 3.0])
    (pick,), (pair,) = found["picks"], found["pairs"]
    assert (pick["completion"], pick["reward"]) == ("d", 3.0)
    assert (pair["chosen"], pair["rejected"], pair["score_chosen"], pair["score_rejected"]) == ("d", "c", 3.0, -2.0)
    assert pair["prompt"] == [{"role": "user", "content": "Why?"}]


def test_the_tools_of_a_prompt_are_kept_for_training():
    weather = {"type": "function", "function": {"name": "weather"}}
    found = kept(["a", "b"], [True, True], [1.0, 2.0], (weather,))
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
def test_where_there_is_no_pair(texts, ended, scores, picks, without):
    found = kept(texts, ended, scores)
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


@pytest.fixture
def many_parts(monkeypatch):
    """Three parts of two training prompts, and two of held-out ones."""
    monkeypatch.setattr(module, "ANSWERS_PER_PART", 8)


def cut_at(folder: Path, step: int) -> None:
    """What a kill leaves after a checkpoint: more of the log, no more checkpoints, no results."""
    for name in ("summary.json", *FILES):
        (folder / name).unlink()
    for later in range(step + 1, 6):
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{later}", ignore_errors=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "picks": [{"half')


@pytest.mark.parametrize("step", [4, 5])
def test_it_goes_on_where_it_was_cut_off_to_the_same_files(step, recipe_path, many_parts):
    folder, *whole = made(recipe_path)
    log = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"best_of: is complete, with another recipe \(n is 2, was 4\)"):
        made(recipe_path, 2, resume=True)
    cut_at(folder, step)
    with pytest.raises(UserError, match=r"best_of: holds a stopped run; --resume .* --overwrite"):
        made(recipe_path)
    with pytest.raises(UserError, match=r"best_of: --resume needs the recipe .* changed: n is 2, was 4"):
        made(recipe_path, 2, resume=True)
    assert list(made(recipe_path, resume=True)[1:]) == whole
    assert (folder / "metrics.jsonl").read_bytes() == log
    assert made(recipe_path, 2, overwrite=True)[3]["n"] == 2


def test_a_damaged_checkpoint_costs_one_part(recipe_path, many_parts, capsys):
    folder, *whole = made(recipe_path)
    cut_at(folder, 5)
    damaged = folder / "checkpoints" / "checkpoint-5" / "metrics.jsonl"
    damaged.write_bytes(damaged.read_bytes().replace(b"prompt", b"PROMPT", 1))
    assert list(made(recipe_path, resume=True)[1:]) == whole
    assert "metrics.jsonl was changed; going back to checkpoint-4" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_sampled(recipe_path, many_parts, monkeypatch, capsys):
    _, *whole = made(recipe_path)
    log = BestOfRun.log

    def log_and_stop(self, line):
        log(self, line)
        if line["step"] == 3:
            self.stop.number = signal.SIGINT

    with monkeypatch.context() as patch:
        patch.setattr(BestOfRun, "log", log_and_stop)
        with pytest.raises(Stopped):
            made(recipe_path, overwrite=True)
    said = capsys.readouterr().out
    assert "checkpoint-3" in said
    assert f"go on with: python -m qalign.best_of {recipe_path} n=4 --resume" in said
    assert list(made(recipe_path, resume=True)[1:]) == whole


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
    (run.adapter / "lineage.json").unlink()  # it has the hash of the weights as they were trained
    with pytest.raises(UserError, match=r"started from an adapter \w+, but .* now; start again with .*best_of"):
        made(recipe_path, 4, start, resume=True)
    assert (folder / "summary.json").is_file()


def test_a_reward_that_was_trained_again_is_noticed(recipe_path, many_parts):
    folder, *_ = made(recipe_path)
    cut_at(folder, 5)
    for checkpoint in (folder / "checkpoints").iterdir():
        log = (checkpoint / "metrics.jsonl").read_text().replace('"scorers": [null', '"scorers": ["12ab"', 1)
        shutil.rmtree(checkpoint)
        (folder / "metrics.jsonl").write_text(log)
        mark_whole(checkpoint, 0, 0.0, folder / "metrics.jsonl")
    with pytest.raises(UserError, match=r"ppo\.reward: the adapter of few was 12ab when this run began"):
        made(recipe_path, resume=True)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["ppo.data={folder}/picks.jsonl"], "lies in the folder that this run writes to"),
        (["ppo.reward=reward"], "there is no finished reward run"),
        (["ppo.reward={folder}/../../mine.py:broken"], "broken raised ZeroDivisionError"),
    ],
)
def test_a_mistake_costs_no_finished_run(overrides, problem, recipe_path, tmp_path):
    folder, *_ = made(recipe_path)
    old = {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    changed = [word.format(folder=folder) for word in overrides]
    with pytest.raises(UserError, match=problem):
        made(recipe_path, 4, *changed, overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == old
    assert not (tmp_path / "runs" / ".best_of.replaced").exists()


def test_a_folder_of_someone_elses_is_left_alone(recipe_path, tmp_path):
    (tmp_path / "runs" / "best_of").mkdir(parents=True)
    (tmp_path / "runs" / "best_of" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds files that don't belong to a qalign run"):
            made(recipe_path, overwrite=overwrite)
    assert (tmp_path / "runs" / "best_of" / "thesis.txt").exists()


def test_one_process_at_a_time(recipe_path, tmp_path, capsys):
    with locked(tmp_path / "runs" / "best_of"):
        assert leaving(module.main, recipe_path) == 2
    assert "is using this run folder" in capsys.readouterr().err


def test_it_says_what_it_reads_and_keeps_the_date(recipe_path, tmp_path, capsys, write_jsonl):
    (tmp_path / "dated.jinja").write_text(
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
    )
    rows = write_jsonl("rows.jsonl", [{"prompt": f"Why {number}?", "source": "forum"} for number in range(4)])
    words = (f"model.chat_template={tmp_path}/dated.jinja", f"ppo.data={rows}", "ppo.eval_data=null", "ppo.limit=null")
    folder, *_ = made(recipe_path, 4, *words)
    said = capsys.readouterr().out
    assert "columns read: prompt" in said
    assert "columns not used: source" in said
    assert str(datetime.now().year) in said

    cut_at(folder, 1)
    (folder / "rendered_at").write_text("2020-02-03\n")
    made(recipe_path, 4, *words, resume=True)
    assert "2020-02-03" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["n=1", "n=x", "n=", "n=-4", "n=2.5"])
def test_a_wrong_n_is_one_line(word, recipe_path, capsys):
    assert leaving(module.main, recipe_path, word) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"command line: n is '{word[2:]}'")
    assert "n=16" in line
