"""The shipped recipes: short, explained, right for their models, and each of their stages trains."""

import json
import math
import re
import runpy
from pathlib import Path
from typing import NamedTuple

import jsonschema
import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import DPOConfig, RewardConfig, SFTConfig

from qalign.config.load import load
from qalign.config.recipe import Recipe
from qalign.config.stages import STAGES, Stage
from qalign.data.templates import ChatTemplate
from qalign.model.base import Base, Role
from qalign.model.memory.forecast import Forecast
from tests.conftest import FIXTURES, ROOT
from tests.helpers import metrics, train_recipe

NAMES = ["llama31_8b", "mistral7b", "qwen3_4b", "smollm2_1.7b", "smollm2_demo"]
DEMO = "smollm2_demo"
SCHEMA = ROOT / "recipes" / "recipe.schema.json"
HUB = sorted({*NAMES} - {DEMO})
ULTRAFEEDBACK, ULTRACHAT = "HuggingFaceH4/ultrafeedback_binarized", "HuggingFaceH4/ultrachat_200k"


class Shape(NamedTuple):
    """What is worked out by hand from a base's published config."""

    fixture: str  # folder in `fixtures/configs`
    per_rank: (
        int  # adapter weights per rank: blocks x inputs plus outputs of the layers (q and o, k and v, gate up down)
    )
    card: tuple[int, int] | None = None  # the recipe's GPU in GB, and how many layers `auto` checkpoints on it


SHAPES = {
    "mistral7b": Shape("Mistral-7B-v0.3", 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)), (12, 31)),
    # The raw base has the shapes of the Instruct model.
    "llama31_8b": Shape("Llama-3.1-8B", 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)), (12, 32)),
    "qwen3_4b": Shape(  # 32 heads of 128: wider than the hidden states
        "Qwen3-4B-Instruct-2507", 36 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728)), (8, 35)
    ),
    "smollm2_1.7b": Shape(  # as many key heads as query heads
        "SmolLM2-1.7B-Instruct", 24 * (4 * (2048 + 2048) + 3 * (2048 + 8192)), (15, 11)
    ),
    "smollm2_demo": Shape("SmolLM2-135M-Instruct", 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))),
}


def text_of(name: str) -> str:
    return (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.fixture(params=NAMES)
def name(request, monkeypatch) -> str:
    """Each shipped recipe; the current directory is the project's, as the recipes say."""
    monkeypatch.chdir(ROOT)
    return request.param


@pytest.fixture
def recipe(name) -> Recipe:
    return load(f"recipes/{name}.yaml")


@pytest.fixture(params=STAGES)
def stage(request) -> str:
    return request.param


@pytest.fixture
def settings(recipe, stage) -> Stage:
    """Each stage's section of each recipe."""
    return getattr(recipe, stage)


# --- the files -------------------------------------------------------------------------------------------------------


def test_every_shipped_recipe_is_tested():
    assert sorted(file.stem for file in (ROOT / "recipes").glob("*.y*ml")) == NAMES == sorted(SHAPES)


def test_a_recipe_is_short_and_every_line_says_why(name):
    first, *lines = text_of(name).splitlines()

    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    assert 30 <= len(lines) + 1 <= 50
    assert not [line for line in lines if line and not re.search(r"# \w+\W+\w+", line)]
    assert max(map(len, lines)) <= 120


def test_the_header_gives_a_command_that_works(name):
    (command,) = re.findall(r"^# .*: python -m qalign (\S+\.yaml)( sft=)? \(add (ppo=) ", text_of(name), re.MULTILINE)

    every = load(command[0], [word.strip() for word in command[1:2] if word])
    assert every.stages[-3:] == ("reward", "dpo", "ppo")
    assert load(command[0], ["ppo="]).stages[-1] == "dpo"
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
        *((stage, "data", data, False) for stage in STAGES for data in ([], "", None, 5)),
        *((stage, "eval_data", data, True) for stage in STAGES
          for data in (None, "a.jsonl", {"path": "a.jsonl"}, ["a.jsonl", {"path": "org/b"}])),
        ("ppo", "reward", {"source": "reward", "wieght": 2.0}, False), ("ppo", "on_alarm", "shout", False),
        ("ppo", "judge", "runs/other/reward", True), ("ppo", "judge", {"source": "m:f", "weight": -0.5}, True),
        ("ppo", "reward", ["reward", {"source": "org/model", "weight": 2}], True), ("dpo", "beta", 0.5, True),
    ],
)  # fmt: skip
def test_editors_find_a_mistake_where_there_is_one(section, key, value, valid, validator):
    raw = yaml.safe_load(text_of("mistral7b"))
    raw.setdefault(section, {})[key] = value

    assert validator.is_valid(raw) is valid


# --- the models ------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(name, recipe) -> Base:
    """The recipe's base on the meta device, without weights."""
    config = AutoConfig.from_pretrained(FIXTURES / "configs" / SHAPES[name].fixture)
    with torch.device("meta"):
        return Base(AutoModelForCausalLM.from_config(config), ChatTemplate(None), name, recipe.model)


def test_the_adapter_fits_the_base(name, recipe, base):
    linear = {place for place, layer in base.lm.named_modules() if isinstance(layer, nn.Linear)}

    with torch.device("meta"):
        base.add_adapter(Role.POLICY, recipe.lora)

    assert base.count_parameters()[0] == recipe.lora.r * SHAPES[name].per_rank
    adapted = {place.removesuffix(".lora_A") for place, _ in base.lm.named_modules() if place.endswith(".lora_A")}
    assert adapted == linear - {"lm_head"}
    assert {p.dtype for p in base.model.parameters() if p.requires_grad} == {torch.float32}


def test_known_adapter_sizes():
    """The two products above that others have published: 41.9 M for a 7B of this shape, 33.0 M for Qwen3-4B, r 16."""
    assert 16 * SHAPES["mistral7b"].per_rank == 41_943_040
    assert 16 * SHAPES["qwen3_4b"].per_rank == 33_030_144


@pytest.mark.parametrize("name", HUB, indirect=True)
def test_the_memory_in_the_header_is_the_current_forecast(name, recipe, base):
    card, layers = SHAPES[name].card
    dtype = torch.float16 if recipe.model.compute_dtype == "float16" else torch.bfloat16

    size = sum(Forecast(recipe, "dpo", base.lm.config, "cuda", dtype).parts(8192, layers).values()) / 2**30

    assert f"DPO needs {size:.1f} GiB (forecast)" in text_of(name)
    assert size < 0.95 * card


# --- the settings ----------------------------------------------------------------------------------------------------


def test_the_t4_computes_in_float16():
    assert load(str(ROOT / "recipes" / "smollm2_1.7b.yaml")).model.compute_dtype == "float16"  # it has no bfloat16


def test_trl_accepts_the_trainer_settings(stage, settings, tmp_path):
    config = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": TrainingArguments}[stage]
    plain = {} if stage == "ppo" else {"activation_checkpointing": False}

    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **plain, **settings.trainer)

    assert {key: getattr(args, key) for key in settings.trainer} == settings.trainer


@pytest.mark.parametrize("name", HUB, indirect=True)
def test_hub_recipes_use_the_splits_made_for_each_stage(name, stage, settings):
    (data,), (held_out,) = settings.data, settings.eval_data
    hub, kind = (ULTRACHAT, "sft") if stage == "sft" else (ULTRAFEEDBACK, "prefs")

    assert (data.path, settings.split) == (hub, f"train_{kind}")
    assert (held_out.path, held_out.split) == (hub, f"test_{kind}")
    assert settings.limit
    assert held_out.limit


def test_the_number_of_steps_in_a_comment_is_right(name, stage, settings):
    (section,) = re.findall(rf"^{stage}:(.+?)(?:\n\n|\Z)", text_of(name), re.MULTILINE | re.DOTALL)
    rows = settings.batch_size // getattr(settings, "samples_per_prompt", 1)
    numbers = re.findall(r"(\d+) (?:optimiser steps|iterations)", section)

    assert numbers or stage == "sft" or (name, stage) == (DEMO, "ppo")
    for number in numbers:
        assert int(number) == math.ceil(settings.limit / rows) * settings.epochs


def test_a_base_that_never_learned_to_chat_goes_through_sft_first(name, recipe):
    starts = {recipe.reward.start_from, recipe.dpo.start_from, recipe.ppo.start_from}

    assert recipe.sft.start_from is None
    assert starts == {"sft"} if "nstruct" not in recipe.model.base else name == DEMO or starts == {None}


# --- the demo's rows -------------------------------------------------------------------------------------------------


def rows_of(source) -> list[dict]:
    return [json.loads(line) for line in Path(source.path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", [DEMO], indirect=True)
def test_what_the_demo_counts_in_its_comments_is_so(name, recipe):
    for stage, kind in (("sft", "dialogues"), ("reward", "pairs"), ("dpo", "pairs")):
        settings = getattr(recipe, stage)
        assert re.search(rf" data: .*# {len(rows_of(settings.data[0]))} .*{kind}", text_of(name))
        assert f"{len(rows_of(settings.eval_data[0]))} held-out {kind}" in text_of(name)


@pytest.mark.parametrize("name", [DEMO], indirect=True)
def test_no_question_of_the_demo_is_both_trained_on_and_measured(name, recipe):
    def questions(key: str) -> set[str]:
        return {
            turn["content"]
            for stage in STAGES
            for source in getattr(getattr(recipe, stage), key)
            for row in rows_of(source)
            for turn in row.get("messages") or [{"role": "user", "content": row["prompt"]}]
            if turn["role"] == "user"
        }

    assert len(questions("data")) > 400
    assert not questions("data") & questions("eval_data")


# --- one step --------------------------------------------------------------------------------------------------------


def tiny_model(name: str, folder: Path) -> str:
    """A random model of the recipe's family, 2 small layers of it, with a tokenizer of its kind."""
    kind = "mistral_v03" if name == "mistral7b" else "llama3"
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / kind)
    published = json.loads((FIXTURES / "configs" / SHAPES[name].fixture / "config.json").read_text(encoding="utf-8"))
    small = {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    config = AutoConfig.for_model(**published | small)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_every_stage_of_a_recipe_trains_for_one_step(name, tmp_path):
    words = [f"model.base={tiny_model(name, tmp_path / 'model')}", "model.revision=", "model.compute_dtype=float32"]
    words += ["model.max_length=256", f"output={tmp_path / 'runs'}", "max_refused_share=1.0"]
    for stage in STAGES:
        kind = "house_style_dialogues_test" if stage == "sft" else "house_style_test"
        rows = f"{{path: {ROOT / 'recipes' / 'data' / kind}.jsonl, limit: 8}}"
        words += [f"{stage}.{key}={rows}" for key in ("data", "eval_data")]
        words += [f"{stage}.max_steps=1", f"{stage}.trainer.optim=adamw_torch", f"{stage}.micro_batch_size=2"]
        words += [f"{stage}.batch_size=4", f"{stage}.eval_every=1"]
    words += ["ppo.max_new_tokens=8", "ppo.samples_per_prompt=2"]

    for stage in STAGES:
        path = f"recipes/{name}.yaml"
        run = train_recipe(load(path, words, stage), path, stage=stage)
        assert run.complete
        assert (run.adapter / "adapter_config.json").is_file()
        assert math.isfinite(next(line["loss"] for line in metrics(run) if "loss" in line))
