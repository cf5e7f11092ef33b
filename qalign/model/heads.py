"""A scalar head on a backbone's hidden states: the score of an answer."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qalign.data.collate import AnswerBatch


class ScalarHead(nn.Linear):
    """Hidden states `(..., hidden)` to scores `(..., 1)`, in the precision of its own weight whatever autocast says.

    It begins small, N(0, 1 / (hidden + 1)): the scale that scores of a fresh reward model are expected in ("The N
    Implementation Details of RLHF with PPO", Huang et al. 2023).
    """

    def __init__(self, hidden: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32):
        super().__init__(hidden, 1, bias=False, device=device, dtype=dtype)
        nn.init.normal_(self.weight, std=(hidden + 1) ** -0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


def end_scores(lm: PreTrainedModel, head: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The head's score at the last real token of each row, which is the answer's end of turn if it ended.

    Args:
        lm: a language model or sequence classifier; its backbone is run.
        head: a `ScalarHead`, or PEFT's wrapper of one.
        input_ids, attention_mask: int64 `(rows, length)`, padded on either side.

    Returns:
        float32 `(rows,)`.
    """
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # the same for a row whatever its padding
    hidden = lm.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    last = (attention_mask * torch.arange(attention_mask.shape[1], device=attention_mask.device)).argmax(dim=1)
    return head(hidden[torch.arange(len(last), device=last.device), last])[:, 0]


def pair_scores(lm: PreTrainedModel, head: nn.Module, batch: AnswerBatch) -> Tensor:
    """The same for pairs, float32 `(pairs, 2)`, chosen first. A packed batch must have kept its ends."""
    hidden = lm.base_model(**batch.inputs, use_cache=False).last_hidden_state
    return head(hidden.flatten(0, 1)[batch.last_tokens]).view(batch.lengths.shape)
