"""What an iteration of PPO learns from: sampled answers, and what every role makes of each of their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qalign import losses
from qalign.rl.rewards import SampledAnswers


@dataclass
class RolloutBatch:
    """The answers of one iteration. Tensors are on the CPU, float32 `(answers, tokens)` in the order of `rows`, 0
    outside the mask.

    Attributes:
        rows: prompts with their answers.
        mask: bool, True on the answers' tokens.
        old: log-probs of the policy that sampled, from the training forward.
        reference: those of the reference.
        values: of the state before each token.
        entropies: of the distribution that each token was drawn from.
        scores: `(answers,)`, of the reward as it came.
        advantages, returns: made of all these.
    """

    rows: list[SampledAnswers]
    mask: Tensor
    old: Tensor
    reference: Tensor
    values: Tensor
    entropies: Tensor
    scores: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    @property
    def kl(self) -> Tensor:
        """log pi - log pi_ref of each answer, in nats: `(answers,)`."""
        return (losses.log_ratio(self.old, self.reference) * self.mask).sum(dim=1)

    @property
    def tokens(self) -> int:
        """That were sampled."""
        return int(self.mask.sum())

    @property
    def each(self) -> int:
        """Answers to a prompt."""
        return len(self.rows[0].texts)

    @property
    def ended(self) -> Tensor:
        """Whether each answer ended by itself: bool `(answers,)`."""
        return torch.tensor([ended for row in self.rows for ended in row.ended])

    def places(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The tokens of some prompts' answers, in the order in which a batch of them has its targets."""
        answers = torch.tensor([number * self.each + k for number in numbers for k in range(self.each)])
        row, column = self.mask[answers].nonzero(as_tuple=True)
        return answers[row], column
