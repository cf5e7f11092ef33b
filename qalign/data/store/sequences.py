"""Token sequences as the trainers take them."""

from dataclasses import dataclass

IGNORED = -100  # the label of tokens outside the loss, as PyTorch's cross entropy has it


@dataclass(frozen=True)
class TokenPair:
    """A preference as token ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    where: str
    dropped_turns: int = 0
    margin: float | None = None
    chosen_probability: float = 1.0  # that the chosen answer is the better one
    counts: tuple[int, ...] = ()  # how often the pair is in the resample of each member of an ensemble

    @property
    def answers(self) -> tuple[list[int], list[int]]:
        return self.chosen_ids, self.rejected_ids

    def __len__(self) -> int:
        """The length of the longer sequence, in tokens."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True)
class TokenLabelled:
    """A prompt with one answer that is good or bad, as token ids."""

    prompt_ids: list[int]
    answer_ids: list[int]
    desirable: bool
    where: str
    dropped_turns: int = 0

    @property
    def answers(self) -> tuple[list[int]]:
        return (self.answer_ids,)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class TokenAnswers:
    """A prompt and its sampled answers as token ids."""

    prompt_ids: list[int]
    answers: tuple[list[int], ...]

    def __len__(self) -> int:
        """The length of the longest sequence, in tokens."""
        return len(self.prompt_ids) + max(map(len, self.answers))


@dataclass(frozen=True)
class TokenDialogue:
    """A sequence for supervised fine-tuning; `labels` are its ids where they are supervised, `IGNORED` elsewhere."""

    ids: list[int]
    labels: list[int]
    where: str
    dropped_turns: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class TokenQuestion:
    """A prompt as token ids."""

    ids: list[int]
