"""The forecast for mixtures of experts: real shapes in 4 bits a weight, and a step against what one really takes."""

import pytest
import torch
import transformers as tf

import benchmarks.memory as benchmark
from qalign.model.experts.weights import expert_tensors
from tests.model.test_memory import assert_near, forecast_of
from tests.moe_models import save

# Qwen3-30B-A3B and gpt-oss-20b.
SHAPES = {
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, vocab_size=151936,
    ),
    "gpt_oss": lambda: tf.GptOssConfig(num_hidden_layers=24, num_local_experts=32),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_layers_of_real_shapes_take_4_bits_a_weight(name):
    config = SHAPES[name]()
    forecast = forecast_of(config, "dpo", "cuda", torch.bfloat16)
    with torch.device("meta"):
        lm = tf.AutoModelForCausalLM.from_config(config)
    modules = [(n, m) for n, m in lm.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    names = {f"{module_name}.weight" for module_name, _ in modules} | expert_tensors(lm).keys()
    in_4_bits = sum(p.numel() for n, p in lm.named_parameters() if n in names)
    others = sum(p.numel() for n, p in lm.named_parameters() if n not in names)
    assert in_4_bits > 0.93 * (in_4_bits + others)
    assert 4 < 8 * (forecast.fixed["base"] - 2 * others) / in_4_bits < 4 * 1.05


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_takes_what_is_forecast(name, checkpointing, tmp_path):
    folder = save(name, tmp_path / "model", hidden_size=128)
    forecast = forecast_of(folder, model={"compute_dtype": "float32"})
    step = forecast.step(384, checkpointing=checkpointing)
    found = benchmark.measured("dpo", forecast.recipe, 384, 1, checkpointing)
    assert_near(forecast, step.total + forecast.fixed["gradients"], found)
