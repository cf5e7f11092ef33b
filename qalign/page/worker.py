"""One thread that owns the model, and visitors who take turns at it.

PyTorch's autocast and no-grad modes belong to a thread, and the base plays one role at a time. So all work on the model
is queued here, one job after the other. The next job is that of the address that was served longest ago, and an answer
that nobody listens to isn't computed.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from queue import Empty, Full, Queue
from threading import Event, Lock
from typing import Any, TypeVar

READER_TIMEOUT_SECONDS = 5.0  # a reader that takes nothing for longer than this has left
LISTENER_TIMEOUT_SECONDS = 3.0  # a visitor whose browser has held no connection for longer than this has left
QUEUE_SIZE = 8  # items that may wait for their reader
MAX_CONNECTIONS = 12  # of one address on which answers arrive; a browser opens at most six of all kinds
REMEMBERED = 1000  # addresses whose last turn is remembered

T = TypeVar("T")


class Listeners:
    """Which visitors hold a connection on which answers arrive, and from which address."""

    def __init__(self) -> None:
        self._open: dict[str, Counter[str]] = {}
        self._lock = Lock()

    @contextmanager
    def listening(self, key: str, address: str) -> Generator[None]:
        """The visitor listens while this context is open; several may be open at once."""
        with self._lock:
            self._open.setdefault(key, Counter())[address] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[key] -= Counter([address])
                if not self._open[key]:
                    del self._open[key]

    def full(self, address: str) -> bool:
        """Whether an address holds as many connections as it may."""
        with self._lock:
            return sum(addresses[address] for addresses in self._open.values()) >= MAX_CONNECTIONS

    def address(self, key: str) -> str | None:
        """The address from which a visitor listens; None if nobody does."""
        with self._lock:
            return next(iter(self._open.get(key, ())), None)


@dataclass
class _Job:
    """Work for the thread. `key` is the visitor; without one it is the page's own work."""

    work: Callable[["_Job"], Any]
    key: str = ""
    stop: Event = field(default_factory=Event)
    done: Future = field(default_factory=Future)
    heard: float = field(default_factory=time.monotonic)  # when somebody last listened

    def run(self) -> None:
        try:
            self.done.set_result(self.work(self))
        except BaseException as error:
            self.done.set_exception(error)


class Worker:
    """Runs jobs one after the other. Without `listeners`, every visitor counts as listening."""

    def __init__(self, listeners: Listeners | None = None):
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._listeners = listeners
        self._running: dict[str, Event] = {}
        self._waiting: list[_Job] = []
        self._turns: OrderedDict[str, float] = OrderedDict()  # of each address: when its last turn began
        self._lock = Lock()

    def run(self, work: Callable[[], T]) -> T:
        """Returns the result of `work()`, or raises its exception here."""
        return self._submit(_Job(lambda _: work())).result()

    def stream(self, key: str, generate: Callable[[], Generator[T]]) -> Iterator[T]:
        """Yields the items of `generate()`, which runs in the worker's thread; its exceptions are raised here.

        It ends early after `stop(key)`, when this iterator is closed, or when the client has left: nobody listens, or
        nobody takes an item for a while.

        Args:
            key: the visitor; an older stream of the same key is stopped.
        """
        items: Queue[T] = Queue(QUEUE_SIZE)
        job = _Job(lambda job: self._fill(items, generate, job), key)
        with self._lock:
            if older := self._running.get(key):
                older.set()
            self._running[key] = job.stop
        self._submit(job)
        try:
            while not (job.done.done() and items.empty()):
                try:
                    yield items.get(timeout=0.05)
                except Empty:
                    continue
            job.done.result()
        finally:
            job.stop.set()
            with self._lock:
                if self._running.get(key) is job.stop:
                    del self._running[key]

    def stop(self, key: str) -> None:
        """Ends the stream of a key after its current item; does nothing if there is none."""
        with self._lock:
            if running := self._running.get(key):
                running.set()

    def _submit(self, job: _Job) -> Future:
        with self._lock:
            self._waiting.append(job)
        self._thread.submit(self._serve_next)  # once for each job, in whatever order they are served
        return job.done

    def _serve_next(self) -> None:
        while (job := self._next()) is None:
            time.sleep(0.02)  # those who wait have just asked, and their browsers are about to listen
        job.run()

    def _next(self) -> _Job | None:
        """Takes the next job; None if there are only visitors who don't listen yet."""
        with self._lock:
            for job in self._waiting:
                if job.stop.is_set() or self._has_left(job):  # it ends at once
                    self._waiting.remove(job)
                    return job
            ready = [(address, job) for job in self._waiting if (address := self._who(job)) is not None]
            if not ready:
                return None
            address, job = min(ready, key=lambda pair: self._turns.get(pair[0], 0.0))  # the first of equals came first
            self._waiting.remove(job)
            self._turns[address] = time.monotonic()
            self._turns.move_to_end(address)
            if len(self._turns) > REMEMBERED:
                self._turns.popitem(last=False)
            return job

    def _who(self, job: _Job) -> str | None:
        """The address that a job is for, or the visitor if addresses aren't known; None if nobody listens."""
        return self._listeners.address(job.key) if self._listeners and job.key else job.key

    def _has_left(self, job: _Job) -> bool:
        if self._who(job) is not None:
            job.heard = time.monotonic()
        return time.monotonic() - job.heard > LISTENER_TIMEOUT_SECONDS

    def _fill(self, items: Queue[T], generate: Callable[[], Generator[T]], job: _Job) -> None:
        if job.stop.is_set() or self._has_left(job):  # before its turn came
            return
        with closing(generate()) as generated:
            for item in generated:
                try:
                    items.put(item, timeout=READER_TIMEOUT_SECONDS)
                except Full:
                    return
                if job.stop.is_set() or self._has_left(job):
                    return
