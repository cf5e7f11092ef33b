"""Tiny random models of many families, pairs of every awkward shape, and log-probs of each answer in a row of its own:
no padding, no packing, full logits, eager attention. That uses no code of qalign, so it gives the expected values."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers as tf

from qalign.data.store.sequences import TokenPair
from qalign.model.packing.packing import Packing, packing_of

VOCABULARY = 64


def _small(vocabulary: int) -> dict:
    return {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "max_position_embeddings": 1024,
    }  # fmt: skip


_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_TURNS = {"layer_types": ["sliding_attention", "full_attention"]}

_GEMMA4 = {  # the last two layers use the keys of the first two; their heads are of two sizes
    "num_hidden_layers": 4, "layer_types": 2 * _TURNS["layer_types"], "num_kv_shared_layers": 2, "head_dim": 8,
    "global_head_dim": 16, "sliding_window": 6, "hidden_size_per_layer_input": 8,
}  # fmt: skip

# Families that can run packed rows. Sliding windows are shorter than the rows.
SERVED = {
    "llama": lambda s: tf.LlamaConfig(**s),
    "mistral": lambda s: tf.MistralConfig(**s, sliding_window=7),
    "qwen2": lambda s: tf.Qwen2Config(**s, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda s: tf.Qwen3Config(**s, head_dim=8),
    "gemma": lambda s: tf.GemmaConfig(**s, head_dim=8),
    "gemma2": lambda s: tf.Gemma2Config(
        **s, head_dim=8, sliding_window=4, final_logit_softcapping=5.0, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda s: tf.Gemma3TextConfig(**s, **_TURNS, head_dim=8, sliding_window=6),
    "gemma4": lambda s: tf.Gemma4TextConfig(**s | _GEMMA4 | {"vocab_size_per_layer_input": s["vocab_size"]}),
    "phi3": lambda s: tf.Phi3Config(**s, sliding_window=9),
    "olmo2": lambda s: tf.Olmo2Config(**s),
    "gpt-oss": lambda s: tf.GptOssConfig(**s, **_EXPERTS, head_dim=8, sliding_window=6),
    "cohere": lambda s: tf.CohereConfig(**s, logit_scale=0.25),
    "granite": lambda s: tf.GraniteConfig(**s, logits_scaling=4.0),
    "gpt-neox": lambda s: tf.GPTNeoXConfig(**_without_groups(s)),
}

# Families with layers that mix tokens without attention, whose modules get a row for each sequence, and these modules.
_GATED = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
_NEMOTRON = {
    "layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3, "head_dim": 8, "chunk_size": 8,
    "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2,
}  # fmt: skip
_KIMI = {
    "layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 4, "linear_head_dim": 8,
    "linear_num_heads": 4, "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
}  # fmt: skip
_GRANITE = {
    **_MAMBA, **_EXPERTS, "layer_types": ["mamba", "attention"], "mamba_chunk_size": 8, "shared_intermediate_size": 16,
}  # fmt: skip
_JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
}
HYBRIDS = {
    "qwen3_5_text": ({**_GATED, "head_dim": 8}, "Qwen3_5GatedDeltaNet"),
    "qwen3_5_moe_text": ({**_GATED, **_EXPERTS, "head_dim": 8, "num_experts": 2}, "Qwen3_5MoeGatedDeltaNet"),
    "qwen3_next": ({**_GATED, **_EXPERTS, "head_dim": 8, "num_experts": 2}, "Qwen3NextGatedDeltaNet"),
    "olmo_hybrid": ({**_GATED, "num_key_value_heads": 4, "linear_num_key_heads": 4}, "OlmoHybridGatedDeltaNet"),
    "lfm2": ({"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}, "Lfm2ShortConv"),
    "lfm3": ({"layer_types": ["conv", "full_attention"], "head_dim": 8}, "Lfm3ShortConv"),
    "granitemoehybrid": (_GRANITE, "GraniteMoeHybridMambaLayer"),
    "nemotron_h": (_NEMOTRON, "NemotronHMamba2Mixer"),
    "mamba2": ({"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8}, "Mamba2Mixer"),
    "jamba": (_JAMBA, "JambaMambaMixer"),
    "bamba": ({**_MAMBA, "attn_layer_indices": [1]}, "BambaMixer"),
    "kimi_linear": (_KIMI, "KimiLinearDeltaAttention"),
    "minimax": (
        {**_EXPERTS, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8},
        "MiniMaxLightningAttention",
    ),
    "recurrent_gemma": ({"num_hidden_layers": 3, "attention_window_size": 64}, "RecurrentGemmaRecurrentBlock"),
}

# Families that can't run packed rows, and the reason.
UNSERVED = {
    "falcon": (lambda s: tf.FalconConfig(**_without_groups(s), alibi=True), "mixes tokens in FalconAttention"),
    "mpt": (
        lambda s: tf.MptConfig(vocab_size=s["vocab_size"], d_model=32, n_layers=2, n_heads=4),
        "mixes tokens in MptAttention",
    ),
    "llama4": (
        lambda s: tf.Llama4TextConfig(**s, head_dim=8, attention_chunk_size=8),
        "gives an answer other hidden states",
    ),
    "stablelm": (
        lambda s: tf.StableLmConfig(**s),
        "has attention that isn't told where the texts of a packed row begin",
    ),
}


def _without_groups(small: dict) -> dict:
    return {name: value for name, value in small.items() if name != "num_key_value_heads"}


def config(name: str, vocabulary: int = VOCABULARY):
    if name in HYBRIDS:
        return tf.AutoConfig.for_model(name, **_small(vocabulary) | HYBRIDS[name][0])
    make = SERVED[name] if name in SERVED else UNSERVED[name][0]
    return make(_small(vocabulary))


@contextmanager
def packed_attention(lm) -> Iterator[None]:
    """The model set to packed rows, whether or not they are exact."""
    with Packing(packing_of(lm).mixers).open(lm):
        yield


def precision(name: str) -> torch.dtype:
    """The widest dtype that a family computes in: some experts and states are float32."""
    return torch.float32 if name == "gpt-oss" or name in HYBRIDS else torch.float64


def family(name: str, vocabulary: int = VOCABULARY, spread: float = 0.25, dtype: torch.dtype | None = None):
    """A random model of two layers, with weights large enough for attention to matter; its head is frozen."""
    torch.manual_seed(0)
    eager = {"attn_implementation": "eager"} if name in SERVED else {}
    lm = tf.AutoModelForCausalLM.from_config(config(name, vocabulary), **eager)
    for parameter_name, parameter in lm.named_parameters():
        if parameter.dim() > 1 or "sinks" in parameter_name:
            parameter.data.normal_(0, spread)
    lm.to(dtype or precision(name)).eval()
    lm.get_output_embeddings().requires_grad_(False)
    return lm


def random_pairs(seed: int = 0, vocabulary: int = VOCABULARY) -> list[TokenPair]:
    """Unequal lengths, one-token answers, answers that begin alike, one that is the beginning of the other (either
    way round), and a prompt of a single token."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    same = ids(6)
    return [
        TokenPair(ids(5), ids(3), ids(9), "unequal"),
        TokenPair(ids(12), ids(11), ids(4), "unequal, the longer one chosen"),
        TokenPair(ids(7), ids(1), ids(20), "one token"),
        TokenPair(ids(4), [5], [6], "one token each"),
        TokenPair(ids(4), [*same, 7, *ids(2)], [*same, 8, *ids(4)], "alike"),
        TokenPair(ids(3), same + ids(3), same, "the rejected one begins the chosen one"),
        TokenPair(ids(6), same[:3], same, "the chosen one begins the rejected one"),
        TokenPair(ids(1), ids(2), ids(3), "a prompt of one token"),
    ]


def alone(lm, pairs: list[TokenPair]) -> torch.Tensor:
    """Log-probs of each answer, `(pairs, 2)`, from a row of its own."""
    return torch.stack([
        torch.stack([_answer(lm, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)])
        for pair in pairs
    ])  # fmt: skip


def _answer(lm, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = lm(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
