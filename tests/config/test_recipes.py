"""The shipped recipes: short, explained, with settings that fit their data (`test_recipe_models` has the models)."""

import json
import math
import re
import runpy
from pathlib import Path

import jsonschema
import pytest
import yaml
from transformers import TrainingArguments
from trl import DPOConfig, KTOConfig, RewardConfig, SFTConfig

from qalign.config.load import load
from qalign.config.stages import RL_STAGES
from tests.config.conftest import DEMO, DEMOS, NAMES, text_of
from tests.conftest import ROOT

FROM_ROWS = ("sft", "reward", "dpo", "kto", "ppo")  # GRPO needs a reward too
SCHEMA = ROOT / "recipes" / "recipe.schema.json"
HUB = sorted({*NAMES} - {*DEMOS})
CONFIGS = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "kto": KTOConfig}
CONFIGS |= dict.fromkeys(RL_STAGES, TrainingArguments)
ULTRAFEEDBACK, ULTRACHAT = "HuggingFaceH4/ultrafeedback_binarized", "HuggingFaceH4/ultrachat_200k"


# --- the files -------------------------------------------------------------------------------------------------------


def test_a_recipe_is_short_and_every_line_says_why(name):
    first, *lines = text_of(name).splitlines()

    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    assert 22 <= len(lines) + 1 <= 52
    assert not [line for line in lines if line and not re.search(r"# \w+\W+\w+", line)]
    assert max(map(len, lines)) <= 120


def test_the_header_gives_a_command_that_works(name):
    pattern = r"^# .*: python -m qalign(?:\.goodhart)? (\S+\.yaml)( sft=)?(?: \(add (ppo=) )?"
    ((path, without, ppo),) = re.findall(pattern, text_of(name), re.MULTILINE)

    every = load(path, [without.strip()] if without else [])
    without_ppo = [("sft", "kto"), ("grpo",), ("sft", "reward", "ppo"), ("sft", "dpo")]
    assert every.stages[-3:] == ("reward", "dpo", "ppo") if ppo else every.stages in without_ppo
    assert not ppo or load(path, [ppo]).stages[-1] == "dpo"
    for each in every.stages:  # no stage starts from one that the command leaves out
        assert getattr(every, each).start_from in (None, *every.stages)


def test_the_generated_files_are_current():
    current = runpy.run_path(str(ROOT / "docs" / "make_recipe.py"))["generated"]()

    assert sorted(current) == [ROOT / "docs" / "recipe.md", SCHEMA]
    for file, content in current.items():
        assert file.read_text(encoding="utf-8") == content, "run `make docs` (python docs/make_recipe.py)"
    assert current[ROOT / "docs" / "recipe.md"].count("\n| `") > 90  # a row for every key


@pytest.fixture(scope="module")
def validator():
    found = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft7Validator.check_schema(found)
    return jsonschema.Draft7Validator(found)


def test_editors_find_no_mistake_in_a_recipe(name, validator):
    raw = yaml.safe_load(text_of(name))  # as an editor reads it, without qalign's own number rules

    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(raw)] == []


@pytest.mark.parametrize(
    ("section", "key", "value", "valid"),
    [
        ("dpo", "bata", 0.1, False), ("dpo", "beta", "0.1", False), ("model", "quantization", "nf5", False),
        ("lora", "r", 0, False), ("sft", "neftune_alpha", 0, False), ("reward", "beta", 0.1, False),
        ("ppo", "reward", [], False), ("ppo", "reward", None, False), ("ppo", "judge", 5, False),
        *((stage, "data", data, False) for stage in FROM_ROWS for data in ([], "", None, 5)),
        *((stage, "eval_data", data, True) for stage in FROM_ROWS
          for data in (None, "a.jsonl", {"path": "a.jsonl"}, ["a.jsonl", {"path": "org/b"}])),
        ("ppo", "reward", {"source": "reward", "wieght": 2.0}, False), ("ppo", "on_alarm", "shout", False),
        ("ppo", "judge", "runs/other/reward", True), ("ppo", "judge", {"source": "m:f", "weight": -0.5}, True),
        ("ppo", "reward", ["reward", {"source": "org/model", "weight": 2}], True), ("dpo", "beta", 0.5, True),
    ],
)  # fmt: skip
def test_editors_find_a_mistake_where_there_is_one(section, key, value, valid, validator):
    raw = yaml.safe_load(text_of("mistral7b"))
    raw.setdefault(section, {"data": "a.jsonl"})[key] = value

    assert validator.is_valid(raw) is valid


# --- the settings ----------------------------------------------------------------------------------------------------


def test_the_t4_computes_in_float16():
    assert load(str(ROOT / "recipes" / "smollm2_1.7b.yaml")).model.compute_dtype == "float16"  # it has no bfloat16


def test_trl_accepts_the_trainer_settings(sections, tmp_path):
    for stage, settings in sections.items():
        plain = {} if stage in RL_STAGES else {"activation_checkpointing": False}

        args = CONFIGS[stage](output_dir=str(tmp_path), use_cpu=True, bf16=False, **plain, **settings.trainer)

        assert {key: getattr(args, key) for key in settings.trainer} == settings.trainer


@pytest.mark.parametrize("name", HUB, indirect=True)
def test_hub_recipes_use_the_splits_made_for_each_stage(name, sections):
    for stage, settings in sections.items():
        (data,), (held_out,) = settings.data, settings.eval_data
        hub, kind = (ULTRACHAT, "sft") if stage == "sft" else (ULTRAFEEDBACK, "prefs")

        assert (data.path, settings.split) == (hub, f"train_{kind}")
        assert (held_out.path, held_out.split) == (hub, f"test_{kind}")
        assert settings.limit
        assert held_out.limit


def test_the_number_of_steps_in_a_comment_is_right(name, recipe, sections):
    for stage, settings in sections.items():
        (section,) = re.findall(rf"^{stage}:(.+?)(?:\n\n|\Z)", text_of(name), re.MULTILINE | re.DOTALL)
        rows = settings.batch_size // getattr(settings, "samples_per_prompt", 1)
        numbers = re.findall(r"(\d+) (?:optimiser steps|iterations)", section)

        assert numbers or stage == "sft" or stage in RL_STAGES or recipe.constitution  # it makes the rows
        for number in numbers:  # a pair gives KTO two answers
            assert int(number) == math.ceil(settings.limit * (1 + (stage == "kto")) / rows) * settings.epochs


def test_a_base_that_never_learned_to_chat_goes_through_sft_first(name, recipe):
    starts = {getattr(recipe, stage).start_from for stage in recipe.stages if stage != "sft"}

    assert not recipe.sft or recipe.sft.start_from is None
    assert starts == {"sft"} if "a raw base model" in text_of(name) else name in DEMOS or starts == {None}


# --- the demo's rows -------------------------------------------------------------------------------------------------


def rows_of(source) -> list[dict]:
    return [json.loads(line) for line in Path(source.path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", [DEMO], indirect=True)
def test_what_the_demo_counts_in_its_comments_is_so(name, recipe):
    for stage, kind in (("sft", "dialogues"), ("reward", "pairs"), ("dpo", "pairs")):
        settings = getattr(recipe, stage)
        assert re.search(rf" data: .*# {len(rows_of(settings.data[0]))} .*{kind}", text_of(name))
        assert f"{len(rows_of(settings.eval_data[0]))} held-out {kind}" in text_of(name)


@pytest.mark.parametrize("name", DEMOS[:-1], indirect=True)  # the last one makes its rows
def test_no_question_of_the_demo_is_both_trained_on_and_measured(name, recipe):
    def questions(key: str) -> set[str]:
        return {
            turn["content"]
            for stage in recipe.stages
            for source in getattr(getattr(recipe, stage), key) or ()
            for row in rows_of(source)
            for turn in row.get("messages") or [{"role": "user", "content": row["prompt"]}]
            if turn["role"] == "user"
        }

    assert len(questions("data")) >= (400 if recipe.sft else 300)
    assert not questions("data") & questions("eval_data")
