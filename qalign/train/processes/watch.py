"""A thread that tells the other processes that this one lives, and notices when one of them ended."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

BEAT, SILENCE = 1.0, 15.0  # seconds between two signs of life, and without one until a process counts as dead
GRACE = 6.0  # seconds that the main thread has to end by itself; it may wait for a process that is gone


@dataclass(frozen=True)
class Member:
    """One of the processes."""

    rank: int
    host: str
    pid: int

    @classmethod
    def me(cls, rank: int) -> "Member":
        return cls(rank, socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        return f"process {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def is_gone(self) -> bool:
        """Whether this host's system knows that the process has ended. One on another host can't be looked up."""
        if self.host != socket.gethostname():
            return False
        import psutil

        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


class ProcessEnded(BaseException):
    """Another process has ended, and this one must too. Like `KeyboardInterrupt` it is no `Exception`, so that nothing
    swallows it.

    Attributes:
        code: the exit code.
        lines: what to say.
        dead: the rank of a process that ended without a word; None if it said why.
    """

    def __init__(self, code: int, lines: Iterable[str], dead: int | None = None):
        self.code, self.lines, self.dead = code, (*lines,), dead
        super().__init__("\n".join(self.lines))


class Watch:
    """The thread. `store` is a connection of its own to where the processes meet; `end` is called with the reason where
    the main thread doesn't end within `GRACE`, and must end the process.

    Attributes:
        is_stuck: whether the store doesn't answer any more, as its host froze. Whoever asks it waits for ever.
    """

    is_stuck = False

    def __init__(self, store: Any, me: Member, others: Iterable[Member], end: Callable[[ProcessEnded], None]):
        self._store, self._me, self._end = store, me, end
        self._heard = {member: ("", time.monotonic()) for member in others}
        self._found: ProcessEnded | None = None
        self._noticed, self._stopped, self._looked = threading.Event(), threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch of the other processes")
        self._thread.start()
        threading.Thread(target=self._time, daemon=True, name="watch of the store").start()

    def check(self, wait: float = 0.0) -> None:
        """Raises `ProcessEnded` if another process has ended, or is found to have within `wait` seconds."""
        if wait:
            self._noticed.wait(wait)
        if self._found:
            raise self._found

    def stop(self) -> None:
        """From now on the main thread ends by itself."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * BEAT)

    def _run(self) -> None:
        beats = 0
        while not self._stopped.wait(BEAT):
            beats += 1
            try:
                self._store.set(f"beat/{self._me.rank}", str(beats))
                found = self._look()
            except Exception as error:  # the store is gone: with the process, or the launcher, that kept it
                found = self._without_store(error)
            self._looked = time.monotonic()
            if found:
                return self._notice(found)

    def _time(self) -> None:
        """In a thread of its own: `TCPStore.check` has no timeout."""
        while not self._stopped.wait(BEAT):
            if self._found:
                return
            if time.monotonic() - self._looked > SILENCE:
                self.is_stuck, keeper = True, next((member for member in self._heard if member.rank == 0), None)
                broken = ProcessEnded(2, [f"the store where the processes meet didn't answer for {SILENCE:.0f} s"])
                return self._notice(dead(keeper) if keeper else broken)

    def _notice(self, found: ProcessEnded) -> None:
        self._found = found
        self._noticed.set()
        if not self._stopped.wait(GRACE):
            self._end(found)

    def _look(self) -> ProcessEnded | None:
        for member in [*self._heard]:
            beat = self._store.get(key).decode() if self._store.check([key := f"beat/{member.rank}"]) else ""
            if beat != self._heard[member][0]:
                self._heard[member] = beat, time.monotonic()
            is_silent = member.is_gone or time.monotonic() - self._heard[member][1] > SILENCE
            # Only now: it may have ended in between.
            if self._store.check([f"left/{member.rank}"]):
                del self._heard[member]
            elif self._store.check([key := f"end/{member.rank}"]):
                return read_end(self._store.get(key))
            elif is_silent:
                return dead(member)
        return None

    def _without_store(self, error: Exception) -> ProcessEnded:
        first = next((member for member in self._heard if member.rank == 0), None)
        if first and (first.is_gone or first.host != self._me.host):
            return dead(first)
        if gone := next((member for member in self._heard if member.is_gone), None):
            return dead(gone)
        return ProcessEnded(2, [f"the connection to the other processes broke ({' '.join(str(error).split())[:100]})"])


def dead(member: Member) -> ProcessEnded:
    """The reason for all others to end when a process has ended without a word."""
    return ProcessEnded(2, [f"{member} ended without saying why, as if it was killed"], member.rank)


def write_end(end: ProcessEnded) -> str:
    """The reason as text, for the store."""
    return json.dumps([end.code, end.lines, end.dead])


def read_end(text: bytes) -> ProcessEnded:
    """What `write_end` wrote."""
    with suppress(ValueError, TypeError):
        return ProcessEnded(*json.loads(text))
    return ProcessEnded(2, ["another process ended"])
