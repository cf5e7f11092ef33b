"""The recipe's own rules, without files: defaults, types, ranges, and settings that conflict."""

from collections.abc import Iterator
from typing import get_args

import pytest
from pydantic import ValidationError

from qalign.config.recipe import Recipe
from qalign.config.stages import DPO_LOSSES, REFERENCE_FREE, RL_STAGES, STAGES, Source

PPO_NEEDS = {"reward": "reward"}
LEARN_FROM_ROWS = ("sft", "reward", "dpo")
JUDGE = {"judge": "m:f", "eval_data": "org/other"}
LOFTQ = {"lora": {"init": "loftq"}, "kto": None, "grpo": None}


def recipe(**sections) -> Recipe:
    """The smallest recipe with all stages, and the given keys on top."""
    stages = {stage: {"data": f"org/{stage}", **(PPO_NEEDS if stage in RL_STAGES else {})} for stage in STAGES}
    base = {"model": {"base": "org/model"}, "output": "runs/x", **stages}
    for key, value in sections.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) and key in base else value
    return Recipe.model_validate(base)


def refusal(**sections) -> str:
    with pytest.raises(ValidationError) as caught:
        recipe(**sections)
    return str(caught.value)


def test_the_stages_of_a_recipe_are_those_it_has_in_the_order_in_which_they_run():
    raw = recipe().model_dump()

    assert Recipe.model_validate(dict(reversed(raw.items()))).stages == STAGES
    assert Recipe.model_validate({**raw, "reward": None}).stages == ("sft", "dpo", "kto", "ppo", "grpo")
    assert Recipe.model_validate({**raw, **dict.fromkeys(STAGES)}).stages == ()


def test_a_recipe_is_immutable():
    read = recipe()

    for section, key in ((read, "seed"), (read.lora, "r"), (read.ppo, "clip"), (read.ppo.reward[0], "source")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, getattr(section, key))


@pytest.mark.parametrize(
    ("section", "key", "inside", "outside"),
    [
        ("model", "max_length", 16, 15), ("lora", "r", 1, 0), ("lora", "alpha", 0.1, 0), ("lora", "dropout", 0.0, -0.1),
        ("lora", "dropout", 0.99, 1.0),
        *((stage, *limits) for stage in STAGES for limits in (
            ("epochs", 0.01, 0.0), ("max_steps", 1, 0), ("limit", 1, 0), ("learning_rate", 1e-12, 0.0),
            ("batch_size", {"ppo": 8, "grpo": 8, "kto": 2}.get(stage, 1), 0),
            ("micro_batch_size", {"ppo": 4, "grpo": 8}.get(stage, 1), 0),
            ("checkpointed_layers", 0, -1), ("warmup_ratio", 0.0, -0.1), ("warmup_ratio", 0.99, 1.0),
            ("save_every", 1, 0),
        )),
        ("sft", "neftune_alpha", 1e-6, 0.0), ("reward", "centering", 0.0, -0.1), ("dpo", "beta", 1e-6, 0.0),
        ("dpo", "length_penalty", 0.0, -0.1), ("dpo", "divergence_alpha", None, 1.1),
        ("ppo", "samples_per_prompt", 1, 0), ("ppo", "max_new_tokens", 1, 0),
        ("ppo", "temperature", 0.01, 0.0), ("ppo", "mini_batches", 1, 0), ("ppo", "update_epochs", 1, 0),
        ("ppo", "kl_coefficient", 0.0, -0.01), ("ppo", "kl_target", 0.01, 0.0), ("ppo", "kl_stop", 1e-6, 0.0),
        ("ppo", "clip", 0.01, 0.0), ("ppo", "value_coefficient", 0.01, 0.0), ("ppo", "value_clip", 0.01, 0.0),
        ("ppo", "gamma", 1.0, 1.01), ("ppo", "gamma", 0.01, 0.0), ("ppo", "gae_lambda", 0.0, -0.01),
        ("ppo", "gae_lambda", 1.0, 1.01), ("ppo", "reward_clip", 0.01, 0.0), ("ppo", "missing_eos_penalty", 0.0, -0.01),
        ("ppo", "patience", 2, 1),
    ],
)  # fmt: skip
def test_each_number_has_its_range(section, key, inside, outside):
    short = {stage: {"max_new_tokens": 8} for stage in RL_STAGES}

    assert getattr(getattr(recipe(**short | {section: {key: inside}}), section), key) == inside
    assert f"{section}.{key}" in refusal(**short | {section: {key: outside}})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("a.jsonl", [Source(path="a.jsonl")]),
        ({"path": "a.jsonl", "limit": 5}, [Source(path="a.jsonl", limit=5)]),
        (["a.jsonl", {"path": "org/b", "weight": 0.5}], [Source(path="a.jsonl"), Source(path="org/b", weight=0.5)]),
    ],
)
def test_data_is_one_source_or_a_list_of_them(stage, data, expected):
    read = getattr(recipe(**{stage: {"data": data, "eval_data": data}}), stage)

    assert (list(read.data), list(read.eval_data)) == (expected, expected)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("data", [[], {"limit": 5}, {"path": "a", "limit": 0}, {"path": "a", "weight": 0.0}, [None]])
def test_data_without_a_source_or_with_a_bad_one_is_refused(stage, data):
    assert f"{stage}.data" in refusal(**{stage: {"data": data}})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("n:f", [("n:f", 1.0)]),
        ({"source": "org/model", "weight": -0.5}, [("org/model", -0.5)]),
        (["n:f", {"source": "a.py:short", "weight": 2}], [("n:f", 1.0), ("a.py:short", 2.0)]),
    ],
)
def test_a_reward_or_a_judge_is_one_source_or_a_list_of_them(given, expected):
    rewarded, judged = recipe(ppo={"reward": given}).ppo, recipe(ppo={"eval_data": "org/other", "judge": given}).ppo

    assert [(reward.source, reward.weight) for reward in rewarded.reward] == expected
    assert [(key, source.source, source.weight) for key, source in judged.sources] == [
        ("reward", "reward", 1.0),
        *(("judge", *pair) for pair in expected),
    ]


# --- conflicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        *(({stage: {"batch_size": batch, "micro_batch_size": micro}}, f"{micro} does not divide batch_size {batch}")
          for stage in LEARN_FROM_ROWS for batch, micro in ((16, 3), (4, 8), (1, 2))),
        *(({"ppo": {"batch_size": batch, "samples_per_prompt": samples, "mini_batches": parts}},
           f"batch_size: {batch} answers don't divide into {parts} mini-batches of whole prompts with {samples}")
          for batch, samples, parts in ((16, 3, 2), (16, 4, 3), (10, 4, 1), (4, 4, 2), (2, 4, 1), (12, 8, 1))),
        *(({"ppo": {"batch_size": 2 * mini, "micro_batch_size": micro}},
           f"micro_batch_size: {micro} is no multiple of samples_per_prompt 4 that divides a mini-batch of {mini}")
          for micro, mini in ((6, 8), (2, 8), (16, 8), (1, 8), (8, 12), (10, 12))),
        *(({stage: {"eval_every": 5}}, "eval_every: has nothing to measure without eval_data") for stage in STAGES),
        *(({"dpo": {key: 8}}, f"{key}: has nothing to answer without eval_data") for key in
          ("sample_prompts", "sample_every")),
        ({"dpo": {"eval_data": "o/o", "sample_prompts": 0, "sample_every": 8}}, "sample_every: has no effect with"),
        ({"ppo": {"reward": {"source": "reward", "weight": 0.0}}}, "weight: a reward with weight 0"),
        ({"ppo": {"eval_data": "o/o", "judge": ["m:f", {"source": "n:f", "weight": 0}]}}, "weight: a reward with"),
        *(({"ppo": {"reward": reward, "judge": judge, "eval_data": "org/other"}}, "judge: must not be what the policy")
          for reward in ("reward", ["n:f", "reward"], {"source": "reward", "weight": -1.0})
          for judge in ("reward", ["m:f", "reward"])),
        ({"ppo": {"judge": "m:f"}}, "judge: has nothing to judge without eval_data"),
        *(({"model": {"max_length": room}, "ppo": {"max_new_tokens": tokens}},
           f"ppo.max_new_tokens: {tokens} leaves no room for a prompt in model.max_length {room}")
          for tokens, room in ((512, 512), (600, 512), (16, 16))),
        ({"ppo": {"kl_target": 6.0, "kl_coefficient": 0.0}}, "kl_target: has no effect with kl_coefficient 0"),
        *(({"ppo": {"advantage": advantage, **keys}}, said)
          for advantage in ("rloo", "grpo", "dr_grpo") for keys, said in (
            ({"samples_per_prompt": 1}, "samples_per_prompt: advantage"),
            ({"value": "trunk"}, "has no value model; remove it, or set advantage: gae"),
            ({"gae_lambda": 0.9}, "gae_lambda: has no effect with advantage"),
            ({"gamma": 0.9}, "gamma: has no effect with advantage"),
            ({"value_clip": 0.1}, "value_clip: has no effect with advantage"),
            ({"value_coefficient": 0.5}, "value_coefficient: has no effect with advantage"),
            ({"reward_scaling": "prompt"}, "reward_scaling: advantage"),
        )),
        ({"ppo": {"value": "none"}}, "value: advantage 'gae' needs a value model; take 'adapter' or 'trunk'"),
        ({"grpo": {"advantage": "gae", "value": "none"}}, "value: advantage 'gae' needs a value model"),
        ({"ppo": {"dynamic_sampling": True}}, "dynamic_sampling: with advantage 'gae'"),
        ({"ppo": {"kl": "none", "kl_coefficient": 0.1}}, "kl_coefficient: has no effect with kl 'none'"),
        ({"ppo": {"kl": "none", "kl_target": 6.0}}, "kl_target: has no effect with kl 'none'"),
        ({"grpo": {"kl": "none", "on_alarm": "slow"}}, "on_alarm: 'slow' raises the KL coefficient"),
        ({"grpo": {"clip_high": 0.5, "ratio_max": 1.4}}, "ratio_max: 1.4 is below the upper clip bound"),
        ({"grpo": {"batch_size": 12}}, "batch_size: 12 answers don't divide into 1 mini-batches"),
        ({"ppo": {"reward_scaling": "prompt", "samples_per_prompt": 1}}, "reward_scaling: 'prompt' compares answers"),
        *(({"dpo": {"label_smoothing": 0.1, "loss": loss}}, f"label_smoothing: has no effect with loss '{loss}'")
          for loss in ("hinge", "sppo_hard", "nca_pair", "bco_pair", "apo_zero", "discopop", "simpo", "orpo")),
        ({"dpo": {"label_smoothing": 0.1, "loss": {"hinge": 1, "sft": 1}}}, "no effect with loss 'hinge' + 'sft'; use"),
        ({"dpo": {"loss": "exo_pair"}}, "loss: 'exo_pair' needs label_smoothing above 0"),
        ({"dpo": {"loss": {"sigmoid": 1, "exo_pair": 1}}}, "loss: 'exo_pair' needs label_smoothing above 0"),
        ({"dpo": {"loss": "sft"}}, "loss: 'sft' alone learns no preference; write {sigmoid: 1.0, sft: 0.2}"),
        ({"dpo": {"loss": {"sft": 1.0}}}, "loss: 'sft' alone learns no preference"),
        ({"dpo": {"discopop_tau": 0.1}}, "discopop_tau: has no effect with loss 'sigmoid'"),
        *(({"dpo": {"length_penalty": 0.1, "loss": loss}}, f"length_penalty: has no effect with loss '{loss}'")
          for loss in ("ipo", "sigmoid_norm", "aot", "bco_pair", "simpo")),
        *(({"dpo": {"divergence": "js", "loss": loss}}, f"divergence: 'js' isn't defined for loss '{said}'; use")
          for loss, said in (("aot", "aot"), ({"sigmoid": 1, "bco_pair": 1}, "bco_pair"), ("simpo", "simpo"))),
        ({"dpo": {"divergence_alpha": 0.5}}, "divergence_alpha: has no effect with divergence 'reverse_kl'"),
        *(({"dpo": {"loss": loss}, "lora": {"dropout": 0.1}}, "lora.dropout: can't be used with this dpo.loss")
          for loss in ("aot", {"sigmoid": 1, "aot_unpaired": 1})),
        ({"dpo": {"loss": "aot", "batch_size": 1}}, "batch_size: 1 leaves loss 'aot' nothing to compare"),
        ({"dpo": {"reference": "in_step", "loss": {"simpo": 1, "sft": 1}}}, "reference: has no effect with loss"),
        ({"dpo": {"loss": "robust"}}, "loss: 'robust' needs label_smoothing above 0"),
        ({"dpo": {"loss": "robust", "label_smoothing": 0.5}}, "dpo.label_smoothing"),
        ({"dpo": {"gamma": 1.0}}, "gamma: has no effect with loss 'sigmoid'"),
        ({"dpo": {"gamma": 0.0, "loss": "orpo"}}, "gamma: has no effect with loss 'orpo'"),
        ({"dpo": {"reference": "in_step", "loss": "simpo"}}, "reference: has no effect with loss 'simpo'"),
        ({"lora": {"targets": ["q_proj", "lm_head"]}}, "targets: 'lm_head' can't have an adapter"),
        ({"lora": {"targets": "lm_head"}}, "targets: 'lm_head' can't have an adapter"),
        ({"lora": {"init": "pissa"}, "model": {"quantization": "none"}}, "init: 'pissa'"),
        ({"lora": {"init": "loftq", "dora": True}, "dpo": {"start_from": "sft"}}, "init: 'loftq' and dora"),
        *((LOFTQ | {"model": {"quantization": kind}, "dpo": {"start_from": "sft"}}, f"quantization is '{kind}'")
          for kind in ("int8", "none")),
        ({"lora": LOFTQ["lora"], "dpo": {"start_from": "sft"}, "ppo": {"start_from": "sft"}}, "step of kto and grpo;"),
        (LOFTQ, "step of dpo and ppo; set dpo.start_from: sft and ppo.start_from: sft, or use 'default'"),
        *((LOFTQ | {"dpo": {"loss": loss}, "ppo": {"start_from": "sft"}}, "step of dpo; set dpo.start_from: sft, or")
          for loss in sorted(set(get_args(DPO_LOSSES)) - REFERENCE_FREE - {"robust", "exo_pair"})),
        *((LOFTQ | {"dpo": dpo}, "step of ppo; set ppo.start_from: sft, or")
          for dpo in ({"start_from": "sft"}, {"loss": "simpo"})),
        ({"max_refused_share": 1.01}, "max_refused_share"), ({"seed": -1}, "seed"), ({"seed": 2**32}, "seed"),
        ({"sft": {"start_from": "sft"}}, "sft.start_from: an SFT run can't start from itself"),
    ],
)  # fmt: skip
def test_settings_that_conflict_are_refused_by_name(sections, words):
    assert words in refusal(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        *({stage: {"batch_size": batch, "micro_batch_size": micro}} for stage in LEARN_FROM_ROWS
          for batch, micro in ((16, 4), (16, 16), (6, 3), (1, 1), (7, "auto"))),
        *({"ppo": {"batch_size": b, "samples_per_prompt": s, "mini_batches": m, "micro_batch_size": micro}}
          for b, s, m, micro in ((64, 4, 2, "auto"), (16, 4, 2, 8), (24, 4, 2, 12), (24, 2, 3, 4), (1, 1, 1, 1))),
        *({stage: {"eval_data": "org/other", "eval_every": 5}} for stage in STAGES),
        {"ppo": JUDGE}, {"ppo": {"kl_target": 6.0}}, {"ppo": {"kl_coefficient": 0.0}}, {"ppo": {"kl_stop": None}},
        {"model": {"max_length": 600}, "ppo": {"max_new_tokens": 599}},
        *({"dpo": {"loss": loss}} for loss in sorted(set(get_args(DPO_LOSSES)) - {"robust", "exo_pair", "sft"})),
        {"dpo": {"loss": "exo_pair", "label_smoothing": 0.001}}, {"dpo": {"loss": {"ipo": 1, "sft": 0.1}}},
        {"dpo": {"divergence": "alpha", "divergence_alpha": 0.2}}, {"dpo": {"length_penalty": 0.01}},
        {"dpo": {"loss": "robust", "label_smoothing": 0.1}}, {"dpo": {"loss": "simpo", "gamma": 0.0}},
        {"lora": {"init": "gaussian"}}, {"lora": {"rslora": True, "dora": True, "r": 64}},
        *(LOFTQ | {"model": {"quantization": kind}, "dpo": dpo, "ppo": {"start_from": "some/adapter"}}
          for kind in ("nf4", "fp4") for dpo in ({"start_from": "sft"}, {"loss": "simpo"}, {"loss": "orpo"})),
        {"max_refused_share": 1, "seed": 0}, {"seed": 2**32 - 1},
        LOFTQ | {"dpo": None, "ppo": None}, {"sft": {"start_from": "some/adapter"}}, {"reward": {"start_from": "sft"}},
    ],
)  # fmt: skip
def test_settings_that_go_together_are_accepted(sections):
    assert recipe(**sections).output == "runs/x"


def test_a_ppo_batch_that_does_not_divide_is_one_problem():
    assert "is no multiple of" not in refusal(ppo={"batch_size": 10, "micro_batch_size": 3})


# --- bounds ----------------------------------------------------------------------------------------------------------


def numbers(schema: dict, where: str = "") -> Iterator[tuple[str, dict]]:
    """(where, its schema) of every number that a JSON schema allows, at any depth."""
    if schema.get("type") in ("integer", "number"):
        yield where, schema
    for key, inside in schema.items():
        if isinstance(inside, dict):
            yield from numbers(inside, f"{where}.{key}")
        for item in inside if isinstance(inside, list) else []:
            if isinstance(item, dict):
                yield from numbers(item, where)


def test_every_number_has_an_upper_bound():
    found = dict(numbers(Recipe.model_json_schema()))

    assert len(found) > 70
    for where, schema in found.items():
        assert {"maximum", "exclusiveMaximum"} & set(schema), where
        assert {"minimum", "exclusiveMinimum"} & set(schema), where


@pytest.mark.parametrize(
    ("section", "key", "inside", "outside"),
    [
        ("model", "max_length", 2**20, 10**12), ("lora", "r", 4096, 10**9), ("lora", "alpha", 1e5, 1e300),
        *((stage, *limits) for stage in STAGES for limits in (
            ("epochs", 10_000.0, 1e300), ("max_steps", 10**7, 10**18), ("limit", 10**9, 10**300),
            ("learning_rate", 1.0, 1e300), ("batch_size", 2**16, 10**10), ("micro_batch_size", 16, 10**10),
            ("checkpointed_layers", 10_000, 10**12), ("save_every", 10**7, 10**18),
            ("data", [{"path": "org/x", "weight": 1000.0}], [{"path": "org/x", "weight": 1e300}]),
            ("data", [{"path": "org/x", "skip": 10**9}], [{"path": "org/x", "skip": 10**30}]),
        )),
        ("ppo", "max_new_tokens", 2047, 10**12), ("ppo", "samples_per_prompt", 1, 10**6), ("dpo", "beta", 1e3, 1e300),
        ("ppo", "update_epochs", 1_000, 10**9), ("ppo", "patience", 1_000, 10**9), ("sft", "neftune_alpha", 1e3, 1e30),
        ("ppo", "reward", {"source": "m:f", "weight": -1e6}, {"source": "m:f", "weight": -1e300}),
    ],
)  # fmt: skip
def test_a_number_beyond_its_bound_is_refused(section, key, inside, outside):
    recipe(**{section: {key: inside}})

    assert "than or equal to" in refusal(**{section: {key: outside}})


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("all-linear", "all-linear"), ("q_proj", ["q_proj"]), (["q_proj", "layers.0.mlp.up_proj"],) * 2,
        *((given, None) for given in ("(([a-z_0-9.])+)+!", ".*", "q_proj|v_proj", "q_proj,v_proj", "*proj", "", "a b")),
        *((given, None) for given in ([], ["(a+)+$"], ["q_proj", ".*"], ["x" * 201], [".q"], ["q."], ["q\n"])),
    ],
)  # fmt: skip
def test_lora_targets_are_names_and_no_regular_expressions(given, taken):
    if taken is None:
        assert "lora.targets" in refusal(lora={"targets": given})
    else:
        assert recipe(lora={"targets": given}).lora.targets == taken


# --- the schema for editors ------------------------------------------------------------------------------------------


def test_the_schema_explains_every_key_beginning_with_its_term_and_allows_no_other():
    found = Recipe.model_json_schema()

    sections = {"Recipe": found, **found["$defs"]}
    stages = {"SFT", "Reward", "DPO", "KTO", "PPO", "GRPO", "Goodhart", "Constitution"}
    assert set(sections) == {"Recipe", "Model", "Lora", *stages, "Source", "RewardSource"}
    for name, section in sections.items():
        assert section["additionalProperties"] is False, name
        for key, value in section["properties"].items():
            term, colon, meaning = value.get("description", "").partition(": ")
            assert colon, f"{name}.{key}"
            assert term[0].isupper(), f"{name}.{key}"
            assert len(term) < 60, f"{name}.{key}"
            assert len(meaning.split()) > 3, f"{name}.{key}"
