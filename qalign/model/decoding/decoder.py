"""What sampling keeps on a base: copies of adapters, and caches whose steps are captured where a trial shows that this
serves."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from traceback import format_exc
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel

from qalign.model.base import Base, Role
from qalign.model.decoding.adapters import HeldAdapters
from qalign.model.decoding.graphs import Steps, in_a_line
from qalign.model.decoding.rows import GrowingRows, StaticRows, column_bucket, prompt_inputs, row_bucket
from qalign.model.decoding.static import StaticCache, UnservedError
from qalign.model.memory.forecast import free_memory
from qalign.model.memory.stream import stream_of

DEVICES = ("cuda",)  # where caches are static: without graphs they only cost masked columns
KEPT_SHARE = 0.05  # of the free memory; what is more is freed when sampling ends, as training will want it
_ERRORS = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)

Rows = GrowingRows | StaticRows


class Decoder:
    """What sampling keeps on one base from call to call.

    Attributes:
        adapters: the adapters of the roles that are sampled from.
        reason: why caches grow and no step is captured, in words; None if steps are captured, or none was tried yet.
        traceback: of what was raised when it was tried, as text.
        graphs: the number of steps that were captured so far.
    """

    def __init__(self):
        self.adapters = HeldAdapters()
        self.reason: str | None = None
        self.traceback = ""
        self.graphs = 0
        self._tried = False
        self._idle: list[Steps] = []
        self._sessions = 0

    @contextmanager
    def session(self, base: Base, roles: Iterable[str]) -> Iterator[None]:
        """Holds the adapters of these roles as they are now. What is kept when the outermost session ends is little of
        the memory."""
        self._sessions += 1
        try:
            if self.adapters.hold(base, roles):
                self._idle.clear()
            yield
        except Exception:
            self.free()  # numbers that aren't finite may be in the caches
            raise
        finally:
            self._sessions -= 1
            if not self._sessions and not 0 < self._kept_bytes <= KEPT_SHARE * free_memory(base.lm.device.type):
                self.free()

    @property
    def _kept_bytes(self) -> int:
        caches = sum(steps.cache.bytes + steps.graph_bytes for steps in self._idle)
        return caches and caches + self.adapters.bytes

    def free(self) -> None:
        """Frees the copies, the caches and the graphs."""
        self._idle.clear()
        self.adapters.drop()

    def rows_within(self, memory: float, base: Base, tokens: int) -> int:
        """How many rows of `tokens` tokens can be cached in `memory` bytes; at least 1."""
        if not self.is_static(base):
            return max(1, int(memory) // base.row_cache.bytes(tokens))
        rows = max(1, int(memory) // base.row_cache.bytes(column_bucket(tokens), windows=False))
        return rows if row_bucket(rows) == rows else rows // 8 * 8 or 1 << (rows.bit_length() - 1)

    @contextmanager
    def rows(
        self, base: Base, inputs: dict[str, Any], prompts: list[int], roles: Sequence[str], new_tokens: int
    ) -> Iterator[Rows]:
        """The rows of a batch whose prompts have been read, each of which may get `new_tokens`; the other arguments
        are those of `GrowingRows`."""
        steps, columns = None, column_bucket(inputs["input_ids"].shape[1] + new_tokens)
        if self.is_static(base):
            steps = self._take(base.lm, inputs["past_key_values"], row_bucket(len(roles)), columns)
        if steps is None:
            yield GrowingRows(base.lm, self.adapters, inputs, prompts, roles)
            return
        before = steps.captured
        try:
            yield StaticRows(steps, inputs, prompts, roles, columns)
        finally:
            self.graphs += steps.captured - before
            self._idle.append(steps)
            if steps.reason:
                self._give_up(steps.reason, steps.traceback)

    def _take(self, lm: PreTrainedModel, cache: DynamicCache, rows: int, columns: int) -> Steps | None:
        """Steps on an idle cache that is large enough, or on a new one; None if memory is short."""
        for steps in self._idle:
            if steps.cache.rows >= rows and steps.cache.columns >= columns:
                self._idle.remove(steps)
                return steps
        self._idle.clear()
        try:
            return Steps(lm, self.adapters, StaticCache(cache, rows, columns, lm.device))
        except torch.OutOfMemoryError:
            return None

    def is_static(self, base: Base) -> bool:
        """Whether rows of this base have a static cache, found by running some once. Layers that are streamed are
        copied by the host, which a graph can't wait for."""
        if base.lm.device.type not in DEVICES or stream_of(base.lm):
            return False
        if not self._tried:
            self._tried = True
            try:
                with torch.no_grad(), base.acting_as(Role.BASE):
                    self._trial(base)
            except UnservedError as error:
                self._give_up(str(error))
            except _ERRORS as error:
                self._give_up(in_a_line(error), format_exc())
        return self.reason is None

    def _trial(self, base: Base) -> None:
        """Decodes some rows in both ways; an `UnservedError` if a static cache doesn't serve."""
        if base.row_cache.name != "past_key_values":
            raise UnservedError("the cache isn't one of keys and values")
        lm, words = base.lm, base.lm.config.get_text_config().vocab_size - 1
        ids = [number * words // 30 for number in range(1, 31)]  # from 1: the first may be the padding
        tokens, prompts, roles = torch.tensor(ids[18:]).view(4, 3).to(lm.device), [0, 1, 1], 3 * [Role.BASE]

        def read() -> dict[str, Any]:
            inputs = prompt_inputs(lm, [ids[:11], ids[11:18]], base.tokenizer.pad_token_id)
            lm(**inputs)
            return inputs

        growing, inputs = GrowingRows(lm, self.adapters, read(), prompts, roles), read()
        cache = StaticCache(inputs["past_key_values"], row_bucket(3), column_bucket(16), lm.device)
        steps = Steps(lm, self.adapters, cache)
        static = StaticRows(steps, inputs, prompts, roles, cache.columns)
        found = [[rows.step(each).float().clone() for each in tokens] for rows in (growing, static)]
        if steps.reason:
            self.traceback = steps.traceback
            raise UnservedError(steps.reason)
        # Another order of sums moves logits by up to 3% in 16 bits.
        most = 1e-3 if torch.finfo(base.dtype).eps < 1e-4 else 0.1
        if not all((one - other).norm() <= most * one.norm() for one, other in zip(*found, strict=True)):
            raise UnservedError("a static cache gives other logits")

    def _give_up(self, reason: str, traceback: str = "") -> None:
        if self.reason is None:
            print(f"sampling runs without CUDA graphs: {reason}", file=sys.stderr)
        self.reason, self.traceback = reason, traceback or self.traceback
        self._idle.clear()


_DECODERS: WeakKeyDictionary[Base, Decoder] = WeakKeyDictionary()


def decoder_of(base: Base) -> Decoder:
    """The decoder of a base."""
    return _DECODERS.setdefault(base, Decoder())
