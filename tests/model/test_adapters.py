"""Adapters fit the layers that they name, hold exactly their own tensors, and leave everything else alone."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

from qalign.config.recipe import Lora
from qalign.errors import UserError
from qalign.model.adapters import targets as adapter_targets
from qalign.model.adapters.files import CONFIG, WEIGHTS
from qalign.model.adapters.targets import own_layers
from qalign.model.adapters.weights import adapter_parameters
from qalign.model.base import Role, load
from qalign.model.loading import Origin
from tests.model.conftest import IDS, logits, save_plain

# Python's `re` needs longer than anyone lives to see that these don't match a layer's name; `regex` sees it at once for
# the first, and not for the second.
CATASTROPHIC, SLOW = r"(?:(?:\w+\.?)+)+!", r"(?:(.)?){32}\1{32}"
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|v_proj|up_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r"\.(?:(?:q_proj|v_proj|up_proj)))"
)


def edit_config(folder: str, **settings) -> None:
    file = Path(folder) / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def edit_weights(folder: str, edit) -> None:
    weights = load_file(Path(folder) / WEIGHTS)
    edit(weights)
    save_file(weights, Path(folder) / WEIGHTS)


def refused(base, folder: str) -> str:
    """The line with which an adapter is refused; nothing of it stays on the base."""
    before = logits(base, Role.BASE)
    with pytest.raises(UserError) as raised:
        base.load_adapter(Role.POLICY, folder, trainable=True)
    assert base.adapters == []
    assert torch.equal(logits(base, Role.BASE), before)
    base.add_adapter("after", Lora(r=2))
    (line,) = raised.value.lines
    assert line.startswith(folder)
    assert len(line.replace(folder, "")) < 250
    return line.replace(folder, "FOLDER")


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "v_prj"], "'v_prj' fits no layer .*did you mean 'v_proj'.*it has q_proj, k_proj, v_proj, o_proj, "),
        (["Q_proj"], "'Q_proj' fits no layer .*did you mean 'q_proj'"),
        (["no_such"], "'no_such' fits no layer .*it has q_proj"),
        (["proj"], "'proj' fits no layer"),
        (["self_attn"], "'self_attn' fits no layer"),
        (["input_layernorm"], "'input_layernorm' fits no layer"),
        (["q_proj", "lm_head"], "the output layer can't have an adapter"),
    ],
)
def test_targets_that_fit_no_layer_are_one_line_with_the_names_of_the_layers(tiny_base, targets, said):
    with pytest.raises(UserError, match=rf"^lora\.targets: [^\n]*{said}[^\n]*$"):
        tiny_base.add_adapter(Role.POLICY, Lora.model_construct(**dict(Lora(r=4)) | {"targets": targets}))
    tiny_base.add_adapter(Role.POLICY, Lora(r=4))


@pytest.mark.parametrize(
    ("targets", "count"),
    [("all-linear", 14), (["q_proj", "v_proj"], 4), (["mlp.up_proj"], 2), (["model.layers.1.mlp.up_proj"], 1),
     (["embed_tokens"], 1)],
)  # fmt: skip
def test_targets_fit_layers_as_in_peft(tiny_base, targets, count):
    tiny_base.add_adapter(Role.POLICY, Lora(r=4, targets=targets))
    assert len(tiny_base.trained_weights(Role.POLICY)) == 2 * count


@pytest.fixture
def seeing(spec, tmp_path):
    """A base with a tiny Gemma 3 that has a vision tower, whose attention has layers of the same names."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    base = load(spec)
    base.lm = base.model = tf.AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    base.origin = Origin(str(tmp_path), None, None, "")
    return base


@pytest.mark.parametrize(("targets", "count"), [("all-linear", 14), (["q_proj", "up_proj"], 4)])
def test_a_vision_tower_which_text_never_trains_gets_no_adapter(seeing, targets, count):
    assert any("vision_tower" in name for name in own_layers(seeing.lm))
    seeing.add_adapter(Role.POLICY, Lora(r=2, targets=targets))
    weights = seeing.trained_weights(Role.POLICY)
    assert len(weights) == 2 * count
    assert not [name for name in weights if "language_model" not in name]
    seeing.lm(input_ids=IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None for weight in weights.values())


def test_a_target_that_only_the_vision_tower_has_is_refused(seeing):
    with pytest.raises(UserError, match=r"'fc1' fits no layer of .*language model; it has q_proj, k_proj, "):
        seeing.add_adapter(Role.POLICY, Lora(targets=["q_proj", "fc1"]))


EXACT = {
    "plain": {},
    "regular expression": {"target_modules": r".*layers\.\d+\.self_attn\.[qv]_proj"},
    "Unsloth's": {"target_modules": UNSLOTH},
    "excluded": {"exclude_modules": r".*\.1\.mlp\..*"},
    "ranks and scales": {
        "rank_pattern": {"q_proj": 2, r"^model\.layers\.[01]\.mlp.*": 3}, "alpha_pattern": {r".*\.1\.mlp\..*": 3.5},
    },
    "the first pattern counts": {"rank_pattern": {r"layers.1.*": 2, "q_proj": 3}},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "bias of LoRA": {"lora_bias": True, "init_lora_weights": True},
    "own norms": {"modules_to_save": ["norm"]},
    "own embeddings": {"modules_to_save": ["embed_tokens"]},
    "LoRA on embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "own rows": {"trainable_token_indices": [20, 21, 58]},
}  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore:.*lora_bias=True", "ignore:.*invalid shape", "ignore:Setting `save_embedding_layers` to `True`"
)
@pytest.mark.parametrize("settings", EXACT.values(), ids=EXACT)
def test_an_adapter_is_on_a_shared_base_what_it_is_alone(spec, tmp_path, settings):
    """Also after it was saved again, and next to roles that have other adapters: to the bit here, and to rounding in
    plain PEFT, which adds in another order."""
    folder = save_plain(spec, tmp_path / "a", **settings)
    alone = logits(load(spec), Role.BASE)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(load(spec).lm, folder).eval()(input_ids=IDS).logits
    assert not torch.equal(expected, alone)
    base = load(spec)
    base.add_adapter(Role.POLICY, Lora(r=2))
    base.load_adapter(Role.REFERENCE, folder, trainable=False)
    base.load_adapter("further", folder, trainable=True)
    found = logits(base, Role.REFERENCE)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=5e-6)
    assert torch.equal(logits(base, "further"), found)
    assert torch.equal(logits(base, Role.POLICY), alone)
    assert torch.equal(logits(base, Role.BASE), alone)
    base.save_adapter("further", tmp_path / "again")
    again = load(spec)
    again.load_adapter(Role.POLICY, str(tmp_path / "again"), trainable=False)
    assert torch.equal(logits(again), found)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"rank_pattern": {SLOW: 4}},
        {"alpha_pattern": {"q_proj": 4, SLOW: 4}},
        {"target_modules": "(?:(?:(?:a{1000}){1000}){1000})|.*q_proj"},  # compiling it takes all memory
    ],
)
def test_a_strangers_regular_expression_has_a_time_limit(spec, tmp_path, monkeypatch, settings):
    monkeypatch.setattr(adapter_targets, "MATCHING_SECONDS", 0.2)
    folder = save_plain(spec, tmp_path / "a")
    edit_config(folder, **settings)
    assert "takes too long on the names of layers" in refused(load(spec), folder)


@pytest.mark.parametrize("key", ["exclude_modules", "rank_pattern", "alpha_pattern"])
def test_peft_sees_no_regular_expression_of_a_stranger(spec, tmp_path, key):
    folder = save_plain(spec, tmp_path / "a")
    edit_config(folder, **{key: CATASTROPHIC if key == "exclude_modules" else {CATASTROPHIC: 4, ".*q_proj": 4}})
    base = load(spec)
    base.load_adapter(Role.POLICY, folder, trainable=True)  # would hang
    assert CATASTROPHIC not in str(base.model.peft_config[Role.POLICY])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": "(?R)*"}, "can't be used"),
        ({"target_modules": "nothing"}, "fit no layer"),
        ({"target_modules": ["nothing"]}, "fit no layer"),
        ({"target_modules": [r".*q_proj"]}, "fit no layer"),
        ({"r": 10**9}, "gives model.layers.0.self_attn.q_proj the rank 1000000000"),
        ({"rank_pattern": {"up_proj": 10**9}}, "gives model.layers.0.mlp.up_proj the rank 1000000000"),
        ({"target_modules": ["q_proj"]}, "has no base_model.model.model.layers.0.mlp.up_proj"),
        ({"target_modules": ["q_proj", "up_proj", "v_proj"]}, "lacks 4 of its 12 tensors, such as "),
        ({"use_dora": True}, "lacks 4 of its 12 tensors, such as "),
        ({"modules_to_save": ["input_layernorm"]}, "lacks base_model.model.model.layers.0.input_layernorm.weight"),
        ({"modules_to_save": ["v_proj"]}, "lacks base_model.model.model.layers.0.self_attn.v_proj.weight"),
        ({"trainable_token_indices": [5]}, "lacks base_model.model.model.embed_tokens.token_adapter.trainable_tok"),
        (
            {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [5]}},
            "indices name lm_head, which is not",
        ),
        ({"target_modules": "q_proj", "layers_to_transform": [0]}, "contradicts itself"),
        ({"layers_pattern": "layers"}, "contradicts itself"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_refused(spec, tmp_path, settings, said):
    folder = save_plain(spec, tmp_path / "a")
    edit_config(folder, **settings)
    assert said in refused(load(spec), folder)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
NORM = "base_model.model.model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda w: w.pop(f"{Q}.lora_B.weight"), "lacks 1 of its 8 tensors, such as "),
        (lambda w: [w.pop(name) for name in list(w) if ".1." in name], "lacks 4 of its 8 tensors, such as "),
        (lambda w: w.update({f"{Q}.lora_A.weight": torch.zeros(4, 63)}), "has the shape (4, 63), expected (4, 64)"),
        (lambda w: w.update({f"{Q}.lora_A.weight": torch.zeros(3, 64)}), "has the shape (3, 64), expected (4, 64)"),
        (lambda w: w.update({f"{Q}.lora_C.weight": torch.zeros(2)}), f"has no {Q}.lora_C"),
        (lambda w: w.update({f"{Q}.lora_A.reference.weight": torch.zeros(4, 64)}), "has no base_model"),
        (lambda w: w.update({NORM: torch.zeros(64)}), f"would overwrite the base's own {NORM}"),
        (lambda w: w[f"{Q}.lora_B.weight"].fill_(float("nan")), f"{Q}.lora_B.weight holds numbers that aren't finite"),
        (lambda w: w.update({"base_model.model.score.weight": torch.zeros(1, 64)}), "is a reward adapter"),
        (lambda w: w.update({"base_model.model.score.weight": torch.zeros(1, 63)}), "hidden size 63, "),
    ],
)
def test_tensors_that_are_not_exactly_the_adapters_are_refused(spec, tmp_path, edit, said):
    folder = save_plain(spec, tmp_path / "a")
    edit_weights(folder, edit)
    assert said in refused(load(spec), folder)


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]},
                                      {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}])  # fmt: skip
def test_an_adapter_with_a_resized_vocabulary_is_told_so(spec, tmp_path, settings):
    lm = load(spec).lm
    rows = lm.get_input_embeddings().weight.shape[0]
    lm.resize_token_embeddings(rows + 8, mean_resizing=False)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **({"target_modules": ["q_proj"]} | settings))
    peft.get_peft_model(lm, config).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    line = refused(load(spec), str(tmp_path / "a"))
    assert f"was made with a vocabulary of {rows + 8} rows, {spec.base} has {rows}" in line


def test_copies_of_the_bases_own_embeddings_are_left_out_and_others_refused(spec, tmp_path):
    model = peft.get_peft_model(load(spec).lm, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    folder = str(tmp_path / "a")
    assert {"base_model.model.lm_head.weight"} < load_file(tmp_path / "a" / WEIGHTS).keys()
    load(spec).load_adapter(Role.POLICY, folder, trainable=True)
    edit_weights(folder, lambda weights: weights["base_model.model.lm_head.weight"].mul_(1.01))
    assert "would overwrite the base's own base_model.model.lm_head.weight" in refused(load(spec), folder)


def test_a_layer_of_the_base_that_is_named_like_a_role_stays_as_it_is(tiny_base):
    block = tiny_base.lm.model.layers[0]
    block.policy = nn.ModuleDict({"reference": nn.Linear(4, 4, dtype=torch.bfloat16)}).requires_grad_(False)
    for role in (Role.POLICY, Role.REFERENCE):
        tiny_base.add_adapter(role, Lora(r=4, targets=["q_proj"]))
        assert len(tiny_base.trained_weights(role)) == 4
        assert all(
            f".lora_A.{role}." in n or f".lora_B.{role}." in n for n in adapter_parameters(tiny_base.model, role)
        )
    assert block.policy["reference"].weight.dtype == torch.bfloat16
    assert not block.policy["reference"].weight.requires_grad
