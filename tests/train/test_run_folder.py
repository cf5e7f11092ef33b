"""The run folder and the command around a stage: what is refused, what is kept, which exit code."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from qalign.config.load import dump, load
from qalign.config.stages import Source
from qalign.data.formats import Refused
from qalign.errors import UserError
from qalign.model import lineage
from qalign.train import run_folder as runs
from qalign.train.callbacks import RunCallback

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


def test_overwrite_never_deletes_the_base_that_was_merged_into_the_run(recipe):
    inside = str(folder(recipe).path / "merged-dequantized")
    reads_itself = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": inside})})
    with pytest.raises(UserError, match=r"model\.base: .* lies in the folder that this run writes to"):
        folder(reads_itself).claim(resume=False, overwrite=True)


def test_an_output_in_the_home_folder_is_there(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder(recipe.model_copy(update={"output": "~/runs"})).path == tmp_path / "runs" / "dpo"


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


def test_a_key_that_the_run_is_older_than_is_no_change_at_its_default(recipe):
    run = folder(recipe)
    run.begin([])
    kept = yaml.safe_load((run.path / "recipe.yaml").read_text())
    del kept["dpo"]["reference"], kept["dpo"]["data"][0]["weight"], kept["lora"], kept["seed"]
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(kept))
    assert run.changes() == ""
    run.claim(resume=True, overwrite=False)

    other = recipe.dpo.model_copy(update={"reference": "in_step"})
    changes = folder(recipe.model_copy(update={"dpo": other, "seed": 7})).differences()
    assert changes == {"dpo.reference": ("cached", "in_step"), "seed": (42, 7)}


def test_a_key_that_is_gone_since_is_a_change(recipe):
    run = folder(recipe)
    run.begin([])
    with (run.path / "recipe.yaml").open("a") as kept:
        kept.write("lottery: true\n")
    assert run.changes() == "lottery is 'gone', was True"


@pytest.fixture
def project(tmp_path, tiny_folder, monkeypatch) -> Path:
    """A folder with a base, rows and a template beside a recipe that names them as seen from there; the current one."""
    place = tmp_path / "project"
    shutil.copytree(tiny_folder, place / "model")
    for name in ("pairs.jsonl", "held.jsonl", "chat.jinja"):
        (place / name).touch()
    (place / "recipe.yaml").write_text(
        "model: {base: model, chat_template: chat.jinja}\noutput: runs\n"
        "dpo: {data: [pairs.jsonl, {path: org/pairs, limit: 3}], eval_data: held.jsonl}\n"
    )
    monkeypatch.chdir(place)
    return place


def test_the_same_files_are_no_change_from_whatever_folder_they_are_named(project, tmp_path, monkeypatch):
    run = folder(load("recipe.yaml"))
    run.begin([])
    kept = yaml.safe_load((run.path / "recipe.yaml").read_text())
    assert kept["model"]["base"] == str(project / "model")
    assert [source["path"] for source in kept["dpo"]["data"]] == [str(project / "pairs.jsonl"), "org/pairs"]
    assert run.changes() == ""

    (tmp_path / "link").symlink_to(project)
    for place, recipe in ((tmp_path, "project/recipe.yaml"), ("/", f"{tmp_path}/link/recipe.yaml")):
        monkeypatch.chdir(place)
        again = folder(load(recipe, [f"output={project}/runs"]))
        assert again.changes() == ""
        again.claim(resume=True, overwrite=False)


def test_other_files_of_the_same_names_are_a_change(project, tmp_path, monkeypatch):
    output = [f"output={tmp_path}/runs"]
    folder(load("recipe.yaml", output)).begin([])
    other = Path(shutil.copytree(project, tmp_path / "other"))
    monkeypatch.chdir(other)
    changes = folder(load("recipe.yaml", output)).changes()
    assert f"dpo.data.0.path is 'pairs.jsonl', was '{project}/pairs.jsonl'" in changes
    assert f"model.base is 'model', was '{project}/model'" in changes
    assert "org/pairs" not in changes


def test_a_project_may_be_moved_with_its_runs(project, tmp_path, monkeypatch):
    folder(load("recipe.yaml")).begin([])
    monkeypatch.chdir(project.rename(tmp_path / "moved"))
    assert folder(load("recipe.yaml")).changes() == ""
    assert folder(load("recipe.yaml", ["dpo.data=held.jsonl"])).changes().startswith("dpo.data.0.path is 'held.jsonl'")


def test_a_run_from_before_paths_were_kept_whole_is_still_the_same(project):
    run = folder(load("recipe.yaml"))
    run.begin([])
    (run.path / "recipe.yaml").write_text(dump(run.recipe))
    assert run.changes() == ""
    assert folder(load(str(project / "recipe.yaml"))).changes() == ""


@pytest.mark.parametrize("content", ["", "- a\n", "model: [\n", b"\xff"])
def test_a_damaged_recipe_of_a_run_is_one_line(recipe, content):
    run = folder(recipe)
    run.begin([])
    (run.path / "recipe.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"dpo/recipe.yaml: the recipe that this run was begun with can't be read"):
        folder(recipe).claim(resume=True, overwrite=False)


def test_a_recipe_that_could_not_be_written_leaves_the_one_that_was_there(recipe, monkeypatch):
    """A full disk: half a recipe would make the run one that nothing can go on with."""
    run = folder(recipe)
    run.begin([])
    kept = (run.path / "recipe.yaml").read_text()
    run.claim(resume=True, overwrite=False)
    monkeypatch.setattr(Path, "write_text", half_of_it)
    with pytest.raises(OSError, match="disk full"):
        run.begin([])
    monkeypatch.undo()
    assert (run.path / "recipe.yaml").read_text() == kept


def test_a_run_that_was_cut_short_as_it_began_may_begin_again(recipe, tmp_path, monkeypatch):
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / lineage.WEIGHTS).touch()
    recipe = recipe.model_copy(update={"dpo": recipe.dpo.model_copy(update={"start_from": str(tmp_path / "parent")})})
    refused = [Refused("data.jsonl:7", "the prompt is empty")]
    monkeypatch.setattr(runs, "dump", lambda recipe: "no room" * 100)
    monkeypatch.setattr(Path, "write_text", lambda file, text, **_: half_of_it(file, text) if "no room" in text
                        else file.write_bytes(text.encode()))  # fmt: skip
    with pytest.raises(OSError, match="disk full"):
        folder(recipe).begin(refused)
    monkeypatch.undo()
    assert {"rejected_rows.jsonl", "parent_hash"} < {file.name for file in folder(recipe).path.iterdir()}
    folder(recipe).claim(resume=False, overwrite=False)


def half_of_it(file: Path, text: str, **_) -> None:
    file.write_bytes(text.encode()[: len(text) // 2])
    raise OSError("disk full")


def test_resume_needs_the_adapter_that_it_started_from(recipe, tmp_path):
    """It would go on with a policy that began elsewhere, against another reference."""
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / lineage.WEIGHTS).write_bytes(b"first")
    goes_on = recipe.model_copy(update={"dpo": recipe.dpo.model_copy(update={"start_from": str(parent)})})
    folder(goes_on).begin([])
    folder(goes_on).claim(resume=True, overwrite=False)
    was = lineage.adapter_hash(parent)
    (parent / lineage.WEIGHTS).write_bytes(b"trained again")
    again = "train it again with python -m qalign.dpo recipe.yaml --overwrite"
    with pytest.raises(UserError, match=rf"started from an adapter {was}, but {parent} is \w{{16}} now; {again}"):
        folder(goes_on).claim(resume=True, overwrite=False)
    folder(goes_on).claim(resume=False, overwrite=True)


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


def test_a_resumed_run_counts_its_seconds_on(recipe, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])
    first = folder(recipe)
    first.begin([])
    clock[0] += 50
    checkpoint = first.checkpoints / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    RunCallback(first, tokens_before=200).on_save(SimpleNamespace(output_dir=first.checkpoints), SimpleNamespace(
        global_step=2), None)  # fmt: skip
    clock[0] += 500  # lost with a power cut

    again = folder(recipe)
    again.claim(resume=True, overwrite=False)
    clock[0] += 7
    assert again.rewind() == (checkpoint, 200)
    clock[0] += 3
    again.adapter.mkdir()
    again.finish("next", "base", **FACTS)
    assert json.loads(again.summary.read_text())["wall_seconds"] == 50 + 7 + 3


def test_a_checkpoint_from_before_seconds_were_kept_is_gone_on_from(recipe, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])
    run = folder(recipe)
    run.begin([])
    checkpoint = run.checkpoints / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "whole").touch()
    (checkpoint / "tokens_seen").write_text("200")
    run.claim(resume=True, overwrite=False)
    clock[0] += 7
    assert run.rewind() == (checkpoint, 200)
    assert run.wall_seconds == 7


def test_the_model_card_is_a_table_whatever_the_facts_are(recipe):
    run = folder(recipe)
    run.begin([])
    run.adapter.mkdir()
    trust = {"accuracy": 0.9, "length_judge": {"picks": "longer"}, "curve": [{"claimed": 0.5}, {"claimed": 0.7}]}
    facts = {"rows": {"used": 3, "held_out": 0}, "trust": trust, "pooling": "not <|pad|>:\nthe end", "warning": None}
    run.finish("next", "base", **FACTS | facts)
    card = (run.adapter / "README.md").read_text()
    lines = [line for line in card.splitlines() if line.startswith("|")]
    assert "| rows.used | 3 |" in lines
    assert "| trust.length_judge.picks | longer |" in lines
    assert "| trust.curve.1.claimed | 0.7 |" in lines
    assert r"| pooling | not <\|pad\|>: the end |" in lines
    assert "{" not in "".join(lines)
    assert {line.replace(r"\|", "").count("|") for line in lines} == {3}
    assert json.loads(run.summary.read_text())["rows"] == {"used": 3, "held_out": 0}


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


@pytest.mark.parametrize("how", [{"resume": False, "overwrite": True}, {"resume": True, "overwrite": False}])
def test_a_try_that_is_refused_leaves_the_list_of_the_run_that_is_there(recipe, how):
    run = folder(recipe)
    run.begin([Refused("data.jsonl:7", "the prompt is empty")])
    kept = (run.path / "rejected_rows.jsonl").read_text()

    again = folder(recipe)
    again.claim(**how)
    refused = [Refused(f"data.jsonl:{n}", "not valid JSON") for n in range(6)]
    with pytest.raises(UserError) as raised:
        again.check_refused("dpo.data", refused, used=94)

    assert (run.path / "rejected_rows.jsonl").read_text() == kept
    listed = run.path / "rejected_rows.last_try.jsonl"
    assert f"all of them are in {listed}. The first:" in raised.value.lines[0]
    assert [json.loads(line)["reason"] for line in listed.read_text().splitlines()] == ["not valid JSON"] * 6
    again.begin([])
    assert not listed.exists(), "it is of no use once a try went well"


def test_no_rows_at_all(recipe):
    with pytest.raises(UserError, match="holds no rows"):
        folder(recipe).check_refused("dpo.data", [], used=0)
