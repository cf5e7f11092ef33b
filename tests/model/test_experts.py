"""Experts in 4 bits against plain transformers with the dequantised weights, and what they take in memory."""

import gc
import weakref

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import qalign.model.experts.weights as experts
from qalign.config.recipe import Lora, Model, Recipe
from qalign.config.stages import SFT, Source
from qalign.errors import UserError
from qalign.model.base import load
from qalign.model.experts.quantizer import is_linear
from qalign.model.loading import load_config, load_weights
from qalign.model.memory.forecast import Forecast
from qalign.model.memory.shard import tensor_bytes
from tests.conftest import FIXTURES
from tests.families import family
from tests.moe_models import FAMILIES, publish_in_mxfp4, save

PARTS = ("_blocks", "_scales", "_scale_offsets")
IDS = torch.arange(10, 50)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a family, made once."""
    made = {}

    def of(name: str, **more) -> str:
        key = name + str(more)
        if key not in made:
            made[key] = save(name, tmp_path_factory.mktemp(name) / "model", **more)
        return made[key]

    return of


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("mxfp4") / "model"
    save("gpt_oss", path)
    return publish_in_mxfp4(path)


def held(path: str, form="held", **settings):
    lm, _, _ = load_weights(Model(base=path, **{"compute_dtype": "float32"} | settings), form=form)
    return lm.eval().requires_grad_(False)


def run(lm):
    """Logits, and the gradient of a number made of them with regard to the embedded tokens."""
    states = lm.get_input_embeddings()(IDS).detach().float().requires_grad_()
    logits = lm(inputs_embeds=states, use_cache=False).logits.float()
    (logits.softmax(-1)[..., ::7].sum() * 10).backward()
    return logits.detach(), states.grad


def relative(found, expected) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def assert_same(one, other, tolerance=1e-5):
    for found, expected in zip(run(one), run(other), strict=True):
        assert relative(found, expected) < tolerance


def experts_of(lm):
    return [module for module in lm.modules() if experts.names_of(module)]


@pytest.mark.parametrize("name", FAMILIES)
def test_4_bit_experts_compute_with_the_dequantised_weights(name, folder):
    lm, plain = held(folder(name)), held(folder(name), form="dequantized")
    assert experts_of(lm)
    assert all(len(module.four_bit) == 2 for module in experts_of(lm))
    for module in experts_of(plain):  # what transformers made, with its own loop over experts
        assert {getattr(module, part).dim() for part in experts.names_of(module)} == {3}
        assert module.config._experts_implementation == "eager"
    assert_same(lm, plain)
    torch.manual_seed(0)
    again = held(folder(name))  # from the cache
    assert all(torch.equal(one, other) for one, other in zip(run(again), run(lm), strict=True))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_weights_held_are_those_that_bitsandbytes_gives_each_expert(name, double_quant, folder):
    lm, original = held(folder(name), double_quant=double_quant), held(folder(name), form="original")
    for found, module in zip(experts_of(lm), experts_of(original), strict=True):
        for part in experts.names_of(module):
            for number, weight in enumerate(getattr(module, part)):
                blocks, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
                state.shape = torch.Size([weight.numel()])  # on a CPU, rows of less than 64 numbers would go wrong
                expected = bnb.functional.dequantize_4bit(blocks, state).view(weight.shape)
                given = experts.expert_weight(found, part, number, torch.float32)
                assert torch.equal(given if found.is_transposed else given.T, expected)
                assert 0.01 < relative(expected, weight) < 0.12


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_layers_take_4_bits_a_weight(name, folder):
    lm = held(folder(name, hidden_size=128, moe_intermediate_size=256, intermediate_size=256))
    layers, counted = lm.model.layers, 0
    taken = sum(tensor_bytes(t) for t in (*layers.parameters(), *layers.buffers()) if t.dtype == torch.uint8)
    for module in layers.modules():
        if isinstance(module, torch.nn.Linear):
            counted += module.in_features * module.out_features
    counted += experts.held_parameters(layers)
    taken += sum(b.nbytes for name, b in layers.named_buffers() if "_scale_" in name)  # in float32
    tables = sum((16 + 256) * 4 for m in layers.modules() if isinstance(m, torch.nn.Linear))  # the same for all sizes
    assert 4 <= 8 * (taken - tables) / counted < 4 * 1.05
    assert experts.held_parameters(lm) > 0.8 * counted


def test_autograd_keeps_no_dequantised_weights(folder, monkeypatch):
    lm, alive = held(folder("qwen3_moe")), weakref.WeakSet()
    dequantise, most = experts.expert_weight, []

    def watched(*args):
        gc.collect()
        most.append(len(alive))
        weight = dequantise(*args)
        alive.add(weight._base if weight._base is not None else weight)
        return weight

    monkeypatch.setattr(experts, "expert_weight", watched)
    run(lm)
    assert len(most) == 2 * 2 * 2 * 4  # forward and backward, two layers, two tensors, four experts
    assert max(most) <= 1


def test_only_experts_that_tokens_chose_are_dequantised(folder, monkeypatch):
    lm, seen = held(folder("mixtral")), []
    dequantise = experts.expert_weight
    monkeypatch.setattr(experts, "expert_weight", lambda *args: (seen.append(args[2]), dequantise(*args))[1])
    with torch.no_grad():
        lm(input_ids=IDS[:, :1], use_cache=False)
    assert len(seen) == 2 * 2 * 2  # two layers, two tensors, the two experts of one token


def test_only_one_layer_of_experts_is_in_16_bits_while_a_base_is_loaded(folder, monkeypatch):
    path, known, most = folder("qwen3_moe", num_hidden_layers=4), weakref.WeakSet(), []
    hold = experts.hold

    def watched(module, name, weight, *args, **kwargs):
        known.add(weight)
        gc.collect()
        most.append(sum(w.numel() for w in known))
        hold(module, name, weight, *args, **kwargs)
        assert not hasattr(module, name)

    monkeypatch.setattr(experts, "hold", watched)
    held(path, double_quant=False)  # no other test has put this into the cache
    assert len(most) == 8
    assert max(most) <= 4 * 3 * 64 * 32


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_published_mxfp4_experts_are_computed_with_exactly(quantization, mxfp4):
    lm = held(mxfp4, quantization=quantization)
    plain = tf.AutoModelForCausalLM.from_pretrained(
        mxfp4, dtype=torch.float32, quantization_config=tf.Mxfp4Config(dequantize=True), experts_implementation="eager"
    )
    if quantization == "nf4":
        linear = {n: m for n, m in held(mxfp4, form="dequantized").named_modules() if type(m) is torch.nn.Linear}
        for name, module in linear.items():  # these are in NF4
            plain.get_submodule(name).weight = module.weight
        for module in experts_of(lm):
            for part in ("gate_up_proj", "down_proj"):
                blocks, scales = getattr(module, f"{part}_blocks"), getattr(module, f"{part}_scales")
                expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
                for number, weight in enumerate(expected):
                    assert torch.equal(experts.expert_weight(module, part, number, torch.float32), weight)
                assert 8 * (blocks.nbytes + scales.nbytes) / expected.numel() == 4.25
    assert_same(lm, plain.eval().requires_grad_(False))
    assert_same(held(mxfp4, quantization=quantization), lm, 1e-9)


def test_what_mxfp4_bases_cannot_be(mxfp4):
    with pytest.raises(
        UserError, match=r"model\.quantization: .*stores its experts in mxfp4, .* write quantization: nf4"
    ):
        held(mxfp4, quantization="int8")
    with pytest.raises(UserError, match="published in mxfp4, so its unquantised weights aren't known"):
        held(mxfp4, form="original")


def test_bfloat16_experts_round_as_transformers_does(folder):
    lm, plain = (
        held(folder("gpt_oss"), compute_dtype="bfloat16"),
        held(folder("gpt_oss"), "dequantized", compute_dtype="bfloat16"),
    )
    with torch.no_grad():
        found, expected = (model(input_ids=IDS, use_cache=False).logits.float() for model in (lm, plain))
    assert relative(found, expected) < 0.02


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"jamba"}))
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_forecast_counts_experts_as_they_are_held(name, double_quant, folder):
    spec = Model(base=folder(name), compute_dtype="float32", double_quant=double_quant)
    assert_forecast(spec)


def test_the_forecast_counts_mxfp4_experts_as_they_are_held(mxfp4):
    assert_forecast(Model(base=mxfp4, compute_dtype="float32"))


def assert_forecast(spec: Model) -> None:
    recipe = Recipe(model=spec, lora=Lora(r=4), output="unused", sft=SFT(data=[Source(path="rows.jsonl")]))
    base = load(spec)
    linear = [module for module in base.lm.modules() if isinstance(module, Linear4bit)]
    others = sum((16 + 256 * spec.double_quant) * 4 + 4 for _ in linear)  # tables, the same for all sizes
    others += sum(b.nbytes for name, b in base.lm.named_buffers() if not name.endswith(PARTS))
    gates = sum(4 * module.in_features for module in linear if module.out_features == 1)  # counted as 16 bits
    for config in (load_config(spec), base.lm.config):  # as `fit` and as a stage see it
        found = Forecast(recipe, "sft", config, "cpu", torch.float32).fixed["base"]
        assert found == pytest.approx(base.held_bytes - others, abs=8 * len(linear) + gates)
    assert base.count_parameters()[1] == sum(p.numel() for p in held(spec.base, form="dequantized").parameters())


def test_the_header_says_how_experts_are_held(folder, mxfp4, tmp_path):
    assert experts.experts_in_words(held(folder("qwen3_moe"))) == ""
    assert experts.experts_in_words(held(mxfp4)) == ", experts in mxfp4"
    in_16_bits = {"num_hidden_layers": 2, "interleave_moe_layer_step": 1, "attention_chunk_size": 64}
    for lm in (
        held(folder("qwen3_moe"), quantization="int8"),
        held(save("llama4_text", tmp_path / "llama4", **in_16_bits)),  # not through transformers' interface
    ):
        names = [
            name for name in dict(lm.named_parameters()) if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        ]
        share = sum(lm.get_parameter(name).numel() for name in names) / lm.num_parameters()
        assert share > 0.05
        assert experts.experts_in_words(lm) == f", but experts in 16 bits: {share:.0%} of the weights"


def test_a_base_that_lacks_experts_is_refused(tmp_path):
    path = save("qwen3_moe", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    kept = {name: tensor for name, tensor in weights.items() if "layers.1.mlp.experts" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    assert len(kept) < len(weights)
    with pytest.raises(UserError, match=r"it lacks 2 of its tensors, such as model\.layers\.1\.mlp"):
        held(path)


@pytest.fixture(scope="module")
def falcon(tmp_path_factory) -> str:
    """A family whose layers are of a subclass of `nn.Linear`, which bitsandbytes alone leaves as they are."""
    path = tmp_path_factory.mktemp("falcon") / "model"
    config = tf.FalconConfig(vocab_size=2048, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tf.AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3").save_pretrained(path)
    return str(path)


def test_layers_that_compute_as_linear_ones_are_held_in_4_bits(falcon):
    lm = held(falcon)
    layers = {name: module for name, module in lm.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name, module in layers.items() if not isinstance(module, Linear4bit)} == {"lm_head"}
    computed, original = held(falcon, form="dequantized"), held(falcon, quantization="none")
    assert_same(lm, computed)
    for name in layers.keys() - {"lm_head"}:
        assert 0.01 < relative(computed.get_submodule(name).weight, original.get_submodule(name).weight) < 0.12


def test_int8_that_would_quantise_nothing_is_one_line(falcon):
    with pytest.raises(UserError, match=r"has no layer that bitsandbytes holds in int8; set model\.quantization"):
        held(falcon, quantization="int8")


def test_routers_are_no_linear_layers():
    lm = family("llama4")
    kinds = {type(module).__name__: is_linear(module) for module in lm.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {"Linear": True, "Llama4Router": False}
