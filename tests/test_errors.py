"""Errors as they are printed: one short line each, and a stop request that is safe inside a signal handler."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from qalign.errors import MAX_LINE, Stopped, StopRequest, UserError, did_you_mean, one_line, short, within
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain: Größe №1, 日本語 🙂 → x", "plain: Größe №1, 日本語 🙂 → x"),
        ("  kept: indentation", "  kept: indentation"),
        ("\x1b]0;pwned\x07\x1b[31mx", r"\x1b]0;pwned\x07\x1b[31mx"),
        ("a\nb\r\nc\td\x0be\x85f\u2028g\xa0h", "a b  c d e f g h"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),  # C1 controls are escapes too
        ("abc\u202edcba \u200b\ufeff", r"abc\u202edcba \u200b\ufeff"),  # turned text, invisible text
        ("half \ud83d", r"half \ud83d"),
    ],
)
def test_what_is_printed_is_one_line_without_control_characters(text, line):
    assert one_line(text) == line
    assert UserError(text).lines == (line,)


@pytest.mark.parametrize("middle", ["x y " * 80, "x y " * 800_000, "\x1b " * 280])
def test_the_middle_of_a_long_line_is_cut_so_that_place_and_fix_stay(middle):
    (line,) = UserError(f"recipe.yaml:3: dpo.beta is '{middle}'; expected a number").lines

    assert len(line) == MAX_LINE
    assert line.startswith("recipe.yaml:3: dpo.beta is '")
    assert line.endswith("'; expected a number")
    assert " … " in line


def test_long_words_are_cut_before_the_sentence_is():
    path = f"/tmp/{'very/' * 30}long/runs/dpo"
    (line,) = UserError(f"{path}: started from an adapter, but {path}/adapter is another now; train it again").lines

    assert line == (
        f"{path}: started from an adapter, "
        "but /tmp/very/very/very/…ery/very/long/runs/dpo/adapter is another now; train it again"
    )


def test_a_line_that_just_fits_is_not_cut():
    assert one_line("x" * 300) == "x" * 300
    assert len(one_line("x y" * 101)) == 300
    assert one_line("x" * 900, None) == "x" * 900


def test_a_value_is_shown_short():
    assert short("tiny") == "'tiny'"
    assert short(["\x1b"]) == r"['\x1b']"
    assert len(short("9" * 5000)) == 80


def test_a_similar_word_is_found_for_a_long_one_too():
    assert did_you_mean("learning_rat", ["learning_rate"]) == "; did you mean 'learning_rate'?"
    assert did_you_mean("x" * 3_000_000, ["learning_rate"]) == ""


def test_work_has_a_time_limit():
    never, broken = threading.Event(), ValueError("no")

    def fail():
        raise broken

    assert within(60, "late", lambda: 7) == 7
    with pytest.raises(ValueError, match="no"):
        within(60, "late", fail)
    try:
        with pytest.raises(UserError, match="late"):
            within(0.01, "late", never.wait)
    finally:
        never.set()


def test_a_stop_request_is_patient_once():
    with pytest.raises(Stopped):
        StopRequest()(signal.SIGINT, None)
    stop = StopRequest()
    stop.patient = True
    stop(signal.SIGTERM, None)
    assert stop.number == signal.SIGTERM
    with pytest.raises(Stopped):
        stop(signal.SIGTERM, None)


def test_a_signal_that_interrupts_a_print_is_heard():
    """Python's streams refuse a second write from a signal handler ("reentrant call"), which would end the run."""
    code = """
import io, os, signal, sys
from qalign.errors import StopRequest
stop = StopRequest(); stop.patient = True
signal.signal(signal.SIGINT, stop)
class Slow(io.RawIOBase):
    writable = lambda self: True
    def write(self, data):
        if stop.number is None: os.kill(os.getpid(), signal.SIGINT)
        return os.write(1, data)
sys.stderr = io.TextIOWrapper(io.BufferedWriter(Slow()))
print("a bar", file=sys.stderr, flush=True)
print(stop.number)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)

    assert (found.returncode, found.stdout) == (0, f"a bar\n{int(signal.SIGINT)}\n"), found.stderr
    assert "stopping after this step" in found.stderr


def test_a_stop_request_without_a_terminal_is_heard(monkeypatch):
    def closed(*_):
        raise OSError("no such file descriptor")

    monkeypatch.setattr(os, "write", closed)
    stop = StopRequest()
    stop.patient = True
    stop(signal.SIGINT, None)
    assert stop.number == signal.SIGINT
