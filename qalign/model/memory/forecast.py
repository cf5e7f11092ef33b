"""How much memory each stage of a recipe takes, and the largest micro-batch that fits: the planner behind
`micro_batch_size: auto` and `qalign fit`. Neither weights nor a GPU are needed (`qalign.model.memory.step`).
"""

import copy
import math
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import fmean, pstdev
from typing import cast

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from qalign.config.paths import adapters_in, function_of, is_own_model, is_own_run, own_member, reward_adapter
from qalign.config.recipe import Model, Recipe
from qalign.config.stages import DPO, PPO, RL_STAGES, SFT_RUN, Reward
from qalign.model.adapters.files import read_files
from qalign.model.adapters.targets import decoder_layers
from qalign.model.experts.quantizer import experts_kind
from qalign.model.experts.weights import held_bytes
from qalign.model.loading import reach_of
from qalign.model.memory.step import Step, StepModel, is_expert, is_quantized, meta_model
from qalign.model.memory.stream import SLOTS

CUDA_CONTEXT = 700 * 2**20  # bytes of a card that CUDA itself takes, where there is none to measure it on
# The usable share of a memory. On an H200, segments that grow reserved 22.95 GiB for 22.59 allocated, and others ran
# out of 23.5 GiB at 22.56; the rest is for forecasts that are too low, by up to 5%.
USABLE = {"cpu": 0.95, "cuda": 0.93, "cuda, segments of fixed size": 0.89}
# Tokens per forward beyond which a step gets no faster per token: weights are unpacked once for all of them.
BUSY_TOKENS = {"cuda": 8192, "cpu": 4096}
SHORTEST = 256  # tokens: a recipe whose rows must be shorter is of no use
# Layers that FSDP has whole at a time: one at work, what was gathered of the next, and the buffer of the one before.
GATHERED = 3
_LONG = 2**17  # tokens: longer steps take long to count, and nobody's rows are longer
_OPTIMIZER_BYTES = {"adamw": 8, "paged_adamw_8bit": 2.07}  # per weight: two moments; 8-bit ones with a scale for 256


@dataclass(frozen=True)
class Plan:
    """What `auto` resolves to: the tokens of a micro-batch, and the number of checkpointed layers."""

    tokens: int
    checkpointed_layers: int
    offloaded: int = 0  # bytes that layers keep for the backward pass in the computer's memory

    def __str__(self) -> str:
        return f", {self.checkpointed_layers} layers checkpointed" if self.checkpointed_layers else ""

    @property
    def lines(self) -> dict[str, str]:
        """A line for a table, if anything is offloaded."""
        where = "of the computer's memory hold what layers keep for the backward pass"
        return {"offloaded": f"yes: {self.offloaded / 2**30:.2f} GiB {where}"} if self.offloaded else {}


def longest_row(recipe: Recipe, stage: str, max_length: int | None = None) -> int:
    """Tokens of the longest row that a recipe allows, for its own `max_length` or another one: both answers of a pair
    at full length; for PPO and GRPO a prompt with all of its answers."""
    length = max_length or recipe.model.max_length
    if isinstance(settings := getattr(recipe, stage), PPO):
        return length + (settings.samples_per_prompt - 1) * settings.max_new_tokens
    return length if stage in ("sft", "kto") else 2 * length


def max_length_of(recipe: Recipe, stage: str, tokens: int) -> int:
    """The `max_length` at which the longest row has this many tokens."""
    if stage in RL_STAGES:
        return tokens - longest_row(recipe, stage, 1) + 1
    return tokens if stage in ("sft", "kto") else tokens // 2


class Forecast:
    """The memory of one stage of a recipe on a device, `cuda` or `cpu`, with matrix products in `dtype`.

    Attributes:
        fixed: bytes that are always in memory, by purpose.
        layers: the base's number of layers; for an ensemble, the number that keep something for the backward pass.
        members: of the ensemble that is trained; 1 without one.
        reach: the longest text that the base can read, in tokens.
        streamed: bytes of the layers that `model.stream` keeps outside of the device, all but two of them; 0 if none.
        processes: that share the micro-batches of an optimiser step, each on a device of its own.
        cards, dealt: how many of them `model.shard` deals the base out to, and its bytes that are; 1 and 0 without it.
        layers_dealt: of these bytes, those of the layers.
        most_steps: the tokens that most optimiser steps have, for `plan`, where they are known.
    """

    def __init__(
        self, recipe: Recipe, stage: str, config: PretrainedConfig, device: str, dtype: torch.dtype, processes: int = 1
    ):
        self.recipe, self.stage, self.device, self.dtype, self.processes = recipe, stage, device, dtype, processes
        self.cards = processes if recipe.model.shard else 1
        self.settings = getattr(recipe, stage)
        self.config = copy.deepcopy(config)
        layers: int = self.config.get_text_config().num_hidden_layers
        # An ensemble's adapters are on the last layers, through which each token goes once for each member.
        self.members = self.settings.members if stage == "reward" else 1
        self.layers = max(1, round(self.settings.share * layers)) if self.members > 1 else layers
        self.reach = reach_of(config) or 2**20
        self.most_steps = 2**40
        self._steps: dict[tuple[int, bool, bool], Step] = {}
        lm = self.model()
        self.fixed = self._fixed(lm)
        self._step_model = StepModel(lm, recipe, stage, device)  # cuts it down

    def with_recipe(self, recipe: Recipe) -> "Forecast":
        """The forecast for another recipe: same stage, base, device and dtype."""
        return Forecast(recipe, self.stage, self.config, self.device, self.dtype, self.processes)

    def decided(self, memory: int) -> "Forecast":
        """The forecast with `model.stream` decided: `auto` streams the layers where with all of them in memory not even
        a row of `SHORTEST` tokens would fit."""
        model, lora = self.recipe.model, self.recipe.lora
        if model.stream != "auto" or model.shard or self.device != "cuda" or model.quantization == "int8":
            return self
        if lora.dora or lora.init == "loftq":  # which start from all weights
            return self
        if self.total(SHORTEST, self.layers, offloaded=self.can_offload) <= memory:
            return self
        return self.with_recipe(self.recipe.model_copy(update={"model": model.model_copy(update={"stream": "always"})}))

    def _fixed(self, lm: PreTrainedModel) -> dict[str, int]:
        settings, width, spec = self.settings, self.dtype.itemsize, self.recipe.model
        held = {n: _held_bytes(p, n, lm, spec, width) for n, p in lm.named_parameters() if not p.requires_grad}
        layers = _bytes_of_layers(lm, held) if spec.stream == "always" else []
        self.streamed, self.dealt, self.layers_dealt, gathered = sum(layers), 0, 0, {}
        if self.cards > 1:
            parts, vocabulary = self._dealt(lm, held)
            self.layers_dealt, self.dealt = sum(parts), sum(parts) + sum(vocabulary)
            gathered = {"gathered": max(GATHERED * max(parts), 2 * max(vocabulary, default=0))}
        whole = sum(held.values()) - self.streamed - self.dealt
        new, start = sum(p.numel() for p in lm.parameters() if p.requires_grad), settings.start_from
        head = self.config.get_text_config().hidden_size if self.stage == "reward" else 0
        adapter = new if start in (None, SFT_RUN) else read_files(start).weights + head  # it may be of another rank
        frozen, trained = 0, self.members * adapter  # weights of adapters
        has_reference = self.stage in ("kto", *RL_STAGES) or (isinstance(settings, DPO) and settings.needs_reference)
        if has_reference and start is not None:
            frozen += adapter  # the reference's copy
        if isinstance(settings, PPO):
            # Reward models that aren't adapters are loaded by the time that memory is planned.
            counts = [(key, _reward_weights(s.source, self.recipe.reward, new)) for key, s in settings.sources]
            frozen += sum(sum(weights) for _, weights in counts)
            if settings.value == "adapter":  # a copy of the first reward adapter
                trained += next(chain(*(weights for key, weights in counts if key == "reward")), new)
        optimizer = "paged_adamw_8bit" if "8bit" in str(settings.trainer.get("optim", "")) else "adamw"
        autocast_copy = self.members * adapter * width if width == 2 else 0
        return {
            "base": whole + SLOTS * max(layers, default=0) + math.ceil(self.dealt / self.cards),
            **gathered,
            "adapters": (trained + frozen) * 4 + autocast_copy,
            "gradients": trained * 4,
            "optimiser": int(trained * _OPTIMIZER_BYTES[optimizer]),
        }

    def _dealt(self, lm: PreTrainedModel, held: dict[str, int]) -> tuple[list[int], list[int]]:
        """The bytes that are dealt out: of each layer, and of embeddings and output layer. Scales of linear layers in 4
        bits aren't."""
        four_bit = self.recipe.model.quantization in ("nf4", "fp4")
        parts = {
            n: p.numel() // 2 if four_bit and is_quantized(p, n, lm) else held.get(n, 0)
            for n, p in lm.named_parameters()
        }
        names = {parameter: name for name, parameter in lm.named_parameters()}
        ends = [module for module in (lm.get_input_embeddings(), lm.get_output_embeddings()) if module is not None]
        shared = {names[cast(nn.Parameter, module.weight)] for module in ends}  # they may have one weight
        return _bytes_of_layers(lm, parts), [parts[name] for name in shared]

    def model(self) -> PreTrainedModel:
        """The base with the stage's adapter on the meta device."""
        return meta_model(self.recipe, self.stage, self.config, self.dtype)

    def step(self, tokens: int, *, checkpointing: bool, offloaded: bool = False) -> Step:
        """The memory of a micro-batch of this many tokens."""
        key = tokens, checkpointing, offloaded
        if key not in self._steps:
            self._steps[key] = self._step_model.run(
                self.members * tokens, checkpointing=checkpointing, offloaded=offloaded
            )
        return self._steps[key]

    def total(self, tokens: int, checkpointed: int, *, offloaded: bool = False) -> int:
        """The peak in bytes, with this many layers checkpointed."""
        return sum(self.parts(tokens, checkpointed, offloaded=offloaded).values())

    def parts(self, tokens: int, checkpointed: int, *, offloaded: bool = False) -> dict[str, int]:
        """Bytes at the peak, by purpose; `offloaded` with all layers checkpointed. The first layers are checkpointed,
        so when the backward comes to them, it has freed what the layers behind them kept."""
        share = min(1, checkpointed / self.layers)
        ways = [(share, True), (1 - share, False)]
        steps = [(weight, self.step(tokens, checkpointing=way, offloaded=offloaded)) for weight, way in ways if weight]
        activations = [int(self._at_once * weight * step.activations) for weight, step in steps]
        moments = [
            {"activations": sum(activations), "logits": max(step.logits for _, step in steps)},
            {"activations": sum(activations), "backward": steps[-1][1].backward},
            {"activations": activations[0], "backward": steps[0][1].backward},
        ]
        return self.fixed | max(moments, key=lambda moment: sum(moment.values()))

    @property
    def _at_once(self) -> int:
        """The roles whose activations are kept at the same time: where layers are streamed, PPO's policy and value
        model go through them together."""
        return 2 if self.streamed and isinstance(self.settings, PPO) and self.settings.value == "adapter" else 1

    def largest(self, memory: int, checkpointed: int, *, offloaded: bool = False) -> int:
        """The largest number of tokens that fits; 0 if none does."""
        total = partial(self.total, checkpointed=checkpointed, offloaded=offloaded)
        low, high = 64, 4096
        if (at_low := total(low)) > memory:
            return 0
        if (at_high := total(high)) <= memory:  # the larger of some straight lines, so at most where the last one leads
            per_token = (total(2 * high) - at_high) / high
            low, at_low, high = high, at_high, high + 32 + int((memory - at_high) / per_token)
            if high > _LONG:
                return high - 32
            at_high = total(high)
        while high - low > max(32, low // 256) and at_high > memory:
            guess, margin = low + (memory - at_low) * (high - low) // (at_high - at_low), (high - low) // 8
            guess = min(max(guess, low + margin), high - margin)
            if (found := total(guess)) <= memory:
                low, at_low = guess, found
            else:
                high, at_high = guess, found
        return low

    def furthest(self, memory: int) -> int:
        """The largest number of tokens that fits by all means."""
        return self.largest(memory, self.layers, offloaded=self.can_offload)

    @property
    def can_offload(self) -> bool:
        return self.device == "cuda" and self.settings.checkpointed_layers == "auto" and self.cards == 1

    def plan(self, memory: int, longest: int, host: float = math.inf) -> Plan | None:
        """A micro-batch that keeps the device busy, or at least holds the longest row, with as few checkpointed layers
        as it needs, unless the recipe sets their number. Where the longest row fits in no other way, what layers keep
        is offloaded. None if not even then it fits.

        Args:
            memory: bytes that may be used in all.
            longest: tokens of the longest row, or of a whole micro-batch if the recipe sets its size.
            host: bytes of the computer's memory for what is offloaded.
        """
        wanted = max(BUSY_TOKENS[self.device], longest) if self.settings.micro_batch_size == "auto" else longest
        share = math.ceil(self.most_steps / self.processes)  # of a step, which a process runs
        # All layers are copied or gathered for each micro-batch: best one for a whole step.
        if (self.streamed or self.dealt) and wanted > longest:
            wanted = max(wanted, min(share, math.ceil(self.settings.batch_size / self.processes) * longest))
        given = self.settings.checkpointed_layers
        most = self.layers if given == "auto" else min(given, self.layers)
        tokens = wanted if self.total(wanted, most) <= memory else min(wanted, self.largest(memory, most))
        if tokens < longest:
            return self._offloaded(memory, longest, host) if self.can_offload else None
        if given != "auto":
            return Plan(tokens, most)
        if self.settings.micro_batch_size == "auto" and self.total(tokens, 0) > memory:
            # Room for more than a step would only have more layers computed twice.
            tokens = min(tokens, max(longest, share))
        # More checkpointed layers take less memory: the first count that fits. All layers fit, as `largest` found.
        return Plan(tokens, bisect_left(range(most), -memory, key=lambda layers: -self.total(tokens, layers)))

    def _offloaded(self, memory: int, longest: int, host: float) -> Plan | None:
        if not longest <= self.largest(memory, self.layers, offloaded=True):
            return None
        held = self._at_once * self.step(longest, checkpointing=True, offloaded=True).held
        return Plan(longest, self.layers, held) if held <= host else None


def _bytes_of_layers(lm: PreTrainedModel, held: dict[str, int]) -> list[int]:
    """The bytes of each layer's weights, from those of the weights by name; none if layers can't be streamed."""
    layers = decoder_layers(lm)
    parts = {p: n for n, p in lm.named_parameters()}
    return [sum(held.get(parts[p], 0) for p in layer.parameters()) for layer in layers or ()]


def _reward_weights(source: str, own: Reward | None, new: int) -> list[int]:
    """How many weights the adapters of a reward have, of an ensemble those of each member; empty if it is no adapter.
    The recipe's own are counted from its settings, by a `new` adapter on all layers; a `UserError` if others can't be
    read."""
    if function_of(source) or is_own_model(source):
        return []
    if is_own_run("reward", source):
        members = 1 if own is None or own_member(source) else own.members
        return [int(new * own.share) if own else new] * members
    folder = reward_adapter(source)
    return [read_files(each).weights for each in adapters_in(folder)] if folder else []


def _held_bytes(parameter: nn.Parameter, name: str, lm: PreTrainedModel, spec: Model, width: int) -> int:
    """Bytes of a weight in memory. 4-bit weights have a float32 scale per 64; double quantisation packs that into a
    byte, with a float32 scale per 256 of these."""
    count = parameter.numel()
    if (kind := experts_kind(lm.config, spec.quantization)) and is_expert(name, lm):
        return held_bytes(parameter.shape, kind, double_quant=spec.double_quant)
    if spec.quantization == "none" or not is_quantized(parameter, name, lm):
        return count * width
    if spec.quantization == "int8":
        return count + 4 * parameter.shape[0]
    scales = count / 64
    return math.ceil(count / 2 + (scales + scales / 256 * 4 if spec.double_quant else 4 * scales))


def tokens_of_most_steps(rows: Sequence[int], batch_size: int) -> int:
    """The tokens that all but a few per cent of the optimiser steps stay within, from those of the rows: the mean of a
    step and two standard deviations."""
    spread = pstdev(rows) * math.sqrt(batch_size)
    return math.ceil(batch_size * fmean(rows) + 2 * spread)


def usable_memory(device: str, held: int = 0) -> int:
    """Bytes that this process may use in tensors, including what it holds already. For a CPU the caller says how much
    that is, as `held`: weights that PyTorch reads straight from a file are free memory to the system."""
    if device == "cpu":
        own = psutil.Process().memory_info()
        in_memory = min(held, own.rss - getattr(own, "shared", 0))
        return int((psutil.virtual_memory().available + in_memory) * USABLE["cpu"])
    # What CUDA and other programs hold is neither free nor reserved by PyTorch. By now the base has run once, so that
    # CUDA has loaded its kernels.
    free, _ = torch.cuda.mem_get_info()
    settings = "".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    grow = "expandable_segments:true" in settings.lower().replace(" ", "")
    return int((free + torch.cuda.memory_reserved()) * USABLE["cuda" if grow else "cuda, segments of fixed size"])


def usable_by_offload() -> int:
    """Bytes of the computer's memory that may be pinned for what is offloaded."""
    return psutil.virtual_memory().available * 3 // 4


def usable_of_card(size: int) -> int:
    """The same of a card with this many bytes that isn't there."""
    return int((size - CUDA_CONTEXT) * USABLE["cuda"])


def free_memory(device: str) -> int:
    """Bytes that this process may still allocate."""
    if device == "cpu":
        return usable_memory(device)
    return max(0, usable_memory(device) - torch.cuda.memory_allocated())
