"""Adapters that come from elsewhere than the recipe says are refused, with both sides named."""

import dataclasses
import json

import pytest

from qalign.config.recipe import Model
from qalign.errors import UserError
from qalign.model import lineage
from qalign.model.base import load
from tests.reward_runs import run_stage, write_recipe

OURS = lineage.Lineage(
    stage="sft",
    base="org/model",
    revision="a" * 40,
    config_hash="c0",
    tokenizer_hash="t0",
    special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
    template="the model's own",
    template_hash="h0",
    quantization="nf4",
    compute_dtype="bfloat16",
)


def test_a_lineage_is_kept_beside_the_adapter_and_read_again(tmp_path):
    assert lineage.read(tmp_path) is None, "an adapter that was made elsewhere has none"
    lineage.write(tmp_path, OURS)
    assert lineage.read(tmp_path) == OURS
    lineage.check("dpo.start_from", tmp_path, dataclasses.replace(OURS, stage="dpo", quantization="fp4"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": "org/other"}, "on the base 'org/model', this recipe's is 'org/other'"),
        ({"revision": "b" * 40}, f"on revision {'a' * 40} of 'org/model', this recipe uses {'b' * 40}"),
        ({"config_hash": "c1"}, "on 'org/model' with the config c0, now it is c1"),
        (
            {"special_tokens": {"bos_token": "<s>", "eos_token": "<|im_end|>"}, "tokenizer_hash": "t1"},
            "with the special tokens bos_token <s>, eos_token </s>, "
            "this recipe's are bos_token <s>, eos_token <|im_end|>",
        ),
        ({"tokenizer_hash": "t1"}, "with the vocabulary t0, this recipe's is t1"),
        (
            {"template_hash": "h1", "template": "chat.jinja"},
            "with the chat template h0 (the model's own), this recipe's is h1 (chat.jinja)",
        ),
    ],
)
def test_each_contradiction_is_one_line_with_both_sides(tmp_path, change, said):
    lineage.write(tmp_path, OURS)
    with pytest.raises(UserError) as refused:
        lineage.check("dpo.start_from", tmp_path, dataclasses.replace(OURS, **change))
    assert refused.value.lines == (f"dpo.start_from: {tmp_path} was trained {said}",)


def test_several_contradictions_are_all_named(tmp_path):
    lineage.write(tmp_path, OURS)
    other = dataclasses.replace(OURS, base="org/other", tokenizer_hash="t1", template_hash="h1")
    with pytest.raises(UserError) as refused:
        lineage.check("dpo.start_from", tmp_path, other)
    assert len(refused.value.lines) == 3


def test_a_local_base_may_have_moved(tmp_path):
    lineage.write(tmp_path, dataclasses.replace(OURS, base="/disk/models/mine", revision=None))
    lineage.check("x", tmp_path, dataclasses.replace(OURS, base="/other/mine", revision=None))
    with pytest.raises(UserError, match="'/disk/models/mine', this recipe's is '/other/theirs'"):
        lineage.check("x", tmp_path, dataclasses.replace(OURS, base="/other/theirs", revision=None))


def test_a_local_base_is_known_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    ours = dataclasses.replace(OURS, base="models/mine", parent="models/mine", revision=None)
    lineage.write(tmp_path, ours)
    monkeypatch.chdir("/")
    kept = lineage.read(tmp_path)
    assert kept.base == kept.parent == str(tmp_path / "models" / "mine")
    lineage.check("x", tmp_path, dataclasses.replace(ours, base=f"{tmp_path}/models/mine"))


def test_weights_that_changed_since_are_one_line(tmp_path):
    """PEFT loads a file with a flipped bit without a word."""
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(bytes(range(100)))
    lineage.write(tmp_path, OURS)
    lineage.check("dpo.start_from", tmp_path, OURS)
    weights.write_bytes(bytes([*range(99), 98]))
    with pytest.raises(UserError, match=r"dpo.start_from: .*safetensors is not as it was written: damaged, or changed"):
        lineage.check("dpo.start_from", tmp_path, OURS)
    (tmp_path / lineage.FILE).write_text(json.dumps(dataclasses.asdict(OURS)))  # as older adapters have it: no hash
    lineage.check("dpo.start_from", tmp_path, OURS)


@pytest.mark.parametrize(
    "text",
    [
        '{"stage": "sft"}',
        "[" * 200_000,
        "null",
        json.dumps(dataclasses.asdict(OURS) | {"base": 5}),
        json.dumps(dataclasses.asdict(OURS) | {"base": None}),
        json.dumps(dataclasses.asdict(OURS) | {"special_tokens": ["a"]}),
        json.dumps(dataclasses.asdict(OURS) | {"special_tokens": {"bos_token": 1}}),
    ],
)
def test_a_broken_lineage_is_one_line(tmp_path, text):
    (tmp_path / lineage.FILE).write_text(text)
    with pytest.raises(UserError, match=r"lineage.json: not a lineage that qalign wrote"):
        lineage.read(tmp_path)


def test_the_base_is_compared_before_anything_is_loaded(tmp_path, monkeypatch):
    lineage.write(tmp_path, OURS)
    lineage.check_base("reward.start_from", tmp_path, "org/model", None)
    lineage.check_base("reward.start_from", tmp_path, "org/model", "main")  # which commit that is shows later
    with pytest.raises(UserError, match="trained on the base 'org/model', this recipe's is 'org/other'"):
        lineage.check_base("reward.start_from", tmp_path, "org/other", None)
    with pytest.raises(UserError, match=f"revision {'a' * 40} of 'org/model', this recipe uses {'b' * 40}"):
        lineage.check_base("reward.start_from", tmp_path, "org/model", "b" * 40)


def test_what_a_base_records_changes_with_the_template_and_the_special_tokens_only(tiny_folder, tmp_path):
    spec = Model(base=tiny_folder, compute_dtype="float32")
    first, again = load(spec).lineage("sft"), load(spec).lineage("sft")
    assert first == again
    assert first.special_tokens["eos_token"] == "<|eot_id|>"
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<|eot_id|>{% endfor %}assistant: ")
    other = load(spec.model_copy(update={"chat_template": str(template)})).lineage("sft")
    assert other.template_hash != first.template_hash
    assert dataclasses.replace(other, template=first.template, template_hash=first.template_hash) == first
    words = load(spec.model_copy(update={"chat_template_kwargs": {"a": 1}})).lineage("sft")
    assert words.template_hash != first.template_hash
    moved = load(spec.model_copy(update={"system_turn": "into_user"})).lineage("sft")
    assert (moved.template_hash != first.template_hash, moved.template.endswith("put into the user's")) == (True, True)


def test_dpo_from_an_sft_run_with_another_template_is_refused(tiny_folder, tmp_path):
    sft = run_stage(write_recipe(tmp_path, tiny_folder, "sft"))
    template = tmp_path / "own.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|eot_id|>{% endfor %}"
                        "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    path = write_recipe(tmp_path, tiny_folder, "dpo", model={"chat_template": str(template)}, start_from="sft")
    with pytest.raises(UserError, match=rf"{sft.adapter} was trained with the chat template \w+ \(the model's own\), "
                                        rf"this recipe's is \w+ \({template}\)"):  # fmt: skip
        run_stage(path)
    assert not (tmp_path / "dpo" / "recipe.yaml").exists(), "nothing was begun"
