"""One thread owns the model: what it hands over, and when it stops."""

import threading
import time

import pytest

from qalign.page import worker
from qalign.page.worker import Worker


def test_everything_is_made_in_one_thread():
    ours, seen = Worker(), set()

    def pieces():
        for number in range(3):
            seen.add(threading.get_ident())
            yield number

    assert list(ours.stream("a", pieces)) == [0, 1, 2]
    assert ours.run(threading.get_ident) in seen
    assert len(seen) == 1
    assert threading.get_ident() not in seen


def test_what_goes_wrong_in_the_thread_is_raised_to_the_taker_after_what_came_before():
    def pieces():
        yield 1
        raise ValueError("no")

    ours, got = Worker(), []
    with pytest.raises(ValueError, match="no"):
        got.extend(ours.stream("a", pieces))
    assert got == [1]
    assert ours.run(lambda: 5) == 5  # it serves on


def endless(closed: threading.Event):
    try:
        while True:
            yield time.monotonic()
    finally:
        closed.set()


def test_a_taker_who_just_disappears_counts_as_gone_after_a_while(monkeypatch):
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.2)
    ours, closed = Worker(), threading.Event()
    abandoned = ours.stream("a", lambda: endless(closed))
    next(abandoned)
    assert closed.wait(5)  # nobody closed it, nobody takes anything
    assert ours.run(lambda: 5) == 5


@pytest.mark.parametrize("end", ["close", "stop", "ask again"])
def test_a_stream_can_be_ended(end):
    ours, closed = Worker(), threading.Event()
    running = ours.stream("a", lambda: endless(closed))
    next(running)
    if end == "close":
        running.close()
    elif end == "stop":
        ours.stop("a")
        list(running)
    else:
        second = ours.stream("a", lambda: (number for number in [7]))
        assert list(second) == [7]
    assert closed.wait(5)
    ours.stop("nobody")


def test_who_leaves_before_their_turn_costs_nothing():
    ours, go, begun = Worker(), threading.Event(), []
    blocking = threading.Thread(target=ours.run, args=(lambda: go.wait(5),))
    blocking.start()

    def pieces():
        begun.append(1)
        yield 1

    waiting = ours.stream("late", pieces)
    taker = threading.Thread(target=lambda: list(waiting))
    taker.start()
    time.sleep(0.1)
    ours.stop("late")
    go.set()
    taker.join(5)
    blocking.join(5)
    assert not begun
