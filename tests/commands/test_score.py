"""`python -m qalign.score`: rows come out as they went in, in their order, with the scores that the stage saw."""

import datetime
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from transformers import AutoTokenizer

from qalign.cli import exit_code
from qalign.errors import UserError
from qalign.model.base import Base
from qalign.score import _scored_name, main, score
from tests.conftest import ROOT
from tests.helpers import TEST, leaving, refusal
from tests.reward_runs import plain_reward_model, plain_score, run_stage, write_recipe
from tests.train.processes import run_together

HELD_OUT = [json.loads(line) for line in Path(TEST).read_text().splitlines()[:12]]
PROMPT, GOOD, BAD = (HELD_OUT[0][key] for key in ("prompt", "chosen", "rejected"))


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """A finished reward run with a report on twelve held-out pairs; tests only read it."""
    held_out = {"path": TEST, "limit": len(HELD_OUT)}
    return run_stage(write_recipe(tmp_path_factory.mktemp("scorer"), tiny_folder, eval_data=held_out))


@pytest.fixture(scope="module")
def true_scores(run, tiny_folder):
    """Scores of single answers by transformers and PEFT alone: the template's ids, one sequence at a time, unpadded."""
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    model = plain_reward_model(tiny_folder, run.adapter)

    @torch.no_grad()
    def scored(*turns: tuple[str, str]) -> float:
        messages = [{"role": role, "content": content} for role, content in turns]
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert ids[-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
        return plain_score(model, ids).item()

    return scored


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])
def test_prompts_with_completions_get_a_reward_whatever_the_kind_of_file(run, true_scores, tmp_path, capsys, suffix):
    """Parquet has types that JSON lacks."""
    rows = [{"prompt": PROMPT, "completion": answer, "note": "ü, 😀"} for answer in (GOOD, BAD, "Ja.", GOOD * 3)]
    file, table = tmp_path / f"answers{suffix}", pandas.DataFrame(rows)
    if suffix == ".csv":
        table.to_csv(file, index=False)
    elif suffix == ".parquet":
        table.assign(when=datetime.datetime(2026, 1, 31, 12, 30), raw=b"\xff").to_parquet(file)
    else:
        rows = [row | {"id": number, "tags": ["ü", None]} for number, row in enumerate(rows)]
        pandas.DataFrame(rows).to_json(file, orient="records", lines=suffix != ".json")
    score(str(run.path), str(file), None, None)
    target = tmp_path / "answers.scored.jsonl"
    found = lines(target)
    assert [{key: row[key] for key in rows[0]} for row in found] == rows
    assert [set(row) - set(rows[0]) for row in found] == [{"reward", *(["when", "raw"] * (suffix == ".parquet"))}] * 4
    expected = [true_scores(("user", PROMPT), ("assistant", row["completion"])) for row in rows]
    assert [row["reward"] for row in found] == pytest.approx(expected, abs=1e-4)
    assert len({row["reward"] for row in found}) == 4
    assert found[0].get("when", "2026-01-31 12:30:00") == "2026-01-31 12:30:00"
    assert f"{target}: 4 rows scored, 0 refused" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {file.name, target.name}


def test_dialogues_are_scored_at_the_end_of_their_last_turn_and_preference_rows_twice(run, true_scores, write_jsonl):
    turns = [("system", "Be brief."), ("user", PROMPT), ("assistant", BAD), ("user", "Again."), ("assistant", GOOD)]
    messages = [{"role": role, "content": content} for role, content in turns]
    file = write_jsonl("mixed.jsonl", [{"messages": messages}, *HELD_OUT[:3], {"messages": messages[:3]}])
    score(str(run.path), file, None, None)
    first, *pairs, last = lines(Path(file).with_name("mixed.scored.jsonl"))
    assert [row["reward"] for row in (first, last)] == pytest.approx(
        [true_scores(*turns), true_scores(*turns[:3])], abs=1e-4
    )
    added = ("reward_chosen", "reward_rejected", "reward_margin")
    assert [tuple(row) for row in pairs] == [(*row, *added) for row in HELD_OUT[:3]]
    for row, raw in zip(pairs, HELD_OUT, strict=False):
        assert {key: row[key] for key in raw} == raw
        for side in ("chosen", "rejected"):
            expected = true_scores(("user", raw["prompt"]), ("assistant", raw[side]))
            assert row[f"reward_{side}"] == pytest.approx(expected, abs=1e-4)
        assert row["reward_margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"], abs=2e-6)


def test_the_order_of_many_rows_is_kept(run, write_jsonl, tmp_path, monkeypatch):
    """Rows are sorted by length and scored a few at a time."""
    file = write_jsonl("rows.jsonl", HELD_OUT + [{"prompt": PROMPT, "completion": row["chosen"]} for row in HELD_OUT])
    found = []
    for rows_at_once in (3, 64):
        monkeypatch.setattr("qalign.data.collate.ROWS_PACKED_TOGETHER", rows_at_once)
        score(str(run.path), file, str(tmp_path / f"{rows_at_once}.jsonl"), None)
        found.append(lines(tmp_path / f"{rows_at_once}.jsonl"))
    for one, other in zip(*found, strict=True):
        scores = [key for key in one if key.startswith("reward")]
        assert [one[key] for key in scores] == pytest.approx([other[key] for key in scores], abs=1e-5)
        assert {key: one[key] for key in one if key not in scores} == {k: other[k] for k in other if k not in scores}


def test_the_scores_are_those_of_the_stages_own_report(run, tmp_path):
    """The report's figures, worked out anew from the scores of the held-out pairs."""
    target = tmp_path / "again.jsonl"
    score(str(run.path), TEST, str(target), len(HELD_OUT))
    margins = [row["reward_margin"] for row in lines(target)]
    scores = [row[key] for row in lines(target) for key in ("reward_chosen", "reward_rejected")]
    trust = json.loads(run.summary.read_text())["trust"]
    mean = sum(scores) / 24
    assert trust["pairs"] == len(margins) == 12
    assert trust["accuracy"] == sum(margin > 0 for margin in margins) / 12
    assert trust["mean_log_loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 12, abs=1e-5)
    assert trust["score_mean"] == pytest.approx(mean, abs=1e-5)
    assert trust["score_std"] == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in scores) / 24), abs=1e-5)


def test_rows_of_all_shapes_keep_their_order_and_bad_ones_are_counted(run, write_jsonl, capsys):
    answer = {"prompt": PROMPT, "completion": GOOD}
    rows = [answer | {"n": 0}, "{broken", {"text": "plain text"}, HELD_OUT[1] | {"n": 1}, {"prompt": PROMPT}]
    rows += [{"prompt": PROMPT, "completion": " "}] * 4 + [answer | {"n": 2, "completion": BAD * 40}, answer | {"n": 3}]
    file = write_jsonl("mixed.jsonl", rows)
    score(str(run.path), file, None, None)
    said = capsys.readouterr()
    found = lines(Path(file).with_name("mixed.scored.jsonl"))
    assert [row["n"] for row in found] == [0, 1, 3]
    assert [tuple(row)[-1] for row in found] == ["reward", "reward_margin", "reward"]
    assert found[0]["reward"] == pytest.approx(found[2]["reward"], abs=1e-5)
    assert "3 rows scored, 8 refused" in said.out
    refusals = [line for line in said.err.splitlines() if line.startswith("refused: ")]
    assert len(refusals) == 5  # more are only counted
    for number, reason in ((2, "not valid JSON"), (3, "plain text"), (5, "this row has prompt"), (6, "empty")):
        assert any(line.startswith(f"refused: {file}:{number}: ") and reason in line for line in refusals), refusals


def test_mean_spread_and_the_first_rows_are_printed(run, write_jsonl, capsys):
    rows = [
        {"prompt": PROMPT, name: text} for name, text in (("answer", GOOD), ("response", BAD), ("completion", GOOD))
    ]
    file = write_jsonl("named.jsonl", [*rows, *HELD_OUT[:4]])
    score(str(run.path), file, None, None)
    found, said = lines(Path(file).with_name("named.scored.jsonl")), capsys.readouterr().out
    pairs = [(row["reward_chosen"], row["reward_rejected"]) for row in found[3:]]
    every = [*(row["reward"] for row in found[:3]), *(score for pair in pairs for score in pair)]
    assert f"mean {statistics.mean(every):+.3f}, standard deviation {statistics.pstdev(every):.3f}" in said
    assert f"from {min(every):+.3f} to {max(every):+.3f}" in said
    assert f"chosen scores higher in {sum(one > other for one, other in pairs) / 4:.1%} of 4" in said
    for number, row in enumerate(found[:3], 1):
        assert f"  named.jsonl:{number}  {row['reward']:+.3f}  " in said
    assert "named.jsonl:4" not in said


def test_the_shape_of_a_row_is_in_the_help_and_in_the_error(run, write_jsonl, capsys):
    assert leaving(main, "--help") == 0
    assert '"prompt", "completion"' in " ".join(capsys.readouterr().out.split())
    assert leaving(main, str(run.path), write_jsonl("odd.jsonl", [{"question": "Why?"}])) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        'holds no usable rows (1 were refused); a row is {"prompt", "completion"} (or "answer", "response"), ' in line
    )
    assert len(line) <= 300


def test_the_target_and_the_limit_can_be_chosen(run, tmp_path, capsys):
    target = tmp_path / "elsewhere.jsonl"
    score(f"{run.path}/adapter", TEST, str(target), 2)  # the adapter's folder means the run
    assert [row["prompt"] for row in lines(target)] == [row["prompt"] for row in HELD_OUT[:2]]
    assert f"{target}: 2 rows scored" in capsys.readouterr().out


def test_only_the_kind_of_file_is_left_out_of_the_targets_name():
    for file, target in {
        "v1.5.jsonl": "v1.5.scored.jsonl",
        "a.b.jsonl.gz": "a.b.scored.jsonl",
        ".hidden.csv": ".hidden.scored.jsonl",
        "answers.parquet": "answers.scored.jsonl",
        "folder.d": "folder.d.scored.jsonl",
    }.items():
        assert _scored_name(Path("rows") / file) == Path("rows") / target


def test_a_score_that_is_no_number_is_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Base, "pair_scores", lambda base, role, rows: torch.full((len(rows), 2), math.nan))
    target = tmp_path / "scored.jsonl"
    assert exit_code(lambda: score(str(run.path), TEST, str(target), 2)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("model.compute_dtype: the reward model's scores are not finite, computed in float32 on cpu")
    assert not target.exists()


def test_what_is_there_is_never_written_over(run, write_jsonl, tmp_path):
    file = write_jsonl("answers.jsonl", [{"prompt": PROMPT, "completion": GOOD}])
    target = tmp_path / "answers.scored.jsonl"
    target.write_text("precious")
    for to, named in ((None, target), (file, file)):
        with pytest.raises(UserError, match="exists already; name another with --to, or remove it") as raised:
            score(str(run.path), file, to, None)
        assert str(named) in raised.value.lines[0]
    assert target.read_text() == "precious"
    with pytest.raises(UserError, match="there is no folder"):
        score(str(run.path), file, str(tmp_path / "no" / "where.jsonl"), None)
    for to in ("a\0b", "~nosuchuser/x"):
        with pytest.raises(UserError, match=r"^--to: .* is no path, or of a user who doesn't exist"):
            score(str(run.path), file, to, None)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": PROMPT, "completion": GOOD, "reward": 1}, "reward"),
        ({"prompt": PROMPT, "completion": GOOD, "reward": None}, "reward"),
        (HELD_OUT[0] | {"reward_margin": 2}, "reward_margin"),
    ],
)
def test_a_column_that_a_row_has_already_is_never_replaced(run, write_jsonl, tmp_path, monkeypatch, row, column):
    file = write_jsonl("rows.jsonl", [HELD_OUT[1], row])
    with monkeypatch.context() as patched:
        patched.setattr("qalign.model.base.load", lambda model, **_: pytest.fail("the base was loaded in vain"))
        with pytest.raises(UserError) as raised:
            score(str(run.path), file, None, None)
    assert raised.value.lines == (
        f"{file}:2: has a column '{column}' already; name others with --column, or remove it",
    )
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}

    score(str(run.path), file, None, None, "judge")
    first, second = lines(tmp_path / "rows.scored.jsonl")
    assert [*first][-3:] == ["judge_chosen", "judge_rejected", "judge_margin"]
    assert {key: second[key] for key in row} == row
    assert isinstance(second["judge_chosen" if "chosen" in row else "judge"], float)


def test_nothing_to_score_is_one_line_and_leaves_no_file(run, write_jsonl, tmp_path, monkeypatch):
    file = write_jsonl("texts.jsonl", [{"text": "plain"}, {"text": "text"}])
    monkeypatch.setattr("qalign.model.base.load", lambda model, **_: pytest.fail("the base was loaded in vain"))
    with pytest.raises(UserError, match=r"holds no usable rows \(2 were refused\)"):
        score(str(run.path), file, None, None)
    with pytest.raises(UserError, match="there is no such file"):
        score(str(run.path), str(tmp_path / "missing.jsonl"), None, None)
    assert {path.name for path in tmp_path.iterdir()} == {"texts.jsonl"}


def test_half_an_emoji_beside_the_answer_comes_out_as_it_went_in(run, write_jsonl):
    """UTF-8 can't hold half a surrogate pair; JSON can, escaped."""
    rows = [{"prompt": PROMPT, "completion": GOOD, "note": "cut \ud83d"}, {"prompt": PROMPT, "completion": "Ü 😀 ja"}]
    file = write_jsonl("answers.jsonl", rows)
    score(str(run.path), file, None, None)
    written = Path(file).with_name("answers.scored.jsonl")
    assert [{key: row[key] for key in raw} for row, raw in zip(lines(written), rows, strict=True)] == rows
    assert "Ü 😀 ja" in written.read_text(encoding="utf-8")


@pytest.mark.parametrize("limit", ["0", "-3", "many"])
def test_a_limit_below_one_is_refused(run, tmp_path, capsys, limit):
    assert leaving(main, str(run.path), TEST, "--to", str(tmp_path / "x"), "--limit", limit) == 2
    assert "--limit" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "x").exists()


def test_a_column_without_a_name_is_refused(run, tmp_path, capsys):
    assert "--column: the name is empty" in refusal(capsys, score, str(run.path), TEST, str(tmp_path / "x"), 1, " ")


def one_line(folder, capsys) -> str:
    """What the command says about a run that it can't use."""
    return refusal(capsys, score, str(folder), TEST, None, 1)


def test_a_run_that_is_missing_unfinished_or_of_another_stage_is_one_line(run, tiny_folder, tmp_path, capsys):
    hint = "train one with python -m qalign.reward RECIPE"
    assert one_line(tmp_path / "nowhere" / "reward", capsys).endswith(hint)
    assert one_line(run.path.with_name("rewards"), capsys).endswith("did you mean 'reward'?")
    copy = Path(shutil.copytree(run.path, tmp_path / "runs" / "reward"))
    (copy / "summary.json").unlink()
    for given in (copy, copy.parent):
        assert one_line(given, capsys) == f"{given}: there is no finished reward run; {hint}"
    sft = run_stage(write_recipe(tmp_path / "others", tiny_folder, "sft", max_steps=1))
    assert one_line(sft.path, capsys) == f"{sft.path}: is a run of sft, expected one of reward"


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("recipe.yaml", "model: {base: a, quantisation: nf4}\noutput: x\n", "quantisation"),
        ("recipe.yaml", "model: [\n", "recipe.yaml"),
        ("recipe.yaml", None, "recipe.yaml"),
        ("adapter/lineage.json", "{}", "not a lineage"),
        ("adapter/adapter_model.safetensors", None, "adapter"),
        ("adapter/adapter_model.safetensors", "cut short", "damaged"),
    ],
)
def test_a_run_that_was_damaged_is_one_line(run, tmp_path, capsys, file, content, reason):
    copy = Path(shutil.copytree(run.path, tmp_path / "runs" / "reward"))
    (copy / file).unlink() if content is None else (copy / file).write_text(content)
    line = one_line(copy, capsys)
    assert reason in line
    assert str(copy) in line


def test_a_run_may_be_moved(run, tmp_path, monkeypatch):
    """The recipe in it still names the folder that it was trained in."""
    copy = Path(shutil.copytree(run.path, tmp_path / "elsewhere" / "reward"))
    score(str(run.path), TEST, str(tmp_path / "before.jsonl"), 3)
    score(str(copy.parent), TEST, str(tmp_path / "moved.jsonl"), 3)  # the folder of all its stages means it too
    monkeypatch.chdir(copy)
    score(".", TEST, str(tmp_path / "inside.jsonl"), 3)
    before, *after = (lines(tmp_path / f"{name}.jsonl") for name in ("before", "moved", "inside"))
    assert after == [before, before]


def test_a_base_that_has_changed_since_is_noticed(run, tiny_folder, tmp_path, capsys):
    other = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    copy = Path(shutil.copytree(run.path, tmp_path / "runs" / "reward"))
    recipe = (copy / "recipe.yaml").read_text()
    assert tiny_folder in recipe
    (copy / "recipe.yaml").write_text(recipe.replace(tiny_folder, str(other)))
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|start_header_id|>", "<|start_header_id|>the "))
    assert "was trained with the chat template" in one_line(copy, capsys)


@pytest.mark.slow
def test_the_command_itself(run, write_jsonl, capsys):
    """In a process of its own, in which no file may be left open."""
    file = write_jsonl("answers.jsonl", [{"prompt": PROMPT, "completion": GOOD}, {"prompt": PROMPT}])
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "qalign.score", str(run.path), file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 rows scored, 1 refused" in done.stdout
    assert f"refused: {file}:2: " in done.stderr
    (row,) = lines(Path(file).with_name("answers.scored.jsonl"))
    assert isinstance(row["reward"], float)
    assert leaving(main, str(run.path), file) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "exists already" in line


@pytest.mark.slow
def test_processes_share_the_rows(tiny_folder, tmp_path):
    """Single answers and pairs by an ensemble, whose spread is told over all rows."""
    run = run_stage(write_recipe(tmp_path / "runs", tiny_folder, members=2))
    mixed, files = tmp_path / "mixed.jsonl", [tmp_path / "one.jsonl", tmp_path / "several.jsonl"]
    rows = [*HELD_OUT, *({"prompt": row["prompt"], "completion": row["rejected"]} for row in HELD_OUT)]
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file, count in zip(files, (1, 3), strict=True):
        assert "24 rows scored, 0 refused" in run_together("score", run.path, count, str(mixed), "--to", str(file))
    one, several = map(lines, files)
    for row, expected in zip(several, one, strict=True):
        assert row == {key: pytest.approx(v, abs=2e-6) if isinstance(v, float) else v for key, v in expected.items()}
