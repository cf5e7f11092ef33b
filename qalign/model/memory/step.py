"""The memory of one training step, counted without weights or a GPU: the step runs on PyTorch's meta device, where
tensors have a shape and no data, and the bytes of the tensors that are alive are counted.

It runs the same code as training (head in chunks, checkpointing, adapters), so a change of that code changes the
forecast. Attention and bitsandbytes' unpacking of weights are replaced by what they allocate.
"""

import copy
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import peft
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qalign.config.recipe import Recipe
from qalign.data.collate import AnswerBatch, Layout, pack
from qalign.data.store.sequences import TokenLabelled, TokenPair
from qalign.model.adapters.lora import AddedLora
from qalign.model.adapters.switch import AdapterSwitch
from qalign.model.adapters.targets import leave_out, new_config
from qalign.model.experts.quantizer import experts_kind, is_linear
from qalign.model.experts.weights import names_of, run_experts
from qalign.model.loading import auto_class
from qalign.model.logps import backbone, state_logps, token_scores
from qalign.model.memory.layers import keep_one_of_each_kind
from qalign.model.memory.offload import Offload, wide_modules
from qalign.model.packing.attention import BLOCK_QUERIES

SCANNED = 512  # tokens: the longest row that models are run with which may go through it token by token


@dataclass(frozen=True)
class Step:
    """Bytes that a micro-batch needs in addition to what is always in memory."""

    activations: int  # kept for the backward when the last layer is done
    logits: int  # the head's peak, in addition to the activations
    backward: int  # the backward's peak, in addition to the activations
    held: int = 0  # what is held in the computer's memory instead

    @property
    def total(self) -> int:
        return self.activations + max(self.logits, self.backward)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are created while it is open: `live` are the bytes of those still alive,
    `peak` is the largest `live` since it was opened or `peak` was set."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) not in given and storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return found

    def _freed(self, size: int) -> None:
        self.live -= size


class _AttentionShape(torch.autograd.Function):
    """What attention keeps and allocates, without its maths: a fused kernel, or the blocks of qalign's own attention,
    whose backward takes 14 bytes for each query of a block and each token that it sees."""

    @staticmethod
    def forward(ctx: Any, query, key, value, seen):
        output = torch.empty_like(query[..., : value.shape[-1]])  # in the order of the query, so without a copy below
        logsums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.seen = seen
        ctx.save_for_backward(query, key, value, output, logsums)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        query, key, value, _, logsums = ctx.saved_tensors
        made = [torch.empty_like(tensor) for tensor in (query, key, value)]
        block = (query.shape[1], BLOCK_QUERIES, ctx.seen, 14)
        made += [torch.empty_like(logsums), query.new_empty(block, dtype=torch.uint8)]
        return *made[:3], None


def _fused(module, query, key, value, attention_mask, *, layout: Layout | None = None, **_: Any):
    if layout is not None:
        layout.calls.append((module, None))
    return cast(Tensor, _AttentionShape.apply(query, key, value, 0)).transpose(1, 2).contiguous(), None


def _blocks(module, query, key, value, attention_mask, *, layout: Layout, **_: Any):
    layout.calls.append((module, None))
    seen = max(segment.first_position + segment.own[1] - segment.own[0] for segment in layout.segments)
    return cast(Tensor, _AttentionShape.apply(query, key, value, seen)).transpose(1, 2).contiguous(), None


class _ProductShape(torch.autograd.Function):
    """What a product of rows with 4-bit experts allocates; it keeps nothing (`qalign.model.experts.weights`)."""

    @staticmethod
    def forward(ctx: Any, rows, inputs, outputs):
        ctx.inputs = inputs
        return rows.new_empty(len(rows), outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        return grad_outputs[0].new_empty(len(grad_outputs[0]), ctx.inputs), None, None


def _experts_product(module, name: str, rows: Tensor, choices: Tensor) -> Tensor:
    inputs, outputs = getattr(module, name).shape[1:] if module.is_transposed else getattr(module, name).shape[:0:-1]
    return cast(Tensor, _ProductShape.apply(rows, inputs, outputs))


_EXPERTS = "qalign_experts_shape"
ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, partial(run_experts, product=_experts_product))
_ATTENTION = {"cuda": "qalign_fused_shape", "cpu": "qalign_blocks_shape"}
AttentionInterface.register(_ATTENTION["cuda"], _fused)
AttentionInterface.register(_ATTENTION["cpu"], _blocks)


def meta_model(recipe: Recipe, stage: str, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The base with a stage's adapter on the meta device, in the dtype that it computes in."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        lm: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
        lm.set_experts_implementation(_EXPERTS)
    if sum(isinstance(module, PreTrainedModel) for module in lm.modules()) > 2:  # it reads more than texts
        lm.set_attn_implementation(_ATTENTION["cuda"])
        leave_out(lm, lambda: lm(**_batch(stage, 9).inputs, use_cache=False))
    if stage == "reward":
        lm.set_output_embeddings(None)
    with torch.device("meta"):
        share = recipe.reward.share if stage == "reward" and recipe.reward else 1.0
        adapter = new_config(recipe.lora, lm, recipe.model.base, share)
        adapter.task_type = peft.TaskType.CAUSAL_LM
        peft.get_peft_model(lm, adapter, autocast_adapter_dtype=False)
        lm.to(dtype)  # pyright: ignore[reportArgumentType]  (adapters too: autocast computes with copies of them)
        if stage == "reward":  # a ScalarHead asks for autocast, which the meta device doesn't have
            lm.score = nn.Linear(config.get_text_config().hidden_size, 1, bias=False)
    return lm


def is_expert(name: str, lm: PreTrainedModel) -> bool:
    """Whether a weight is a tensor of all experts of a layer that can be held in 4 bits."""
    module, _, leaf = name.rpartition(".")
    return leaf in names_of(lm.get_submodule(module))


def is_quantized(parameter: nn.Parameter, name: str, lm: PreTrainedModel) -> bool:
    """Whether bitsandbytes quantises a weight: those of all linear layers except the head."""
    if "lora_" in name or not name.endswith("weight"):
        return False
    stored = getattr(lm.config, "quantization_config", None) or {}  # of a base that is published quantised
    skipped = (stored if isinstance(stored, dict) else vars(stored)).get("llm_int8_skip_modules") or ()
    if any(module in name for module in skipped):
        return False
    layer = lm.get_submodule(name.rpartition(".")[0])
    return is_linear(layer) and layer is not lm.get_output_embeddings() and parameter.shape[0] > 1


class StepModel:
    """A model that `meta_model` made, with one layer of each kind, to run steps of a stage on and count what a `device`
    (`cuda` or `cpu`) would allocate."""

    def __init__(self, lm: PreTrainedModel, recipe: Recipe, stage: str, device: str):
        self.lm, self.recipe, self.stage = lm, recipe, stage
        lm.set_attn_implementation(_ATTENTION[device])
        trial = _batch(stage, 9)
        shape = (trial.input_ids.numel(), lm.config.get_text_config().hidden_size)
        self.layers = keep_one_of_each_kind(lm, lambda: _states(lm, trial).shape == shape)
        self.attention = {module for module, _ in cast(Layout, trial.layout).calls}
        self.scans = any(not self.attention.intersection(layer.modules()) for layer in self.layers)
        able = [layer for layer in self.layers if self.attention.intersection(layer.modules())]
        self.wide = wide_modules(able, lambda: _states(lm, _batch(stage, 9)))
        self._known: dict[tuple[int, bool, bool], Step] = {}
        self._copied = 0
        # The layers that are left stand for ones behind others, whose states have gradients; but not for those below
        # the adapters of an ensemble.
        trained = [layer for layer in self.layers if any(p.requires_grad for p in layer.parameters())]
        if stage == "reward" and recipe.reward and recipe.reward.share < 1 and trained:
            trained[0].register_forward_pre_hook(self._given_gradients, with_kwargs=True)
        else:
            lm.get_input_embeddings().register_forward_hook(self._with_gradients)
        AddedLora(lm.modules()).activate("default")
        for parameter in lm.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def _with_gradients(self, _module: nn.Module, _inputs: Any, states: Tensor) -> Tensor:
        self._copied = states.nbytes
        return states.requires_grad_().clone()

    def _given_gradients(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._with_gradients(layer, None, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._with_gradients(layer, None, kwargs["hidden_states"])}

    def run(self, tokens: int, *, checkpointing: bool, offloaded: bool = False) -> Step:
        """The memory of one step with this many tokens, with all layers checkpointed or none, and what they keep
        `offloaded` or not. Layers without attention may go through a sequence token by token, so a model that has some
        is run with fewer tokens, from where its memory grows in a straight line."""
        if checkpointing:
            self.lm.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        else:
            self.lm.activation_checkpointing_disable()
        AdapterSwitch(self.lm).train()
        if not self.scans or tokens <= SCANNED:
            return self._counted(tokens, offloaded)
        sizes = [(count, checkpointing, offloaded) for count in (SCANNED // 2, SCANNED)]
        for key in sizes:
            if key not in self._known:
                self._known[key] = self._counted(key[0], offloaded)
        few, more = (self._known[key] for key in sizes)
        rise = (tokens - SCANNED) / (SCANNED - SCANNED // 2)
        return Step(
            int(more.activations + rise * (more.activations - few.activations)),
            self._logits(tokens),
            int(more.backward + rise * (more.backward - few.backward)),
            int(more.held + rise * (more.held - few.held)),
        )

    def _counted(self, tokens: int, offloaded: bool) -> Step:
        """Counts one step with this many tokens."""
        if not offloaded:
            return self._counts(tokens)
        offload = Offload(self.lm, self.wide)
        try:
            step = self._counts(tokens)
        finally:
            offload.remove()
        other_layers = sum(many - 1 for many in self.layers.values())
        return replace(step, held=offload.bytes + other_layers * self._copied)

    def _counts(self, tokens: int) -> Step:
        lm, batch, kept = self.lm, _batch(self.stage, tokens), dict[nn.Module, int]()
        given: dict[nn.Module, tuple[weakref.ref[Any], int]] = {}
        with LiveBytes() as counted, ExitStack() as hooks:
            at_head: list[int] = []

            def before(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
                states = inputs[0] if inputs else named["hidden_states"]
                given[layer] = weakref.ref(states.untyped_storage()), states.nbytes
                kept[layer] = -counted.live

            def after(layer: nn.Module, _inputs: Any, _output: Any) -> None:
                kept[layer] += counted.live

            def mark(*_: Any) -> None:
                at_head.append(counted.live)
                counted.peak = counted.live
                for layer, (states, size) in given.items():  # what isn't kept goes once its layer is done
                    kept[layer] -= size if states() is None else 0

            for layer in self.layers:
                hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(layer.register_forward_hook(after).remove)
            hooks.callback(backbone(lm).register_forward_hook(mark).remove)
            loss = _loss(lm, self.stage, batch, _states(lm, batch))
            seen, growth = at_head[0], dict(kept)  # the backward may compute layers again
            logits, counted.peak = counted.peak - seen, counted.live
            loss.backward()
            backward = counted.peak - seen
        layout = cast(Layout, batch.layout)
        rows = layout.sequences(torch.device("cpu"))[0].numel() / layout.tokens
        # A layer without attention runs a row a sequence.
        shares = {layer: 1 if self.attention.intersection(layer.modules()) else rows for layer in self.layers}
        more = sum(growth[layer] * (many * shares[layer] - 1) for layer, many in self.layers.items())
        return Step(int(seen - self._copied + more), logits, backward + self._unpacked())

    def _logits(self, tokens: int) -> int:
        """The head's peak alone, in addition to the hidden states."""
        batch, width = _batch(self.stage, tokens), self.lm.config.get_text_config().hidden_size
        hidden = torch.empty(batch.input_ids.numel(), width, dtype=self.lm.dtype, device="meta", requires_grad=True)
        with LiveBytes() as counted:
            _loss(self.lm, self.stage, batch, hidden)
        return counted.peak

    def _unpacked(self) -> int:
        """Bytes of the largest weight, which bitsandbytes unpacks while it multiplies."""
        lm, quantization = self.lm, self.recipe.model.quantization
        if quantization == "none":
            return 0
        found = [parameter for name, parameter in lm.named_parameters() if is_quantized(parameter, name, lm)]
        if experts_kind(lm.config, quantization):  # one expert at a time
            found += [parameter[0] for name, parameter in lm.named_parameters() if is_expert(name, lm)]
        return max(parameter.numel() for parameter in found) * lm.dtype.itemsize


def _batch(stage: str, tokens: int) -> AnswerBatch:
    third = tokens // 3
    pair = TokenPair([0] * (tokens - 2 * third), [1] * third, [2] * third, "")
    if stage == "sft":
        pair = TokenPair([0] * tokens, [1, 2], [1, 3], "")
    if stage == "kto":
        pair = TokenLabelled([0] * (tokens - tokens // 2), [1] * (tokens // 2), True, "")
    return pack([pair], last_token="kept" if stage == "reward" else "dropped").to(torch.device("meta"))


def _loss(lm: PreTrainedModel, stage: str, batch: AnswerBatch, hidden: Tensor) -> Tensor:
    """A stage's loss from hidden states `(tokens, hidden)`, up to arithmetic on a few numbers per row. It keeps no
    intermediate result alive."""
    if stage == "sft":  # at most every token is supervised, as in plain texts
        return token_scores(lm, hidden, batch.input_ids[0]).logps.sum()
    if stage == "reward":
        return cast(nn.Linear, lm.score)(hidden[batch.last_tokens].float()).sum()
    return state_logps(lm, hidden[batch.predictors], batch.targets).sum()


def _states(lm: PreTrainedModel, batch: AnswerBatch) -> Tensor:
    return backbone(lm)(**batch.inputs, use_cache=False).last_hidden_state[0]
