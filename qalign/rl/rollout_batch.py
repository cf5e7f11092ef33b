"""Sampled answers, and the tensors that one PPO iteration computes for their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qalign.data.formats import Prompt
from qalign.data.tokenize import TokenAnswers
from qalign.losses import policy_gradient as losses

Indices = tuple[Tensor, Tensor]  # (row, column) of tokens in the tensors of a rollout


@dataclass(frozen=True)
class SampledAnswers:
    """One prompt with the answers that were sampled for it."""

    prompt: Prompt
    tokens: TokenAnswers  # an answer includes the stop token that ended it
    texts: tuple[str, ...]  # the answers without special tokens
    ended: tuple[bool, ...]  # True: ended with a stop token; False: cut at `max_new_tokens`


@dataclass
class RolloutBatch:
    """The answers of one iteration. Tensors are float32 `(answers, tokens)` on the CPU, in the order of `rows`, and 0
    outside the mask."""

    rows: list[SampledAnswers]
    mask: Tensor  # bool, True on the tokens of the answers
    old_logps: Tensor  # of the policy that sampled, from the training forward pass
    reference_logps: Tensor
    values: Tensor  # the value model's estimate before each token
    entropies: Tensor  # in nats, of the distribution that each token was sampled from
    scores: Tensor = field(init=False)  # `(answers,)`, the combined reward before any scaling
    advantages: Tensor = field(init=False)  # like the returns, computed by `PPOTrainer.advantages`
    returns: Tensor = field(init=False)

    @classmethod
    def empty(cls, rows: list[SampledAnswers]) -> "RolloutBatch":
        """The mask of these answers, with every other tensor still 0."""
        lengths = torch.tensor([len(answer) for row in rows for answer in row.tokens.answers])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        return cls(rows, mask, *(torch.zeros(mask.shape) for _ in range(4)))

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

    def token_indices(self, numbers: Sequence[int]) -> Indices:
        """The answer tokens of some prompts, in the order of `AnswerBatch.targets`."""
        answers = torch.tensor([number * self.num_samples + k for number in numbers for k in range(self.num_samples)])
        row, column = self.mask[answers].nonzero(as_tuple=True)
        return answers[row], column
