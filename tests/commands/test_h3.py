"""`python -m qalign.h3`: its figures from its own answers, what it leaves in the run, and what it refuses."""

import json
import shutil

import pytest
from PIL import Image

from qalign import h3
from qalign.data.formats import Prompt
from qalign.data.tokenize import encode_prompt
from qalign.errors import UserError
from qalign.judge.comparison.answer_files import Compared
from qalign.judge.comparison.judges import RewardJudge
from qalign.judge.comparison.sides import side_of
from qalign.judge.measures.honesty import read_claims
from qalign.judge.measures.safety import is_refusal, of_file
from qalign.model.base import load
from qalign.reports.reward_report import wilson
from tests.helpers import TEST, leaving
from tests.judge.test_judges import server
from tests.reward_runs import run_stage, write_recipe

HARMFUL = ["How do I do something harmful?", "How do I do something worse?", "And what is the worst?"]


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """An SFT run and a DPO run on one base, and a file of harmful prompts."""
    folder = tmp_path_factory.mktemp("h3")
    held = {"eval_data": {"path": TEST, "limit": 4}, "max_steps": 2}
    found = [run_stage(write_recipe(folder / "demo", tiny_folder, "sft", max_steps=2))]
    found.append(run_stage(write_recipe(folder / "demo", tiny_folder, "dpo", **held)))
    (folder / "harmful.txt").write_text("\n".join(HARMFUL))
    return *found, str(folder / "harmful.txt")


@pytest.fixture(autouse=True)
def little_to_do(monkeypatch):
    monkeypatch.setattr(h3, "MAX_NEW_TOKENS", 4)
    claims = read_claims()[:12]
    monkeypatch.setattr("qalign.judge.measures.honesty.read_claims", lambda: claims)


def kept(run) -> dict:
    return json.loads((run.path / "h3.json").read_text())


def by_name(run) -> dict:
    return {measure["name"]: measure for measure in kept(run)["measures"]}


@pytest.mark.pictures
def test_runs_are_measured_beside_their_base(runs, monkeypatch, capsys):
    sft, dpo, harmful = runs
    # A random model never refuses: here every answer with an even number of letters does.
    monkeypatch.setattr(h3, "is_refusal", lambda text: len(text) % 2 == 0)
    capsys.readouterr()
    assert leaving(h3.main, str(sft.path), str(dpo.path), "--harmful", harmful, "--limit", "2") == 0
    said = capsys.readouterr().out
    for run in (sft, dpo):
        rows = [json.loads(line) for line in (run.path / "h3_answers.jsonl").read_text().splitlines()]
        measures = by_name(run)
        of_set = {
            name: [row for row in rows if row["set"] == name] for name in ("harmful", "look_alikes", "instructions")
        }
        assert [len(found) for found in of_set.values()] == [2, 60, 40]
        assert of_set["harmful"][0]["prompt"] == [{"role": "user", "content": HARMFUL[0]}]
        for name, rows in (("safe", of_set["harmful"]), ("over_refusal", of_set["look_alikes"])):
            for side in ("before", "after"):
                share = sum(len(row[side]) % 2 == 0 for row in rows) / len(rows)
                assert measures[name][side]["value"] == pytest.approx(share)
                assert measures[name][side]["interval"] == pytest.approx(wilson(share, len(rows)))
        followed = [
            h3.followed(check, row["after"])
            for check, row in zip(of_file("instructions.yaml"), of_set["instructions"], strict=True)
        ]
        assert measures["instructions"]["after"]["value"] == pytest.approx(sum(followed) / 40)
        assert f"{run.path}: before → after" in said
        with Image.open(run.path / "h3.png") as picture:
            assert picture.size[0] == 1200
    sides = [by_name(run) for run in (sft, dpo)]
    for name in ("true_claims", "claims_judged", "calibration_error"):
        assert sides[0][name]["before"] == sides[1][name]["before"], "one base"
        assert sides[0][name]["after"] != sides[1][name]["after"], "two adapters"
    assert "win_rate" not in sides[0]
    assert "no win rate: name a judge" in said
    assert kept(sft)["harmful_from"] == "harmful.txt"
    assert kept(sft)["refusal_rule"]["refused"] == 32


def test_the_model_card_has_the_table_once(runs, capsys):
    sft, _, harmful = runs
    card = sft.adapter / "README.md"
    for _ in range(2):
        assert leaving(h3.main, str(sft.path), "--harmful", harmful) == 0
        text = card.read_text()
        assert text.count("## Helpful, harmless, honest") == 1
        assert text.count("```python") == 1, "the card says what it said"
    after = by_name(sft)["instructions"]["after"]
    low, high = after["interval"]
    assert f"| {after['value']:.1%} ({low:.0%} to {high:.0%}) |" in text
    assert "no harmful prompts" not in capsys.readouterr().out


def test_the_win_rate_is_the_judges_and_the_other_answers_are_not_judged(runs, tmp_path, capsys):
    _, dpo, harmful = runs
    judge = tmp_path / "mine.py"
    judge.write_text("def length(completions):\n    return [float(len(text)) for text in completions]\n")
    assert leaving(h3.main, str(dpo.path), "--harmful", harmful, "--judge", f"{judge}:length") == 0
    rows = [json.loads(line) for line in (dpo.path / "h3_answers.jsonl").read_text().splitlines()]
    pairs = [(len(row["before"]), len(row["after"])) for row in rows if row["set"] == "held_out"]
    assert len(pairs) == 4, "the run's own held-out prompts"
    rate = sum(0.5 if was == now else float(now > was) for was, now in pairs) / 4
    found = by_name(dpo)["win_rate"]
    assert found["after"]["value"] == pytest.approx(rate)
    assert found["change"]["value"] == pytest.approx(rate - 0.5)
    assert found["wins"] + found["ties"] + found["losses"] == 4
    assert kept(dpo)["judge"] == f"{judge}:length"
    assert "no win rate" not in capsys.readouterr().out
    assert f"judged by {judge}:length" in (dpo.adapter / "README.md").read_text()


@pytest.mark.slow
def test_a_reward_run_judges_every_run(runs, tiny_folder, tmp_path):
    sft, dpo, harmful = runs
    judge = run_stage(write_recipe(tmp_path, tiny_folder, max_steps=1))
    words = [str(sft.path), str(dpo.path), "--harmful", harmful, "--prompts", TEST, "--limit", "3"]
    assert leaving(h3.main, *words) == 0
    alone = [(run.path / "h3_answers.jsonl").read_text() for run in (sft, dpo)]
    assert leaving(h3.main, *words, "--judge", str(judge.path)) == 0
    reward = RewardJudge("alone", load(sft.recipe.model), judge.adapter)
    for run, answers in zip((sft, dpo), alone, strict=True):
        judged = (run.path / "h3_answers.jsonl").read_text()
        assert judged.startswith(answers), "a judge on the base changes no answer"
        rows = [row for row in map(json.loads, judged.splitlines()) if row["set"] == "held_out"]
        pairs = [Compared(Prompt(row["prompt"], "", {}), row["after"], row["before"]) for row in rows]
        preferences = [0.5 if pair.a == pair.b else next(reward.judge([pair])) for pair in pairs]
        assert len(preferences) == 3
        assert by_name(run)["win_rate"]["after"]["value"] == pytest.approx(sum(preferences) / 3)


def test_a_url_is_asked_once(runs):
    """Its judgements are kept: the same command asks for none of them again."""
    _, dpo, harmful = runs

    def longer(asked: str) -> str:
        first, second = asked.partition("First answer:")[2].partition("Reply with")[0].split("Second answer:")
        return "first" if len(first.strip()) > len(second.strip()) else "second"

    with server(longer) as (url, bodies):
        words = [str(dpo.path), "--harmful", harmful, "--judge", url, "--judge-model", "m"]
        assert leaving(h3.main, *words) == 0
        rows = [json.loads(line) for line in (dpo.path / "h3_answers.jsonl").read_text().splitlines()]
        pairs = [(row["before"].strip(), row["after"].strip()) for row in rows if row["set"] == "held_out"]
        asked = [(was, now) for was, now in pairs if was != now]
        assert len(bodies) == 2 * len(asked) > 0
        assert {body["model"] for body in bodies} == {"m"}
        assert leaving(h3.main, *words) == 0
        assert len(bodies) == 2 * len(asked)
    preferences = [0.5 if len(now) == len(was) else float(len(now) > len(was)) for was, now in pairs]
    assert by_name(dpo)["win_rate"]["after"]["value"] == pytest.approx(sum(preferences) / 4)


def test_votes_of_the_page_are_a_judge_too(runs, tmp_path):
    _, dpo, harmful = runs
    sides = [
        {"weights": side_of(str(dpo.path)).weights, "text": "of the run"},
        {"weights": None, "text": "of the base"},
    ]
    asked = [[{"role": "user", "content": f"q{number}"}] for number in range(3)]
    lines = [
        {"prompt": prompt, "vote": choice, "a": sides[0], "b": sides[1]}
        for prompt, choice in zip(asked, ("a", "b", "tie"), strict=True)
    ]
    votes = tmp_path / "votes.jsonl"
    votes.write_text("\n".join(map(json.dumps, [*lines, {**lines[0], "prompt": asked[1], "vote": "a"}])))
    assert leaving(h3.main, str(dpo.path), "--harmful", harmful, "--judge", str(votes)) == 0
    found = by_name(dpo)["win_rate"]
    assert (found["wins"], found["ties"], found["losses"]) == (2, 1, 1)
    assert '"held_out"' not in (dpo.path / "h3_answers.jsonl").read_text(), "nothing more is sampled"


def shortened(run, folder, max_length: int) -> str:
    """A copy of a run, whose recipe has another `model.max_length`."""
    shutil.copytree(run.path, folder / run.stage)
    recipe = folder / run.stage / "recipe.yaml"
    text = recipe.read_text()
    assert text.count("max_length: 512") == 1
    recipe.write_text(text.replace("max_length: 512", f"max_length: {max_length}"))
    return str(folder / run.stage)


@pytest.mark.parametrize(
    ("max_length", "judge", "problem"),
    [
        (512, "FILE:gone", "--judge: "),
        (160, "base", "--judge: base can judge nothing: "),
        (64, None, "model.max_length: 64 is too short for the claims"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_sampled(
    runs, tmp_path, monkeypatch, capsys, max_length, judge, problem
):
    _, dpo, harmful = runs
    monkeypatch.setattr(h3, "_answers", lambda *_: pytest.fail("an answer was sampled"))
    (tmp_path / "mine.py").write_text("def length(completions):\n    return [0.0 for _ in completions]\n")
    words = ["--judge", judge.replace("FILE", str(tmp_path / "mine.py"))] if judge else []
    capsys.readouterr()
    assert leaving(h3.main, shortened(dpo, tmp_path, max_length), "--harmful", harmful, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(problem), line


def test_prompts_that_cannot_be_used_are_left_out(tiny_base, capsys):
    end = tiny_base.tokenizer.eos_token
    texts = ["Good?", f"Forged {end}?", "Long? " * 400, "Good too?"]
    every = [Prompt(({"role": "user", "content": text},), f"rows:{n}", {}) for n, text in enumerate(texts, start=1)]
    asked, ids = h3._encoded(tiny_base, h3.Asked({"harmful": every, "held_out": every[:1]}, None), 4)
    assert asked.sets == {"harmful": [every[0], every[3]], "held_out": every[:1]}
    assert ids == [encode_prompt(tiny_base.template, each.turns) for each in (every[0], every[3], every[0])]
    said = capsys.readouterr()
    assert "harmful prompts: 2 of 4 are left out" in said.out
    assert ["special token" in said.err, "rows:2" in said.err, "rows:3" in said.err] == [True] * 3
    with pytest.raises(UserError, match=r"^look alikes prompts: holds no usable rows \(1 were refused\)"):
        h3._encoded(tiny_base, h3.Asked({"look_alikes": every[1:2]}, None), 4)


def test_a_win_rate_without_a_judgement_is_left_out():
    rows = [Compared(Prompt(({"role": "user", "content": "?"},), f"rows:{n}", {}), "a", "b") for n in range(2)]
    assert h3._win_rate(rows, [None, None]) == {}
    assert h3._win_rate(rows, [0.5, None])["win_rate"]["after"]["value"] == 0.5


def test_a_change_is_shown_where_its_interval_leaves_zero_out():
    def measure(low: float, high: float) -> dict:
        return {"change": {"value": (low + high) / 2, "interval": [low, high]}, "before": None, "after": None}

    found = h3._listed(
        {"safe": measure(0.1, 0.3), "over_refusal": measure(0.1, 0.3), "true_claims": measure(-0.1, 0.3)}
    )
    assert [each["verdict"] for each in found] == ["better", "worse", "no change shown"]
    assert h3._listed({"gives_in": measure(-0.3, -0.1)})[0]["verdict"] == "better"


def test_what_the_user_gets_wrong_is_one_line(runs, tiny_folder, tmp_path, capsys):
    sft, dpo, _ = runs
    other = write_recipe(tmp_path / "other", tiny_folder, "sft", model={"double_quant": False}, max_steps=1)
    elsewhere = str(run_stage(other).path)
    copied = tmp_path / "unfinished" / "dpo"
    shutil.copytree(dpo.path, copied)
    (copied / "summary.json").unlink()
    judge = write_recipe(tmp_path / "judge", tiny_folder, data=TEST, limit=4, batch_size=2, max_steps=1)
    judge = str(run_stage(judge).path)
    (tmp_path / "none.jsonl").write_text('{"text": "no prompt"}\n')
    (votes := tmp_path / "votes.jsonl").touch()
    for words, problem in (
        ([str(tmp_path / "gone")], "there is no finished"),
        ([str(copied)], "there is no finished"),
        ([str(sft.path), str(sft.adapter)], "is named twice"),
        ([str(sft.path), elsewhere], "its base is held otherwise than that of"),
        ([str(sft.path), "--limit", "0"], "--limit: 0 is not a number of prompts"),
        ([str(sft.path), "--harmful", str(tmp_path / "none.jsonl")], "--harmful: "),
        ([str(dpo.path), "--judge", "http://localhost:x/v1"], "--judge: http://localhost:x/v1"),
        ([str(sft.path), "--judge", str(votes)], "has no votes between"),
        ([str(sft.path), "--judge", str(tmp_path / "gone")], "--judge: "),
        ([str(dpo.path), "--judge", judge], "was trained on answers to 4 of the 4 prompts"),
        ([str(sft.path), "--judge", "base"], "no run has held-out prompts to judge answers to"),
    ):
        capsys.readouterr()
        assert leaving(h3.main, *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert problem in line, line


def test_the_rule_is_the_one_that_is_tested():
    assert h3.is_refusal is is_refusal
