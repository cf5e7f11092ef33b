"""One thread that owns the model, and hands over what it makes piece by piece.

PyTorch's autocast and no-grad belong to a thread, and a base plays one part at a time: whoever wants something of the
model asks here, and waits for its turn.
"""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from queue import Empty, Full, Queue
from threading import Event, Lock

PATIENCE_SECONDS = 5.0  # that a piece may wait to be taken before its taker counts as gone
AHEAD = 8  # pieces that may wait


class Worker:
    """Runs one job after the other, in the order in which they came."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._running: dict[str, Event] = {}
        self._lock = Lock()

    def run(self, work: Callable):
        """The result of `work()`; what it raises is raised here."""
        return self._thread.submit(work).result()

    def stream(self, key: str, pieces: Callable[[], Generator]) -> Iterator:
        """What `pieces()` yields, as it comes, made in the worker's thread.

        It is cut short by `stop(key)`, when this iterator is closed, or when nobody takes a piece for a while (a client
        that left). What it raises is raised here.

        Args:
            key: whose it is; an older stream of the same key is stopped.
        """
        handed, stop = Queue(AHEAD), Event()
        with self._lock:
            if older := self._running.get(key):
                older.set()
            self._running[key] = stop
        job = self._thread.submit(_hand_over, pieces, handed, stop)
        try:
            while not (job.done() and handed.empty()):
                try:
                    yield handed.get(timeout=0.05)
                except Empty:
                    continue
            job.result()
        finally:
            stop.set()
            with self._lock:
                if self._running.get(key) is stop:
                    del self._running[key]

    def stop(self, key: str) -> None:
        """Ends the stream of a key after the piece that it is at; nothing if there is none."""
        with self._lock:
            if running := self._running.get(key):
                running.set()


def _hand_over(pieces: Callable[[], Generator], handed: Queue, stop: Event) -> None:
    if stop.is_set():  # its taker left before its turn came
        return
    with closing(pieces()) as made:
        for piece in made:
            try:
                handed.put(piece, timeout=PATIENCE_SECONDS)
            except Full:
                return
            if stop.is_set():
                return
