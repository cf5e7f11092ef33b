"""How much memory a training step takes, found out without a weight or a GPU: the step runs on PyTorch's meta device,
where tensors have a shape and no content, and what is alive is counted.

Because the very code of the step is run (attention, head in chunks, checkpointing, adapters), a change of it changes
the forecast. Two things are not on the meta device and are added: what bitsandbytes unpacks of a weight while it
multiplies, and the 16-bit copies of the adapters that autocast keeps.
"""

import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import peft
import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from qalign.config.paths import function_of, is_own_model
from qalign.config.recipe import Model, Recipe
from qalign.data.collate import pack
from qalign.data.tokenize import TokenPair
from qalign.model.attention import BLOCK_QUERIES
from qalign.model.logps import pair_logps

CUDA_CONTEXT = 700 * 2**20  # the driver's own, and cuBLAS' workspaces; it differs by card and driver
USABLE = 0.95  # of a memory: allocators leave gaps
# Tokens at once beyond which a step gets no faster a token: a weight is unpacked once for all of them.
BUSY_TOKENS = {"cuda": 8192, "cpu": 4096}
_OPTIMIZER_BYTES = {"adamw": 8, "paged_adamw_8bit": 2.07}  # two moments a weight, 8-bit ones with a scale for 256


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is open and are still alive.

    Attributes:
        live: now.
        peak: at most since it was opened or `peak` was set.
    """

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
    """What attention keeps and makes, without its maths: a fused kernel, or the blocks of `qalign.model.attention`, which
    take 14 bytes for each query of a block and each token that it sees while they run backward."""

    @staticmethod
    def forward(ctx, query, key, value, seen):
        output, logsums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.seen = seen
        ctx.save_for_backward(query, key, value, output, logsums)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, logsums = ctx.saved_tensors
        made = [torch.empty_like(tensor) for tensor in (query, key, value)]
        made += [torch.empty_like(logsums), query.new_empty((query.shape[1], BLOCK_QUERIES, ctx.seen, 14), dtype=torch.uint8)]
        return *made[:3], None


def _fused(module, query, key, value, attention_mask, **_):
    return _AttentionShape.apply(query, key, value, 0).transpose(1, 2).contiguous(), None


def _blocks(module, query, key, value, attention_mask, *, layout, **_):
    seen = max(segment.first_position + segment.own[1] - segment.own[0] for segment in layout.segments)
    return _AttentionShape.apply(query, key, value, seen).transpose(1, 2).contiguous(), None


_ATTENTION = {"cuda": "qalign_fused_shape", "cpu": "qalign_blocks_shape"}
AttentionInterface.register(_ATTENTION["cuda"], _fused)
AttentionInterface.register(_ATTENTION["cpu"], _blocks)


class _TiledHead(torch.autograd.Function):
    """What the head of TRL's `SFTTrainer` makes: logits of up to 4,096 tokens by 32,768 words at a time, and on a CPU
    29 bytes of temporaries for each (`trl.kernels.chunked_logprob`)."""

    @staticmethod
    def forward(ctx, hidden, vocabulary, temporaries):
        ctx.tile = (min(hidden.shape[0], 4096), 32768)
        ctx.temporaries = (ctx.tile[0], min(vocabulary, 32768), temporaries)
        ctx.save_for_backward(hidden)
        hidden.new_empty(ctx.tile)
        return hidden.new_empty(hidden.shape[0], dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        (hidden,) = ctx.saved_tensors
        made = [torch.empty_like(hidden, dtype=torch.float32), hidden.new_empty(ctx.tile)]
        made.append(hidden.new_empty(ctx.temporaries, dtype=torch.uint8))
        del made[1:]
        return made[0].to(hidden.dtype), None, None


@dataclass(frozen=True)
class Step:
    """Bytes that a micro-batch needs beyond what is always there.

    Attributes:
        activations: kept for the backward when the last layer is done.
        logits: what the head needs on top of them.
        backward: what the backward needs on top of them, at most.
    """

    activations: int
    logits: int
    backward: int

    @property
    def total(self) -> int:
        return self.activations + max(self.logits, self.backward)


@dataclass(frozen=True)
class Plan:
    """What `auto` comes to: so many tokens at once, with so many layers checkpointed."""

    tokens: int
    checkpointed_layers: int

    def __str__(self) -> str:
        """What there is to say of the layers."""
        return f", {self.checkpointed_layers} layers checkpointed" if self.checkpointed_layers else ""


def longest_row(recipe: Recipe, stage: str, max_length: int | None = None) -> int:
    """Tokens of the longest row that a recipe allows, or another `max_length` would: of a pair both answers in full, of
    a prompt of PPO's itself and all of its answers."""
    length = max_length or recipe.model.max_length
    if stage == "ppo":
        return length + (recipe.ppo.samples_per_prompt - 1) * recipe.ppo.max_new_tokens
    return length if stage == "sft" else 2 * length


def max_length_of(recipe: Recipe, stage: str, tokens: int) -> int:
    """The `max_length` at which the longest row has so many tokens."""
    if stage == "ppo":
        return tokens - longest_row(recipe, stage, 1) + 1
    return tokens if stage == "sft" else tokens // 2


class Forecast:
    """The memory of one stage of a recipe.

    Args:
        recipe: with a section for the stage.
        stage: its name.
        config: the base's, as transformers reads it.
        device: `cuda` or `cpu`.
        dtype: what matrices are multiplied in.

    Attributes:
        fixed: bytes that are there all the time, by what they are for.
        layers: of the base.
        reach: the longest text that the base can read, in tokens.
    """

    def __init__(self, recipe: Recipe, stage: str, config: PretrainedConfig, device: str, dtype: torch.dtype):
        self.recipe, self.stage, self.device, self.dtype = recipe, stage, device, dtype
        self.settings = getattr(recipe, stage)
        self.config = copy.deepcopy(config)
        self.layers = self.config.get_text_config().num_hidden_layers
        self.reach = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20
        self._steps: dict[tuple[int, bool], Step] = {}
        self.fixed = self._fixed()

    def with_recipe(self, recipe: Recipe) -> "Forecast":
        """The same stage, base and device with another recipe."""
        return Forecast(recipe, self.stage, self.config, self.device, self.dtype)

    def _fixed(self) -> dict[str, int]:
        """Bytes that are there all the time."""
        lm = self._model(self.layers)
        adapters = {name: p for name, p in lm.named_parameters() if p.requires_grad}
        each = sum(parameter.numel() for parameter in adapters.values())
        settings, width = self.settings, self.dtype.itemsize
        frozen = self.stage in ("dpo", "ppo") and settings.start_from is not None  # a copy for the reference
        trained = each
        if self.stage == "ppo":
            sources = [source.source for _, source in settings.sources]
            # Models of their own are no adapters, and loaded by the time that memory is planned.
            frozen += sum(not (function_of(source) or is_own_model(source)) for source in sources)
            trained += each if settings.value == "adapter" else 0
        optimizer = "paged_adamw_8bit" if "8bit" in str(settings.trainer.get("optim", "")) else "adamw"
        fixed = {
            "base": sum(_held_bytes(p, name, lm, self.recipe.model, width) for name, p in lm.named_parameters()),
            "adapters": (trained + frozen * each) * 4 + (each * width if width == 2 else 0),
            "gradients": trained * 4,
            "optimiser": int(trained * _OPTIMIZER_BYTES[optimizer]),
        }
        fixed["base"] -= sum(_held_bytes(p, name, lm, self.recipe.model, width) for name, p in adapters.items())
        return fixed | ({"CUDA context": CUDA_CONTEXT} if self.device == "cuda" else {})

    def step(self, tokens: int, *, checkpointing: bool) -> Step:
        """A micro-batch of so many tokens: two models of few layers are run on the meta device, the rest is linear."""
        key = tokens, checkpointing
        if key not in self._steps:
            few = min(self.layers, 2 * len(_pattern(self.config)))
            one, other = (self._run(layers, *key) for layers in (few, 2 * few))
            slope = (other.activations - one.activations) / few
            self._steps[key] = Step(int(one.activations + slope * (self.layers - few)), other.logits, other.backward)
        return self._steps[key]

    def total(self, tokens: int, checkpointed: int) -> int:
        """Bytes in all, with so many layers checkpointed."""
        return sum(self.parts(tokens, checkpointed).values())

    def parts(self, tokens: int, checkpointed: int) -> dict[str, int]:
        """Bytes at the peak, by what they are for."""
        share = min(1, checkpointed / self.layers)
        ways = [(share, True), (1 - share, False)]
        steps = [(weight, self.step(tokens, checkpointing=way)) for weight, way in ways if weight]
        activations = sum(weight * step.activations for weight, step in steps)
        logits = max(step.logits for _, step in steps)
        backward = max(step.backward for _, step in steps)
        largest = {"logits": logits} if logits > backward else {"backward": backward}
        return self.fixed | {"activations": int(activations)} | largest

    def largest(self, memory: int, checkpointed: int) -> int:
        """The most tokens that fit at once; 0 if none do. (What a step takes is linear in its tokens, once they are
        more than one piece of the head.)"""
        low, high = 64, 4096
        if (at_once := self.total(high, checkpointed)) <= memory:
            each = (self.total(2 * high, checkpointed) - at_once) / high
            return high + int((memory - at_once) / each)
        if self.total(low, checkpointed) > memory:
            return 0
        while high - low > 32:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total(middle, checkpointed) <= memory else (low, middle)
        return low

    def plan(self, memory: int, longest: int) -> "Plan | None":
        """Packs that keep the device busy, or at least hold the longest row, and as few checkpointed layers as that
        takes (where the recipe doesn't say how many).

        Args:
            memory: bytes that may be taken in all.
            longest: tokens of the longest row or pair; of a whole micro-batch, where the recipe sets its size.

        Returns:
            None if not even that fits.
        """
        wanted = max(BUSY_TOKENS[self.device], longest) if self.settings.micro_batch_size == "auto" else longest
        given = self.settings.checkpointed_layers
        most = self.layers if given == "auto" else min(given, self.layers)
        tokens = min(wanted, self.largest(memory, most))
        if tokens < longest:
            return None
        if given != "auto":
            return Plan(tokens, most)
        low, high = 0, self.layers
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.total(tokens, middle) <= memory else (middle + 1, high)
        return Plan(tokens, low)

    def _model(self, layers: int) -> PreTrainedModel:
        """The base with its adapter on the meta device, in the precision that it computes in."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            pattern = _pattern(config)
            text.layer_types = [pattern[number % len(pattern)] for number in range(layers)]
        auto = AutoModelForCausalLM
        if self.stage == "reward":
            auto, config.num_labels = AutoModelForSequenceClassification, 1
        with torch.device("meta"):
            lm = auto.from_config(config, dtype=self.dtype)
            lora = self.recipe.lora
            peft.get_peft_model(
                lm,
                peft.LoraConfig(
                    r=lora.r,
                    lora_dropout=lora.dropout,
                    target_modules=lora.targets,
                    use_dora=lora.dora,
                    task_type=peft.TaskType.SEQ_CLS if self.stage == "reward" else peft.TaskType.CAUSAL_LM,
                ),
                autocast_adapter_dtype=False,
            )
            lm.to(self.dtype)  # adapters too: autocast computes with copies of them
            if self.stage == "reward":
                lm.score = nn.Linear(lm.score.in_features, 1, bias=False)  # a ScalarHead asks for autocast
        return lm

    def _run(self, layers: int, tokens: int, checkpointing: bool) -> Step:
        lm = self._model(layers)
        lm.train()
        if checkpointing:
            lm.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        lm.set_attn_implementation(_ATTENTION[self.device])
        # On a CPU PEFT casts inputs for itself: it asks whether CUDA's autocast is on.
        if self.device == "cpu" and self.dtype != torch.float32:
            for name, module in lm.named_modules():
                if "lora_A." in name:
                    module.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))
        for parameter in lm.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        forward = self._forward(lm, tokens)
        with LiveBytes() as counted:
            marks = []

            def at_the_head(*_):
                marks.append(counted.live)
                counted.peak = counted.live

            lm.base_model.register_forward_hook(at_the_head)
            loss = forward()
            logits, counted.peak = counted.peak - marks[0], counted.live
            loss.backward()
            return Step(marks[0], logits, counted.peak - marks[0] + self._unpacked(lm))

    def _forward(self, lm: PreTrainedModel, tokens: int) -> Callable[[], Tensor]:
        """The stage's loss, up to a sum."""
        if self.stage == "sft":
            batch = _meta(pack([TokenPair([0] * tokens, [1, 2], [1, 3], "")]))
            vocabulary, temporaries = lm.get_output_embeddings().weight.shape[0], 0 if self.device == "cuda" else 29
            backbone = lambda: lm.base_model(**batch.inputs, use_cache=False).last_hidden_state[0]  # noqa: E731
            return lambda: _TiledHead.apply(backbone(), vocabulary, temporaries).sum()
        third = tokens // 3
        pair = TokenPair([0] * (tokens - 2 * third), [1] * third, [2] * third, "")
        if self.stage == "reward":
            batch = _meta(pack([pair], last_token="kept"))
            backbone = lambda: lm.base_model(**batch.inputs, use_cache=False).last_hidden_state[0]  # noqa: E731
            return lambda: lm.score(backbone()[batch.last_tokens].float()).sum()
        batch = _meta(pack([pair]))
        return lambda: pair_logps(lm, batch).sum()

    def _unpacked(self, lm: PreTrainedModel) -> int:
        """The largest weight, as bitsandbytes unpacks it while it multiplies."""
        if self.recipe.model.quantization == "none":
            return 0
        return max(p.numel() for name, p in lm.named_parameters() if _is_quantized(p, name, lm)) * self.dtype.itemsize


def _meta(batch):
    return batch.to(torch.device("meta"))


def _pattern(config: PretrainedConfig) -> list[str]:
    """The kinds of layers up to where they repeat."""
    kinds = list(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    for length in range(1, len(kinds)):
        if all(kind == kinds[number % length] for number, kind in enumerate(kinds)):
            return kinds[:length]
    return kinds


def _is_quantized(parameter: nn.Parameter, name: str, lm: PreTrainedModel) -> bool:
    """As bitsandbytes does it: every linear layer but the head."""
    if "lora_" in name or not name.endswith("weight"):
        return False
    layer = lm.get_submodule(name.rpartition(".")[0])
    return isinstance(layer, nn.Linear) and layer is not lm.get_output_embeddings() and parameter.shape[0] > 1


def _held_bytes(parameter: nn.Parameter, name: str, lm: PreTrainedModel, spec: Model, width: int) -> int:
    """A weight as it is held: 4-bit ones have a scale for every 64, which double quantisation packs into a byte with a
    scale of its own for every 256."""
    count = parameter.numel()
    if spec.quantization == "none" or not _is_quantized(parameter, name, lm):
        return count * width
    if spec.quantization == "int8":
        return count + 4 * parameter.shape[0]
    scales = count / 64
    return math.ceil(count / 2 + (scales + scales / 256 * 4 if spec.double_quant else 4 * scales))


def usable_memory(device: str) -> int:
    """Bytes that this process may take in all, what it holds already included."""
    if device == "cpu":
        return int(psutil.virtual_memory().available * USABLE)
    free, _ = torch.cuda.mem_get_info()
    return int((free + torch.cuda.memory_reserved()) * USABLE) + CUDA_CONTEXT


def kv_cache_bytes(config: PretrainedConfig, tokens: int, width: int) -> int:
    """Keys and values of so many tokens, in all layers, at so many bytes a number."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head * tokens * width
