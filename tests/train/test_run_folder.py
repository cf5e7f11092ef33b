"""The run folder: what is refused, what is kept, and what a finished run says."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from qalign.config import atomic
from qalign.config.load import dump, load
from qalign.data.formats import Refused
from qalign.errors import UserError
from qalign.model import lineage
from qalign.train import run_folder as runs
from tests.train.runs import FACTS, FRESH, OVERWRITE, RESUME, begun, finished, folder, write_checkpoint


def test_a_taken_folder_is_refused_and_overwrite_deletes_only_when_training_begins(recipe):
    run = folder(recipe)
    run.claim(**FRESH)
    assert not run.path.exists(), "a new folder is free, and made only when training begins"
    begun(recipe)
    with pytest.raises(UserError, match=r"holds a stopped run; --resume .*, --overwrite"):
        run.claim(**FRESH)
    finished(recipe)
    with pytest.raises(UserError, match="holds a complete run"):
        run.claim(**FRESH)
    run.claim(**OVERWRITE)
    assert run.complete
    run.begin([])
    assert not run.complete
    assert (run.path / "recipe.yaml").is_file()


@pytest.mark.parametrize("name", ["thesis.doc", ".git"])
def test_files_that_are_no_run_are_never_deleted(recipe, name):
    run = folder(recipe)
    run.path.mkdir(parents=True)
    (run.path / name).write_text("years of work")
    for how in (FRESH, OVERWRITE):
        with pytest.raises(UserError, match="choose another `output`"):
            run.claim(**how)
    assert (run.path / name).is_file()


def test_an_output_in_the_home_folder_is_there(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder(recipe.model_copy(update={"output": "~/runs"})).path == tmp_path / "runs" / "dpo"


def test_an_output_that_is_a_file_is_one_line(recipe, tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match="is, or lies in, a file"):
        folder(recipe).claim(**FRESH)


def test_resume_needs_the_same_recipe_but_for_the_sections_of_other_stages(recipe, tmp_path):
    """A stage's run belongs to its own section: work on `dpo:` must not throw away a finished `sft:`."""
    begun(recipe)
    folder(recipe).claim(**RESUME)
    folder(load(str(tmp_path / "recipe.yaml"), [f"sft.data={tmp_path / 'pairs.jsonl'}"])).claim(**RESUME)
    streamed = load(str(tmp_path / "recipe.yaml"), ["model.stream=always"])  # the same bits, as on another card
    folder(streamed).claim(**RESUME)
    with pytest.raises(UserError, match=r"--resume needs the recipe .*: dpo\.beta is 0\.7, was 0\.1"):
        folder(recipe, beta=0.7).claim(**RESUME)


def test_a_key_that_the_run_is_older_than_is_no_change_at_its_default_and_one_that_is_gone_since_is(recipe):
    run = begun(recipe)
    file = run.path / "recipe.yaml"
    kept = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(kept | {"lottery": True}))
    assert run.changes() == "lottery is 'gone', was True"
    del kept["dpo"]["reference"], kept["dpo"]["data"][0]["weight"], kept["lora"], kept["seed"]
    file.write_text(yaml.safe_dump(kept))
    assert run.changes() == ""
    changes = folder(recipe.model_copy(update={"seed": 7}), reference="in_step").differences()
    assert changes == {"dpo.reference": ("cached", "in_step"), "seed": (42, 7)}


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
    run = begun(load("recipe.yaml"))
    kept = yaml.safe_load((run.path / "recipe.yaml").read_text())
    assert kept["model"]["base"] == str(project / "model")
    assert [source["path"] for source in kept["dpo"]["data"]] == [str(project / "pairs.jsonl"), "org/pairs"]
    assert run.changes() == ""

    (tmp_path / "link").symlink_to(project)
    for place, recipe in ((tmp_path, "project/recipe.yaml"), ("/", f"{tmp_path}/link/recipe.yaml")):
        monkeypatch.chdir(place)
        again = folder(load(recipe, [f"output={project}/runs"]))
        assert again.changes() == ""
        again.claim(**RESUME)
    monkeypatch.chdir(project)
    (run.path / "recipe.yaml").write_text(dump(run.recipe))  # as older versions wrote it: with relative paths
    assert run.changes() == ""
    assert folder(load(str(project / "recipe.yaml"))).changes() == ""


def test_other_files_of_the_same_names_are_a_change(project, tmp_path, monkeypatch):
    output = [f"output={tmp_path}/runs"]
    begun(load("recipe.yaml", output))
    monkeypatch.chdir(shutil.copytree(project, tmp_path / "other"))
    changes = folder(load("recipe.yaml", output)).differences()
    assert changes["dpo.data.0.path"][0] == f"{project}/pairs.jsonl"
    assert changes["model.base"][0] == f"{project}/model"
    assert "dpo.data.1.path" not in changes


def test_a_project_may_be_moved_with_its_runs(project, tmp_path, monkeypatch):
    begun(load("recipe.yaml"))
    monkeypatch.chdir(project.rename(tmp_path / "moved"))
    assert folder(load("recipe.yaml")).changes() == ""
    assert "dpo.data.0.path" in folder(load("recipe.yaml", ["dpo.data=held.jsonl"])).differences()


@pytest.mark.parametrize("content", [b"", b"- a\n", b"model: [\n", b"\xff"])
def test_a_damaged_recipe_of_a_run_is_one_line(recipe, content):
    run = begun(recipe)
    (run.path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"dpo/recipe.yaml: .* can't be read; --overwrite") as raised:
        folder(recipe).claim(**RESUME)
    assert len(raised.value.lines) == 1


def test_resume_needs_the_adapter_that_it_started_from(recipe, tmp_path):
    """It would continue with a policy that began elsewhere, against another reference."""
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / lineage.WEIGHTS).write_bytes(b"first")
    begun(recipe, start_from=str(parent))
    folder(recipe, start_from=str(parent)).claim(**RESUME)
    was = lineage.adapter_hash(parent)
    (parent / lineage.WEIGHTS).write_bytes(b"trained again")
    fix = "start again with python -m qalign.dpo recipe.yaml --overwrite"
    with pytest.raises(UserError, match=rf"started from an adapter {was}, but {parent} is \w{{16}} now; {fix}"):
        folder(recipe, start_from=str(parent)).claim(**RESUME)
    folder(recipe, start_from=str(parent)).claim(**OVERWRITE)
    (folder(recipe).path / "parent_hash").write_bytes(b"\xff\0")
    with pytest.raises(UserError, match="started from an adapter"):
        folder(recipe, start_from=str(parent)).claim(**RESUME)


@pytest.fixture
def full_disk(monkeypatch):
    """No file reaches the disk whose name has this in it; what was written of it stays, as after a power cut."""

    def fill(name: str) -> None:
        def refuse(file: Path) -> None:
            if name in file.name:
                file.write_bytes(file.read_bytes()[:10])
                raise OSError("disk full")

        monkeypatch.setattr(atomic, "sync", refuse)

    return fill


def test_a_recipe_that_could_not_be_written_leaves_the_one_that_was_there(recipe, full_disk):
    """Half a recipe would make the run one that nothing can resume."""
    run = begun(recipe)
    kept = (run.path / "recipe.yaml").read_text()
    run.claim(**RESUME)
    full_disk("recipe")
    with pytest.raises(OSError, match="disk full"):
        run.begin([])
    assert (run.path / "recipe.yaml").read_text() == kept


def test_a_run_that_was_cut_short_as_it_began_may_begin_again(recipe, tmp_path, full_disk, monkeypatch):
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / lineage.WEIGHTS).touch()
    full_disk("recipe")
    monkeypatch.setattr(Path, "unlink", lambda file, missing_ok=False: None)  # killed: nothing tidies up
    start_from = str(tmp_path / "parent")
    with pytest.raises(OSError, match="disk full"):
        begun(recipe, [Refused("data.jsonl:7", "the prompt is empty")], start_from=start_from)
    left = {file.name for file in folder(recipe).path.iterdir()}
    assert {"rejected_rows.jsonl", "parent_hash"} < left
    assert any(name.startswith(".recipe.") for name in left)
    folder(recipe, start_from=start_from).claim(**FRESH)


def test_only_a_whole_checkpoint_counts(recipe):
    run = begun(recipe)
    write_checkpoint(run, 15, whole=False)
    assert run.last_checkpoint() is None
    for step in (5, 10):
        write_checkpoint(run, step)
    assert run.last_checkpoint().name == "checkpoint-10"


def test_rewind_drops_what_will_be_logged_again(recipe, capsys):
    run = begun(recipe)
    for step in (1, 2):
        run.log({"step": step})
    last, cut = write_checkpoint(run, 2), write_checkpoint(run, 3, whole=False)
    run.log({"step": 3})
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # a power cut left half a line
    run.claim(**RESUME)
    assert run.rewind() == (last, 200)
    assert not cut.exists()
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]
    assert "damaged" not in capsys.readouterr().out, "what was logged after the checkpoint doesn't count"
    fresh = folder(recipe)
    assert fresh.rewind() == (None, 0)
    assert fresh.metrics.read_text() == ""


@pytest.mark.parametrize(
    "junk", [b"\0" * 30 + b"\n", b"\xff\xfe junk\n", b'{"step": 1}\n[]\n', b"{" * 5000 + b"\n", b""]
)
def test_metrics_that_were_damaged_are_again_as_they_were_at_the_checkpoint(recipe, junk, capsys):
    run = begun(recipe)
    for step in (1, 2):
        run.log({"step": step, "loss": 0.5})
    kept = run.metrics.read_bytes()
    write_checkpoint(run, 2)
    run.metrics.write_bytes(junk)
    run.claim(**RESUME)
    run.rewind()
    assert run.metrics.read_bytes() == kept
    assert f"{run.metrics}: was damaged" in capsys.readouterr().out


def test_a_resumed_run_counts_its_seconds_on(recipe, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])
    first = begun(recipe)
    clock[0] += 50
    checkpoint = write_checkpoint(first, 2)
    clock[0] += 500  # lost with a power cut

    again = folder(recipe)
    again.claim(**RESUME)
    clock[0] += 7
    assert again.rewind() == (checkpoint, 200)
    clock[0] += 3
    again.adapter.mkdir()
    again.finish("next", "base", {again.adapter: "model = ..."}, **FACTS)
    assert json.loads(again.summary.read_text())["wall_seconds"] == 50 + 7 + 3


def test_the_model_card_is_a_table_whatever_the_facts_are(recipe):
    run = finished(recipe)
    trust = {"accuracy": 0.9, "length_judge": {"picks": "longer"}, "curve": [{"claimed": 0.5}, {"claimed": 0.7}]}
    facts = {"rows": {"used": 3, "held_out": 0}, "trust": trust, "pooling": "not <|pad|>:\nthe end", "warning": None}
    run.finish("next", "base", {run.adapter: "model = ..."}, **FACTS | facts)
    lines = [line for line in (run.adapter / "README.md").read_text().splitlines() if line.startswith("|")]
    expected = {"rows.used": 3, "trust.length_judge.picks": "longer", "trust.curve.1.claimed": 0.7}
    assert {f"| {name} | {value} |" for name, value in expected.items()} <= set(lines)
    assert r"| pooling | not <\|pad\|>: the end |" in lines
    assert "{" not in "".join(lines)
    assert {line.replace(r"\|", "").count("|") for line in lines} == {3}
    assert json.loads(run.summary.read_text())["rows"] == {"used": 3, "held_out": 0}


def test_the_share_of_refused_rows_decides(recipe):
    """At 5% 5 of 100 pass and 6 don't; then all are in a file, and the first are named."""
    run = folder(recipe)
    refused = [Refused(f"data.jsonl:{n}", "the prompt is empty") for n in range(6)]
    run.check_refused("dpo.data", refused[:5], used=95)
    with pytest.raises(UserError) as raised:
        run.check_refused("dpo.data", refused, used=94)
    assert raised.value.lines[0].startswith("dpo.data: 6 of 100 rows were refused (6%; max_refused_share is 5%)")
    assert raised.value.lines[1] == "  data.jsonl:0: the prompt is empty"
    assert len((run.path / "rejected_rows.jsonl").read_text().splitlines()) == 6
    folder(recipe).claim(**FRESH)  # the list alone is no run: the next try is not refused
    with pytest.raises(UserError, match="holds no rows"):
        run.check_refused("dpo.data", [], used=0)


@pytest.mark.parametrize("how", [OVERWRITE, RESUME])
def test_a_refused_start_leaves_the_list_of_the_run_that_is_there(recipe, how):
    run = begun(recipe, [Refused("data.jsonl:7", "the prompt is empty")])
    kept = (run.path / "rejected_rows.jsonl").read_text()

    again = folder(recipe)
    again.claim(**how)
    with pytest.raises(UserError) as raised:
        again.check_refused("dpo.data", [Refused(f"data.jsonl:{n}", "not valid JSON") for n in range(6)], used=94)

    assert (run.path / "rejected_rows.jsonl").read_text() == kept
    listed = run.path / "rejected_rows.last_try.jsonl"
    assert str(listed) in raised.value.lines[0]
    assert [json.loads(line)["reason"] for line in listed.read_text().splitlines()] == ["not valid JSON"] * 6
    again.begin([])
    assert not listed.exists(), "it is of no use once a try went well"
