"""What `--overwrite` replaces, when, and what comes back."""

import json
import shutil
from pathlib import Path

import pytest

from qalign.config.load import load
from qalign.config.stages import Source
from qalign.errors import Stopped, UserError
from qalign.train import run_folder as runs
from tests.helpers import train_recipe
from tests.reward_runs import run_stage
from tests.train.runs import (
    EACH_STAGE,
    FACTS,
    FRESH,
    OVERWRITE,
    RESUME,
    begun,
    finished,
    folder,
    recipe_of,
    write_checkpoint,
)


def content(place: Path) -> dict[str, bytes]:
    return {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()}


@pytest.mark.parametrize("key", ["dpo.start_from", "dpo.data", "dpo.eval_data", "model.base"])
def test_overwrite_never_deletes_what_the_run_reads(recipe, key):
    inside = str(folder(recipe).path / "adapter")
    section, name = key.split(".")
    value = (Source(path=f"{inside}/rows.jsonl"),) if name.endswith("data") else inside
    changed = getattr(recipe, section).model_copy(update={name: value})
    run = runs.RunFolder(recipe.model_copy(update={section: changed}), "dpo")
    with pytest.raises(UserError, match=rf"{key}: .* lies in the folder that this run writes to"):
        run.claim(**OVERWRITE)


def test_overwrite_never_deletes_the_recipe_or_the_chat_template(recipe, tmp_path):
    run = finished(recipe)
    own = run.path / "recipe.yaml"
    again = runs.RunFolder(load(str(own)), "dpo", f"'{own}' dpo.beta=0.2")
    with pytest.raises(UserError, match=r"the recipe: '.*recipe\.yaml' lies in the folder"):
        again.claim(**OVERWRITE)
    runs.RunFolder(load(str(own)), "dpo", str(own)).claim(**RESUME)

    template = run.path / "chat.jinja"
    template.write_text("{{ messages }}")
    model = recipe.model.model_copy(update={"chat_template": str(template)})
    with pytest.raises(UserError, match=r"model\.chat_template: .* lies in the folder"):
        runs.RunFolder(recipe.model_copy(update={"model": model}), "dpo").claim(**OVERWRITE)


def test_overwrite_never_deletes_a_reward_function(tiny_folder, tmp_path):
    """It is named with the function behind a colon."""
    path = recipe_of(tmp_path / "runs", tiny_folder, "ppo")
    place = tmp_path / "runs" / "ppo"
    place.mkdir()
    (place / "recipe.yaml").touch()
    shutil.move(tmp_path / "runs" / "mine.py", place / "mine.py")
    run = runs.RunFolder(load(path, [f"ppo.reward={place}/mine.py:length"], "ppo"), "ppo", path)
    with pytest.raises(UserError, match=r"ppo\.reward: .* lies in the folder"):
        run.claim(**OVERWRITE)


@pytest.mark.parametrize(
    "error", [UserError("a mistake found late"), KeyboardInterrupt(), Stopped(15), ValueError("a bug")]
)
def test_a_start_that_fails_puts_the_old_run_back(recipe, error, capsys):
    old = content(finished(recipe).path)
    run = folder(recipe, beta=0.5)

    def start():
        with run.held():
            run.claim(**OVERWRITE)
            run.begin([])
            write_checkpoint(run, 1, whole=False)
            raise error

    with pytest.raises(type(error)):
        start()
    assert content(run.path) == old
    assert "is back" in capsys.readouterr().out
    assert sorted(file.name for file in run.path.parent.iterdir()) == [".dpo.lock", "dpo"]


def test_a_start_that_was_killed_is_healed_at_the_next_one(recipe, capsys):
    old = content(finished(recipe).path)
    run = folder(recipe, beta=0.5)
    run.claim(**OVERWRITE)
    run.begin([])  # and killed: nothing tidies up
    (run.path / ".report.qalign-123.png").touch()
    assert content(run.path) != old
    with folder(recipe).held():
        assert content(run.path) == old
    assert "is back" in capsys.readouterr().out


def test_the_old_run_goes_with_the_first_checkpoint_of_the_new_one(recipe, capsys):
    finished(recipe)
    run = folder(recipe, beta=0.5)
    replaced = run.path.with_name(".dpo.replaced")
    with run.held():
        run.claim(**OVERWRITE)
        run.begin([])
        assert (replaced / "summary.json").is_file()
        write_checkpoint(run, 1)
        assert not replaced.exists()
    assert not run.complete
    folder(recipe, beta=0.5).claim(**RESUME)
    shutil.copytree(run.path, replaced)  # killed while it was deleted
    (replaced / "recipe.yaml").unlink()
    with folder(recipe).held():
        assert not replaced.exists()
    assert "is back" not in capsys.readouterr().out


def test_a_stage_folder_that_is_a_link_is_overwritten_where_it_lies(recipe, tmp_path):
    """Another disk, for example."""
    run = finished(recipe)
    disk = run.path.rename(tmp_path / "disk")
    run.path.symlink_to(disk)
    again = folder(recipe)
    with again.held():
        again.claim(**OVERWRITE)
        again.begin([])
        again.adapter.mkdir()
        again.finish("next", "base", {again.adapter: "model = ..."}, **FACTS)
    assert run.path.is_symlink()
    assert (disk / "summary.json").is_file()
    assert sorted(file.name for file in tmp_path.iterdir() if "disk" in file.name) == [".disk.lock", "disk"]


def test_a_stage_folder_that_is_a_link_to_itself_is_one_line(recipe, tmp_path):
    run = folder(recipe)
    run.path.parent.mkdir(parents=True, exist_ok=True)
    run.path.symlink_to(run.path.name)
    for refused in (run.held().__enter__, lambda: run.claim(**FRESH)):
        with pytest.raises(UserError, match="a link that leads round in a circle"):
            refused()


def test_what_a_killed_process_left_is_cleared_at_the_next_start(recipe):
    run = begun(recipe)
    adapter = run.path / ".adapter.qalign-abcd1234"
    (adapter / "old").mkdir(parents=True)
    (adapter / "old" / "adapter_config.json").touch()
    (adapter / "new").mkdir()
    (run.path / ".report.qalign-4711.png").touch()
    (run.path / "samples").mkdir()
    (run.path / "samples" / ".step-3.qalign-12.jsonl").touch()
    with folder(recipe).held():
        assert sorted(content(run.path)) == ["adapter/adapter_config.json", "recipe.yaml"]


def test_hidden_files_of_the_users_stay(recipe):
    run = begun(recipe)
    (run.path / ".my-notebook").mkdir()
    for name in (".notes.2024.md", ".my-notebook/one.txt"):
        (run.path / name).touch()
    with folder(recipe).held():
        assert {".notes.2024.md", ".my-notebook/one.txt"} <= set(content(run.path))


def test_a_complete_run_says_how_to_go_on_from_it(recipe):
    run = finished(recipe)
    for changed, how in ((run, FRESH), (folder(recipe, epochs=3), RESUME)):
        with pytest.raises(UserError, match=r"dpo\.start_from=\S+/dpo/adapter with another `output`") as raised:
            changed.claim(**how)
        assert "--resume" not in raised.value.lines[0]


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_a_mistake_found_after_the_start_costs_no_finished_run(stage, tiny_folder, tmp_path, monkeypatch):
    """In the real stage, after it prepared its folder: the header is the last thing before training."""
    import qalign.train.loop

    path = recipe_of(tmp_path, tiny_folder, stage, max_steps=1)
    run = run_stage(path)
    old = content(run.path)

    def fail(*args):
        assert not run.complete, "the new run has begun"
        raise UserError("a mistake found late")

    monkeypatch.setattr(qalign.train.loop, "print_table", fail)
    with pytest.raises(UserError, match="found late"):
        train_recipe(load(path, [f"{stage}.learning_rate=0.5"], stage), path, stage=stage, overwrite=True)
    assert content(run.path) == old
    assert json.loads(old["summary.json"])["steps"] == 1


def test_a_reward_that_fails_at_once_costs_no_finished_run(tiny_folder, tmp_path):
    """PPO has a checkpoint of step 0, before anything was learned: it doesn't count."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text(
        "def good(completions): return [float(len(text)) for text in completions]\ndef bad(**_): raise OSError\n"
    )
    path = recipe_of(tmp_path, tiny_folder, "ppo", max_steps=1, reward=f"{rewards}:good")
    run = run_stage(path)
    old = content(run.path)

    with pytest.raises(UserError, match="bad"):
        train_recipe(load(path, [f"ppo.reward={rewards}:bad"], "ppo"), path, stage="ppo", overwrite=True)

    assert content(run.path) == old
