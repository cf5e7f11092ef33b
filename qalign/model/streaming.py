"""Answers of several roles at once, token by token.

Sides whose adapters PEFT can mix in one batch are decoded together: a 4-bit base spends a step on unpacking its
weights, so two sides take little longer than one. Others (DoRA) take turns of a few tokens, as a change of role takes
a while.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import shuffle

import peft
import torch
from torch import Tensor
from transformers import DynamicCache

from qalign.errors import UserError
from qalign.model.base import Base

GREEDY_BELOW = 1e-3  # a temperature that no two tokens share a draw at, and that logits can still be divided by
TURN_TOKENS = 8  # of one batch before the next has its turn: a switch costs a third of a token on SmolLM2


@dataclass(frozen=True)
class Line:
    """An answer to be drawn.

    Attributes:
        role: who gives it: a `Role`, or an adapter of the base's.
        prompt_ids: generation prompt included.
        seed: fixes what is drawn, whatever else is decoded beside it.
    """

    role: str
    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: where an answer is cut at the latest.
        temperature: 0, or next to it, takes the likeliest token each time.
        top_p: draws among the likeliest tokens that have this probability together (Holtzman et al. 2020,
            arXiv:1904.09751); 1 is all of them.
        ends: ids that end an answer; they belong to it.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    ends: tuple[int, ...]


def stream(base: Base, lines: Sequence[Line], drawing: Drawing) -> Iterator[list[tuple[int, int]]]:
    """Yields after each step (number of the line, token) of those that got one. A line is over once its token is one of
    `ends`, or the last that it may have.

    The model plays its part while this is suspended: take all of it in one thread, or close it.
    """
    batches = [_Batch(base, numbers, lines, drawing) for numbers in _together(base, lines)]
    while batches:
        for batch in list(batches):
            with torch.no_grad(), base.acting_as(batch.adapter or batch.roles[0]):
                for _ in range(drawing.max_new_tokens if len(batches) == 1 else TURN_TOKENS):
                    yield batch.step()
                    if not batch.numbers:
                        batches.remove(batch)
                        break


def _together(base: Base, lines: Sequence[Line]) -> list[list[int]]:
    """The numbers of the lines, in batches that one forward can serve."""
    roles = {line.role for line in lines}
    if len(roles) == 1 or all(_mixes(base, role) for role in roles):
        return [list(range(len(lines)))]
    batches = [[number for number, line in enumerate(lines) if line.role == role] for role in sorted(roles)]
    shuffle(batches)  # in a blind test, who begins must not tell who it is
    return batches


def _mixes(base: Base, role: str) -> bool:
    """Whether PEFT can run an adapter on some rows of a batch (`adapter_names`)."""
    config = getattr(base.model, "peft_config", {}).get(role)
    return config is None or (isinstance(config, peft.LoraConfig) and not config.use_dora)


class _Batch:
    """Lines that are decoded together: a KV cache, and the last token of each.

    Attributes:
        numbers: of the lines that are not over.
        roles: theirs.
        adapter: one of those that take part, None if none does; PEFT mixes only while its adapters are on.
        mixed: whether there are several roles, now or before some were over.
    """

    def __init__(self, base: Base, numbers: list[int], lines: Sequence[Line], drawing: Drawing):
        self.base, self.numbers, self.drawing = base, numbers, drawing
        self.roles = [lines[number].role for number in numbers]
        self.adapter = next((role for role in self.roles if role in base.adapters), None)
        self.mixed = len(set(self.roles)) > 1
        device = base.lm.device
        self.draws = torch.stack([_draws(lines[number].seed, drawing.max_new_tokens) for number in numbers]).to(device)
        prompts = [lines[number].prompt_ids for number in numbers]
        longest = max(map(len, prompts))
        self.ids = torch.full((len(prompts), longest), base.tokenizer.pad_token_id, device=device)
        self.mask = torch.zeros_like(self.ids)
        for row, prompt in enumerate(prompts):  # on the left, so that all answers begin in the same column
            self.ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            self.mask[row, longest - len(prompt) :] = 1
        self.positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        self.cache, self.drawn = DynamicCache(config=base.lm.config), 0

    def step(self) -> list[tuple[int, int]]:
        """One more token of each line; those that are over leave."""
        tokens = nucleus(self._logits(), self.draws[:, self.drawn], self.drawing)
        found = list(zip(self.numbers, tokens.tolist(), strict=True))
        self.drawn += 1
        is_last = self.drawn == self.drawing.max_new_tokens
        left = [row for row, (_, token) in enumerate(found) if not is_last and token not in self.drawing.ends]
        self.numbers, self.roles = ([kept[row] for row in left] for kept in (self.numbers, self.roles))
        if self.numbers and len(left) < len(found):
            self.cache.batch_select_indices(torch.tensor(left, device=tokens.device))
            self.draws, self.mask, self.positions = (kept[left] for kept in (self.draws, self.mask, self.positions))
            tokens = tokens[left]
        self.ids, self.positions = tokens[:, None], self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return found

    def _logits(self) -> Tensor:
        """`(rows, vocabulary)` after the last token of each row.

        Raises:
            UserError: they are no numbers.
        """
        model, names = self.base.lm, {}
        if self.mixed:
            on = [role if role in self.base.adapters else "__base__" for role in self.roles]
            model, names = self.base.model, {"adapter_names": on}  # PEFT's, which hands each layer the names
        logits = model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **names,
        ).logits[:, -1]
        if not logits.amax(dim=-1).isfinite().all():  # a token that is ruled out may have -inf
            raise UserError(
                f"the model gives no numbers in {self.base.precision}: out of its range, or a broken adapter; another "
                "model.compute_dtype may help"
            )
        return logits


def _draws(seed: int, tokens: int) -> Tensor:
    """The numbers in [0, 1) that decide each token of a line: float64 `(tokens,)`."""
    return torch.rand(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def nucleus(logits: Tensor, draws: Tensor, drawing: Drawing) -> Tensor:
    """The token of each row at which the cumulative probability, likeliest first, exceeds its number: `(rows,)`.

    Args:
        logits: `(rows, vocabulary)`.
        draws: float64 `(rows,)` in [0, 1).
    """
    if drawing.temperature < GREEDY_BELOW:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / drawing.temperature).softmax(dim=-1).double()
    sorted_, order = probabilities.sort(dim=-1, descending=True, stable=True)
    cumulative = sorted_.cumsum(dim=-1)
    kept = (cumulative - sorted_ < drawing.top_p).sum(dim=-1, keepdim=True)  # the likeliest one always is
    mass = cumulative.gather(1, kept - 1)
    place = torch.searchsorted(cumulative, draws[:, None] * mass, right=True)
    return order.gather(1, torch.minimum(place, kept - 1))[:, 0]
