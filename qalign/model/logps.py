"""What is computed from the backbone's hidden states: log-probs of the answers' tokens, and scores from a scalar head.

The language model head runs only at positions that predict a token of an answer, one chunk of positions at a time, so
the full logits never exist in memory.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from qalign.data.collate import AnswerBatch
from qalign.errors import UserError
from qalign.model.memory.shard import gathered

_CHUNK_ELEMENTS = 2**25  # of one chunk of logits: 128 MB in float32, for any vocabulary


class ScalarHead(nn.Linear):
    """Hidden states `(..., hidden)` to scores `(..., 1)`, computed in the dtype of its own weight, also under autocast.
    Initialised with N(0, 1 / (hidden + 1)) ("The N Implementation Details of RLHF with PPO", Huang et al. 2023)."""

    def __init__(self, hidden: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32):
        super().__init__(hidden, 1, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=(self.in_features + 1) ** -0.5)

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


def backbone(lm: PreTrainedModel) -> PreTrainedModel:
    """The part of a language model that computes its hidden states: `base_model`. Where its class gives a name that no
    part has, as Llama 4's text model does, the model is told the name of the first model inside it."""
    if lm.base_model is lm:
        inside = [name for name, part in lm.named_children() if isinstance(part, PreTrainedModel)]
        if not inside:
            raise UserError(f"model.base: {type(lm).__name__} computes no hidden states apart from its head")
        lm.base_model_prefix = inside[0]
    return cast(PreTrainedModel, lm.base_model)


def new_head(lm: PreTrainedModel) -> ScalarHead:
    """A scalar head for a model's hidden states, not initialised yet."""
    return cast(ScalarHead, nn.utils.skip_init(ScalarHead, lm.config.get_text_config().hidden_size, device=lm.device))


def pair_logps(lm: PreTrainedModel, batch: AnswerBatch) -> Tensor:
    """Log-probs of the answers, summed over their tokens: float32 `(rows, answers each)` in nats; of a pair the chosen
    one first."""
    return summed(batch, completion_logps(lm, batch))


def summed(batch: AnswerBatch, logps: Tensor) -> Tensor:
    """Sums log-probs `(targets,)` of tokens over each answer: `(rows, answers each)`."""
    return logps.new_zeros(batch.lengths.numel()).index_add(0, batch.owners, logps).view_as(batch.lengths)


def completion_logps(lm: PreTrainedModel, batch: AnswerBatch) -> Tensor:
    """Log-probs of all tokens of the answers, float32 (float64 for a float64 model) `(targets,)` in nats, in the order
    of `batch.targets`. The head must be frozen, and a packed batch needs `packed_attention`."""
    return state_logps(lm, answer_states(lm, batch), batch.targets)


def answer_states(lm: PreTrainedModel, batch: AnswerBatch) -> Tensor:
    """Hidden states that predict the tokens of the answers: `(targets, hidden)`, in the order of `batch.targets`."""
    hidden = backbone(lm)(**batch.inputs, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch.predictors]


def state_logps(lm: PreTrainedModel, states: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs `(targets,)` in nats of tokens, from the hidden states before them, under the distribution that
    sampling at this temperature draws from."""
    logps, *_ = cast(tuple[Tensor, ...], _HeadLogps.apply(states, targets, lm, temperature, False))
    return logps


class TokenScores(NamedTuple):
    """What a model says about some tokens, each `(targets,)`; gradients reach `logps` alone."""

    logps: Tensor  # float32, nats
    entropies: Tensor  # float32, nats: of the whole distribution
    is_top: Tensor  # bool: no token is more likely; of equally likely ones the first counts


def token_scores(lm: PreTrainedModel, states: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenScores:
    """`state_logps` and what else the same logits say, without a second product with the output layer."""
    return TokenScores(*cast(tuple[Tensor, ...], _HeadLogps.apply(states, targets, lm, temperature, True)))


def _chunk_size(lm: PreTrainedModel) -> int:
    return max(1, _CHUNK_ELEMENTS // _head(lm).weight.shape[0])


def _head(lm: PreTrainedModel) -> nn.Linear:
    return cast(nn.Linear, lm.get_output_embeddings())


class _HeadLogps(torch.autograd.Function):
    """log p(target) from hidden states. Its gradient with respect to a hidden state is `g * (W[y] - E_p[W])`: a scalar
    times a direction that the forward can compute. That takes two matrix products; recomputing the logits in the
    backward would take three."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, lm: PreTrainedModel, temperature: float, all_scores: bool):
        size = _chunk_size(lm)
        wants_grad = ctx.needs_input_grad[0]
        logps, entropies, is_top, directions = [], [], [], []
        with gathered(_head(lm)):
            for states, ids in zip(hidden.split(size), targets.split(size), strict=True):
                with torch.set_grad_enabled(wants_grad):
                    states = states.detach().requires_grad_(wants_grad)
                    logits = head_logits(lm, states)
                    # Divided in 32 bits, as in sampling: in 16 bits a token would be off by over 0.1 nats.
                    logits = logits if temperature == 1 else logits.float() / temperature
                weights = logits.detach().to(torch.promote_types(logits.dtype, torch.float32), copy=True)
                chosen = weights.gather(1, ids[:, None])
                top = weights.amax(dim=1, keepdim=True)
                is_top += [weights.argmax(dim=1) == ids] if all_scores else []
                # In place, as each pass over the logits costs time.
                total = weights.sub_(top).exp_().sum(dim=1, keepdim=True)
                logps.append((chosen - top - total.log())[:, 0])
                if all_scores:
                    products = logits.detach().to(weights.dtype, copy=True).mul_(weights)
                    mean = products.sum(dim=1, keepdim=True) / total
                    del products  # as large as all logits of a chunk
                    entropies.append((top + total.log() - mean)[:, 0])
                if wants_grad:
                    slope = weights.div_(-total).scatter_add_(1, ids[:, None], torch.ones_like(chosen))
                    directions.append(torch.autograd.grad(logits, states, slope.to(logits.dtype))[0])
        if wants_grad:
            ctx.save_for_backward(torch.cat(directions))
        if not all_scores:
            return torch.cat(logps), None, None
        ctx.mark_non_differentiable(others := torch.cat(entropies), tops := torch.cat(is_top))
        return torch.cat(logps), others, tops

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        (directions,) = ctx.saved_tensors
        return (grad_outputs[0][:, None] * directions).to(directions.dtype), None, None, None, None


@dataclass
class _GivenStates(ModelOutput):
    """What a backbone would return that has computed these states, and nothing else."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Stands in for a backbone and computes nothing; everything else is read from the backbone."""

    def __init__(self, backbone: nn.Module, states: Tensor):
        super().__init__()
        self.backbone, self.states = backbone, states

    def forward(self, *_: Any, **__: Any) -> _GivenStates:
        return _GivenStates(self.states)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("backbone"), name)


def head_logits(lm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits of hidden states `(tokens, hidden)`: the model's own forward with a backbone that returns these states. So
    what a family does with them, such as a scale or a soft cap, is done; `check_head` verifies it."""
    own, states = backbone(lm), hidden[None]
    name = cast(str, lm.base_model_prefix)
    setattr(lm, name, _Given(own, states))
    try:
        return lm(inputs_embeds=states, use_cache=False).logits[0]
    finally:
        setattr(lm, name, own)


@torch.no_grad()
def check_head(lm: PreTrainedModel) -> None:
    """Checks that `head_logits` gives the model's own logits; a `UserError` if its family computes something else after
    the backbone, or if it overflows in this dtype."""
    if lm.get_output_embeddings() is None:
        raise UserError(f"model.base: {type(lm).__name__} has no output layer to take log-probs from")
    ids = torch.arange(8, device=lm.device)[None]
    own = lm(input_ids=ids, use_cache=False).logits[0].float()
    ours = head_logits(lm, backbone(lm)(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
    if not own.isfinite().all():
        raise UserError(f"model.compute_dtype: {lm.dtype} overflows in this model; use float32 or bfloat16")
    if not torch.allclose(own, ours, rtol=1e-2, atol=1e-2):
        raise UserError(f"model.base: {type(lm).__name__} computes more than qalign knows after its last hidden states")
