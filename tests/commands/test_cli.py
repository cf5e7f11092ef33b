"""The `qalign` command, and how every command ends: which exit code, and what is said."""

import errno
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from qalign import cli
from qalign.errors import Stopped, StopRequest, UserError
from tests.conftest import ROOT


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (lambda: None, 0, ""),
        (raising(UserError("one line", "another")), 2, "one line\nanother\n"),
        (raising(PermissionError(errno.EACCES, "Permission denied", "/runs")), 2, "/runs: Permission denied\n"),
        (raising(OSError(errno.ENOSPC, "No space left on device")), 2, "disk: No space left on device\n"),
        (raising(KeyboardInterrupt()), 130, "stopped by SIGINT\n"),
        (raising(Stopped(signal.SIGINT)), 130, "stopped by SIGINT\n"),
        (raising(Stopped(signal.SIGTERM)), 143, "stopped by SIGTERM\n"),
    ],
)
def test_exit_codes(work, code, said, capsys):
    assert cli.exit_code(work) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No such file", "a"), RuntimeError("a bug of ours")])
def test_an_unexpected_error_is_not_hidden(error):
    with pytest.raises(type(error)):
        cli.exit_code(raising(error))


def test_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.exit_code(lambda: None) == 2
    assert "one GPU in one process" in capsys.readouterr().err


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1,0", "1"), ("", "")])
def test_one_gpu_is_seen(monkeypatch, before, after):
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    cli.exit_code(lambda: None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after


def test_out_of_memory_anywhere_is_one_line(capsys):
    assert cli.exit_code(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))) == 2
    assert capsys.readouterr().err.startswith("out of GPU memory (CUDA out of memory). Try nf4")


def test_a_stop_request_is_patient_once():
    with pytest.raises(Stopped):
        StopRequest()(signal.SIGINT, None)
    stop = StopRequest()
    stop.patient = True
    stop(signal.SIGTERM, None)
    assert stop.number == signal.SIGTERM
    with pytest.raises(Stopped):
        stop(signal.SIGTERM, None)


# --- the console script ----------------------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch) -> list[tuple[str, list[str]]]:
    """What `qalign` would run: (module, its words)."""
    found = []
    module = lambda name: SimpleNamespace(main=lambda words: found.append((name, words)))  # noqa: E731
    monkeypatch.setattr(cli.importlib, "import_module", module)
    return found


@pytest.mark.parametrize(
    ("words", "module", "others"),
    [
        *((f"{name} a b=1 --resume", f"qalign.{name}", "a b=1 --resume") for name in cli.COMMANDS if name != "page"),
        ("page --port 1", "qalign.page.launch", "--port 1"),
        ("my.yaml dpo.beta=1", "qalign.__main__", "my.yaml dpo.beta=1"),
        ("--resume my.yaml", "qalign.__main__", "--resume my.yaml"),
    ],
)
def test_the_first_word_says_which_command_runs(words, module, others, called):
    cli.main(words.split())
    assert called == [(module, others.split())]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 0, "qalign RECIPE"),
        (["--help"], 0, "qalign RECIPE"),
        (["evalute", "a.yaml"], 2, "no command 'evalute'; did you mean 'evaluate'?"),
        (["xyz"], 2, "no command 'xyz'; `qalign --help`"),
    ],
)
def test_help_and_unknown_commands(words, code, said, called, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert said in (err if code else out)
    assert (len(err.splitlines()) == 1) if code else all(f"\n  {name} " in out for name in cli.COMMANDS)
    assert not called


def test_every_command_has_a_module_with_a_main():
    code = (
        "import sys\nfrom importlib import import_module\nfrom qalign import cli\n"
        "assert not {'torch', 'qalign.dpo'} & set(sys.modules), 'the command line itself imports no command'\n"
        "for name in cli.COMMANDS: import_module(cli.MODULES.get(name, f'qalign.{name}')).main"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(("script", "usage"), [("/bin/qalign", "qalign dpo"), ("dpo.py", "python -m qalign.dpo")])
def test_usage_lines_say_what_was_typed(script, usage, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as ended:
        cli.main(["dpo", "--help"])
    assert ended.value.code == 0
    assert f"usage: {usage} [-h]" in capsys.readouterr().out
