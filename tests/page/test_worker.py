"""One thread owns the model: what it hands over, and when it stops."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qalign.page import worker
from qalign.page.worker import Worker


def test_everything_runs_in_one_thread():
    ours, seen = Worker(), set()

    def generate():
        for number in range(3):
            seen.add(threading.get_ident())
            yield number

    assert list(ours.stream("a", generate)) == [0, 1, 2]
    assert seen == {ours.run(threading.get_ident)}
    assert threading.get_ident() not in seen


def test_an_exception_reaches_the_reader_after_the_items_before_it():
    def generate():
        yield 1
        raise ValueError("no")

    ours, got = Worker(), []
    with pytest.raises(ValueError, match="no"):
        got.extend(ours.stream("a", generate))
    assert got == [1]
    assert ours.run(lambda: 5) == 5  # the worker goes on


@pytest.mark.parametrize("end", ["close", "stop", "ask again", "disappear"])
def test_a_stream_ends_early(end, monkeypatch):
    monkeypatch.setattr(worker, "READER_TIMEOUT_SECONDS", 0.2 if end == "disappear" else 30)
    ours, closed = Worker(), threading.Event()

    def endless():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    running = ours.stream("a", endless)
    next(running)
    if end == "close":
        running.close()
    elif end == "stop":
        ours.stop("a")
        list(running)
    elif end == "ask again":
        assert list(ours.stream("a", lambda: (number for number in [7]))) == [7]
    assert closed.wait(5)
    assert ours.run(lambda: 5) == 5
    ours.stop("nobody")


def test_a_reader_that_leaves_before_its_turn_costs_nothing():
    ours, begun, go = Worker(), threading.Event(), threading.Event()
    with ThreadPoolExecutor() as readers:
        readers.submit(ours.run, lambda: begun.set() or go.wait(5))
        assert begun.wait(5)
        waiting = readers.submit(list, ours.stream("late", lambda: pytest.fail("it began")))
        time.sleep(0.1)
        ours.stop("late")
        go.set()
        assert waiting.result(5) == []
