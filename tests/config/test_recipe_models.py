"""The models of the shipped recipes: shapes, the memory that a header names, thoughts, and a step of each stage."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from qalign.config.load import load
from qalign.config.stages import RL_STAGES
from qalign.data.formats import canonical
from qalign.data.templates import ChatTemplate, prepare_template
from qalign.data.tokenize import encode_pair
from qalign.model.base import Base, Role
from qalign.model.loading import auto_class
from qalign.model.memory.forecast import CUDA_CONTEXT, Forecast, longest_row, usable_of_card
from tests.config.conftest import DEMOS, NAMES, text_of
from tests.conftest import FIXTURES, ROOT
from tests.helpers import metrics, slow, train_recipe

HUB = sorted({*NAMES} - {*DEMOS})
TRL = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"  # as models are published with them


class Shape(NamedTuple):
    """What is worked out by hand from a base's published config."""

    fixture: str  # folder in `fixtures/configs`
    # Adapter weights per rank: blocks x inputs plus outputs of the layers (q and o, k and v, gate up down).
    per_rank: int
    card: int | None = None  # the recipe's GPU in GB


# Of 42 layers 7 see everything, with heads of 512, not 256. Only the first 24, 4 of the 7 among them, have k and v.
# Each layer has a gate and a projection for its own 256 numbers a token, which one layer makes for all.
GEMMA4_E4B = (
    35 * 2 * (2560 + 2048) + 7 * 2 * (2560 + 4096) + 20 * 2 * (2560 + 512) + 4 * 2 * (2560 + 1024)
    + 42 * 3 * (2560 + 10240) + 42 * 2 * (2560 + 256) + (2560 + 42 * 256)
)  # fmt: skip


def gated(hidden: int, mlp: int) -> int:
    """Of Qwen3.5: 8 layers of attention, whose queries come with a gate, and 24 of Gated DeltaNet (q, k and v in one
    layer, the gate z, b and a a number for each of 32 heads, the output)."""
    attention = (hidden + 2 * 4096) + 2 * (hidden + 1024) + (4096 + hidden)
    delta = (hidden + 8192) + (hidden + 4096) + 2 * (hidden + 32) + (4096 + hidden)
    return 8 * attention + 24 * delta + 32 * 3 * (hidden + mlp)


SHAPES = {
    "mistral7b": Shape("Mistral-7B-v0.3", 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)), 12),
    # The raw base has the shapes of the Instruct model.
    "llama31_8b": Shape("Llama-3.1-8B", 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)), 12),
    "qwen3_4b": Shape(  # 32 heads of 128: wider than the hidden states
        "Qwen3-4B-Instruct-2507", 36 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728)), 8
    ),
    "smollm2_1.7b": Shape(  # as many key heads as query heads
        "SmolLM2-1.7B-Instruct", 24 * (4 * (2048 + 2048) + 3 * (2048 + 8192)), 15
    ),
    **dict.fromkeys(DEMOS, Shape("SmolLM2-135M-Instruct", 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)))),
    "smollm3_3b": Shape("SmolLM3-3B", 36 * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 11008)), 8),
    "olmo3_7b": Shape("Olmo-3-7B-Instruct", 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008)), 12),
    "ministral3_8b": Shape(
        "Ministral-3-8B-Instruct-2512", 34 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)), 12
    ),
    "qwen3.5_4b": Shape("Qwen3.5-4B", gated(2560, 9216), 8),
    "qwen3.5_9b": Shape("Qwen3.5-9B", gated(4096, 12288), 12),
    "gemma4_e4b": Shape("gemma-4-E4B-it", GEMMA4_E4B, 12),
    "gpt_oss_20b": Shape("gpt-oss-20b", 24 * (2 * (2880 + 4096) + 2 * (2880 + 512)), 16),  # attention alone
}


@pytest.fixture
def config(name):
    return AutoConfig.from_pretrained(FIXTURES / "configs" / SHAPES[name].fixture)


def test_every_shipped_recipe_has_a_shape():
    assert sorted(SHAPES) == NAMES


def test_the_adapter_fits_the_base(name, recipe, config):
    with torch.device("meta"):
        base = Base(auto_class(config).from_config(config), ChatTemplate(None), name, recipe.model)
        linear = {place for place, layer in base.lm.named_modules() if isinstance(layer, nn.Linear)}
        base.add_adapter(Role.POLICY, recipe.lora)

    assert base.count_parameters()[0] == recipe.lora.r * SHAPES[name].per_rank
    adapted = {place.removesuffix(".lora_A") for place, _ in base.lm.named_modules() if place.endswith(".lora_A")}
    text = {place for place in linear if "language_model." in place}  # of a model that also reads images
    assert adapted == (text or linear) - {"lm_head"}
    assert {p.dtype for p in base.model.parameters() if p.requires_grad} == {torch.float32}


def test_known_adapter_sizes():
    """The two products above that others have published: 41.9 M for a 7B of this shape, 33.0 M for Qwen3-4B, r 16."""
    assert 16 * SHAPES["mistral7b"].per_rank == 41_943_040
    assert 16 * SHAPES["qwen3_4b"].per_rank == 33_030_144


SLOWER = [slow(name) for name in HUB if name != "mistral7b"]


@pytest.mark.parametrize("name", ["mistral7b", *SLOWER], indirect=True)
def test_the_memory_in_the_header_is_the_current_forecast(name, recipe, config):
    """Of the micro-batch that `auto` takes on the recipe's GPU, which holds at least the longest pair."""
    dtype = torch.float16 if recipe.model.compute_dtype == "float16" else torch.bfloat16
    forecast = Forecast(recipe, "dpo", config, "cuda", dtype)

    plan = forecast.plan(usable_of_card(int(SHAPES[name].card * 2**30)), longest_row(recipe, "dpo"))

    assert not plan.offloaded
    size = (forecast.total(plan.tokens, plan.checkpointed_layers) + CUDA_CONTEXT) / 2**30
    assert f"DPO needs {size:.1f} GiB (forecast)" in text_of(name)


# --- thoughts --------------------------------------------------------------------------------------------------------

# What matters here of SmolLM3's template, which TRL has none of.
SMOLLM3 = """\
{%- set empty = "<think>\n\n</think>\n" if enable_thinking is defined and not enable_thinking else "" %}
{%- for message in messages %}
{{- "<|im_start|>" + message.role + "\n" + (empty if message.role == "assistant" else "") }}
{{- message.content + "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" + empty }}{% endif %}"""
ENDS = {"qwen3_5_think": "<|im_end|>", "gptoss": "<|return|>", "smollm3": "<|im_end|>", "gemma4_v5": "<turn|>"}
THOUGHTLESS = {"role": "assistant", "content": "No, they root in cold soil."}
THOUGHTFUL = THOUGHTLESS | {"reasoning_content": "Bulbs need cold."}


def learned(name: str, family: str, answer: dict, **kwargs) -> str:
    """The text of an answer that a recipe trains on, with the family's template."""
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3")
    tokenizer.add_special_tokens({"extra_special_tokens": [ENDS[family]]})
    file = TRL / f"{family}.jinja"
    tokenizer.chat_template = file.read_text(encoding="utf-8") if file.exists() else SMOLLM3
    model = load(f"recipes/{name}.yaml").model
    if kwargs:
        model = model.model_copy(update={"chat_template_kwargs": kwargs["instead"]})
    rejected = answer | {key: "Yes." for key in answer if key != "role"}
    row = canonical({"prompt": "Too late for tulips?", "chosen": [answer], "rejected": [rejected]}, "row 1")
    return tokenizer.decode(encode_pair(prepare_template(tokenizer, model), row, 1000).chosen_ids)


@pytest.mark.parametrize(
    ("name", "family", "text"),
    [
        ("smollm3_3b", "smollm3", "No, they root in cold soil.<|im_end|>"),
        ("qwen3.5_4b", "qwen3_5_think", "No, they root in cold soil.<|im_end|>"),
        ("qwen3.5_9b", "qwen3_5_think", "No, they root in cold soil.<|im_end|>"),
        ("gemma4_e4b", "gemma4_v5", "No, they root in cold soil.<turn|>"),
        ("gpt_oss_20b", "gptoss", "<|channel|>final<|message|>No, they root in cold soil.<|return|>"),
    ],
    indirect=["name"],
)
def test_thoughts_are_left_out_as_the_recipe_says(name, family, text):
    assert "Thoughts are left out" in text_of(name)
    assert learned(name, family, THOUGHTLESS) == text


@pytest.mark.parametrize("name", ["smollm3_3b"], indirect=True)
def test_thoughts_in_the_text_of_smollm3_are_kept_once_the_recipe_is_changed(name):
    thought = {"role": "assistant", "content": "<think>\nBulbs need cold.\n</think>\n\nNo."}

    assert learned(name, "smollm3", thought, instead={"enable_thinking": True}) == thought["content"] + "<|im_end|>"


@pytest.mark.parametrize("name", ["qwen3.5_4b", "qwen3.5_9b"], indirect=True)
def test_thoughts_of_rows_are_kept_without_the_line_that_leaves_them_out(name):
    text = learned(name, "qwen3_5_think", THOUGHTFUL, instead={})

    assert text == "Bulbs need cold.\n</think>\n\nNo, they root in cold soil.<|im_end|>"


@pytest.mark.parametrize("name", ["gpt_oss_20b"], indirect=True)
def test_thoughts_of_rows_that_have_them_are_kept_in_their_channel(name):
    text = learned(name, "gptoss", THOUGHTFUL)

    assert text.startswith("<|channel|>analysis<|message|>Bulbs need cold.<|end|>")


# --- one step --------------------------------------------------------------------------------------------------------

SMALL = {  # in place of a published config's own sizes
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "sliding_window": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "no_rope_layers": [1, 0],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "global_head_dim": 16, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
    "vocab_size": 2048, "vocab_size_per_layer_input": 2048,  # more than the tokenizer has, as is usual
}  # fmt: skip


TOWERS = {  # that read images
    "mistral3": {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16,
        "num_attention_heads": 2, "patch_size": 4, "image_size": 16,
    },
    "gemma4": {
        "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16,
    },
    "qwen3_5": {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
        "num_position_embeddings": 16, "patch_size": 4,
    },
}  # fmt: skip


def small(published: dict, tokenizer) -> dict:
    """A published config with few small layers, two of each kind."""
    found = published | {key: size for key, size in SMALL.items() if key in published}
    found |= {"head_dim": 8, "num_hidden_layers": 2, "pad_token_id": 0}
    if "layer_types" in published:
        found["layer_types"] = 2 * list(dict.fromkeys(published["layer_types"]))
        found["num_hidden_layers"] = len(found["layer_types"])
    found.pop("quantization_config", None)  # random weights are stored in no format of 4 bits
    return found | {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


def tiny_model(name: str, folder: Path) -> str:
    """A random model of the recipe's family, 2 small layers of it, with a tokenizer of its kind."""
    kind = "mistral_v03" if name == "mistral7b" else "llama3"
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / kind)
    published = json.loads((FIXTURES / "configs" / SHAPES[name].fixture / "config.json").read_text(encoding="utf-8"))
    if "text_config" in published:
        text = small(published["text_config"], tokenizer)
        published |= {"text_config": text, "vision_config": TOWERS[published["model_type"]]}
    else:
        published = small(published, tokenizer)
    config = AutoConfig.for_model(**published)
    auto = AutoModelForImageTextToText if "text_config" in published else AutoModelForCausalLM
    torch.manual_seed(0)
    auto.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_every_stage_of_a_recipe_trains_for_one_step(name, recipe, tmp_path):
    words = [f"model.base={tiny_model(name, tmp_path / 'model')}", "model.revision=", "model.compute_dtype=float32"]
    words += ["model.max_length=256", f"output={tmp_path / 'runs'}", "max_refused_share=1.0"]
    for stage in recipe.stages:
        kind = "house_style_dialogues_test" if stage == "sft" else "house_style_test"
        rows = f"{{path: {ROOT / 'recipes' / 'data' / kind}.jsonl, limit: 8}}"
        words += [f"{stage}.{key}={rows}" for key in ("data", "eval_data")]
        words += [f"{stage}.max_steps=1", f"{stage}.trainer.optim=adamw_torch", f"{stage}.micro_batch_size=2"]
        words += [f"{stage}.batch_size=4", f"{stage}.eval_every=1"]
    if recipe.constitution:
        words.append("constitution.max_new_tokens=8")
    for stage in {*recipe.stages} & {*RL_STAGES}:
        words += [f"{stage}.max_new_tokens=8", f"{stage}.samples_per_prompt=2"]

    for stage in recipe.stages:
        path = f"recipes/{name}.yaml"
        run = train_recipe(load(path, words, stage), path, stage=stage)
        assert run.complete
        assert (run.adapter / "adapter_config.json").is_file()
        assert math.isfinite(next(line["loss"] for line in metrics(run) if "loss" in line))
