"""Tiny random models of model families, saved as published ones are: a folder with weights, a tokenizer and a chat
template. Each family's peculiarities are on: windows shorter than any row, shared keys, heads of two sizes, experts,
linear attention, convolutions, state spaces, soft caps, sinks, towers, dropout in attention."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests import families
from tests.conftest import FIXTURES

WINDOW = 8  # tokens
VOCABULARY = 2048
TURNS = {"layer_types": ["sliding_attention", "full_attention"]}
SLIDING = {"sliding_window": WINDOW}
NO_GROUPS = {"num_key_value_heads": 4}
MOST_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
TOKENS = {"image_token_id": 2010, "video_token_id": 2011, "vision_start_token_id": 2012, "vision_end_token_id": 2013}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "vocab_size": VOCABULARY,
    "bos_token_id": 2000, "eos_token_id": 2005, "pad_token_id": 0, "moe_intermediate_size": 32, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "shared_expert_intermediate_size": 32, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
MAMBA = {"mamba_d_state": 16, "use_mamba_kernels": False}
GEMMA4 = {
    **TURNS, **SLIDING, "num_hidden_layers": 4, "layer_types": 2 * TURNS["layer_types"], "num_kv_shared_layers": 2,
    "global_head_dim": 32, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY, "final_logit_softcapping": 30.0,
}  # fmt: skip
GEMMA4_LARGE = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
GEMMA3N = {
    **GEMMA4, "intermediate_size": [128] * 4, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
}  # fmt: skip


def _text(model_type: str, **more: Any) -> tf.PretrainedConfig:
    """A config with the sizes that its class knows, and `more`."""
    known = {name for cls in type(_plain(model_type)).__mro__ for name in getattr(cls, "__annotations__", {})}
    return _plain(model_type, **{name: size for name, size in SIZES.items() if name in known} | more)


def _plain(model_type: str, **settings: Any) -> tf.PretrainedConfig:
    return tf.AutoConfig.for_model(model_type, **settings)


def _wrapper(model_type: str, text: tf.PretrainedConfig, vision: dict, **more: Any) -> tf.PretrainedConfig:
    return _plain(model_type, text_config=text.to_dict(), vision_config=vision, **more)


def _qwen_wrapper(model_type: str) -> tf.PretrainedConfig:
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "num_position_embeddings": 16, "patch_size": 4,
    }  # fmt: skip
    return _wrapper(model_type, _text(f"{model_type}_text", **MOST_LINEAR), vision, **TOKENS)


def _gemma4_wrapper(**more: Any) -> tf.PretrainedConfig:
    vision = {**TOWER, "model_type": "gemma4_vision", "head_dim": 16, "num_key_value_heads": 2, "global_head_dim": 16}
    ids = {"image_token_id": 2010, "video_token_id": 2011, "audio_token_id": 2012, "boi_token_id": 2013}
    ids |= {"eoi_token_id": 2014, "boa_token_id": 2015, "eoa_token_index": 2016}
    return _wrapper("gemma4", _text("gemma4_text", **GEMMA4 | more), vision, audio_config=None, **ids)


def _gemma3_wrapper() -> tf.PretrainedConfig:
    vision = {**TOWER, "image_size": 16, "patch_size": 4, "model_type": "siglip_vision_model"}
    tokens = {"boi_token_index": 2011, "eoi_token_index": 2012, "image_token_index": 2010, "mm_tokens_per_image": 4}
    return _wrapper("gemma3", _text("gemma3_text", **TURNS, **SLIDING), vision, **tokens)


def _mistral3_wrapper() -> tf.PretrainedConfig:
    vision = {**TOWER, "model_type": "pixtral", "head_dim": 16, "patch_size": 4, "image_size": 16}
    return _wrapper("mistral3", _text("ministral3"), vision, image_token_index=2010)


def _known(name: str) -> Callable[[], tf.PretrainedConfig]:
    """A family that other tests use too."""
    return lambda: families.config(name, VOCABULARY)


def _own(model_type: str, **more: Any) -> Callable[[], tf.PretrainedConfig]:
    return lambda: _text(model_type, **more)


# By `model_type` (behind a comma, which models of it): models published under it, and a config.
FAMILIES: dict[str, tuple[str, Callable[[], tf.PretrainedConfig]]] = {
    "apertus": ("Apertus 8B", _own("apertus")),
    "bamba": ("Bamba 9B", _known("bamba")),
    "cohere": ("Command R", _known("cohere")),
    "cohere2": ("Command R7B, Command A", _own("cohere2", **SLIDING, **TURNS, logit_scale=0.25)),
    "deepseek_v3": (
        "DeepSeek V3, R1, Moonlight",
        _own("deepseek_v3", **NO_GROUPS, first_k_dense_replace=1, num_mtp_layers=0),
    ),
    "ernie4_5": ("ERNIE 4.5 0.3B", _own("ernie4_5")),
    "ernie4_5_moe": (
        "ERNIE 4.5 21B-A3B",
        _own("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1),
    ),
    "exaone4": ("EXAONE 4.0", _own("exaone4", **SLIDING, **TURNS)),
    "falcon": ("Falcon RW 1B", _known("falcon")),
    "falcon_h1": (
        "Falcon-H1",
        _own("falcon_h1", mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=16,
             lm_head_multiplier=0.5, key_multiplier=0.5),
    ),
    "gemma": ("Gemma 1, CodeGemma", _known("gemma")),
    "gemma2": ("Gemma 2", _known("gemma2")),
    "gemma3": ("Gemma 3 4B, 12B, 27B", _gemma3_wrapper),
    "gemma3_text": ("Gemma 3 270M, 1B", _known("gemma3")),
    "gemma3n_text": ("the text model of Gemma 3n", _own("gemma3n_text", **GEMMA3N)),
    "gemma4": ("Gemma 4 E2B, E4B", _gemma4_wrapper),
    "gemma4, large": ("Gemma 4 31B", lambda: _gemma4_wrapper(**GEMMA4_LARGE)),
    "gemma4, experts": ("Gemma 4 26B-A4B", lambda: _gemma4_wrapper(**GEMMA4_LARGE, **GEMMA4_EXPERTS)),
    "gemma4_text": ("the text model of Gemma 4", _known("gemma4")),
    "glm4": ("GLM-4 9B, GLM-Z1", _own("glm4")),
    "glm4_moe": ("GLM-4.5, 4.6", _own("glm4_moe", first_k_dense_replace=1, num_mtp_layers=0)),
    "gpt_neox": ("Pythia", _known("gpt-neox")),
    "gpt_oss": ("gpt-oss 20b", _known("gpt-oss")),
    "granite": ("Granite 3", _own("granite", attention_dropout=0.1, logits_scaling=4.0)),
    "granitemoehybrid": ("Granite 4", _known("granitemoehybrid")),
    "hunyuan_v1_dense": ("Hunyuan 0.5B to 7B", _own("hunyuan_v1_dense")),
    "jamba": ("Jamba", _known("jamba")),
    "kimi_linear": ("Kimi Linear", _known("kimi_linear")),
    "lfm2": ("LFM2, LFM2.5", _known("lfm2")),
    "lfm2_moe": (
        "LFM2 8B-A1B",
        _own("lfm2_moe", layer_types=["conv", "full_attention"], num_dense_layers=1),
    ),
    "lfm3": ("LFM3", _known("lfm3")),
    "llama": ("Llama 2 to 3.3, SmolLM2", _known("llama")),
    "llama4_text": ("the text model of Llama 4", _known("llama4")),
    "mamba2": ("Mamba 2, Codestral Mamba", _known("mamba2")),
    "minicpm3": ("MiniCPM3", _own("minicpm3", **NO_GROUPS, dim_model_base=32)),
    "minimax": ("MiniMax-Text-01", _known("minimax")),
    "ministral": ("Ministral 8B of 2024", _own("ministral", **SLIDING, **TURNS)),
    "ministral3": ("the text model of Ministral 3", _own("ministral3")),
    "mistral": ("Mistral 7B, Nemo", _known("mistral")),
    "mistral3": ("Ministral 3, Mistral Small 3", _mistral3_wrapper),
    "mixtral": ("Mixtral", _own("mixtral", router_jitter_noise=0.0)),
    "mpt": ("MPT", _known("mpt")),
    "nemotron_h": ("Nemotron-H, Nemotron 3 Nano", _known("nemotron_h")),
    "olmo2": ("OLMo 2", _known("olmo2")),
    "olmo3": ("OLMo 3", _own("olmo3", **SLIDING, **TURNS)),
    "olmo_hybrid": ("OLMo Hybrid", _known("olmo_hybrid")),
    "olmoe": ("OLMoE", _own("olmoe")),
    "phi3": ("Phi-3, Phi-4", _known("phi3")),
    "phimoe": ("Phi-3.5-MoE", _own("phimoe")),
    "qwen2": ("Qwen2, Qwen2.5", _known("qwen2")),
    "qwen3": ("Qwen3", _known("qwen3")),
    "qwen3_5": ("Qwen3.5, dense", lambda: _qwen_wrapper("qwen3_5")),
    "qwen3_5_moe": ("Qwen3.5, with experts", lambda: _qwen_wrapper("qwen3_5_moe")),
    "qwen3_5_text": ("the text model of Qwen3.5", _known("qwen3_5_text")),
    "qwen3_moe": ("Qwen3 30B-A3B", _own("qwen3_moe")),
    "qwen3_next": ("Qwen3-Next", _known("qwen3_next")),
    "recurrent_gemma": (
        "RecurrentGemma",
        _own("recurrent_gemma", num_hidden_layers=3, attention_window_size=WINDOW, lru_width=64),
    ),
    "seed_oss": ("Seed-OSS", _own("seed_oss", attention_dropout=0.1, residual_dropout=0.1)),
    "smollm3": ("SmolLM3", _own("smollm3", no_rope_layers=[1, 0])),
    "stablelm": ("StableLM 2", _known("stablelm")),
    "starcoder2": ("StarCoder2", _own("starcoder2", **SLIDING)),
    "zamba2": (
        "Zamba2",
        _own("zamba2", **MAMBA, num_hidden_layers=4, layers_block_type=["mamba", "hybrid", "mamba", "mamba"],
             n_mamba_heads=4, mamba_ngroups=2, chunk_size=16, num_mem_blocks=1),
    ),
}  # fmt: skip
# One of each kind: plain, a window, a hybrid, shared keys, experts, a multimodal wrapper, dropout in attention.
SHORT = ("llama", "mistral", "lfm2", "gemma4_text", "qwen3_moe", "mistral3", "seed_oss")


def save(name: str, folder: Path) -> None:
    """Writes a random model of a family and a tokenizer with a chat template."""
    torch.manual_seed(0)
    config = FAMILIES[name][1]()
    kind = tf.AutoModelForImageTextToText if hasattr(config, "vision_config") else tf.AutoModelForCausalLM
    lm = kind.from_config(config)
    for parameter_name, parameter in lm.named_parameters():
        leaf = parameter_name.rpartition(".")[2]
        if leaf not in ("A_log", "dt_bias", "D") and (parameter.dim() > 1 or leaf == "sinks"):
            parameter.data.normal_(0, 0.3 if "embed" in parameter_name else 0.12)
    lm.to(torch.bfloat16).save_pretrained(folder)
    tf.AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3").save_pretrained(folder)
