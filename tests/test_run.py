"""The run folder and the command around a stage: what is refused, what is kept, which exit code."""

import json

import pytest

from qalign import run as runs
from qalign.errors import UserError
from qalign.recipe import Source
from qalign.recipe_file import load
from qalign.rows import Refused

FACTS = {"tokens_per_second": 1.0, "peak_bytes": 1, "reference": "none"}


@pytest.fixture
def recipe(tmp_path, tiny_folder, write_jsonl):
    data = write_jsonl("pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{base: {tiny_folder}}}\noutput: {tmp_path / 'runs'}\ndpo: {{data: {data}}}\n")
    return load(str(path))


def folder(recipe) -> runs.RunFolder:
    return runs.RunFolder(recipe, "dpo", "recipe.yaml")


def test_a_new_folder_is_free(recipe):
    run = folder(recipe)
    run.claim(resume=False, overwrite=False)
    assert not run.path.exists()
    run.begin([])
    assert (run.path / "recipe.yaml").is_file()


def test_a_taken_folder_is_refused_and_nothing_is_lost(recipe):
    folder(recipe).begin([])
    with pytest.raises(UserError, match="holds a run that was stopped; --resume goes on with it, --overwrite starts"):
        folder(recipe).claim(resume=False, overwrite=False)
    folder(recipe).adapter.mkdir()
    folder(recipe).finish("next", "base", **FACTS)
    with pytest.raises(UserError, match="holds a complete run"):
        folder(recipe).claim(resume=False, overwrite=False)
    assert folder(recipe).complete


def test_overwrite_deletes_only_when_training_begins(recipe):
    first = folder(recipe)
    first.begin([])
    first.adapter.mkdir()
    first.finish("next", "base", **FACTS)
    again = folder(recipe)
    again.claim(resume=False, overwrite=True)
    assert again.complete
    again.begin([])
    assert not again.complete


def test_files_that_are_no_run_are_never_deleted(recipe):
    run = folder(recipe)
    run.path.mkdir(parents=True)
    (run.path / "thesis.doc").write_text("years of work")
    with pytest.raises(UserError, match="no run of qalign's"):
        run.claim(resume=False, overwrite=True)
    assert (run.path / "thesis.doc").is_file()


@pytest.mark.parametrize("key", ["start_from", "data", "eval_data"])
def test_overwrite_never_deletes_what_the_run_reads(recipe, key):
    inside = str(folder(recipe).path / "adapter")
    value = inside if key == "start_from" else (Source(path=f"{inside}/rows.jsonl"),)
    reads_itself = recipe.model_copy(update={"dpo": recipe.dpo.model_copy(update={key: value})})
    with pytest.raises(UserError, match=rf"dpo\.{key}: .* lies in the folder that this run writes to"):
        folder(reads_itself).claim(resume=False, overwrite=True)


def test_an_output_that_is_a_file_is_one_line(recipe, tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match="is, or lies in, a file"):
        folder(recipe).claim(resume=False, overwrite=False)


def test_resume_needs_the_same_recipe(recipe):
    folder(recipe).begin([])
    folder(recipe).claim(resume=True, overwrite=False)
    other = recipe.model_copy(update={"dpo": recipe.dpo.model_copy(update={"beta": 0.7})})
    with pytest.raises(UserError, match=r"this one differs: dpo\.beta is 0\.7, was 0\.1"):
        folder(other).claim(resume=True, overwrite=False)


def test_only_a_whole_checkpoint_counts(recipe):
    run = folder(recipe)
    for step in (5, 10, 15):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    assert run.last_checkpoint() is None
    for step in (5, 10):
        (run.checkpoints / f"checkpoint-{step}" / "whole").touch()
    assert run.last_checkpoint().name == "checkpoint-10"


def test_rewind_drops_what_will_be_logged_again(recipe):
    run = folder(recipe)
    run.begin([])
    run.claim(resume=True, overwrite=False)
    for step in (2, 3):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    (run.checkpoints / "checkpoint-2" / "whole").touch()
    (run.checkpoints / "checkpoint-2" / "tokens_seen").write_text("200")
    lines = [json.dumps({"step": step}) for step in (1, 2, 3)]
    run.metrics.write_text("\n".join(lines) + '\n{"step": 4, "lo')  # a power cut left half a line
    assert run.rewind() == (run.checkpoints / "checkpoint-2", 200)
    assert not (run.checkpoints / "checkpoint-3").exists()  # cut short
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]
    fresh = folder(recipe)
    assert fresh.rewind() == (None, 0)
    assert fresh.metrics.read_text() == ""


def test_few_refused_rows_pass_and_are_listed(recipe):
    run = folder(recipe)
    refused = [Refused("data.jsonl:7", "the prompt is empty")]
    run.check_refused("dpo.data", refused, used=99)
    run.begin(refused)
    listed = [json.loads(line) for line in (run.path / "rejected_rows.jsonl").read_text().splitlines()]
    assert listed == [{"where": "data.jsonl:7", "reason": "the prompt is empty"}]


def test_too_many_refused_rows_stop_and_are_listed(recipe):
    run = folder(recipe)
    refused = [Refused(f"data.jsonl:{n}", "the prompt is empty") for n in range(6)]
    with pytest.raises(UserError) as raised:
        run.check_refused("dpo.data", refused, used=94)
    assert raised.value.lines[0].startswith("dpo.data: 6 of 100 rows were refused (6%; max_refused_share is 5%)")
    assert raised.value.lines[1] == "  data.jsonl:0: the prompt is empty"
    assert len((run.path / "rejected_rows.jsonl").read_text().splitlines()) == 6
    folder(recipe).claim(resume=False, overwrite=False)  # the list alone is no run: the next try is not refused


def test_no_rows_at_all(recipe):
    with pytest.raises(UserError, match="holds no rows"):
        folder(recipe).check_refused("dpo.data", [], used=0)
