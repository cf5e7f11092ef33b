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
        model: with an adapter of that name on 4-bit layers.
        original: the same model unquantised.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        held = module.get_base_layer().weight
        rounded = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state).float()
        weight = original.get_submodule(name.removeprefix("base_model.model.")).weight
        rank = module.r[adapter]
        few = min(2 * rank, *rounded.shape)  # twice the rank: the randomised SVD is then good for the first half
        left, sizes, right = torch.svd_lowrank(weight.to(rounded.device).float() - rounded, q=few, niter=4)
        root = sizes[:rank].sqrt()
        module.lora_A[adapter].weight.data = (right[:, :rank] * root).T.contiguous()
        module.lora_B[adapter].weight.data = left[:, :rank] * root / module.scaling[adapter]
