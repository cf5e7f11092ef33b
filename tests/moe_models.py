"""Tiny random mixtures of experts, saved as folders with a tokenizer."""

import json
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.conftest import ROOT

TOKENIZER = ROOT / "tests" / "fixtures" / "tokenizers" / "llama3"
MIXED = ["linear_attention", "full_attention"]
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8}
MLA |= {"qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
LINEAR |= {"linear_value_head_dim": 16, "shared_expert_intermediate_size": 32, "layer_types": MIXED}

# What differs between them: gates joined or interleaved, weights transposed, biases, no gate, shared experts, routers.
FAMILIES = {
    "qwen3_moe": {},
    "gpt_oss": {},
    "mixtral": {},
    "olmoe": {},
    "glm4_moe": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v3": MLA | {"first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "qwen3_next": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0},
    "jamba": {
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "expert_layer_offset": 0,
        "expert_layer_period": 1,
    },
    "nemotron_h": {"layers_block_type": ["moe", "attention"]},
}


def config(name: str, **more):
    """A config with the common small sizes that its class knows."""
    made = CONFIG_MAPPING[name]
    known = {field for cls in made.__mro__ for field in getattr(cls, "__annotations__", {})}
    small = {
        "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
        "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    return made(**{key: value for key, value in small.items() if key in known} | FAMILIES.get(name, {}) | more)


def save(name: str, folder: Path, **more) -> str:
    """Saves a random model of a family; its weights are large enough for experts to matter."""
    torch.manual_seed(0)
    lm = tf.AutoModelForCausalLM.from_config(config(name, **more))
    for parameter in lm.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
    lm.save_pretrained(folder)
    tf.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return str(folder)


def publish_in_mxfp4(folder: Path) -> str:
    """Turns a gpt-oss folder into one as it is published: bytes of two 4-bit numbers, and exponents, both random."""
    file = folder / "model.safetensors"
    weights, generator = load_file(file), torch.Generator().manual_seed(1)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        scales = (experts, outputs, inputs // 32)
        weights[f"{name}_blocks"] = torch.randint(0, 256, (*scales, 16), generator=generator).to(torch.uint8)
        weights[f"{name}_scales"] = torch.randint(120, 126, scales, generator=generator).to(torch.uint8)
    save_file({name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in weights.items()},
              file, metadata={"format": "pt"})  # fmt: skip
    settings = json.loads((folder / "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)
