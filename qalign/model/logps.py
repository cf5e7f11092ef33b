"""Forward to per-token log-probs of the completions, without ever holding the full logits.

The head runs over the positions that predict a completion token only, a chunk at a time.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qalign.data.collate import AnswerBatch
from qalign.errors import UserError
from qalign.losses import entropy

# Elements of one chunk of logits: 128 MB in float32, whatever the vocabulary.
_CHUNK_ELEMENTS = 2**25


def completion_logps(lm: PreTrainedModel, batch: AnswerBatch) -> Tensor:
    """Log-probs of every token of the answers, float32 (float64 for a float64 model) `(targets,)` in nats, in the
    order of `batch.targets`.

    Args:
        lm: a causal language model, adapters injected; its head must be frozen. A packed batch needs `packed_attention`.
        batch: on the model's device.
    """
    return state_logps(lm, answer_states(lm, batch), batch.targets)


def answer_states(lm: PreTrainedModel, batch: AnswerBatch) -> Tensor:
    """Hidden states that predict the tokens of the answers: `(targets, hidden)`, in the order of `batch.targets`."""
    hidden = lm.base_model(**batch.inputs, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch.predictors]


def state_logps(lm: PreTrainedModel, states: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs `(targets,)` of tokens from the hidden states before them, under the distribution that sampling at this
    temperature draws from."""
    return _HeadLogps.apply(states, targets, lm, temperature)


@torch.no_grad()
def state_entropies(lm: PreTrainedModel, states: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropies `(targets,)` of that distribution, in nats."""
    pieces = states.split(_chunk(lm))
    return torch.cat([entropy(head_logits(lm, piece).float() / temperature) for piece in pieces])


def _chunk(lm: PreTrainedModel) -> int:
    return max(1, _CHUNK_ELEMENTS // lm.get_output_embeddings().weight.shape[0])


def pair_logps(lm: PreTrainedModel, batch: AnswerBatch) -> Tensor:
    """Log-probs of the answers, summed over their tokens: float32 `(pairs, 2)` in nats, chosen first."""
    logps = completion_logps(lm, batch)
    return logps.new_zeros(batch.lengths.numel()).index_add(0, batch.owners, logps).view_as(batch.lengths)


class _HeadLogps(torch.autograd.Function):
    """log p(target) from hidden states.

    Each token's log-prob has the gradient `g * (W[y] - E_p[W])` with respect to its hidden state, a scalar times a
    direction known in the forward: two matrix products instead of the three of recomputing the logits backward.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, lm: PreTrainedModel, temperature: float) -> Tensor:
        size = _chunk(lm)
        wants_grad = ctx.needs_input_grad[0]
        logps, directions = [], []
        for states, ids in zip(hidden.split(size), targets.split(size), strict=True):
            with torch.set_grad_enabled(wants_grad):
                states = states.detach().requires_grad_(wants_grad)
                logits = head_logits(lm, states)
                # Divided in 32 bits, as where answers are drawn: in 16 a token would be off by over 0.1 nats.
                logits = logits if temperature == 1 else logits.float() / temperature
            weights = logits.detach().to(torch.promote_types(logits.dtype, torch.float32), copy=True)
            chosen = weights.gather(1, ids[:, None])
            top = weights.amax(dim=1, keepdim=True)
            total = weights.sub_(top).exp_().sum(dim=1, keepdim=True)  # in place: each pass over them counts
            logps.append((chosen - top - total.log())[:, 0])
            if wants_grad:
                slope = weights.div_(-total).scatter_add_(1, ids[:, None], torch.ones_like(chosen))
                directions.append(torch.autograd.grad(logits, states, slope.to(logits.dtype))[0])
        if wants_grad:
            ctx.save_for_backward(torch.cat(directions))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (directions,) = ctx.saved_tensors
        return (grad[:, None] * directions).to(directions.dtype), None, None, None


def head_logits(lm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits of hidden states `(tokens, hidden)`, with the scale and the soft cap some families put behind the head.

    `check_head` tells whether this holds for a model.
    """
    config = lm.config.get_text_config()
    logits = lm.get_output_embeddings()(hidden)
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def check_head(lm: PreTrainedModel) -> None:
    """Makes sure that hidden states and `head_logits` give the model's own logits.

    Raises:
        UserError: this family does something else behind its backbone, or the precision is too small for it.
    """
    if lm.get_output_embeddings() is None:
        raise UserError(f"model.base: {type(lm).__name__} has no output layer to take log-probs from")
    ids = torch.arange(8, device=lm.device)[None]
    own = lm(input_ids=ids, use_cache=False).logits[0].float()
    ours = head_logits(lm, lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
    if not own.isfinite().all():
        raise UserError(f"model.compute_dtype: {lm.dtype} overflows in this model; use float32 or bfloat16")
    if not torch.allclose(own, ours, rtol=1e-2, atol=1e-2):
        raise UserError(f"model.base: the head of {type(lm).__name__} does more than qalign knows (logits differ)")
