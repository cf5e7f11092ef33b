"""LoRA adapters as PEFT configs and files: their settings, LoftQ's initialisation, reading with checks, saving."""

import tempfile
from pathlib import Path
from typing import cast

import bitsandbytes.functional
import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qalign.config.recipe import Lora
from qalign.errors import UserError
from qalign.model.loading import save_tokenizer
from qalign.model.origin import Origin

SCORE_HEAD = "base_model.model.score.weight"  # its name in the file of a sequence classifier's adapter
OUTPUT_LAYER_TAKEN = "{}: the output layer can't have an adapter, as log-probs use its frozen weight"
# PEFT initialisations that move part of the base's weights into the adapter: on the unchanged base they are wrong.
_REBASED = ("pissa", "olora", "corda", "lora_ga")


def new_config(lora: Lora, task_type: peft.TaskType = peft.TaskType.CAUSAL_LM) -> peft.LoraConfig:
    """PEFT's config for a new adapter of a recipe."""
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (PEFT only divides by it, a float works)
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
        task_type=task_type,
    )


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


def read(folder: str, *, trainable: bool, device: torch.device) -> tuple[peft.LoraConfig, dict[str, Tensor]]:
    """An adapter's settings and weights from a folder that PEFT saved.

    Raises:
        UserError: it is of a kind that can't share a base. For a broken folder, whatever PEFT or safetensors raises.
    """
    config = peft.PeftConfig.from_pretrained(folder, trust_remote_code=False)
    if config.peft_type is None:
        raise UserError(f"{folder}: adapter_config.json doesn't say what kind of adapter this is")
    if config.is_prompt_learning:
        raise UserError(f"{folder}: prompt tuning can't share a base between roles; use LoRA")
    config = cast(peft.LoraConfig, config)
    if (bias := getattr(config, "bias", "none")) != "none":
        raise UserError(f"{folder}: an adapter with bias '{bias}' changes the base itself; use 'none'")
    init = str(getattr(config, "init_lora_weights", True))
    if init.startswith(_REBASED):
        raise UserError(f"{folder}: a '{init}' adapter needs a base of its own; convert it to plain LoRA")
    config.init_lora_weights = True  # any other initialisation would be computed and then overwritten
    config.inference_mode = not trainable
    weights = peft.load_peft_weights(folder, device=str(device))
    if config.task_type == peft.TaskType.SEQ_CLS and SCORE_HEAD not in weights:
        raise UserError(f"{folder}: this reward adapter has lost its score head; train it again")
    return config, weights


def save(model: peft.PeftModel, role: str, folder: Path, tokenizer: PreTrainedTokenizerBase, origin: Origin) -> None:
    """Writes an adapter with the tokenizer and its chat template into a folder."""
    config = cast(peft.LoraConfig, model.peft_config[role])
    config.base_model_name_or_path, config.revision = origin.source, origin.hub_revision
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # PEFT writes into a folder of the role's name
        model.save_pretrained(temporary, selected_adapters=[role], save_embedding_layers=False)
        save_tokenizer(tokenizer, Path(temporary) / role)
        for file in (Path(temporary) / role).iterdir():
            file.replace(folder / file.name)
