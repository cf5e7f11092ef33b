"""The recipe's own rules, no file involved: what is known, how strict it is, what goes together."""

import json
import subprocess
import sys
from typing import get_args

import pytest
from pydantic import ValidationError

from qalign.config.recipe import Recipe, schema
from qalign.config.stages import DPO_LOSSES, REFERENCE_FREE, STAGES, RewardSource, Source
from tests.conftest import ROOT

NEEDED = {"ppo": {"reward": "reward"}}  # beside `data`
LEARN_FROM_ROWS = ("sft", "reward", "dpo")


def recipe(model: dict | None = None, lora: dict | None = None, **sections) -> Recipe:
    """The smallest recipe with all stages and the given keys on top."""
    stages = {stage: {"data": f"org/{stage}", **NEEDED.get(stage, {}), **sections.pop(stage, {})} for stage in STAGES}
    return Recipe.model_validate(
        {"model": {"base": "org/model", **(model or {})}, "lora": lora or {}, "output": "runs/x", **stages, **sections}
    )


def refusal(**sections) -> str:
    with pytest.raises(ValidationError) as caught:
        recipe(**sections)
    return str(caught.value)


def test_a_key_that_is_left_out_has_the_documented_default():
    read = recipe()

    assert read.seed == 42
    assert read.max_refused_share == 0.05
    model, lora, dpo = read.model, read.lora, read.dpo
    assert (model.quantization, model.double_quant, model.compute_dtype) == ("nf4", True, "auto")
    assert (model.max_length, model.revision, model.chat_template, model.chat_template_kwargs) == (2048, None, None, {})
    assert (lora.r, lora.alpha, lora.dropout, lora.targets) == (16, 32.0, 0.0, "all-linear")
    assert (lora.rslora, lora.dora, lora.init) == (False, False, "default")
    assert (dpo.loss, dpo.beta, dpo.learning_rate, dpo.epochs) == ("sigmoid", 0.1, 5e-6, 1.0)
    assert (dpo.batch_size, dpo.micro_batch_size, dpo.scheduler, dpo.warmup_ratio) == (16, "auto", "cosine", 0.1)
    assert (dpo.label_smoothing, dpo.gamma, dpo.sft_weight) == (0.0, None, 0.0)
    assert (read.sft.learning_rate, read.sft.packing, read.sft.neftune_alpha) == (2e-4, False, None)
    assert (read.reward.learning_rate, read.reward.margin, read.reward.centering) == (1e-4, False, 0.0)
    for stage in (read.sft, read.reward, read.dpo, read.ppo):
        assert (stage.split, stage.limit, stage.eval_data, stage.trainer) == ("train", None, None, {})
        assert (stage.micro_batch_size, stage.start_from) == ("auto", None)
    assert [stage.batch_size for stage in (read.sft, read.reward, read.dpo, read.ppo)] == [16, 16, 16, 64]


def test_what_ppo_does_where_the_recipe_does_not_say():
    ppo = recipe().ppo

    assert ppo.reward == (RewardSource(source="reward", weight=1.0),)
    assert (ppo.judge, ppo.patience, ppo.on_alarm) == (None, 3, "warn")
    assert (ppo.learning_rate, ppo.samples_per_prompt, ppo.mini_batches, ppo.update_epochs) == (1e-5, 4, 2, 2)
    assert (ppo.max_new_tokens, ppo.temperature, ppo.missing_eos_penalty) == (256, 1.0, 1.0)
    assert (ppo.kl_coefficient, ppo.kl_target, ppo.kl_stop) == (0.05, None, 0.1)
    assert (ppo.clip, ppo.value_clip, ppo.value, ppo.value_coefficient) == (0.2, 0.2, "adapter", 0.1)
    assert (ppo.gamma, ppo.gae_lambda, ppo.reward_scaling, ppo.reward_clip) == (1.0, 0.95, "running", 5.0)
    assert ppo.engine == "transformers"


def test_the_stages_of_a_recipe_are_those_it_has_in_the_order_in_which_they_run():
    base = {"model": {"base": "org/model"}, "output": "runs/x"}
    sections = {stage: {"data": "org/rows", **NEEDED.get(stage, {})} for stage in ("ppo", "dpo", "sft", "reward")}

    assert recipe().stages == ("sft", "reward", "dpo", "ppo")
    assert Recipe.model_validate(base).stages == ()
    assert Recipe.model_validate({**base, **sections}).stages == ("sft", "reward", "dpo", "ppo")
    assert Recipe.model_validate({**base, **sections, "reward": None}).stages == ("sft", "dpo", "ppo")


def test_nothing_changes_once_read():
    read = recipe()

    for section, key in (
        (read, "seed"),
        (read.model, "base"),
        (read.lora, "r"),
        (read.sft, "packing"),
        (read.reward, "margin"),
        (read.dpo, "beta"),
        (read.ppo, "clip"),
        (read.ppo.reward[0], "source"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, getattr(section, key))


@pytest.mark.parametrize(
    "sections",
    [
        {"sead": 1},
        {"model": {"quantisation": "nf4"}},
        {"lora": {"rank": 8}},
        {"sft": {"pakcing": True}},
        {"reward": {"centring": 0.01}},
        {"dpo": {"lerning_rate": 1e-5}},
        {"sft": {"beta": 0.1}},
        {"reward": {"packing": True}},
        {"dpo": {"margin": True}},
        {"dpo": {"data": {"path": "org/pairs", "weigth": 2}}},
        {"dpo": {"data": ["org/pairs", {"path": "org/pairs", "weigth": 2}]}},
        {"ppo": {"beta": 0.1}},
        {"ppo": {"kl_coeficient": 0.1}},
        {"ppo": {"reward": {"source": "reward", "weigth": 2.0}}},
        {"ppo": {"eval_data": "org/held-out", "judge": [{"source": "org/model", "path": "org/model"}]}},
    ],
)
def test_an_unknown_key_is_refused_in_every_section(sections):
    assert "Extra inputs are not permitted" in refusal(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"seed": "42"},
        {"seed": 42.0},
        {"seed": True},
        {"output": 5},
        {"max_refused_share": "5%"},
        {"model": {"double_quant": 1}},
        {"model": {"double_quant": "yes"}},
        {"lora": {"r": 16.0}},
        {"lora": {"alpha": "32"}},
        {"lora": {"targets": ["q_proj", 5]}},
        {"lora": {"rslora": 1}},
        {"lora": {"dora": "yes"}},
        {"lora": {"init": True}},
        {"sft": {"packing": 1}},
        {"sft": {"neftune_alpha": "5"}},
        {"reward": {"margin": "yes"}},
        {"reward": {"centering": True}},
        {"dpo": {"beta": True}},
        {"dpo": {"batch_size": "16"}},
        {"dpo": {"micro_batch_size": "4"}},
        {"dpo": {"data": 5}},
        {"dpo": {"trainer": ["optim"]}},
        {"ppo": {"reward": 5}},
        {"ppo": {"reward": [5]}},
        {"ppo": {"reward": {"source": 5}}},
        {"ppo": {"reward": {"source": "reward", "weight": "2"}}},
        {"ppo": {"reward": {"source": "reward", "weight": True}}},
        {"ppo": {"reward": {"weight": 2.0}}},
        {"ppo": {"reward": None}},
        {"ppo": {"samples_per_prompt": 4.0}},
        {"ppo": {"kl_coefficient": "0.05"}},
        {"ppo": {"kl_stop": False}},
        {"ppo": {"value": None}},
        {"ppo": {"engine": "vLLM"}},
    ],
)
def test_a_value_of_another_type_is_refused_even_where_it_could_be_converted(sections):
    refusal(**sections)


def test_a_whole_number_will_do_for_a_number():
    read = recipe(lora={"alpha": 8}, sft={"neftune_alpha": 5}, reward={"centering": 1}, dpo={"epochs": 2, "beta": 1})

    assert (read.lora.alpha, read.sft.neftune_alpha, read.reward.centering) == (8.0, 5.0, 1.0)
    assert (read.dpo.epochs, read.dpo.beta) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("section", "key", "inside", "outside"),
    [
        ("model", "max_length", 16, 15),
        ("lora", "r", 1, 0),
        ("lora", "alpha", 0.1, 0),
        ("lora", "dropout", 0.0, -0.1),
        ("lora", "dropout", 0.99, 1.0),
        *(
            (stage, *range_)
            for stage in STAGES
            for range_ in (
                ("epochs", 0.01, 0.0),
                ("max_steps", 1, 0),
                ("limit", 1, 0),
                ("batch_size", *((8, 0) if stage == "ppo" else (1, 0))),
                ("micro_batch_size", *((4, 0) if stage == "ppo" else (1, 0))),
                ("learning_rate", 1e-12, 0.0),
                ("warmup_ratio", 0.0, -0.1),
                ("warmup_ratio", 0.99, 1.0),
                ("save_every", 1, 0),
            )
        ),
        ("sft", "neftune_alpha", 1e-6, 0.0),
        ("reward", "centering", 0.0, -0.1),
        ("dpo", "beta", 1e-6, 0.0),
        ("dpo", "sft_weight", 0.0, -0.1),
        ("ppo", "samples_per_prompt", 1, 0),
        ("ppo", "max_new_tokens", 1, 0),
        ("ppo", "temperature", 0.01, 0.0),
        ("ppo", "mini_batches", 1, 0),
        ("ppo", "update_epochs", 1, 0),
        ("ppo", "kl_coefficient", 0.0, -0.01),
        ("ppo", "kl_target", 0.01, 0.0),
        ("ppo", "kl_stop", 1e-6, 0.0),
        ("ppo", "clip", 0.01, 0.0),
        ("ppo", "value_coefficient", 0.01, 0.0),
        ("ppo", "value_clip", 0.01, 0.0),
        ("ppo", "gamma", 1.0, 1.01),
        ("ppo", "gamma", 0.01, 0.0),
        ("ppo", "gae_lambda", 0.0, -0.01),
        ("ppo", "gae_lambda", 1.0, 1.01),
        ("ppo", "reward_clip", 0.01, 0.0),
        ("ppo", "missing_eos_penalty", 0.0, -0.01),
        ("ppo", "patience", 2, 1),
    ],
)
def test_each_number_has_its_range(section, key, inside, outside):
    short = {"ppo": {"max_new_tokens": 8}}
    assert getattr(getattr(recipe(**short | {section: {key: inside}}), section), key) == inside
    assert f"{section}.{key}" in refusal(**short | {section: {key: outside}})


def test_share_and_seed_have_their_range():
    assert recipe(max_refused_share=1, seed=0).max_refused_share == 1
    assert "max_refused_share" in refusal(max_refused_share=1.01)
    assert "seed" in refusal(seed=-1)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("a.jsonl", [Source(path="a.jsonl")]),
        ({"path": "a.jsonl", "limit": 5}, [Source(path="a.jsonl", limit=5)]),
        (["a.jsonl", "org/b"], [Source(path="a.jsonl"), Source(path="org/b")]),
        (
            ["a.jsonl", {"path": "org/b", "split": "test", "weight": 0.5}],
            [Source(path="a.jsonl"), Source(path="org/b", split="test", weight=0.5)],
        ),
    ],
)
def test_data_is_one_source_or_a_list_of_them(stage, data, expected):
    assert list(getattr(recipe(**{stage: {"data": data}}), stage).data) == expected
    assert list(getattr(recipe(**{stage: {"eval_data": data}}), stage).eval_data) == expected


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("data", [[], {"limit": 5}, {"path": "a", "limit": 0}, {"path": "a", "weight": 0.0}, [None]])
def test_data_without_a_source_or_with_a_bad_one_is_refused(stage, data):
    assert f"{stage}.data" in refusal(**{stage: {"data": data}})


# --- what goes together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", LEARN_FROM_ROWS)
@pytest.mark.parametrize(("batch", "micro"), [(16, 4), (16, 16), (6, 3), (1, 1), (7, "auto")])
def test_a_micro_batch_that_divides_the_batch_is_taken(stage, batch, micro):
    read = recipe(**{stage: {"batch_size": batch, "micro_batch_size": micro}})

    assert getattr(read, stage).micro_batch_size == micro


@pytest.mark.parametrize("stage", LEARN_FROM_ROWS)
@pytest.mark.parametrize(("batch", "micro"), [(16, 3), (4, 8), (1, 2)])
def test_a_micro_batch_that_does_not_divide_the_batch_is_refused(stage, batch, micro):
    message = refusal(**{stage: {"batch_size": batch, "micro_batch_size": micro}})

    assert f"micro_batch_size: {micro} does not divide batch_size {batch}" in message


@pytest.mark.parametrize(
    ("batch", "each", "parts", "micro"),
    [(64, 4, 2, "auto"), (16, 4, 2, 8), (16, 4, 2, 4), (24, 4, 2, 12), (24, 2, 3, 4), (1, 1, 1, 1), (6, 3, 2, 3)],
)
def test_a_ppo_batch_divides_into_mini_batches_of_whole_prompts_and_those_into_micro_batches(batch, each, parts, micro):
    settings = {"batch_size": batch, "samples_per_prompt": each, "mini_batches": parts, "micro_batch_size": micro}
    ppo = recipe(ppo=settings).ppo

    assert {key: getattr(ppo, key) for key in settings} == settings


@pytest.mark.parametrize(
    ("batch", "each", "parts"),
    [(16, 3, 2), (16, 4, 3), (10, 4, 1), (4, 4, 2), (2, 4, 1), (12, 8, 1)],
)
def test_a_ppo_batch_of_parts_of_prompts_is_refused(batch, each, parts):
    message = refusal(ppo={"batch_size": batch, "samples_per_prompt": each, "mini_batches": parts})

    assert (
        f"batch_size: {batch} answers don't divide into {parts} mini-batches of whole prompts with {each} answers each"
    ) in message


@pytest.mark.parametrize(
    ("micro", "mini"),
    [(6, 8), (2, 8), (16, 8), (1, 8), (8, 12), (10, 12)],  # no whole prompts of 4, or not a whole number of times
)
def test_a_ppo_micro_batch_that_does_not_divide_a_mini_batch_into_whole_prompts_is_refused(micro, mini):
    message = refusal(ppo={"batch_size": 2 * mini, "micro_batch_size": micro})

    assert (
        f"micro_batch_size: {micro} is no multiple of samples_per_prompt 4 that divides a mini-batch of {mini}; "
        "take one, or 'auto'"
    ) in message


def test_a_ppo_batch_that_does_not_divide_is_told_once():
    message = refusal(ppo={"batch_size": 10, "micro_batch_size": 3})

    assert "batch_size: 10 answers don't divide" in message
    assert "is no multiple of" not in message


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("reward", [("reward", 1.0)]),
        ({"source": "org/model", "weight": -0.5}, [("org/model", -0.5)]),
        (["reward", {"source": "a.py:short", "weight": 2}], [("reward", 1.0), ("a.py:short", 2.0)]),
    ],
)
def test_a_reward_is_one_source_or_a_list_of_them(given, expected):
    read = recipe(ppo={"reward": given}).ppo

    assert [(reward.source, reward.weight) for reward in read.reward] == expected
    judged = recipe(ppo={"reward": "module:function", "eval_data": "org/other", "judge": given}).ppo
    assert [(judge.source, judge.weight) for judge in judged.judge] == expected
    assert [(key, source.source) for key, source in judged.sources] == [
        ("reward", "module:function"),
        *(("judge", source) for source, _ in expected),
    ]


def test_ppo_needs_a_reward():
    raw = {"model": {"base": "org/model"}, "output": "x", "ppo": {"data": "org/prompts"}}

    with pytest.raises(ValidationError, match=r"ppo\.reward\n  Field required"):
        Recipe.model_validate(raw)
    assert "ppo.reward" in refusal(ppo={"reward": []})
    assert "ppo.reward" in refusal(ppo={"reward": ""})


def test_a_reward_of_weight_0_is_refused():
    reason = "weight: a reward with weight 0 does nothing; remove it"

    assert reason in refusal(ppo={"reward": {"source": "reward", "weight": 0.0}})
    assert reason in refusal(ppo={"eval_data": "org/other", "judge": ["m:f", {"source": "n:f", "weight": 0}]})


@pytest.mark.parametrize("judge", ["reward", ["m:f", "reward"], {"source": "reward", "weight": 2.0}])
@pytest.mark.parametrize("reward", ["reward", ["n:f", "reward"], {"source": "reward", "weight": -1.0}])
def test_a_judge_that_the_policy_trains_on_is_refused(reward, judge):
    message = refusal(ppo={"reward": reward, "judge": judge, "eval_data": "org/other"})

    assert "judge: must not be what the policy trains on; name another reward run, or a function" in message


def test_a_judge_needs_something_to_judge():
    assert "judge: has nothing to judge without eval_data; add held-out prompts or remove this" in refusal(
        ppo={"judge": "m:f"}
    )
    assert recipe(ppo={"judge": "m:f", "eval_data": "org/other"}).ppo.judge == (RewardSource(source="m:f"),)


@pytest.mark.parametrize(("most", "room"), [(512, 512), (600, 512), (16, 16), (2048, 2048)])
def test_answers_must_leave_room_for_a_prompt(most, room):
    message = refusal(model={"max_length": room}, ppo={"max_new_tokens": most})

    assert (
        f"ppo.max_new_tokens: {most} leaves no room for a prompt in model.max_length {room}; lower it, or raise "
        "model.max_length"
    ) in message
    read = recipe(model={"max_length": room}, ppo={"max_new_tokens": room - 1})
    assert read.ppo.max_new_tokens == room - 1


def test_a_kl_coefficient_of_0_cannot_adapt():
    assert "kl_target: has no effect with kl_coefficient 0, which can't adapt" in refusal(
        ppo={"kl_target": 6.0, "kl_coefficient": 0.0}
    )
    assert recipe(ppo={"kl_target": 6.0}).ppo.kl_target == 6.0
    assert recipe(ppo={"kl_coefficient": 0.0}).ppo.kl_coefficient == 0.0
    assert recipe(ppo={"kl_stop": None}).ppo.kl_stop is None


@pytest.mark.parametrize("stage", STAGES)
def test_eval_every_needs_something_to_measure(stage):
    reason = "eval_every: has nothing to measure without eval_data; add it or remove this"

    assert reason in refusal(**{stage: {"eval_every": 5}})
    assert getattr(recipe(**{stage: {"eval_data": "org/other", "eval_every": 5}}), stage).eval_every == 5


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing: has no effect with loss 'sigmoid'"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "label_smoothing: has no effect with loss 'ipo'"),
        ({"loss": "robust"}, "loss: 'robust' needs label_smoothing above 0"),
        ({"loss": "robust", "label_smoothing": 0.5}, "dpo.label_smoothing"),
        ({"gamma": 1.0}, "gamma: has no effect with loss 'sigmoid'"),
        ({"gamma": 0.0, "loss": "orpo"}, "gamma: has no effect with loss 'orpo'"),
    ],
)
def test_a_setting_that_the_loss_would_ignore_is_refused(settings, reason):
    assert reason in refusal(dpo=settings)


@pytest.mark.parametrize(
    "settings",
    [{"loss": "robust", "label_smoothing": 0.1}, {"loss": "simpo", "gamma": 0.0}, {"loss": "simpo", "gamma": 1.5}],
)
def test_a_setting_that_the_loss_uses_is_taken(settings):
    dpo = recipe(dpo=settings).dpo

    assert {key: getattr(dpo, key) for key in settings} == settings


def test_every_loss_but_robust_needs_nothing_else():
    assert set(get_args(DPO_LOSSES)) > REFERENCE_FREE
    for loss in set(get_args(DPO_LOSSES)) - {"robust"}:
        assert recipe(dpo={"loss": loss}).dpo.loss == loss


def test_the_head_gets_no_adapter():
    assert "targets: 'lm_head' can't have an adapter" in refusal(lora={"targets": ["q_proj", "lm_head"]})
    assert recipe(lora={"targets": ["q_proj", "v_proj"]}).lora.targets == ["q_proj", "v_proj"]


def test_a_start_that_would_change_the_shared_base_is_refused():
    assert "init: 'pissa' takes its start out of the base's own weights" in refusal(lora={"init": "pissa"})
    assert "init: 'pissa'" in refusal(lora={"init": "pissa"}, model={"quantization": "none"})


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_loftq_needs_rounding_to_4_bits_to_mend(quantization):
    message = refusal(lora={"init": "loftq"}, model={"quantization": quantization}, dpo={"start_from": "sft"})

    assert f"lora.init: 'loftq' mends 4-bit weights, and model.quantization is '{quantization}'" in message


def test_loftq_and_dora_do_not_go_together():
    assert "init: 'loftq' and dora can't be combined" in refusal(
        lora={"init": "loftq", "dora": True}, dpo={"start_from": "sft"}
    )


def test_loftq_must_not_move_the_policy_away_from_its_reference():
    message = "lora.init: 'loftq' would move the policy away from its reference before the first step of dpo"

    for loss in set(get_args(DPO_LOSSES)) - REFERENCE_FREE - {"robust"}:
        assert f"{message}; set dpo.start_from: sft, or" in refusal(
            lora={"init": "loftq"}, dpo={"loss": loss}, ppo={"start_from": "sft"}
        )
    ppos = message.replace("dpo", "ppo") + "; set ppo.start_from: sft, or use 'default'"
    for dpo in ({"start_from": "sft"}, {"loss": "simpo"}):
        assert ppos in refusal(lora={"init": "loftq"}, dpo=dpo)
    both = f"{message} and ppo; set dpo.start_from: sft and ppo.start_from: sft, or use 'default'"
    assert both in refusal(lora={"init": "loftq"})


@pytest.mark.parametrize(
    "dpo", [{"start_from": "sft"}, {"start_from": "some/adapter"}, {"loss": "simpo"}, {"loss": "orpo"}]
)
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_loftq_is_taken_where_the_reference_is_not_the_bare_base(dpo, quantization):
    ppo = {"start_from": dpo.get("start_from", "sft")}
    read = recipe(lora={"init": "loftq"}, model={"quantization": quantization}, dpo=dpo, ppo=ppo)

    assert read.lora.init == "loftq"


def test_loftq_is_taken_without_a_dpo_stage():
    raw = {"model": {"base": "org/model"}, "lora": {"init": "loftq"}, "output": "x", "sft": {"data": "org/rows"}}

    assert Recipe.model_validate(raw).lora.init == "loftq"


@pytest.mark.parametrize("lora", [{"init": "gaussian"}, {"dora": True}, {"rslora": True, "dora": True, "r": 64}])
def test_starts_and_scales_that_need_nothing_else_are_taken(lora):
    read = recipe(lora=lora, model={"quantization": "none"}).lora

    assert {key: getattr(read, key) for key in lora} == lora


def test_an_sft_run_does_not_start_from_itself():
    assert "sft.start_from: an SFT run can't start from itself" in refusal(sft={"start_from": "sft"})
    assert recipe(sft={"start_from": "some/adapter"}).sft.start_from == "some/adapter"
    assert recipe(reward={"start_from": "sft"}).reward.start_from == "sft"


# --- the schema for editors ------------------------------------------------------------------------------------------


def test_the_schema_explains_every_key_and_allows_no_other():
    found = json.loads(schema())

    sections = {"Recipe": found, **found["$defs"]}
    assert set(sections) == {"Recipe", "Model", "Lora", "SFT", "Reward", "DPO", "PPO", "Source", "RewardSource"}
    for name, section in sections.items():
        assert section["additionalProperties"] is False, name
        for key, value in section["properties"].items():
            assert len(value.get("description", "")) > 10, f"{name}.{key} has no docstring"


@pytest.mark.parametrize("section", ["SFT", "Reward", "DPO", "PPO"])
def test_the_schema_takes_data_in_every_form_that_a_recipe_does(section):
    keys = json.loads(schema())["$defs"][section]["properties"]
    source = {"$ref": "#/$defs/Source"}

    for forms in (keys["data"]["anyOf"], keys["eval_data"]["anyOf"]):
        assert {"type": "string", "minLength": 1} in forms
        assert source in forms
        (listed,) = (form["items"]["anyOf"] for form in forms if form.get("type") == "array")
        assert {"type": "string", "minLength": 1} in listed
        assert source in listed


def test_the_schema_takes_a_reward_in_every_form_that_a_recipe_does():
    ppo = json.loads(schema())["$defs"]["PPO"]
    text, source = {"type": "string", "minLength": 1}, {"$ref": "#/$defs/RewardSource"}

    assert {"data", "reward"} == set(ppo["required"])
    for key in ("reward", "judge"):
        forms = ppo["properties"][key]["anyOf"]
        (listed,) = (form for form in forms if form.get("type") == "array")
        assert (text in forms, source in forms) == (True, True)
        assert (text in listed["items"]["anyOf"], source in listed["items"]["anyOf"]) == (True, True)
        assert listed["minItems"] == 1
        assert ({"type": "null"} in forms) is (key == "judge")


def test_the_module_prints_the_schema():
    run = subprocess.run(
        [sys.executable, "-m", "qalign.config.recipe"], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert json.loads(run.stdout) == json.loads(schema())
