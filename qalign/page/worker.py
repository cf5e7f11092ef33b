"""One thread that owns the model and hands over its results one by one.

PyTorch's autocast and no-grad modes belong to a thread, and the base plays one role at a time. So all work on the model
is queued here.
"""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from queue import Empty, Full, Queue
from threading import Event, Lock
from typing import TypeVar

READER_TIMEOUT_SECONDS = 5.0  # a reader that takes nothing for longer than this has left
QUEUE_SIZE = 8  # items that may wait for their reader

T = TypeVar("T")


class Worker:
    """Runs jobs one after the other, in the order in which they came."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._running: dict[str, Event] = {}
        self._lock = Lock()

    def run(self, work: Callable[[], T]) -> T:
        """Returns the result of `work()`, or raises its exception here."""
        return self._thread.submit(work).result()

    def stream(self, key: str, generate: Callable[[], Generator[T]]) -> Iterator[T]:
        """Yields the items of `generate()`, which runs in the worker's thread; its exceptions are raised here.

        It ends early after `stop(key)`, when this iterator is closed, or when nobody takes an item for a while because
        the client has left.

        Args:
            key: the visitor; an older stream of the same key is stopped.
        """
        items: Queue[T] = Queue(QUEUE_SIZE)
        stop = Event()
        with self._lock:
            if older := self._running.get(key):
                older.set()
            self._running[key] = stop
        job = self._thread.submit(_fill, items, generate, stop)
        try:
            while not (job.done() and items.empty()):
                try:
                    yield items.get(timeout=0.05)
                except Empty:
                    continue
            job.result()
        finally:
            stop.set()
            with self._lock:
                if self._running.get(key) is stop:
                    del self._running[key]

    def stop(self, key: str) -> None:
        """Ends the stream of a key after its current item; does nothing if there is none."""
        with self._lock:
            if running := self._running.get(key):
                running.set()


def _fill(items: Queue[T], generate: Callable[[], Generator[T]], stop: Event) -> None:
    if stop.is_set():  # the reader left before its turn came
        return
    with closing(generate()) as generated:
        for item in generated:
            try:
                items.put(item, timeout=READER_TIMEOUT_SECONDS)
            except Full:
                return
            if stop.is_set():
                return
