"""Token pairs to tensors. Padding is on the right and masked by length, so it changes no number."""

import torch
from torch import Tensor

from qalign.tokens import TokenPair


class PairCollator:
    """Pairs to one batch of two rows a pair: all chosen answers, then all rejected ones, in the same order.

    Called by a data loader with `list[TokenPair]`; returns a dict of int64 tensors of shape `(2 * pairs, longest)`:
    `input_ids`, `attention_mask` (1 on tokens), `completion_mask` (1 on supervised tokens); and `where`, the rows'
    places, `list[str]` of length `pairs`.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, pairs: list[TokenPair]) -> dict[str, Tensor | list[str]]:
        rows = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
        longest = max(len(prompt) + len(completion) for prompt, completion in rows)
        input_ids = torch.full((len(rows), longest), self.pad_token_id)
        attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        for number, (prompt, completion) in enumerate(rows):
            end = len(prompt) + len(completion)
            input_ids[number, :end] = torch.tensor(prompt + completion)
            attention_mask[number, :end] = 1
            completion_mask[number, len(prompt) : end] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": completion_mask,
            "where": [pair.where for pair in pairs],
        }
