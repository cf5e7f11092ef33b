"""What is read of a run for its curves, and how `qalign.watch` shows it."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qalign import watch
from qalign.reports.curves import run_in, runs_under, view
from qalign.train.lock import locked
from tests.conftest import ROOT

LINES = [
    {"step": 0, "eval_kl_nats": 0.0, "alarms": []},
    {"step": 1, "loss": 0.75, "grad_norm": None, "learning_rate": 1e-3},
    {"step": 2, "loss": 0.5, "grad_norm": 2.0, "learning_rate": 1e-3},
    {"step": 2, "eval_kl_nats": 1.5, "eval_loss": 0.625, "alarms": ["answers loop", "they are long"], "kept": True},
]


def leaving(*words: str) -> int:
    """The exit code of `qalign.watch`. (`tests.helpers` has one too, but loads PyTorch.)"""
    with pytest.raises(SystemExit) as left:
        watch.main(words)
    return left.value.code


def written(folder: Path, lines=LINES) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return written(tmp_path / "runs" / "a" / "dpo")


def test_a_run_s_curves_are_its_figures_in_panels(run):
    found = view(run)
    assert found.names() == ["eval_kl_nats", "loss", "learning_rate", "grad_norm", "eval_loss"]
    assert found.curve("loss") == ("loss", [1, 2], [0.75, 0.5])
    assert found.curve("grad_norm") == ("grad_norm", [2], [2.0])  # what was not finite is left out
    assert {title: [curve.name for curve in curves] for title, curves in found.panels().items()} == {
        "loss": ["loss", "eval_loss"], "KL, nats": ["eval_kl_nats"], "gradient norm": ["grad_norm"],
        "learning rate": ["learning_rate"],
    }  # fmt: skip
    assert [*found.panels(["eval_loss"])] == ["eval_loss"]
    assert (found.state, found.step) == ("stopped", 2)
    assert found.alarms == ["step 2: answers loop", "step 2: they are long"]


def test_a_run_is_running_while_a_process_holds_it_and_finished_with_its_summary(run, monkeypatch):
    with locked(run):
        assert view(run).state == "running"
        assert view(run).holder.pid == os.getpid()
        # Its number was given to another process after it was killed.
        monkeypatch.setattr("qalign.train.lock.STARTED_LATER", -1e9)
        assert view(run).state == "stopped"
    monkeypatch.undo()
    (run / "summary.json").write_text("{}")
    assert view(run).state == "finished"


def test_a_killed_process_is_not_at_work(run):
    code = "import sys; from pathlib import Path; from qalign.train.lock import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(run)], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        assert view(run).holder.pid == process.pid
        process.kill()
        time.sleep(0.2)
        assert view(run).holder is None  # a zombie, as nobody has waited for it
    assert view(run).holder is None


def test_the_run_of_a_folder_is_the_one_at_work_or_the_newest(run, tmp_path):
    older = written(run.parent / "best_of" / "round_1" / "dpo")
    os.utime(older / "metrics.jsonl", (1, 1))
    os.utime(older / "recipe.yaml", (1, 1))
    assert runs_under(tmp_path / "runs") == runs_under(run.parent) == [run, older]
    with locked(older):
        assert run_in(tmp_path / "runs") == older
    assert run_in(run) == run
    assert run_in(tmp_path) == run
    assert run_in(tmp_path / "runs" / "b") is None
    with locked(tmp_path / "runs" / "b" / "sft"):  # it loads the base, and has written nothing
        assert run_in(tmp_path / "runs" / "b").name == "sft"


def test_in_a_pipe_it_prints_once_without_colours(run, capsys):
    assert leaving(str(run)) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{run}: stopped, 4 lines, at step 2\nalarm at step 2: answers loop\n")
    assert "\x1b" not in said
    for title in ("loss: 0.5, held out 0.625", "KL, nats: held out 1.5", "learning rate: 0.001"):
        assert title in said
    assert max(map(len, said.splitlines()[3:])) <= 80


def test_a_curve_goes_the_way_of_its_figures(tmp_path, capsys):
    """The first half lies on the highest line of the plot, the second one on the lowest."""
    lines = [{"step": step, "loss": 1.0 if step <= 10 else 0.0} for step in range(1, 21)]
    leaving(str(written(tmp_path / "x" / "sft", lines)), "--show", "loss")
    plot = [line.partition("┤")[2] or line.partition("│")[2] for line in capsys.readouterr().out.splitlines()]
    drawn = [line for line in plot if any("⠀" < character <= "⣿" for character in line)]
    high, low = (
        [place for place, character in enumerate(line) if "⠀" < character <= "⣿"] for line in (drawn[0], drawn[-1])
    )
    assert max(high) - min(high) > 20
    assert max(low) - min(low) > 20
    assert min(high) < min(low)
    assert max(high) < max(low)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs/a/dpp"], "did you mean 'dpo'?"),
        (["runs/none"], "there is no run"),
        (["runs/a", "--show", "los"], "did you mean 'loss'?"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert leaving(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.slow
def test_in_a_terminal_it_draws_anew_until_the_run_ends(run):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qalign.watch", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "LINES": "50"}
    seen, deadline = "", time.monotonic() + 60

    def until(words: str) -> None:
        nonlocal seen
        while words not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 65536).decode(errors="replace")

    with locked(run):
        process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
        until("at step 2")
        with (run / "metrics.jsonl").open("a") as file:
            file.write('\n{"step": 7, "loss": 0.25}\n')
        until("at step 7")
        assert process.poll() is None
    until(": stopped")
    assert process.wait(20) == 0
    assert seen.count(watch.CLEAR) >= 3
