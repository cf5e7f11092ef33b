"""The weights of adapters on a base: LoftQ's initialisation, reading with checks, saving."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import bitsandbytes.functional
import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import pad_for_scores
from qalign.errors import UserError
from qalign.model.adapters import generation_config
from qalign.model.adapters.files import HEAD, SCORE_HEAD, WEIGHTS, AdapterFiles, read_files
from qalign.model.adapters.targets import OUTPUT_LAYER_TAKEN, config_of, name_of, own_layers, own_modules
from qalign.model.loading import save_tokenizer
from qalign.model.origin import Origin

PREFIX = "base_model.model."  # of the names in an adapter's file


@torch.no_grad()
def start_with_loftq(model: nn.Module, original: PreTrainedModel, adapter: str) -> None:
    """LoftQ initialisation with one step (Li et al. 2023, arXiv:2310.08659, T = 1): each layer's adapter starts as the
    best low-rank approximation of the quantisation error, W - Q ≈ scale · B A, where W are the weights of `original`.
    Layers that are not in 4 bits keep LoRA's initialisation.

    PEFT's own `replace_lora_weights_loftq` needs CUDA, and is right only for alpha = r, as it leaves the scale out.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        weight = cast(Tensor, module.get_base_layer().weight)
        if (state := getattr(weight, "quant_state", None)) is None:
            continue
        rounded = bitsandbytes.functional.dequantize_4bit(weight.data, state).float()
        exact = original.get_submodule(name.removeprefix("base_model.model.")).weight
        rank = module.r[adapter]
        directions = min(2 * rank, *rounded.shape)  # twice the rank, as only the first half of a randomised SVD is good
        error = cast(Tensor, exact).to(rounded.device).float() - rounded
        left, sizes, right = torch.svd_lowrank(error, q=directions, niter=4)
        root = sizes[:rank].sqrt()
        lora_a, lora_b = (cast(nn.Linear, part[adapter]).weight for part in (module.lora_A, module.lora_B))
        # A small layer has fewer directions than a high rank; the rest keep LoRA's own start, which changes nothing.
        lora_a[: len(root)] = (right[:, :rank] * root).T
        lora_b[:, : len(root)] = left[:, :rank] * root / module.scaling[adapter]


def read(folder: str, lm: PreTrainedModel, base: str, *, trainable: bool) -> tuple[peft.LoraConfig, dict[str, Tensor]]:
    """A saved adapter's config and tensors, checked as far as possible before PEFT touches the model, as PEFT can't
    undo everything.

    Args:
        base: what the base is called, for messages.

    Raises:
        UserError: the adapter is damaged, was made on another base, or can't share the base with other roles.
    """
    files = read_files(folder)
    config, ranks = config_of(files.settings, lm, folder)
    config.inference_mode = not trainable
    try:
        _check_vocabulary(files, lm, config, base)
        _check_shapes(files, lm, config, ranks, base)
        weights = load_file(Path(folder) / WEIGHTS, device=str(lm.device))
        if broken := next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None):
            raise UserError(f"{broken} holds numbers that aren't finite; train the adapter again")
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    layers = own_layers(lm)
    for name in _vocabulary_layers(lm):  # PEFT may save copies of the base's own, which are not the adapter's
        for key in (f"{PREFIX}{name}.weight", f"{PREFIX}{name}.base_layer.weight"):
            own = cast(Tensor, layers[name].weight)
            if key in weights and torch.equal(weights[key].to(own.dtype), own) and not _is_saved(name, config):
                del weights[key]
    return config, weights


def _check_vocabulary(files: AdapterFiles, lm: PreTrainedModel, config: peft.LoraConfig, base: str) -> None:
    """Refuses an adapter of another vocabulary, and one that changes the output layer."""
    rows = cast(Tensor, lm.get_input_embeddings().weight).shape[0]
    for name in _vocabulary_layers(lm):
        for part, dim in (("weight", 0), ("base_layer.weight", 0), ("lora_embedding_A", 1), ("lora_B.weight", 0)):
            shape = files.shapes.get(f"{PREFIX}{name}.{part}", ())
            if len(shape) == 2 and shape[dim] != rows:
                raise UserError(
                    f"was made with a vocabulary of {shape[dim]} rows, {base} has {rows}; merge it into the base that "
                    "it was made on, and use that as model.base"
                )
    output = name_of(lm, lm.get_output_embeddings())
    if output and (check_target_module_exists(config, output) or _is_saved(output, config)):
        raise UserError(OUTPUT_LAYER_TAKEN)
    if config.trainable_token_indices and lm.config.get_text_config().tie_word_embeddings:
        raise UserError(f"trains rows of the embeddings, which are {base}'s output layer too; use LoRA alone")


def _check_shapes(
    files: AdapterFiles, lm: PreTrainedModel, config: peft.LoraConfig, ranks: dict[str, int], base: str
) -> None:
    """Compares the tensors with the config and the base, before PEFT makes room for what the config says."""
    hidden, shapes = lm.config.get_text_config().hidden_size, files.shapes
    if (head := shapes.get(SCORE_HEAD)) and head[1] != hidden:
        raise UserError(f"was trained on a base of hidden size {head[1]}, {base} has {hidden}")
    if not ranks:
        raise UserError(f"its target_modules fit no layer of {base}; was it made on another base?")
    kept = {shape[0] for name, shape in shapes.items() if shape and (".lora_A." in name or "lora_embedding_A" in name)}
    if other := next((name for name, rank in ranks.items() if rank not in kept), None):
        raise UserError(f"adapter_config.json gives {other} the rank {ranks[other]}, which no tensor has")
    wanted = {}
    for name, module in own_modules(lm).items():
        if name and _is_saved(name, config):
            if next(module.children(), None):
                raise UserError(f"its modules_to_save has {name}, which is more than one layer; use LoRA alone")
            wanted |= {f"{name}.{part}": tuple(own.shape) for part, own in module.named_parameters()}
    rows = config.trainable_token_indices or []
    if rows:
        (name,) = (_vocabulary_layers(lm) or [""])[:1]
        named: dict[str, list[int]] = rows if isinstance(rows, dict) else {name: rows}
        if other := next((place for place in named if not name.endswith(place)), None):
            raise UserError(f"its trainable_token_indices name {other}, which is not the input embeddings")
        numbers = next(iter(named.values()))
        wanted[f"{name}.token_adapter.trainable_tokens_delta"] = (len(numbers), hidden)
        if not all(0 <= number < len(cast(Any, lm.get_input_embeddings().weight)) for number in numbers):
            raise UserError(f"its trainable_token_indices lie outside of {base}'s vocabulary")
    for key, shape in wanted.items():
        if shapes.get(f"{PREFIX}{key}") != shape:
            found = shapes.get(f"{PREFIX}{key}")
            has = f"has {PREFIX}{key} in the shape {found}" if found else f"lacks {PREFIX}{key}"
            raise UserError(f"{has}; expected {shape}")


def _vocabulary_layers(lm: PreTrainedModel) -> list[str]:
    """The names of the input embeddings and of the output layer."""
    names = (name_of(lm, layer) for layer in (lm.get_input_embeddings(), lm.get_output_embeddings()))
    return [name for name in names if name]


def _is_saved(name: str, config: peft.LoraConfig) -> bool:
    """Whether an adapter has its own copy of a layer, as PEFT reads `modules_to_save`."""
    return any(name.endswith(saved) for saved in config.modules_to_save or ())


def fill(model: peft.PeftModel, role: str, weights: dict[str, Tensor], folder: str, base: str) -> None:
    """Sets the tensors of an adapter that PEFT has added; a `UserError` if they aren't exactly its tensors."""
    expected = peft.get_peft_model_state_dict(model, adapter_name=role, save_embedding_layers=False)
    for name in expected.keys() & weights.keys():
        found, own = tuple(weights[name].shape), tuple(expected[name].shape)
        if found != own:
            raise UserError(f"{folder}: doesn't fit {base}: {name} has the shape {found}, expected {own}")
    mine = adapter_parameters(model, role).keys()
    if others := weights.keys() & ({name for name, _ in model.named_parameters()} - mine):
        raise UserError(f"{folder}: would overwrite the base's own {min(others)}; adapters must leave the base alone")
    result = peft.set_peft_model_state_dict(model, weights, adapter_name=role)
    if unused := result.unexpected_keys:
        raise UserError(
            f"{folder}: this adapter doesn't fit {base}, which has no {unused[0]} ({len(unused)} such tensors)"
        )
    if missing := mine & set(result.missing_keys):
        raise UserError(
            f"{folder}: lacks {len(missing)} of its {len(mine)} tensors, such as {min(missing)}; copy it again"
        )


def adapter_parameters(model: nn.Module, role: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by name. They are found by their place, as a layer of the base may be named like
    the role."""
    found: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            for attribute in module.adapter_layer_names:
                held: Any = getattr(module, attribute, ())
                if role in held:
                    place, part = f"{prefix}.{attribute}.{role}", held[role]
                    named = part.named_parameters() if isinstance(part, nn.Module) else [("", part)]
                    found |= {f"{place}.{name}".rstrip("."): parameter for name, parameter in named}
    return found


def make_trainable(model: nn.Module, roles: Iterable[str]) -> None:
    """Makes the adapters of these roles trainable, and nothing else: PEFT goes by which adapter is active."""
    model.requires_grad_(False)
    for role in roles:
        for parameter in adapter_parameters(model, role).values():
            parameter.requires_grad_(True)


def save(
    model: peft.PeftModel, role: str, folder: Path, template: ChatTemplate, origin: Origin, *, exact_names: bool
) -> None:
    """Writes an adapter with the tokenizer and its chat template into a folder: one that gives scores as PEFT saves a
    sequence classifier's, one that gives answers with how to generate them. `exact_names` names each layer in full, as
    the checkpoint has others whose names end alike."""
    config, lm = cast(peft.LoraConfig, model.peft_config[role]), cast(PreTrainedModel, model.get_base_model())
    config.base_model_name_or_path, config.revision = origin.source, origin.hub_revision
    if exact_names:
        layers = [(name, layer) for name, layer in lm.named_modules() if isinstance(layer, LoraLayer)]
        config.target_modules = [name for name, layer in layers if role in layer.r]
    gives_scores = HEAD in (config.modules_to_save or ())
    config.task_type = peft.TaskType.SEQ_CLS if gives_scores else peft.TaskType.CAUSAL_LM
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # PEFT writes into a folder of the role's name
        model.save_pretrained(temporary, selected_adapters=[role], save_embedding_layers=False)
        saved = Path(temporary) / role
        usual, tokenizer = template.tokenizer.pad_token, template.tokenizer
        tokenizer.pad_token = pad_for_scores(template) if gives_scores else usual
        save_tokenizer(tokenizer, saved)
        tokenizer.pad_token = usual
        if not gives_scores:
            generation_config.trained(lm, template).save_pretrained(saved)
        for file in saved.iterdir():
            file.replace(folder / file.name)
