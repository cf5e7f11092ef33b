"""How an adapter may begin, other than as no change."""

import bitsandbytes
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel


@torch.no_grad()
def mend_rounding(model: PeftModel, original: PreTrainedModel, adapter: str) -> None:
    """LoftQ's start in one step (Li et al. 2023, arXiv:2310.08659, T = 1): each layer's adapter begins as the best
    approximation of its rank to what 4-bit rounding took away, W - Q ≈ scale · B A.

    PEFT's own `replace_lora_weights_loftq` needs CUDA, and is right only for alpha = r, as it leaves the scale out.

    Args:
        model: with an adapter of that name. Where a layer is not 4-bit it stays as it is.
        original: the same model unquantised.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        held = module.get_base_layer().weight
        if (state := getattr(held, "quant_state", None)) is None:  # left unquantised: nothing to mend
            continue
        rounded = bitsandbytes.functional.dequantize_4bit(held.data, state).float()
        weight = original.get_submodule(name.removeprefix("base_model.model.")).weight
        rank = module.r[adapter]
        few = min(2 * rank, *rounded.shape)  # twice the rank: the randomised SVD is then good for the first half
        left, sizes, right = torch.svd_lowrank(weight.to(rounded.device).float() - rounded, q=few, niter=4)
        root = sizes[:rank].sqrt()
        # A small layer has fewer directions than a high rank: the others begin as LoRA's own, which change nothing.
        module.lora_A[adapter].weight[: len(root)] = (right[:, :rank] * root).T
        module.lora_B[adapter].weight[:, : len(root)] = left[:, :rank] * root / module.scaling[adapter]
