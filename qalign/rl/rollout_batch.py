"""Sampled answers, and the tensors that one iteration of PPO or GRPO computes for their tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qalign.data.formats import Prompt
from qalign.data.store.sequences import TokenAnswers
from qalign.losses import policy_gradient as losses
from qalign.reports import alarms

Indices = tuple[Tensor, Tensor]  # (row, column) of tokens in the tensors of a rollout


@dataclass(frozen=True)
class SampledAnswers:
    """One prompt with the answers that were sampled for it."""

    prompt: Prompt
    tokens: TokenAnswers  # an answer includes the stop token that ended it
    texts: tuple[str, ...]  # the answers without special tokens
    ended: tuple[bool, ...]  # True: ended with a stop token; False: cut at `max_new_tokens`
    # Log-probs of the answers' tokens by the engine that sampled them; none where that is the base in memory.
    sampler_logps: tuple[list[float], ...] = ()


@dataclass
class RolloutBatch:
    """The answers of one iteration. Tensors are float32 `(answers, tokens)` on the CPU, in the order of `rows`, and 0
    outside the mask."""

    rows: list[SampledAnswers]
    mask: Tensor  # bool, True on the tokens of the answers
    old_logps: Tensor  # of the policy that sampled, from the training forward pass
    reference_logps: Tensor
    values: Tensor  # the value model's estimate before each token
    returns: Tensor  # what it learns, computed by `PPOTrainer.advantages`
    entropies: Tensor  # in nats, of the distribution that each token was sampled from
    used: list[int]  # the numbers of the prompts that the update uses
    sampler_logps: Tensor | None  # of another engine that sampled
    correction: Tensor  # weight of each token in the policy's loss, see `correct`
    scores: Tensor = field(init=False)  # `(answers,)`, the combined reward before any scaling
    advantages: Tensor = field(init=False)  # computed by `PPOTrainer.advantages`

    @classmethod
    def empty(cls, rows: list[SampledAnswers]) -> "RolloutBatch":
        """The mask of these answers, with every other tensor still 0."""
        lengths = torch.tensor([len(answer) for row in rows for answer in row.tokens.answers])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        names = ("old_logps", "reference_logps", "values", "returns", "entropies")
        zeros = {name: torch.zeros(mask.shape) for name in names}
        sampler = [logp for row in rows for logps in row.sampler_logps for logp in logps]
        logps = torch.zeros(mask.shape).masked_scatter(mask, torch.tensor(sampler)) if sampler else None
        return cls(rows, mask, used=[*range(len(rows))], sampler_logps=logps, correction=mask.float(), **zeros)

    def correct(self, cap: float | None) -> dict[str, float]:
        """Sets `correction` to the truncated ratios of the policy to the engine that sampled, if that is another one,
        with `cap`; they stay 1 if it is None. Returns how far apart the two are, in nats and by TRL's names."""
        if self.sampler_logps is None:
            return {}
        apart = (self.old_logps - self.sampler_logps)[self.mask]
        if cap is not None:
            self.correction = losses.truncated_ratio(self.old_logps, self.sampler_logps, cap) * self.mask
        ratios = self.correction[self.mask]
        return {
            "sampling/kl": losses.kl_k3(self.sampler_logps, self.old_logps)[self.mask].mean().item(),
            "sampling/sampling_logp_difference/mean": apart.abs().mean().item(),
            "sampling/sampling_logp_difference/max": apart.abs().max().item(),
            "sampling/importance_sampling_ratio/min": ratios.min().item(),
            "sampling/importance_sampling_ratio/mean": ratios.mean().item(),
            "sampling/importance_sampling_ratio/max": ratios.max().item(),
        }

    @property
    def kl(self) -> Tensor:
        """log pi - log pi_ref of each whole answer, in nats: `(answers,)`."""
        return (losses.log_ratio(self.old_logps, self.reference_logps) * self.mask).sum(dim=1)

    @property
    def tokens(self) -> int:
        """Number of sampled tokens."""
        return int(self.mask.sum())

    @property
    def num_samples(self) -> int:
        return len(self.rows[0].texts)

    @property
    def ended(self) -> Tensor:
        """Whether each answer ended with a stop token: bool `(answers,)`."""
        return torch.tensor([ended for row in self.rows for ended in row.ended])

    def figures(self) -> dict[str, float]:
        """Metrics of the log-probs, by TRL's names."""
        k3 = losses.kl_k3(self.old_logps, self.reference_logps)
        return {
            "objective/kl": self.kl.mean().item(),
            "objective/kl_k3": (k3 * self.mask).sum(dim=1).mean().item(),
            "objective/entropy": (self.entropies * self.mask).sum(dim=1).mean().item(),
            "policy/entropy_avg": (self.entropies.sum() / self.tokens).item(),
        }

    def point(
        self, step: int, proxy: Tensor, judge: Tensor | None, *, clipped: float = 0.0, spread: float | None = None
    ) -> alarms.EvalPoint:
        """The figures of an evaluation.

        Args:
            step: number of the iteration or round.
            proxy, judge: scores `(prompts, num_samples)` of the reward, and of the judge if there is one.
        """
        texts = [text for row in self.rows for text in row.texts]
        return alarms.EvalPoint(
            step=step,
            answers=len(texts),
            kl_nats=self.kl.mean().item(),
            proxy=proxy.mean().item(),
            proxy_std=proxy.std(correction=0).item(),
            judge=None if judge is None else judge.mean().item(),
            judge_std=None if judge is None else judge.std(correction=0).item(),
            length=self.tokens / len(texts),
            ended=self.ended.float().mean().item(),
            distinct=alarms.distinct_n(texts),
            repeated=alarms.repeated_lines(texts),
            entropy=(self.entropies.sum() / self.tokens).item(),
            clipped=clipped,
            spread=spread,
        )

    def samples(self, proxy: Tensor, judge: Tensor | None) -> list[dict[str, Any]]:
        """The first answer to each prompt with its scores, as rows of `samples/`."""
        return [
            {"prompt": list(row.prompt.turns), "completion": row.texts[0], "reward": proxy[number].item()}
            | ({} if judge is None else {"judge": judge[number].item()})
            | {"ended": row.ended[0], "where": row.prompt.where}
            for number, row in enumerate(self.rows)
        ]

    def token_indices(self, numbers: Sequence[int]) -> Indices:
        """The answer tokens of some prompts, in the order of `AnswerBatch.targets`."""
        samples = range(self.num_samples)
        answers = torch.tensor([n * self.num_samples + k for n in numbers for k in samples], dtype=torch.int64)
        row, column = self.mask[answers].nonzero(as_tuple=True)
        return answers[row], column

    def fill(self, numbers: Sequence[int], found: dict[str, Tensor]) -> None:
        """Sets tensors by name for the answer tokens of some prompts, in their order."""
        where = self.token_indices(numbers)
        for name, values in found.items():
            getattr(self, name)[where] = values

    def mini_batches(self, count: int, seed: int) -> list[list[int]]:
        """The numbers of the prompts in use, shuffled, in so many mini-batches."""
        used = {*self.used}
        order = [number for number in shuffled(len(self.rows), seed) if number in used]
        size = max(1, math.ceil(len(order) / count))
        return [order[start : start + size] for start in range(0, len(order), size)]


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name of several micro-batches as one, each copied from its device once."""
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in (parts[0] if parts else ())}


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers from 0 to `count` - 1 in an order that depends on the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
