"""One thread owns the model: what it hands over, and when it stops."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from qalign.page import worker
from qalign.page.worker import MAX_CONNECTIONS, Listeners, Worker


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


class Busy:
    """A worker whose thread is held until `go` is set, and what was computed in which order."""

    def __init__(self, listeners=None):
        self.worker, self.go, self.order = Worker(listeners), threading.Event(), []
        self.readers = ThreadPoolExecutor(40)
        begun = threading.Event()
        self.readers.submit(self.worker.run, lambda: begun.set() or self.go.wait(20))
        assert begun.wait(5)

    def ask(self, key: str):
        def generate():
            self.order.append(key)
            yield key

        waiting = len(self.worker._waiting)
        asked = self.readers.submit(list, self.worker.stream(key, generate))
        while len(self.worker._waiting) == waiting:
            time.sleep(0.001)
        return asked


def test_each_address_has_its_turn():
    listeners = Listeners()
    busy = Busy(listeners)
    with ExitStack() as stack:
        for key in ("a1", "a2", "a3", "a4", "b1", "c1"):
            stack.enter_context(listeners.listening(key, key[0]))
        asked = [busy.ask(key) for key in ("a1", "a2", "a3", "a4", "b1", "c1")]
        busy.go.set()
        assert [answer.result(5) for answer in asked] == [["a1"], ["a2"], ["a3"], ["a4"], ["b1"], ["c1"]]
    assert busy.order == ["a1", "b1", "c1", "a2", "a3", "a4"]


def test_answers_that_nobody_listens_to_are_not_computed_and_hold_up_nobody():
    listeners = Listeners()
    busy = Busy(listeners)
    unheard = [busy.ask(f"unheard {number}") for number in range(20)]
    with listeners.listening("heard", "b"):
        heard = busy.ask("heard")
        busy.go.set()
        assert heard.result(2) == ["heard"]  # before the others are given up
        assert [answer.result(10) for answer in unheard] == [[]] * 20
    assert busy.order == ["heard"]


def test_who_listens_a_little_later_is_answered():
    listeners = Listeners()
    busy = Busy(listeners)
    asked = busy.ask("late")
    busy.go.set()
    time.sleep(0.2)
    with listeners.listening("late", "a"):
        assert asked.result(5) == ["late"]


def test_an_answer_stops_once_nobody_listens(monkeypatch):
    monkeypatch.setattr(worker, "LISTENER_TIMEOUT_SECONDS", 0.1)
    listeners, closed = Listeners(), threading.Event()

    def endless():
        try:
            while True:
                time.sleep(0.005)
                yield 1
        finally:
            closed.set()

    running = Worker(listeners).stream("a", endless)
    with listeners.listening("a", "x"):
        for _ in range(100):  # half a second
            next(running)
        assert not closed.is_set()
    list(running)
    assert closed.is_set()


def test_an_address_holds_a_bounded_number_of_connections():
    listeners = Listeners()
    with ExitStack() as stack:
        for number in range(MAX_CONNECTIONS):
            assert not listeners.full("x")
            stack.enter_context(listeners.listening(str(number % 3), "x"))
        assert listeners.full("x")
        assert not listeners.full("y")
    assert not listeners.full("x")
    assert not listeners._open
