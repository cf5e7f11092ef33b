"""Trackers hold what metrics.jsonl holds, each step once, after a kill and a resume too, in the same run."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# trackio reads it as it is imported.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="qalign-trackio-")

from qalign.config.load import load as load_recipe
from qalign.errors import Stopped, UserError
from qalign.reports.answers import write_samples
from qalign.reports.plots import picture
from qalign.train import trackers
from qalign.train.run_folder import RunFolder
from tests.helpers import metrics, stopping_after
from tests.reward_runs import run_stage
from tests.train.runs import FRESH, HELD_OUT, RESUME, STAGES, recipe_of, write_checkpoint

SAMPLE = {"prompt": [{"role": "user", "content": "Why | or\nhow?"}], "completion": "Because.", "proxy": 0.5}
HELD = {"tensorboard": lambda run: in_events(run), "trackio": lambda run: in_trackio(run)}


@pytest.fixture(scope="module", autouse=True)
def swept():
    yield
    shutil.rmtree(os.environ["TRACKIO_DIR"], ignore_errors=True)


def in_events(run: RunFolder) -> list[tuple]:
    """(step, name, value) of all that TensorBoard's event files hold, each as often as it was written; pictures and
    texts with True. Read record by record, without what TensorBoard itself would take for doubled."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found = []
    for file in sorted((run.path / "tensorboard").glob("events*")):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                figure = value.simple_value if value.WhichOneof("value") == "simple_value" else True
                found.append((event.step, value.tag.removesuffix("/text_summary"), figure))
    return found


def in_trackio(run: RunFolder) -> list[tuple]:
    trackio = pytest.importorskip("trackio")
    word = (run.path / trackers.RUN_ID).read_text()
    (known,) = [one for one in trackio.Api().runs("qalign") if one.name.endswith(word)]
    lines = trackio.SQLiteStorage.get_logs("qalign", run=known.name, run_id=known.id)
    return [
        (line["step"], name, value if isinstance(value, (int, float)) else True)
        for line in lines for name, value in line.items() if name not in ("step", "timestamp")
    ]  # fmt: skip


def figures(run: RunFolder) -> list[tuple]:
    """(step, name, value) of every number in metrics.jsonl."""
    return [
        (line["step"], name, value)
        for line in metrics(run)
        for name, value in line.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


def assert_same(found: list[tuple], expected: list[tuple]) -> None:
    assert [(step, name) for step, name, _ in sorted(found)] == [(step, name) for step, name, _ in sorted(expected)]
    for (_, name, value), (_, _, wanted) in zip(sorted(found), sorted(expected), strict=True):
        assert value == pytest.approx(wanted, rel=1e-6), name  # event files hold float32


def session(recipe, *, resume: bool) -> RunFolder:
    """A run folder as a session of a stage begins it."""
    run = RunFolder(recipe, "dpo", "recipe.yaml")
    run.claim(**(RESUME if resume else FRESH))
    run.begin([])
    run.rewind()
    return run


def looked(run: RunFolder, step: int) -> None:
    """An evaluation: sample answers, a picture, and a line of figures."""
    write_samples(run.path, step, [SAMPLE])
    with picture(run.path / "dpo_report.png", (1, 1), 0.1) as figure:
        figure.suptitle(str(step))
    run.log({"step": step, "eval_kl_nats": step / 3, "alarms": ["loops", "long"], "eval_judge": None})


@pytest.fixture(params=["tensorboard", "trackio"])
def tracker(request) -> str:
    pytest.importorskip(request.param)
    return request.param


def test_a_killed_run_goes_on_in_the_same_run_with_each_step_once(recipe, tracker):
    """The evaluation at a checkpoint's own step comes after it, as DPO's does, and so is rewound."""
    recipe = recipe.model_copy(update={"log_to": [tracker]})
    run = session(recipe, resume=False)
    looked(run, 0)
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 1 / step})
        if step == 2:
            write_checkpoint(run, 2)
            looked(run, 2)
    word = (run.path / trackers.RUN_ID).read_text()
    if tracker == "trackio":
        run._trackers.close()  # it sends twice a second; a kill before that is the next test

    again = session(recipe, resume=True)
    assert [line["step"] for line in metrics(again)] == [0, 1, 2]
    looked(again, 2)
    for step in (3, 4):
        again.log({"step": step, "loss": 1 / step})
    again._trackers.close()

    assert (run.path / trackers.RUN_ID).read_text() == word
    more = [(step, name, True) for step in (0, 2) for name in ("alarms", "samples", "dpo_report")]
    assert_same(HELD[tracker](run), figures(run) + more)


def test_what_a_kill_lost_comes_from_the_metrics_and_so_does_what_a_new_tracker_lacks(recipe, tracker):
    run = session(recipe, resume=False)
    looked(run, 0)
    for step in (1, 2):
        run.log({"step": step, "loss": 1 / step})
    write_checkpoint(run, 2)

    again = session(recipe.model_copy(update={"log_to": tracker.split()}), resume=True)
    again.log({"step": 3, "loss": 0.25})
    again._trackers.close()

    more = [(0, name, True) for name in ("alarms", "samples", "dpo_report")]
    assert_same(HELD[tracker](run), figures(run) + more)


def test_a_run_that_replaces_another_is_a_run_of_its_own(recipe, tracker):
    recipe = recipe.model_copy(update={"log_to": [tracker]})
    words = []
    for how in (FRESH, FRESH | {"overwrite": True}):
        run = RunFolder(recipe, "dpo", "recipe.yaml")
        run.claim(**how)
        run.begin([])
        run.rewind()
        run.log({"step": 1, "loss": len(words)})
        run._trackers.close()
        words.append((run.path / trackers.RUN_ID).read_text())
    assert words[0] != words[1]
    assert_same(HELD[tracker](run), [(1, "loss", 1)])


class Failing:
    """A tracker that loses its connection."""

    held, sent = None, 0

    def __init__(self, run):
        pass

    def send(self, step, items):
        Failing.sent += 1
        if step == 2:
            raise ConnectionError("the network is down\nfor good")

    def close(self):
        raise AssertionError("it was given up")


def test_a_tracker_that_fails_ends_no_run_and_is_told_nothing_more(recipe, monkeypatch, capsys):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Failing)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    run = session(recipe.model_copy(update={"log_to": ["wandb"]}), resume=False)
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 1.0})
    run._trackers.close()
    assert Failing.sent == 2
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "wandb" in line]
    assert said.startswith("warning: log_to: wandb failed (ConnectionError: the network is down for good)")


def test_a_missing_package_is_one_line_before_anything_is_read(recipe, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    run = RunFolder(recipe.model_copy(update={"log_to": ["trackio", "wandb"]}), "dpo", "recipe.yaml")
    with pytest.raises(UserError, match=r"^log_to: trackio and wandb are not installed; pip install trackio wandb"):
        run.claim(**FRESH)


def test_samples_keep_to_their_cells_in_a_markdown_table():
    row = {"prompt": "Why | or\nhow?", "completion": "Because.", "proxy": 0.5}
    lines = trackers._markdown([row]).splitlines()
    assert lines == ["| prompt | completion | proxy |", "| --- | --- | --- |", "| Why ¦ or how? | Because. | 0.5 |"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_sends_all_figures_once_though_it_was_stopped(stage, tiny_folder, tmp_path, monkeypatch):
    names = [name for name in ("tensorboard", "trackio", "wandb") if importlib.util.find_spec(name)]
    monkeypatch.setenv("WANDB_MODE", "offline")
    keys = {"limit": 20, "save_every": 2, "max_steps": 5, "eval_data": HELD_OUT, "eval_every": 2}
    path = Path(recipe_of(tmp_path, tiny_folder, stage, **keys))
    path.write_text(path.read_text() + f"log_to: [{', '.join(names)}]\n")
    with stopping_after(2), pytest.raises(Stopped):
        run_stage(str(path))
    run_stage(str(path), resume=True)
    run = RunFolder(load_recipe(str(path)), stage)

    for name in ("tensorboard", "trackio"):
        found = HELD[name](run)
        assert_same([one for one in found if one[2] is not True], figures(run))
        pictures = {one[1] for one in found if one[2] is True}
        assert {file.stem for file in run.path.glob("*.png")} <= pictures
        assert ("samples" in pictures) == (run.path / "samples").is_dir()
    if "wandb" in names:
        word = (run.path / trackers.RUN_ID).read_text()
        folders = [*run.path.glob("wandb/offline-run-*")]
        assert len(folders) == 2
        assert all(folder.name.endswith(word) for folder in folders)
