"""A reward model's scores of many answers."""

import math

import torch
from tqdm.auto import tqdm

from qalign.errors import UserError
from qalign.model.base import Base, Role

BATCH_ROWS = 8


def score_sequences(base: Base, sequences: list[list[int]]) -> list[float]:
    """Scores of whole sequences, prompt and answer with its end of turn, in the order given.

    Args:
        base: with a reward adapter and its head.
        sequences: ids.

    Raises:
        UserError: a score is not finite.
    """
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))  # like lengths: less padding
    scores = [0.0] * len(sequences)
    with tqdm(total=len(sequences), desc="scoring", unit="answer") as bar:
        for start in range(0, len(order), BATCH_ROWS):
            numbers = order[start : start + BATCH_ROWS]
            longest = len(sequences[numbers[-1]])
            ids = torch.full((len(numbers), longest), base.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, number in enumerate(numbers):
                ids[row, : len(sequences[number])] = torch.tensor(sequences[number])
                mask[row, : len(sequences[number])] = 1
            found = base.scores(Role.REWARD, ids.to(base.lm.device), mask.to(base.lm.device)).tolist()
            for number, score in zip(numbers, found, strict=True):
                scores[number] = score
            bar.update(len(numbers))
    if not all(map(math.isfinite, scores)):
        raise UserError(
            f"model.compute_dtype: the reward model's scores are not finite, computed in {base.precision}; use "
            "bfloat16 or float32, or train it again with a lower learning_rate"
        )
    return scores
