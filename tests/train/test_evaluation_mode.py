"""The base stays in evaluation mode while a role is trained: only the adapters have dropout."""

import pytest
import torch
import transformers as tf
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from transformers.modeling_layers import GradientCheckpointingLayer

from qalign.model.adapters.files import WEIGHTS
from qalign.model.adapters.switch import AdapterSwitch
from qalign.train.callbacks import checkpoint_layers
from tests.helpers import metrics
from tests.reward_runs import run_stage, write_recipe

IDS = torch.arange(10, 40).view(2, 15)
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Families with dropout of their own: in attention's function, and in functions that the layer calls.
CONFIGS = {
    "granite": lambda: tf.GraniteConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, attention_dropout=0.5),
    "opt": lambda: tf.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, layerdrop=0.5),
}


def adapted(name: str, lora_dropout: float = 0.0):
    torch.manual_seed(0)
    lm = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    spec = LoraConfig(r=2, target_modules="all-linear", lora_dropout=lora_dropout, task_type=TaskType.CAUSAL_LM)
    model = get_peft_model(lm, spec)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.log_softmax(-1)[..., 5].sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("checkpointed", [0, 1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_base_has_no_dropout_of_its_own_and_checkpointed_layers_run_again(name, checkpointed):
    """What is computed, and all gradients, are those of evaluation mode; each planned layer runs a second time."""
    model = adapted(name)
    expected = gradients(model.eval())
    model.train()
    assert not torch.equal(gradients(model)[0], expected[0]), "it would have dropout"
    checkpoint_layers(model, checkpointed)
    AdapterSwitch(model).train()
    calls: list[int] = []
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for number, layer in enumerate(layers):
        first = next(module for module in layer.modules() if isinstance(module, torch.nn.LayerNorm | torch.nn.Linear))
        inner = first if list(first.parameters()) else layer
        inner.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-6)
    assert len(layers) == 2
    assert [calls.count(number) for number in range(2)] == [2 if n < checkpointed else 1 for n in range(2)]


def test_the_adapters_dropout_stays():
    model = adapted("granite", lora_dropout=0.5)
    AdapterSwitch(model).train()
    assert not torch.equal(gradients(model)[0], gradients(model)[0])
    assert not model.get_base_model().training
    assert model.training, "TRL asks the outermost module"
    AdapterSwitch(model.get_base_model()).train()
    assert not any(module.training for module in model.get_base_model().modules() if type(module).__name__ == "Linear")


@pytest.mark.parametrize("stage", ["dpo", "sft"])
def test_a_run_on_a_base_with_dropout_is_one_without(tiny_folder, tmp_path, stage):
    """`Trainer` puts the model into training mode before each step. The first DPO loss is ln 2, and after three steps
    the adapter is to the bit that of the same base without dropout."""
    found = []
    for share in (0.0, 0.5):
        tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder)
        torch.manual_seed(0)
        config = tf.GraniteConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.1, attention_dropout=share,
        )  # fmt: skip
        folder = tmp_path / f"granite-{share}"
        tf.GraniteForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        run = run_stage(write_recipe(tmp_path / f"run-{share}", str(folder), stage, checkpointed_layers=1))
        found.append((load_file(run.adapter / WEIGHTS), [line["loss"] for line in metrics(run) if "loss" in line]))
    (first, losses), (second, same) = found
    assert losses == same
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    if stage == "dpo":
        assert losses[0] == pytest.approx(0.693147, abs=1e-6)
