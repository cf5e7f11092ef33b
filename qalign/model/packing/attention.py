"""Attention over a packed row in which the answers to one prompt share it: exact, without padding or a dense mask.

The function is registered with transformers' public `AttentionInterface`. Each layer of a model calls it and passes on
the `layout=` that the model's forward was given. It supports what model families use: grouped-query heads, `scaling`,
`sliding_window` (measured in positions), `softcap` (Gemma 2) and `s_aux` (the attention sinks of gpt-oss).
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from transformers import AttentionInterface

from qalign.data.collate import Layout

NAME = "qalign_shared_prompt"
BLOCK_QUERIES = 128  # small enough to skip most of what the causal mask excludes, large enough for matrix products


class UnservedAttention(ValueError):
    """Why a model's attention can't run packed rows, in words that a user is shown behind the model's name."""


def packed_row_attention(
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
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for a packed row, whose mask is defined by the layout.

    Args:
        query: `(1, heads, tokens, head_dim)`, position embeddings applied.
        key, value: `(1, key_heads, tokens, head_dim)`.

    Returns:
        (`(1, tokens, heads, head_dim)`, None). Raises `UnservedAttention` for layers, or rows that aren't packed.
    """
    if layout is None:
        raise UnservedAttention("has attention that isn't told where the texts of a packed row begin")
    if attention_mask is not None or position_bias is not None or dropout:
        what = "dropout" if dropout else "a mask of its own" if position_bias is None else "position biases"
        raise UnservedAttention(f"has {what} in attention")
    layout.calls.append((module, sliding_window))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _flex if _flex_runs_on(query) else _BlockAttention.apply
    output = cast(Tensor, attend(query[0], key[0], value[0], s_aux, layout, scaling, sliding_window, softcap))
    return output.transpose(0, 1)[None].contiguous(), None


AttentionInterface.register(NAME, packed_row_attention)


class _Block(NamedTuple):
    """Queries of one segment, and the keys that they see."""

    start: int  # of the queries, as an index of the packed row
    size: int  # number of queries
    first: int  # position of the first key
    last: int  # position after the last key
    keys: list[tuple[int, int]]  # index ranges of the packed row

    def rows_of(self, tensor: Tensor) -> Tensor:
        """`(heads, tokens, …)` to a view of the block's queries, `(heads, queries, …)`."""
        return tensor[:, self.start : self.start + self.size]

    def queries_of(self, tensor: Tensor, groups: int) -> Tensor:
        """`(heads, tokens, dim)` to `(key_heads, groups * queries, dim)`: the heads that share a key are adjacent."""
        return self.rows_of(tensor).reshape(tensor.shape[0] // groups, groups * self.size, -1)

    def keys_of(self, tensor: Tensor) -> Tensor:
        """`(key_heads, tokens, dim)` to `(key_heads, keys, dim)`."""
        parts = [tensor[:, start:end] for start, end in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def add_to_keys(self, total: Tensor, grad: Tensor) -> None:
        """Adds `(key_heads, keys, dim)` to `total`, `(key_heads, tokens, dim)`, at the block's keys."""
        parts = grad.split([end - start for start, end in self.keys], dim=1)
        for (start, end), part in zip(self.keys, parts, strict=True):
            total[:, start:end] += part


def _blocks(layout: Layout, window: int | None) -> Iterator[_Block]:
    for segment in layout.segments:
        shift = segment.first_position - segment.own[0]  # from row index to position
        for start in range(*segment.own, BLOCK_QUERIES):
            size = min(BLOCK_QUERIES, segment.own[1] - start)
            first, last = max(0, start + shift - window + 1) if window else 0, start + shift + size
            yield _Block(start, size, first, last, list(segment.row_ranges(first, last)))


class _BlockAttention(torch.autograd.Function):
    """Softmax attention, one block of queries at a time. It keeps its output and a log-sum-exp per query; the backward
    computes the probabilities again (as FlashAttention does: Dao et al. 2022, arXiv:2205.14135)."""

    @staticmethod
    def forward(ctx: Any, query, key, value, sinks, layout, scaling, window, softcap) -> Tensor:
        output = torch.empty(query.shape[:-1] + value.shape[-1:], dtype=query.dtype, device=query.device)
        groups = query.shape[0] // key.shape[0]
        logsums = query.new_empty(query.shape[:2], dtype=_wide(query))
        for block in _blocks(layout, window):
            scores = _scores(block.queries_of(query, groups), block.keys_of(key), block, scaling, window, softcap)
            top = scores.amax(dim=-1, keepdim=True)
            weights = scores.sub_(top).exp_()
            total = weights.sum(dim=-1, keepdim=True)
            logsum = top + total.log()
            if sinks is not None:
                each = sinks.view(-1, groups, 1).expand(-1, -1, block.size).reshape(logsum.shape)
                logsum = torch.logaddexp(logsum, each.to(logsum.dtype))
                total = (logsum - top).exp()
            found = torch.bmm(weights.to(query.dtype), block.keys_of(value)) / total.to(query.dtype)
            block.rows_of(output)[:] = found.view(len(query), block.size, -1)
            block.rows_of(logsums)[:] = logsum.view(len(query), block.size)
        ctx.save_for_backward(query, key, value, sinks, output, logsums)
        ctx.settings = (layout, scaling, window, softcap)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        (grad,) = grad_outputs
        query, key, value, sinks, output, logsums = ctx.saved_tensors
        layout, scaling, window, softcap = ctx.settings
        groups = query.shape[0] // key.shape[0]
        wide = _wide(query)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        shift = (grad.to(wide) * output).sum(dim=-1)
        for block in _blocks(layout, window):
            queries, grads = block.queries_of(query, groups), block.queries_of(grad, groups)
            keys = block.keys_of(key)
            scores = _scores(queries, keys, block, scaling, window, softcap)
            slope = 1 - (scores / softcap) ** 2 if softcap else None
            weights = scores.sub_(block.queries_of(logsums[..., None], groups)).exp_()
            block.add_to_keys(grad_value, torch.bmm(weights.to(query.dtype).transpose(1, 2), grads))
            change = torch.bmm(grads, block.keys_of(value).transpose(1, 2)).to(wide)
            change = change.sub_(block.queries_of(shift[..., None], groups)).mul_(weights)
            if slope is not None:
                change = torch.where(weights > 0, change * slope, 0)
            change = change.to(query.dtype)
            block.rows_of(grad_query)[:] = torch.bmm(change, keys).view(len(query), block.size, -1)
            block.add_to_keys(grad_key, torch.bmm(change.transpose(1, 2), queries))
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            grad_sinks = -((sinks[:, None] - logsums).exp() * shift).sum(dim=1).to(sinks.dtype)
        grad_query, grad_key = grad_query.mul_(scaling), grad_key.mul_(scaling).to(key.dtype)
        return grad_query, grad_key, grad_value.to(value.dtype), grad_sinks, *[None] * 4


def _wide(query: Tensor) -> torch.dtype:
    """The dtype in which the softmax and all sums are computed: at least float32."""
    return torch.promote_types(query.dtype, torch.float32)


def _scores(queries: Tensor, keys: Tensor, block: _Block, scaling, window, softcap) -> Tensor:
    """Scaled, soft-capped and masked scores, `(key_heads, groups * queries, keys)`."""
    keys = keys.transpose(1, 2)
    scores = torch.baddbmm(queries.new_empty(1, 1, 1), queries, keys, beta=0, alpha=scaling).to(_wide(queries))
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    by_query = scores.view(scores.shape[0], -1, block.size, scores.shape[-1])
    by_query[..., -block.size :].masked_fill_(_later(block.size, scores.device), float("-inf"))
    if window:
        position = torch.arange(block.first, block.last, device=scores.device)
        by_query.masked_fill_(position[-block.size :, None] - position >= window, float("-inf"))
    return scores


@lru_cache(maxsize=BLOCK_QUERIES)
def _later(count: int, device: torch.device) -> Tensor:
    """The causal mask of `count` tokens: True where the key comes after the query."""
    return torch.ones(count, count, dtype=torch.bool, device=device).triu_(1)


def _flex_runs_on(query: Tensor) -> bool:
    """Whether FlexAttention has forward and backward kernels for this device: CUDA from Ampere on."""
    return query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable:
    # Dynamic, as after eight compilations for eight lengths PyTorch would run it uncompiled, with all scores in memory.
    return torch.compile(flex_attention, dynamic=True)


def _flex(query, key, value, sinks, layout: Layout, scaling, window, softcap, run: Callable | None = None) -> Tensor:
    """The same with FlexAttention: one kernel for all segments, which skips the blocks that no query sees."""
    groups = query.shape[0] // key.shape[0]
    if groups & (groups - 1):  # its kernels share keys between heads for powers of two only
        key, value, groups = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0), 1

    # A number in the closure would become a symbol of the dynamic compilation, which has no lowering. A tensor has one.
    cap = _constant(softcap or 1.0, query.device)

    def capped(score, _batch, _head, _query, _key):
        return cap * torch.tanh(score / cap)

    found = (run or _compiled_flex())(
        query[None],
        key[None],
        value[None],
        score_mod=capped if softcap else None,
        block_mask=layout.block_mask(window, query.device),
        scale=scaling,
        enable_gqa=groups > 1,
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )
    if sinks is None:
        return found[0]
    output, more = found
    return (output * torch.sigmoid(more.lse - sinks[None, :, None].to(more.lse.dtype))[..., None].to(output.dtype))[0]


@lru_cache
def _constant(value: float, device: torch.device) -> Tensor:
    """A number as a tensor, copied to the device once."""
    return torch.tensor(value, dtype=torch.float32, device=device)
