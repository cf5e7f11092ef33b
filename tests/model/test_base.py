"""One base, several roles: the reference is what it would be alone, and nothing but the policy ever moves."""

import gc
import shutil
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig

from qalign.config.cache import cache_folder
from qalign.config.recipe import Lora, Model
from qalign.errors import UserError
from qalign.model.base import Role, load
from qalign.model.loading import guard_4bit, save_tokenizer
from tests.conftest import FIXTURES
from tests.helpers import digest, scramble
from tests.model.conftest import IDS, gradient, logits, state


def test_reference_with_adapters_off_is_the_base_alone_to_the_bit(spec, tiny_base):
    alone = logits(tiny_base)
    base = load(spec)
    base.add_adapter(Role.POLICY, Lora(r=4))
    scramble(base)
    assert torch.equal(logits(base, Role.REFERENCE), alone)
    assert not torch.equal(logits(base, Role.POLICY), alone)


def test_reference_from_an_adapter_is_base_and_adapter_alone_to_the_bit(spec, adapter_folder):
    alone = peft.PeftModel.from_pretrained(load(spec).lm, adapter_folder).eval()
    with torch.no_grad():
        expected = alone(input_ids=IDS).logits
    base = load(spec)
    base.load_adapter(Role.POLICY, adapter_folder, trainable=True)
    base.load_reference(adapter_folder)
    assert torch.equal(logits(base, Role.POLICY), expected)  # the policy starts as a copy
    scramble(base)
    assert torch.equal(logits(base, Role.REFERENCE), expected)
    assert not torch.equal(logits(base, Role.POLICY), expected)
    assert adapter_folder in base.reference


def test_reference_has_no_dropout_and_the_training_policy_does(spec, adapter_folder):
    config = peft.LoraConfig.from_pretrained(adapter_folder)
    config.lora_dropout = 0.5
    config.save_pretrained(adapter_folder)
    base = load(spec)
    base.load_adapter(Role.POLICY, adapter_folder, trainable=True)
    base.load_reference(adapter_folder)
    base.model.train()
    with torch.no_grad():
        with base.acting_as(Role.REFERENCE) as lm:
            first, second = lm(input_ids=IDS).logits, lm(input_ids=IDS).logits
        assert torch.equal(first, second)
        with base.acting_as(Role.POLICY) as lm:  # while it is measured, not trained
            assert torch.equal(lm(input_ids=IDS).logits, lm(input_ids=IDS).logits)
    with base.acting_as(Role.POLICY) as lm:
        assert not torch.equal(lm(input_ids=IDS).logits, lm(input_ids=IDS).logits)


@pytest.mark.parametrize("from_adapter", [False, True])
def test_acting_restores_everything_also_nested_and_after_an_error(spec, adapter_folder, from_adapter):
    base = load(spec)
    if from_adapter:
        base.load_adapter(Role.POLICY, adapter_folder, trainable=True)
        base.load_reference(adapter_folder)
    else:
        base.add_adapter(Role.POLICY, Lora(r=4))
    scramble(base)
    policy, reference = logits(base), logits(base, Role.REFERENCE)
    base.model.train()
    base.model.base_model.model.model.layers[0].eval()  # an unusual mix of modes must come back too
    before = state(base)

    def now(lm):
        with torch.no_grad():
            return lm(input_ids=IDS).logits

    with base.acting_as(Role.REFERENCE) as lm:
        assert torch.equal(now(lm), reference)
        inside = state(base)
        assert not any(inside[1])
        assert not any(inside[2])
        with base.acting_as(Role.POLICY) as lm:
            assert torch.equal(now(lm), policy)
            with base.acting_as(Role.REFERENCE) as lm:
                assert torch.equal(now(lm), reference)
            assert torch.equal(now(lm), policy)
        assert torch.equal(now(lm), reference)
        assert state(base)[0:3] == inside[0:3]
    assert state(base) == before
    with pytest.raises(KeyError), base.acting_as(Role.REFERENCE):
        raise KeyError
    assert state(base) == before
    assert torch.equal(logits(base), policy)


def test_an_adapter_can_be_added_saved_and_restored_in_the_role_of_the_base(spec, adapter_folder, tmp_path):
    """There the model holds the base's own layers."""
    base = load(spec)
    base.add_adapter(Role.POLICY, Lora(r=4))
    scramble(base)
    expected = logits(base)
    with base.acting_as(Role.BASE):
        base.save_adapter(Role.POLICY, tmp_path / "saved")
        base.load_adapter(Role.JUDGE, str(tmp_path / "saved"), trainable=True)
        with pytest.raises(UserError):
            base.load_adapter("broken", FIXTURES, trainable=True)
        weights = base.trained_weights(Role.POLICY)
        for weight in weights.values():
            weight.data.zero_()
        base.restore_adapter(Role.POLICY, tmp_path / "saved")
        assert base.role == Role.BASE
    assert len(weights) == 2 * 7 * 2
    assert all(weight.requires_grad for weight in weights.values())
    assert torch.equal(logits(base), expected)


def test_an_evaluated_policy_stays_frozen(spec, adapter_folder):
    base = load(spec)
    base.load_adapter(Role.POLICY, adapter_folder, trainable=False)
    logits(base, Role.REFERENCE)
    logits(base, Role.POLICY)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_adapters_train_in_float32_on_a_bfloat16_base(tiny_folder, adapter_folder):
    base = load(Model(base=tiny_folder, compute_dtype="bfloat16"))
    base.load_adapter(Role.POLICY, adapter_folder, trainable=True)
    base.load_reference(adapter_folder)
    trainable = [parameter for parameter in base.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    assert base.lm.lm_head.weight.dtype == torch.bfloat16


def test_one_copy_of_the_base_in_memory(spec, adapter_folder):
    """All roles together hold each quantised weight once."""
    gc.collect()
    others = {id(t) for t in gc.get_objects() if isinstance(t, bnb.nn.Params4bit)}
    base = load(spec)
    one_copy = sum(p.numel() for p in base.lm.parameters())
    base.load_adapter(Role.POLICY, adapter_folder, trainable=True)
    base.load_reference(adapter_folder)
    for role in (Role.REFERENCE, Role.POLICY):
        logits(base, role)
    gc.collect()
    weights = [t for t in gc.get_objects() if isinstance(t, bnb.nn.Params4bit) and id(t) not in others]
    assert [weight.quant_state.quant_type for weight in weights] == ["nf4"] * (2 * 7)
    lora = sum(p.numel() for n, p in base.model.named_parameters() if "lora_" in n)
    assert sum(p.numel() for p in base.model.parameters()) == one_copy + lora
    assert lora == 2 * sum(p.numel() for p in load_file(f"{adapter_folder}/adapter_model.safetensors").values())


def test_bitsandbytes_does_not_repack_the_weights(tiny_base):
    """On a CPU with AVX512-BF16 the first eval forward without gradients would repack them and spoil all gradients."""
    tiny_base.add_adapter(Role.POLICY, Lora(r=4))
    before = digest(tiny_base)
    tiny_base.model.train()
    first = gradient(tiny_base)
    logits(tiny_base, Role.REFERENCE)
    logits(tiny_base)
    assert digest(tiny_base) == before
    for module in tiny_base.lm.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False)
            assert module.support_avx512bf16_for_cpu is False
    tiny_base.model.train()
    assert torch.equal(gradient(tiny_base), first)


def test_repacked_weights_are_refused(tiny_base):
    module = next(m for m in tiny_base.lm.modules() if isinstance(m, bnb.nn.Linear4bit))
    module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match="repacked"):
        guard_4bit(tiny_base.lm)


def test_the_cached_base_is_the_same_to_the_bit(spec, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tiny_folder}/config.json")  # a file, so nothing can be cached in it
    fresh = load(spec)
    assert "can't be written" in capsys.readouterr().out
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached = load(spec)
    assert [folder.name.startswith("nf4-") for folder in cache_folder().glob("[!.]*")] == [True]
    assert digest(fresh) == digest(cached)
    weights = load_file(f"{tiny_folder}/model.safetensors")
    moved = tmp_path / "changed"
    shutil.copytree(tiny_folder, moved)
    save_file({k: v * 2 for k, v in weights.items()}, moved / "model.safetensors", metadata={"format": "pt"})
    assert digest(load(spec.model_copy(update={"base": str(moved)}))) != digest(fresh)


@pytest.mark.parametrize("quantization", ["none", "int8", "fp4"])
def test_other_ways_to_hold_the_base(spec, quantization):
    base = load(spec.model_copy(update={"quantization": quantization}))
    base.add_adapter(Role.POLICY, Lora(r=4))
    scramble(base)
    assert not torch.equal(logits(base, Role.POLICY), logits(base, Role.REFERENCE))


def test_what_cannot_be_loaded_is_one_line(spec, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), "nobody/no-such-model"):
        with pytest.raises(UserError) as raised:
            load(spec.model_copy(update={"base": name}))
        assert len(raised.value.lines) == 1
        assert raised.value.lines[0].startswith(f"model.base: '{name}' ")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            peft.LoraConfig(target_modules="all-linear", bias="all", task_type="CAUSAL_LM"),
            "bias 'all' changes",
        ),
        (peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"), "the output layer can't have an adapter"),
        (
            peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
            "the output layer can't have an adapter",
        ),
        (peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "is a 'PROMPT_TUNING' adapter"),
    ],
)
def test_adapters_that_the_roles_cannot_keep_apart_are_refused(spec, tmp_path, config, reason):
    peft.get_peft_model(load(spec).lm, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    base = load(spec)
    with pytest.raises(UserError, match=reason):
        base.load_adapter(Role.POLICY, str(tmp_path / "adapter"), trainable=True)
    assert base.adapters == []
    base.add_adapter(Role.POLICY, Lora(r=4))  # nothing of it stands in the way of others


def narrowed(file: Path) -> None:
    weights = {name: tensor[:, :-1].contiguous() for name, tensor in load_file(file).items()}
    save_file(weights, file)


@pytest.mark.parametrize("content", ["{}", "not json", '{"peft_type": "NO_SUCH"}', b"cut short", narrowed])
def test_a_broken_adapter_or_one_of_another_model_is_one_line(spec, adapter_folder, content):
    if isinstance(content, str):
        Path(adapter_folder, "adapter_config.json").write_text(content)
    elif isinstance(content, bytes):
        Path(adapter_folder, "adapter_model.safetensors").write_bytes(content)
    else:
        content(Path(adapter_folder, "adapter_model.safetensors"))
    with pytest.raises(UserError) as raised:
        load(spec).load_adapter(Role.POLICY, adapter_folder, trainable=True)
    (line,) = raised.value.lines
    assert line.startswith(f"{adapter_folder}: ")


@pytest.mark.parametrize("name", ["llama3", "zephyr", "mistral_v03"])
def test_a_saved_tokenizer_gives_the_same_ids(name, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / name)
    text = "<|user|>\nhello there</s>\n<|assistant|>\n hi</s>\n [INST] x[/INST] y</s>"
    save_tokenizer(tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids


def test_saved_policy_loads_with_plain_peft(spec, tmp_path):
    base = load(spec)
    base.add_adapter(Role.POLICY, Lora(r=4))
    scramble(base)
    expected = logits(base)
    base.save_adapter(Role.POLICY, tmp_path / "adapter")
    quantised = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", quantization_config=BitsAndBytesConfig(**quantised), dtype=torch.float32
    )
    guard_4bit(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, expected)


def test_loftq_leaves_a_layer_that_was_not_rounded_as_lora_begins(tiny_base):
    """bitsandbytes leaves out what a model's config names (`modules_to_not_convert`)."""
    layer = tiny_base.lm.model.layers[0].mlp
    held = layer.up_proj.weight
    whole = bnb.functional.dequantize_4bit(held.data, held.quant_state).float()
    layer.up_proj = nn.Linear(*reversed(whole.shape), bias=False)
    layer.up_proj.weight = nn.Parameter(whole, requires_grad=False)

    tiny_base.add_adapter(Role.POLICY, Lora(r=4, alpha=8, init="loftq"))

    assert isinstance(layer.up_proj.get_base_layer().weight, nn.Parameter)
    assert not layer.up_proj.lora_B["policy"].weight.any()
    assert layer.up_proj.lora_A["policy"].weight.any()
    assert torch.equal(layer.up_proj.get_base_layer().weight, whole)
    assert layer.down_proj.lora_B["policy"].weight.any(), "this one was rounded"
