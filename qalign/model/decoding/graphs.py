"""Decoding steps on a static cache: on CUDA captured as graphs and replayed, because launching the kernels one by one
takes four fifths of a step's time."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import format_exc
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qalign.model.decoding.adapters import HeldAdapters, Spans
from qalign.model.decoding.static import StaticCache

_SYNC = "synchronizing CUDA operation"  # PyTorch's words for waiting for the device


@dataclass
class _Step:
    """A step with a certain number of rows and columns, and the adapters on the rows of `spans`."""

    inputs: dict[str, Any]
    spans: Spans
    graph: Any = None  # a `torch.cuda.CUDAGraph`
    logits: Tensor | None = None  # `(rows, vocabulary)`; a replay writes them here
    warm: bool = False
    waits: str = ""  # where the host waited for the device in the first warm-up


class Steps:
    """The steps of a static cache. The first one of a kind is run as it is, which also warms it up; then the kind is
    captured as a CUDA graph, and replayed from then on.

    Attributes:
        cache: what the steps read and write.
        reason: why steps on CUDA are run as they are; None if they are captured.
        traceback: of what went wrong while capturing, as text.
        graph_bytes: memory of the graphs' own pool.
    """

    def __init__(self, lm: PreTrainedModel, adapters: HeldAdapters, cache: StaticCache):
        self._lm, self._adapters, self.cache = lm, adapters, cache
        self.reason: str | None = None
        self.traceback = ""
        self.graph_bytes = 0
        self._kinds: dict[tuple[int, int, Spans], _Step] = {}
        self._on_cuda = lm.device.type == "cuda"
        if self._on_cuda:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    @property
    def captured(self) -> int:
        """The number of graphs."""
        return sum(step.graph is not None for step in self._kinds.values())

    def run(self, rows: int, columns: int, spans: Spans) -> Tensor:
        """The logits of the first rows, `(rows, vocabulary)`, which the next run of the same kind writes over."""
        if (step := self._kinds.get((rows, columns, spans))) is None:
            step = self._kinds[rows, columns, spans] = _Step(self.cache.inputs(rows, columns), spans)
        if self._on_cuda and self.reason is None and step.graph is None:
            if not step.warm:
                return self._warm_up(step)
            self._capture(step)
        if step.graph is None or step.logits is None:
            return self._forward(step)
        step.graph.replay()
        return step.logits

    def _forward(self, step: _Step) -> Tensor:
        cache = self.cache
        step.inputs["attention_mask"].index_fill_(1, cache.column, 1)
        with self._adapters.answering(step.spans):
            logits = self._lm(**step.inputs).logits[:, -1]
        cache.column.add_(1)
        cache.positions.add_(1)
        return logits

    def _warm_up(self, step: _Step) -> Tensor:
        """A step on the stream that captures, as PyTorch asks for. No graph can wait for the device; the first step may
        do so once, to make something that stays."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _waits() as waits:
            logits = self._forward(step)
        current.wait_stream(self._stream)
        step.warm = not waits
        if waits and step.waits:
            self.reason = f"a step waits for the device: {waits[0]}"
        step.waits = "".join(waits[:1])
        return logits

    def _capture(self, step: _Step) -> None:
        current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                before = torch.cuda.memory_reserved()
                logits = self._forward(step)
                self.graph_bytes += torch.cuda.memory_reserved() - before
            step.graph, step.logits = graph, logits
        except RuntimeError as error:  # nothing has run, so the step is run as it is
            torch.cuda.set_stream(current)
            self.traceback, self.reason = format_exc(), in_a_line(error)


def in_a_line(error: Exception) -> str:
    """An error of another library's as a reason."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


@contextmanager
def _waits() -> Iterator[list[str]]:
    """Collects where the host waits for the device."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found += [f"{each.filename}:{each.lineno}" for each in caught if _SYNC in str(each.message)]
