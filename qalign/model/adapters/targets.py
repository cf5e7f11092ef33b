"""Which layers of a base an adapter is put on, from a recipe or from a stranger's file."""

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import peft
import regex
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qalign.config.recipe import Lora
from qalign.errors import UserError, did_you_mean
from qalign.model.adapters.files import LoraSettings
from qalign.model.experts.weights import expert_tensors
from qalign.model.origin import note

OUTPUT_LAYER_TAKEN = "the output layer can't have an adapter, as log-probs use its frozen weight"
LINEAR = (nn.Linear, Conv1D)
ADAPTABLE = (*LINEAR, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)  # by PEFT's LoRA
HEADS = ("score", "classifier")  # of models that give scores: set apart by `Base`
MATCHING_SECONDS = 2.0  # for all regular expressions of one adapter
MAX_COUNT = 10_000  # product of the counts in a regular expression, such as {2,9}: compiling has no time limit
_PLAIN, _COUNT = re.compile(r"[\w.-]+"), re.compile(r"\{(\d{0,20}),?(\d{0,20})\}")


def own_modules(lm: nn.Module) -> dict[str, nn.Module]:
    """The base's own modules, by the names that they have without an adapter."""
    found, wrapped = {}, ()
    for name, module in lm.named_modules():
        if name.startswith(wrapped):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            wrapped += (f"{name}.",)
            module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        found[name] = module
    return found


def own_layers(lm: nn.Module) -> dict[str, nn.Module]:
    """The base's own layers that can have an adapter, by name."""
    modules = own_modules(lm).items()
    return {name: module for name, module in modules if isinstance(module, ADAPTABLE) and name not in HEADS}


def text_layers(lm: PreTrainedModel) -> dict[str, nn.Module]:
    """Those of `own_layers` that texts train: not those of a vision tower, the output layer, routers, or layers that
    the forward of a text leaves out."""
    decoder = lm.get_decoder()
    prefix = next(f"{name}." if name else "" for name, module in lm.named_modules() if module is decoder)
    others = {name_of(lm, lm.get_output_embeddings()), *routers(lm)}
    layers = {name: layer for name, layer in own_layers(lm).items() if name.startswith(prefix) and name not in others}
    used = _used(decoder, list(layers.values()))
    return {name: layer for name, layer in layers.items() if layer in used}


@torch.no_grad()
def _used(decoder: nn.Module, layers: Sequence[nn.Module]) -> set[nn.Module]:
    """Those of these layers that the forward of a text calls; all of them if the model can't be run like that."""
    try:
        ids = torch.arange(3, device=next(decoder.parameters()).device)[None]
        return _called_by(lambda: decoder(input_ids=ids, use_cache=False), layers)
    except Exception:  # on the meta device, whatever a model's code does with numbers that aren't there
        return set(layers)


def _called_by(run: Callable[[], object], modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Those of these modules that `run` calls."""
    called: set[nn.Module] = set()
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(lambda module, _: called.add(module)).remove)
        run()
    return called


def routers(lm: nn.Module) -> list[str]:
    """The names of the layers that choose a token's experts: next to a module with experts, they have an output for
    each expert. They get no adapter, so that all roles choose by the same weights."""
    layers, found = own_layers(lm), []
    for name, count in expert_tensors(lm).items():
        block = name.rpartition(".")[0].rpartition(".")[0]
        found += [n for n, layer in layers.items() if n.startswith(f"{block}.") and _outputs(layer) == count]
    return list(dict.fromkeys(found))


def _outputs(layer: nn.Module) -> int | None:
    return getattr(layer, "out_features", None)


def _refused_by_peft(lm: PreTrainedModel, leaves: Iterable[str]) -> set[str]:
    """The names of layers on which PEFT puts no adapter in this type of model. It refuses some in state spaces, and
    takes some for experts of a checkpoint of transformers 4. It is asked, on layers of one weight."""
    refused = set()
    for leaf in leaves:
        model: Any = nn.Module()
        model.config = lm.config
        model.add_module(leaf, nn.Linear(1, 1))
        try:
            peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=[leaf]), model)
        except ValueError:
            refused.add(leaf)
        else:
            refused |= set() if isinstance(getattr(model, leaf), LoraLinear) else {leaf}
    return refused


def leave_out(lm: PreTrainedModel, run: Callable[[], object]) -> list[str]:
    """Releases what no text reaches, such as the tower that reads images, and returns the names. Of the layers and the
    experts none is released: `run`, which runs a text through the model, may not reach every expert."""
    found = list(_unreached(lm, _called_by(run, lm.modules())))
    for parent, name, _ in found:
        setattr(parent, name, None)
    try:
        if found:
            run()
    except (AttributeError, TypeError):  # its weights are read past its forward
        for parent, name, module in found:
            setattr(parent, name, module)
        return []
    return [name for _, name, _ in found]


def _unreached(module: nn.Module, called: set[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The largest modules with weights that weren't called: (its parent, its name there, the module)."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            continue
        if called.isdisjoint(child.modules()):
            if any(True for _ in child.parameters()):
                yield module, name, child
        else:
            yield from _unreached(child, called)


def name_of(lm: nn.Module, wanted: nn.Module | None) -> str | None:
    """The name of a module in a model; None if it is not there."""
    return next((name for name, module in lm.named_modules() if module is wanted), None) if wanted is not None else None


def decoder_layers(lm: PreTrainedModel) -> nn.ModuleList | None:
    """The layers of the language model; None if they don't stand in one list."""
    count = lm.config.get_text_config().num_hidden_layers
    lists = (module for module in lm.get_decoder().modules() if isinstance(module, nn.ModuleList))
    return next((module for module in lists if len(module) == count), None)


def last_layers(lm: PreTrainedModel, share: float) -> list[nn.Module]:
    """This share of the layers, from the last one: at least one. A `UserError` if they don't stand in one list."""
    if (layers := decoder_layers(lm)) is None:
        raise UserError(f"reward.members: the layers of {type(lm).__name__} don't stand in one list; set members 1")
    return list(layers)[-max(1, round(share * len(layers))) :]


def new_config(lora: Lora, lm: PreTrainedModel, name: str, share: float = 1.0) -> peft.LoraConfig:
    """PEFT's config for a new adapter of a recipe on a base called `name`, on the last `share` of its layers; a
    `UserError` if its targets don't fit."""
    chosen = _targets(lora.targets, lm, name)
    if share < 1:
        inside = {module for layer in last_layers(lm, share) for module in layer.modules()}
        chosen = [n for n, layer in own_layers(lm).items() if layer in inside and _ends_with(n, chosen)]
        if not chosen:
            raise UserError(f"lora.targets: fits no layer in the last {share:.0%}; raise reward.member_layers")
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (PEFT only divides by it, a float works)
        lora_dropout=lora.dropout,
        target_modules=chosen,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
    )


def _targets(targets: str | list[str], lm: PreTrainedModel, base: str) -> list[str]:
    """The names to give PEFT for `lora.targets`."""
    layers, output = text_layers(lm), name_of(lm, lm.get_output_embeddings())
    linear = [name for name, layer in layers.items() if isinstance(layer, LINEAR)]
    refused = _refused_by_peft(lm, dict.fromkeys(name.rpartition(".")[2] for name in linear))
    linear = [name for name in linear if name.rpartition(".")[2] not in refused]
    if targets == "all-linear":
        return linear
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    has = f"; it has {', '.join(names[:12])}{' …' if len(names) > 12 else ''}"
    for target in targets:
        if not any(_ends_with(name, [target]) for name in layers):
            if output and _ends_with(output, [target]):
                raise UserError(f"lora.targets: '{target}': {OUTPUT_LAYER_TAKEN}")
            reason = _why_none(target, lm) or f"fits no layer of {base}'s language model{did_you_mean(target, names)}"
            raise UserError(f"lora.targets: '{target}' {reason}{has}")
        if target.rpartition(".")[2] in refused:
            raise UserError(f"lora.targets: PEFT puts no adapter on '{target}' of {lm.config.model_type}{has}")
    others = [name for name in own_layers(lm) if name not in layers and name != output]
    if any(_ends_with(name, targets) for name in others):  # of a vision tower, or routers
        return [name for name in layers if _ends_with(name, targets)]
    return list(targets)


def _why_none(target: str, lm: PreTrainedModel) -> str | None:
    """Why a target that fits no layer that texts train gets no adapter, if it is one of a mixture of experts."""
    tensors = expert_tensors(lm)
    if any(_ends_with(name, [target]) or _ends_with(name.rpartition(".")[0], [target]) for name in tensors):
        return "holds all experts in one tensor, on which PEFT puts no adapter that works in 4 bits and by roles"
    if any(_ends_with(name, [target]) for name in routers(lm)):
        return "chooses the experts, so it gets no adapter: all roles must choose by the same weights"
    return None


def _ends_with(name: str, targets: Iterable[str]) -> bool:
    """Whether one of the targets names this layer, as PEFT reads a list of targets."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


class Matcher:
    """Matches layer names with regular expressions in bounded time. With `re`, as in PEFT, a bad one runs for ever."""

    def __init__(self, where: str):
        self.where, self.deadline = where, time.monotonic() + MATCHING_SECONDS

    def fitting(self, pattern: str, names: Iterable[str]) -> list[str]:
        """The names that the pattern matches completely; a `UserError` if it can't be read or takes too long."""
        shown = f"{self.where}: the regular expression {pattern[:60]!r}{'…' if len(pattern) > 60 else ''}"
        try:
            counts = (max(1, int(one)) for pair in _COUNT.findall(pattern) for one in pair if one)
            if math.prod(counts) > MAX_COUNT or time.monotonic() > self.deadline:
                raise TimeoutError
            re.compile(pattern)  # refuses what only `regex` knows, such as recursion, which can take gigabytes
            compiled = regex.compile(pattern)
            return [n for n in names if compiled.fullmatch(n, timeout=max(1e-3, self.deadline - time.monotonic()))]
        except TimeoutError:
            raise UserError(f"{shown} takes too long on the names of layers; write a list of names") from None
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise UserError(f"{shown} can't be used ({error}); write a list of names") from None


def config_of(settings: LoraSettings, lm: PreTrainedModel, folder: str) -> tuple[peft.LoraConfig, dict[str, int]]:
    """PEFT's config for a saved adapter, and the rank of each layer that it gets an adapter on.

    Regular expressions are replaced by the names that they match, so that PEFT, which matches without a time limit,
    sees none from a stranger's file.
    """
    try:
        config = peft.LoraConfig(**settings.model_dump(exclude_none=True))
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}: adapter_config.json contradicts itself: {error}") from None
    config.modules_to_save = [name for name in config.modules_to_save or () if name not in HEADS] or None
    layers, matcher = own_layers(lm), Matcher(folder)
    if isinstance(config.target_modules, str):
        linear = [name for name, layer in text_layers(lm).items() if isinstance(layer, LINEAR)]
        all_linear = config.target_modules.lower() == "all-linear"
        config.target_modules = linear if all_linear else matcher.fitting(config.target_modules, layers)
    if isinstance(config.exclude_modules, str):
        config.exclude_modules = matcher.fitting(config.exclude_modules, layers)
    fitting = [name for name in layers if check_target_module_exists(config, name)]
    if changed := [name for name in routers(lm) if name in fitting]:
        note(f"note: {folder} changes routers ({changed[0]}), so its role chooses experts as no other role does")
    ranks: dict[str, int] = dict.fromkeys(fitting, config.r)
    for key in ("rank_pattern", "alpha_pattern"):
        left, plain = fitting, {}
        numbers: dict[str, Any] = getattr(config, key)
        for pattern, number in numbers.items():  # the first one that fits a layer counts
            found = matcher.fitting(rf"(.*\.)?({pattern})", left)
            left = [name for name in left if name not in found]
            plain |= {pattern if _PLAIN.fullmatch(pattern) else name: number for name in found}
            if key == "rank_pattern":
                ranks.update((name, number) for name in found)
        setattr(config, key, plain)
    config.init_lora_weights = True  # any other initialisation would be computed and then overwritten
    return config, ranks
