"""Attention over a packed row in which answers share their prompt: exact, no padding, no mask of all by all.

The function is registered with transformers' public `AttentionInterface`; a model calls it in each layer, and hands on
the `layout=` that its forward was given. It honours what families put into their attention: grouped heads, `scaling`,
`sliding_window` (by position), `softcap` (Gemma 2) and `s_aux` (gpt-oss' sinks).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from qalign.data.collate import pack
from qalign.data.packing import Layout
from qalign.data.tokenize import TokenPair

NAME = "qalign_shared_prompt"
QUERIES = 128  # in one block: small enough to skip most of what causality forbids, large enough for matrix products


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_,
) -> tuple[Tensor, None]:
    """transformers' attention function for a packed row.

    Args:
        query: `(1, heads, tokens, head_dim)`, positions already in it.
        key, value: `(1, key_heads, tokens, head_dim)`.
        attention_mask: None; who sees whom is in the layout.

    Returns:
        (`(1, tokens, heads, head_dim)`, None).
    """
    assert layout is not None, "this attention needs a packed batch; leave `shared_prompts` for anything else"
    assert attention_mask is None, "who sees whom is in the layout"
    assert position_bias is None, "biases by position are not known here"
    assert dropout == 0.0, "dropout in attention is not known here"
    layout.windows.append(sliding_window)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sees = (layout, scaling, sliding_window, softcap)
    attend = _flex if _flex_runs_on(query) else _BlockAttention.apply
    output = attend(query[0], key[0], value[0], s_aux, *sees)
    return output.transpose(0, 1)[None].contiguous(), None


AttentionInterface.register(NAME, shared_prompt_attention)


@contextmanager
def shared_prompts(lm: PreTrainedModel) -> Iterator[None]:
    """While open, the model takes packed rows and nothing else. Backward must run inside too: gradient checkpointing
    computes the forward again."""
    before = lm.config.get_text_config()._attn_implementation
    lm.set_attn_implementation(NAME)
    try:
        yield
    finally:
        lm.set_attn_implementation(before)


@torch.no_grad()
def why_not_shared(lm: PreTrainedModel) -> str | None:
    """Why a model can't take packed rows, in words; None if it can.

    Its settings are read, and two packed pairs are run: each layer must ask for this attention, and an answer must be
    as it is alone (ALiBi counts places, not positions), whatever its neighbour (state-space layers carry it along).
    """
    config = lm.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown or getattr(config, "attention_chunk_size", None):
        return f"has layers of another kind ({', '.join(sorted(unknown)) or 'attention in chunks'})"
    if any(getattr(config, name, 0.0) for name in ("attention_dropout", "attn_pdrop")):
        return "has dropout in its attention"
    ids = [number * (config.vocab_size - 1) // 30 for number in range(30)]
    prompt, one, other, end = ids[:12], ids[12:20], ids[20:28], ids[28:]
    batches = [pack([TokenPair(prompt, first, end, "")]).to(lm.device) for first in (one, other)]
    alone = torch.tensor([prompt + end[:1]], device=lm.device)
    try:
        with shared_prompts(lm):
            found = [lm.base_model(**b.inputs, use_cache=False).last_hidden_state[0, b.last_tokens[1]] for b in batches]
    except (AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:
        return f"can't be given packed rows ({' '.join(str(error).split())[:100]})"
    expected = lm.base_model(input_ids=alone, use_cache=False).last_hidden_state[0, -1]
    windows = batches[0].layout.windows
    if len(windows) != config.num_hidden_layers:
        return f"uses transformers' AttentionInterface in {len(windows)} of {config.num_hidden_layers} layers"
    # Rounding to 16 bits moves hidden states by 1 to 3%; a neighbour in sight moved SmolLM2's by 27 to 36%.
    tolerance = 1e-3 if torch.finfo(lm.dtype).eps < 1e-4 else 0.1
    if any((state - expected).float().norm() > tolerance * expected.float().norm() for state in found):
        return "gives an answer other hidden states than it has alone"
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    slides &= bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
    return "keeps its sliding window to itself" if slides and config.sliding_window not in windows else None


class _BlockAttention(torch.autograd.Function):
    """Softmax attention, a block of queries at a time, that keeps its output and one number a query, and makes the
    probabilities again in the backward (FlashAttention's recurrence, Dao et al. 2022, arXiv:2205.14135)."""

    @staticmethod
    def forward(ctx, query, key, value, sinks, layout, scaling, window, softcap):
        output = torch.empty(query.shape[:-1] + value.shape[-1:], dtype=query.dtype, device=query.device)
        groups = query.shape[0] // key.shape[0]
        logsums = query.new_empty(query.shape[:2], dtype=_wide(query))
        for segment, start, end, first in _blocks(layout, window):
            queries = _grouped(query, start, end, groups)
            ranges = list(segment.row_ranges(first, segment.first_position + end - segment.own[0]))
            scores = _scores(queries, _gather(key, ranges), scaling, softcap, end - start, first, segment, end, window)
            top = scores.amax(dim=-1, keepdim=True)
            weights = scores.sub_(top).exp_()
            total = weights.sum(dim=-1, keepdim=True)
            logsum = top + total.log()
            if sinks is not None:
                logsum = torch.logaddexp(logsum, _each_query(sinks, groups, end - start).to(logsum.dtype))
                total = (logsum - top).exp()
            found = torch.bmm(weights.to(query.dtype), _gather(value, ranges)) / total.to(query.dtype)
            output[:, start:end] = found.view(len(query), end - start, -1)
            logsums[:, start:end] = logsum.view(len(query), end - start)
        ctx.save_for_backward(query, key, value, sinks, output, logsums)
        ctx.sees = (layout, scaling, window, softcap)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, sinks, output, logsums = ctx.saved_tensors
        layout, scaling, window, softcap = ctx.sees
        groups = query.shape[0] // key.shape[0]
        wide = _wide(query)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        shift = (grad.to(wide) * output).sum(dim=-1)
        for segment, start, end, first in _blocks(layout, window):
            queries, grads = _grouped(query, start, end, groups), _grouped(grad, start, end, groups)
            ranges = list(segment.row_ranges(first, segment.first_position + end - segment.own[0]))
            keys = _gather(key, ranges)
            scores = _scores(queries, keys, scaling, softcap, end - start, first, segment, end, window)
            slope = 1 - (scores / softcap) ** 2 if softcap else None
            weights = scores.sub_(_grouped(logsums[..., None], start, end, groups)).exp_()
            _scatter(grad_value, ranges, torch.bmm(weights.to(query.dtype).transpose(1, 2), grads))
            change = torch.bmm(grads, _gather(value, ranges).transpose(1, 2)).to(wide)
            change = change.sub_(_grouped(shift[..., None], start, end, groups)).mul_(weights)
            if slope is not None:
                change = torch.where(weights > 0, change * slope, 0)
            change = change.to(query.dtype)
            grad_query[:, start:end] = torch.bmm(change, keys).view(len(query), end - start, -1)
            _scatter(grad_key, ranges, torch.bmm(change.transpose(1, 2), queries))
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            grad_sinks = -((sinks[:, None] - logsums).exp() * shift).sum(dim=1).to(sinks.dtype)
        return (
            grad_query.mul_(scaling),
            grad_key.mul_(scaling).to(key.dtype),
            grad_value.to(value.dtype),
            grad_sinks,
            None,
            None,
            None,
            None,
        )


def _wide(query: Tensor) -> torch.dtype:
    """What softmax and sums are computed in."""
    return torch.promote_types(query.dtype, torch.float32)


def _blocks(layout: Layout, window: int | None):
    """(segment, start and end of a block of its own tokens in the row, the first position that the block sees)."""
    for segment in layout.segments:
        for start in range(*segment.own, QUERIES):
            end = min(start + QUERIES, segment.own[1])
            position = segment.first_position + start - segment.own[0]
            yield segment, start, end, max(0, position - window + 1) if window else 0


def _grouped(tensor: Tensor, start: int, end: int, groups: int) -> Tensor:
    """`(heads, tokens, dim)` to `(key heads, groups * tokens of the block, dim)`: heads of one key lie together."""
    return tensor[:, start:end].reshape(tensor.shape[0] // groups, groups * (end - start), -1)


def _each_query(sinks: Tensor, groups: int, queries: int) -> Tensor:
    """`(heads,)` to `(key heads, groups * queries, 1)`."""
    return sinks.view(-1, groups, 1).expand(-1, -1, queries).reshape(-1, groups * queries, 1)


def _gather(tensor: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    runs = [tensor[:, start:end] for start, end in ranges]
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)


def _scatter(total: Tensor, ranges: list[tuple[int, int]], grad: Tensor) -> None:
    for (start, end), part in zip(ranges, grad.split([end - start for start, end in ranges], dim=1), strict=True):
        total[:, start:end] += part


@lru_cache(maxsize=QUERIES)
def _later(count: int, device: torch.device) -> Tensor:
    """Which of so many tokens each of them must not see."""
    return torch.ones(count, count, dtype=torch.bool, device=device).triu_(1)


def _scores(queries, keys, scaling, softcap, count, first, segment, end, window) -> Tensor:
    """Scaled, capped and masked scores `(key heads, groups * count, keys)`."""
    keys = keys.transpose(1, 2)
    scores = torch.baddbmm(queries.new_empty(1, 1, 1), queries, keys, beta=0, alpha=scaling).to(_wide(queries))
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    seen = scores.shape[-1]
    each = scores.view(scores.shape[0], -1, count, seen)
    each[..., seen - count :].masked_fill_(_later(count, scores.device), float("-inf"))
    if window:
        last = segment.first_position + end - segment.own[0]
        position = torch.arange(first, last, device=scores.device)
        each.masked_fill_(position[-count:, None] - position >= window, float("-inf"))
    return scores


def _flex_runs_on(query: Tensor) -> bool:
    """FlexAttention's kernels, forward and backward, exist for CUDA from Ampere on."""
    return query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


@lru_cache(maxsize=1)
def _compiled_flex():
    # Any length without compiling anew: past eight times PyTorch would go on uncompiled, with all scores in memory.
    return torch.compile(flex_attention, dynamic=True)


def _flex(query, key, value, sinks, layout, scaling, window, softcap, run=None) -> Tensor:
    """The same through FlexAttention: one kernel for all segments, which skips the blocks that nobody sees."""
    groups = query.shape[0] // key.shape[0]
    if groups & (groups - 1):  # its kernels share keys between heads for powers of two only
        key, value, groups = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0), 1

    def capped(score, _batch, _head, _query, _key):
        return softcap * torch.tanh(score / softcap)

    output, more = (run or _compiled_flex())(
        query[None],
        key[None],
        value[None],
        score_mod=capped if softcap else None,
        block_mask=layout.block_mask(window, query.device),
        scale=scaling,
        enable_gqa=groups > 1,
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None:
        output = output * torch.sigmoid(more.lse - sinks[None, :, None].to(more.lse.dtype))[..., None].to(output.dtype)
    return output[0]
