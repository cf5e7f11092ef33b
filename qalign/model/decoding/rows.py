"""The rows of a batch while they are decoded: in a cache that grows, or in one that stays where it is.

Both read a prompt once for all its answers, and let rows leave whose answers are complete.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from qalign.model.decoding.adapters import HeldAdapters, spans_of
from qalign.model.decoding.graphs import Steps
from qalign.model.memory.kv_cache import padded_prompts, uncached_logits

COMPACT_AT = 0.25  # ended rows leave a growing cache once they are this share of it, because leaving copies the cache
COLUMNS = 256  # a static cache has a multiple of it; a new graph is captured each time this many more are needed


def row_bucket(rows: int) -> int:
    """How many rows a step has for so many answers: a power of 2, or from 16 a multiple of 8."""
    return 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 8) * 8


def column_bucket(tokens: int) -> int:
    """How many columns a static cache has for so many tokens."""
    return -(-tokens // COLUMNS) * COLUMNS


def prompt_inputs(
    lm: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, cache: str | None = "past_key_values"
) -> dict[str, Any]:
    """What the model reads first, with a `RowCache`'s name for the cache, if it has one."""
    inputs = padded_prompts([torch.tensor(prompt, device=lm.device) for prompt in prompts], pad_id)
    if cache is None:
        return inputs
    # An index instead of 1, which gives the head a strided slice: 80 times slower in bfloat16 on a CPU.
    last = {"logits_to_keep": inputs["input_ids"].new_tensor([-1])}
    return inputs | last | {cache: DynamicCache(config=lm.config), "use_cache": True}


def last_logits(lm: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Logits after the last tokens of what is read, with a cache or without one: `(rows, vocabulary)`."""
    return lm(**inputs).logits[:, -1] if "use_cache" in inputs else uncached_logits(lm, inputs)


class GrowingRows:
    """Rows whose cache, or whose input if there is none, grows by a column at every step.

    Args:
        inputs: `prompt_inputs` that were read.
        prompts: the number of each row's prompt.
        roles: the role of each row.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        adapters: HeldAdapters,
        inputs: dict[str, Any],
        prompts: list[int],
        roles: Sequence[str],
    ):
        self._lm, self._adapters, self._inputs, self._roles = lm, adapters, inputs, list(roles)
        if prompts != list(range(len(inputs["input_ids"]))):
            self._select(prompts)

    def step(self, tokens: Tensor) -> Tensor:
        """The logits after each row's next token: `(rows, vocabulary)`."""
        inputs = self._inputs
        before = inputs["input_ids"][:, :0] if "use_cache" in inputs else inputs["input_ids"]
        inputs["input_ids"] = torch.cat([before, tokens[:, None]], dim=1)
        inputs["position_ids"] = inputs["position_ids"][:, -1:] + 1
        inputs["attention_mask"] = pad(inputs["attention_mask"], (0, 1), value=1)
        with self._adapters.answering(spans_of(self._roles)):
            return last_logits(self._lm, inputs)

    def keep(self, rows: list[int]) -> bool:
        """Keeps these rows alone, if that is worth it: whether it was."""
        if len(rows) > (1 - COMPACT_AT) * len(self._roles):
            return False
        self._roles = [self._roles[row] for row in rows]
        self._select(rows)
        return True

    def _select(self, rows: list[int]) -> None:
        kept: Any = torch.tensor(rows, device=self._lm.device)
        for cache in (each for each in self._inputs.values() if isinstance(each, DynamicCache)):
            cache.reorder_cache(kept)
        self._inputs |= {name: self._inputs[name][rows] for name in ("input_ids", "attention_mask", "position_ids")}


class StaticRows:
    """Rows in a cache of fixed size, as `GrowingRows`; they take at most `most_columns` of it, so that the shapes of a
    step depend on the batch alone, not on earlier ones. What is missing to a bucket are copies of the last row."""

    def __init__(
        self, steps: Steps, inputs: dict[str, Any], prompts: list[int], roles: Sequence[str], most_columns: int
    ):
        self._steps, self._roles, self._read = steps, list(roles), inputs["input_ids"].shape[1]
        self._columns, self._most_columns = 0, most_columns
        mask, positions = inputs["attention_mask"], inputs["position_ids"]
        steps.cache.fill(inputs.pop("past_key_values"), mask, positions, self._bucket(prompts))

    def step(self, tokens: Tensor) -> Tensor:
        """The logits after each row's next token: `(rows, vocabulary)`, until the next step."""
        cache, rows = self._steps.cache, row_bucket(len(tokens))
        cache.tokens[: len(tokens), 0] = tokens
        cache.tokens[len(tokens) : rows] = tokens[-1]
        self._read += 1
        if self._read > self._columns:  # this bucket and the next one, so that no graph is for a few tokens alone
            self._columns = min(column_bucket(self._read + COLUMNS), self._most_columns)
        return self._steps.run(rows, self._columns, spans_of(self._roles))[: len(tokens)]

    def keep(self, rows: list[int]) -> bool:
        """Keeps these rows alone, if that is worth it: whether it was."""
        if row_bucket(len(rows)) > row_bucket(len(self._roles)) // 2:  # fewer are hardly faster
            return False
        self._roles = [self._roles[row] for row in rows]
        self._steps.cache.keep(self._bucket(rows), self._read)
        return True

    def _bucket(self, rows: list[int]) -> Tensor:
        filled = rows + rows[-1:] * (row_bucket(len(rows)) - len(rows))
        return torch.tensor(filled, device=self._steps.cache.column.device)
