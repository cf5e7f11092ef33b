"""Tiny models of the families that can be written as GGUF, and finished runs on them."""

from pathlib import Path
from typing import Any

import torch
import transformers as tf

from qalign.data.templates import ChatTemplate, prepare_template
from tests.conftest import FIXTURES

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 1024}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# By name: the config's class, the tokenizer, and what else the config has.
FAMILIES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, "zephyr", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "llama, tied": (tf.LlamaConfig, "llama3", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama, biased": (tf.LlamaConfig, "llama3", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "mistral": (tf.MistralConfig, "mistral_v03", {"sliding_window": 512}),
    "qwen2": (tf.Qwen2Config, "llama3", {}),
    "qwen3": (tf.Qwen3Config, "llama3", {"head_dim": 32, "rms_norm_eps": 1e-5}),
}


def tokenizer(name: str) -> Any:
    return tf.AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / name)


def model(name: str) -> tuple[Any, ChatTemplate]:
    """A random model with its chat template; its logits are of the size of a trained model's."""
    kind, words, more = FAMILIES[name]
    template = prepare_template(tokenizer(words))
    ids = {"bos_token_id": template.tokenizer.bos_token_id, "eos_token_id": template.tokenizer.eos_token_id}
    torch.manual_seed(3)
    lm = tf.AutoModelForCausalLM.from_config(kind(vocab_size=len(template.tokenizer), **SHAPE | ids | more)).eval()
    for parameter in lm.parameters():
        parameter.data = torch.randn_like(parameter) * 0.15 + (parameter.dim() == 1)
    return lm, template


def logits(lm: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return lm(input_ids=torch.tensor([ids])).logits[0].double()


def save(name: str, folder: Path) -> str:
    lm, template = model(name)
    lm.save_pretrained(folder)
    template.tokenizer.save_pretrained(folder)
    return str(folder)
