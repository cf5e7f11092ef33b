"""How commands end: which exit code, and what is said."""

import errno
import os
import signal

import pytest
import torch

from qalign import cli as command
from qalign.errors import UserError


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code"),
    [
        (lambda: None, 0),
        (raising(UserError("one line", "another")), 2),
        (raising(PermissionError(errno.EACCES, "Permission denied", "/root/runs")), 2),
        (raising(OSError(errno.ENOSPC, "No space left on device")), 2),
        (raising(KeyboardInterrupt()), 130),
        (raising(command.Stopped(signal.SIGINT)), 130),
        (raising(command.Stopped(signal.SIGTERM)), 143),
    ],
)
def test_exit_codes(work, code, capsys):
    assert command.exit_code(work) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if code == 2:
        assert said in ("one line\nanother\n", "/root/runs: Permission denied\n", "disk: No space left on device\n")


def test_an_unexpected_error_is_not_hidden():
    with pytest.raises(FileNotFoundError):
        command.exit_code(raising(FileNotFoundError(errno.ENOENT, "No such file", "a bug of ours")))


def test_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command.exit_code(lambda: None) == 2
    assert "one GPU in one process" in capsys.readouterr().err


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1,0", "1"), ("", "")])
def test_one_gpu_is_seen(monkeypatch, before, after):
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    command.exit_code(lambda: None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after


def test_out_of_memory_anywhere_is_one_line(capsys):
    assert command.exit_code(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))) == 2
    assert capsys.readouterr().err.startswith("out of GPU memory (CUDA out of memory). Try nf4")
    with pytest.raises(RuntimeError):
        command.exit_code(raising(RuntimeError("a bug of ours")))


def test_a_stop_request_is_patient_once():
    stop = command.StopRequest()
    with pytest.raises(command.Stopped):
        stop(signal.SIGINT, None)
    stop = command.StopRequest()
    stop.patient = True
    stop(signal.SIGTERM, None)
    assert stop.number == signal.SIGTERM
    with pytest.raises(command.Stopped):
        stop(signal.SIGTERM, None)
