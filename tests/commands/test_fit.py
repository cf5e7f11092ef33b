"""`python -m qalign.fit`: what it prints is so, what it advises fits, and it needs no weights."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from qalign import fit
from qalign.config.load import load
from qalign.config.stages import RL_STAGES, STAGES
from qalign.errors import UserError
from qalign.model.loading import load_config
from qalign.model.memory import forecast as memory
from tests.conftest import FIXTURES, ROOT
from tests.helpers import leaving

CONFIGS = FIXTURES / "configs"
GIB = 2**30


@pytest.fixture(scope="module", autouse=True)
def each_step_once():
    """The same step of the same model is run once for all tests here."""
    run, known = memory.StepModel.run, {}

    def remembered(self, tokens, **way):
        config, recipe = self.lm.config.to_json_string(use_diff=False), self.recipe
        about = (config, self.stage, self.lm.dtype, str(recipe.lora), recipe.model.quantization)
        key = (*about, self.lm.config._attn_implementation, *way.values(), tokens)
        if key not in known:
            known[key] = run(self, tokens, **way)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory.StepModel, "run", remembered)
        yield


@pytest.fixture
def bare(tmp_path, tiny_folder) -> str:
    """A model folder with nothing but its config."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(Path(tiny_folder) / "config.json", folder)
    return str(folder)


@pytest.fixture
def recipe_path(tmp_path, bare) -> str:
    """A recipe of all stages on it."""
    (tmp_path / "rows.jsonl").write_text("")
    stage = {"data": "rows.jsonl", "batch_size": 4}
    recipe = {
        "model": {"base": bare, "compute_dtype": "float32", "max_length": 512},
        "lora": {"r": 4, "alpha": 8},
        "output": "runs",
        **dict.fromkeys(STAGES, stage),
        "ppo": stage | {"batch_size": 8, "samples_per_prompt": 2, "max_new_tokens": 100, "reward": "reward"},
        "grpo": stage | {"batch_size": 8, "samples_per_prompt": 2, "max_new_tokens": 100, "reward": "reward"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def forecast_of(path: str, stage: str, overrides: list[str]):
    """A stage's forecast as the command makes it for a card."""
    recipe = load(path, overrides)
    return memory.Forecast(recipe, stage, load_config(recipe.model), "cuda", torch.bfloat16)


def test_words_in_any_order(recipe_path, monkeypatch):
    seen = []
    monkeypatch.setattr(fit, "report", lambda recipe, given, _: seen.append((recipe, given)))
    words = [recipe_path, "model.max_length=300", "reward="]
    for order in (
        [*words, "--memory", "12GB"],
        ["--memory", "12GB", *words],
        [words[0], "--memory", "12GB", *words[1:]],
        [*words[:2], "--memory=12GB", words[2]],
    ):
        assert leaving(fit.main, *order) == 0
        recipe, given = seen.pop()
        assert (recipe.stages, recipe.model.max_length, given) == (("sft", "dpo", "kto", "ppo", "grpo"), 300, "12GB")


def test_a_base_that_is_dealt_out_is_planned_for_each_card(recipe_path, capsys):
    shared = ("dpo.batch_size=8", "model.shard=true", "--memory", "12GB")
    assert leaving(fit.main, recipe_path, *shared, "--cards", "2") == 0
    said = capsys.readouterr().out
    assert "usable on cuda of each of 2 processes" in said
    assert said.count("yes: each of 2 processes holds") == said.count("\n  gathered ") == 4, "sft, reward, dpo and kto"
    assert said.count("NO: model.shard: only sft, reward, dpo and kto") == 2, "ppo and grpo"
    assert leaving(fit.main, recipe_path, *shared) == 2
    assert "--cards 2" in capsys.readouterr().err


def test_every_stage_is_shown(recipe_path, capsys):
    assert leaving(fit.main, recipe_path, "--memory", "12GB", "dpo.batch_size=8") == 0
    said = capsys.readouterr().out
    assert "nf4, computing in float32, rows of up to 512 tokens, " in said
    assert re.findall(rf"^({'|'.join(STAGES)})$", said, flags=re.MULTILINE) == list(STAGES)
    assert said.count("yes: ") == len(STAGES)
    assert "of 10.52 GiB" in said  # 93% of it, less what CUDA takes


def test_without_memory_it_is_about_this_computer_whose_home_may_hold_the_base(recipe_path, bare, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(Path(bare).parent))
    assert leaving(fit.main, recipe_path, "model.base=~/bare", "sft=", "reward=") == 0
    said = capsys.readouterr().out
    assert "yes: " in said
    assert "on cpu" in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--memory", "lots"], "--memory: 'lots' is not a size; write 12GB for a card with 12 GB"),
        (["--memory", "0"], "--memory: '0' is not a size"),
        (["--memory", "12MB"], "--memory: '12MB' is not a size"),
        (["model.base=no/such-model", "--memory", "12GB"], "model.base: 'no/such-model' can't be fetched: "),
        (["model.quantization=nf5"], "quantization"),
    ],
)
def test_a_mistake_is_one_line(words, complaint, recipe_path, capsys):
    assert leaving(fit.main, recipe_path, *words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert complaint in line


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-family"}', "{}"])
def test_a_config_that_cannot_be_read_is_one_line(text, recipe_path, bare, capsys):
    (Path(bare) / "config.json").write_text(text)
    assert leaving(fit.main, recipe_path, "--memory", "12GB") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"model.base: '{bare}' can't be read: ")


@pytest.mark.parametrize(
    "settings",
    [{"model_type": "t5"}, {"hidden_act": "nosuch"}, {"rope_parameters": {"rope_type": "nosuch", "rope_theta": 1.0}}],
)
def test_a_config_of_no_model_that_can_be_trained_is_one_line(settings, recipe_path, bare, capsys):
    config = Path(bare) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    assert leaving(fit.main, recipe_path, "--memory", "12GB") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"model.base: '{bare}' can't be trained: ")


def test_errors_are_reported_before_torch_is_imported(recipe_path, tmp_path):
    """In a process of its own."""
    (tmp_path / "broken.yaml").write_text("model: {base: x\n")
    script = (
        "import sys; from qalign import fit\n"
        "for words in (['broken.yaml'], ['recipe.yaml', '--memory', 'lots']):\n"
        "    try:\n        fit.main(words)\n"
        "    except SystemExit as leaving:\n        print(leaving.code)\n"
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'bitsandbytes'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "2\n2\n[]\n", done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_sizes_are_in_gib():
    for text in ("12", "12GB", "12gb", " 12 GiB ", "12G", "12.0 GB"):
        assert fit.memory_of(text) == 12 * GIB
    assert fit.memory_of("0.5GB") == GIB // 2
    for text in ("", "GB", "-12GB", "12 TB", "1e3", "12 GB free", "0.0GB", "nan", "12,5"):
        with pytest.raises(UserError, match="is not a size; write 12GB"):
            fit.memory_of(text)


def test_the_bar_is_as_wide_as_the_memory():
    assert fit.bar({"a": 50, "b": 25}, 100) == f"{'█' * 30}{'▓' * 15}{'·' * 15}| 75% of 0.00 GiB"
    assert fit.bar({"a": 100}, 100) == f"{'█' * 60}| 100% of 0.00 GiB"
    assert fit.bar({"a": 90, "b": 60}, 100) == f"{'█' * 54}{'▓' * 6}|{'▓' * 30} 150% of 0.00 GiB"
    assert fit.bar({"a": 900}, 100) == f"{'█' * 60}|{'█' * 60} 900% of 0.00 GiB"  # no wider than a screen


@pytest.mark.parametrize("stage", STAGES)
def test_the_parts_are_those_of_the_forecast_and_their_sum_the_total(stage, recipe_path):
    forecast = forecast_of(recipe_path, stage, [f"{stage}.micro_batch_size={4 if stage in RL_STAGES else 2}"])
    longest = {"sft": 512, "reward": 1024, "dpo": 1024, "kto": 512, "ppo": 512 + 100, "grpo": 512 + 100}
    tokens = 2 * longest[stage]  # the prompt once
    table = dict(fit.lines(forecast, 12 * GIB))
    parts = forecast.parts(tokens, 0)
    assert sum(parts.values()) == forecast.total(tokens, 0)
    assert [name for name in table if name not in ("in all", "fits", "limit")] == list(parts)
    assert len(parts) == len(fit.SHADES) - 1  # a shade each, and one for what is gathered of a base in parts
    for name, size in parts.items():
        assert float(table[name].split()[0]) == pytest.approx(size / GIB, abs=0.0051)
    assert float(table["in all"].split()[0]) == pytest.approx(sum(parts.values()) / GIB, abs=0.0051)
    assert len(re.search(r"GiB  (.*)\|", table["in all"])[1]) == fit.WIDTH
    words = fit.ROWS[stage]
    expected = f"yes: {tokens:,} tokens at once, no of 2 layers checkpointed; that is 2 of the longest {words}"
    assert table["fits"] == expected


@pytest.mark.parametrize("stage", STAGES)
def test_the_limit_is_within_the_bases_reach(stage, recipe_path, bare):
    forecast = forecast_of(recipe_path, stage, [])
    length = int(re.search(r"max_length ([\d,]+)$", dict(fit.lines(forecast, 500 * GIB))["limit"])[1].replace(",", ""))
    assert length == json.loads((Path(bare) / "config.json").read_text())["max_position_embeddings"]


def followed(path: str, stage: str, memory: float, overrides: list[str]) -> tuple[list[str], dict]:
    """What was advised, one after the other, until it says yes or names no key; and the last table."""
    advised = []
    while True:
        table = dict(fit.lines(forecast_of(path, stage, [*overrides, *advised]), int(memory * GIB)))
        if "change" not in table or table["change"].startswith("model.base:"):
            return advised, table
        assert table["fits"].startswith("NO: ")
        assert table["change"] not in advised, "the same advice twice"
        advised.append(table["change"])


@pytest.fixture
def mistral(monkeypatch) -> list[str]:
    monkeypatch.chdir(ROOT)
    return [f"model.base={CONFIGS / 'Mistral-7B-v0.3'}", "model.max_length=32000"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "memory", "first", "most"),
    [
        (["dpo.micro_batch_size=auto", "model.quantization=none"], 8, "model.quantization=nf4", 2),
        (["dpo.micro_batch_size=auto"], 8, "model.max_length=", 1),
        (["model.max_length=4096", "dpo.micro_batch_size=16"], 12, "dpo.micro_batch_size=auto", 2),
    ],
)
def test_advice_leads_to_a_yes(keys, memory, first, most, mistral):
    """One setting a time: the first makes room, the next says how much of it rows may take."""
    advised, table = followed("recipes/mistral7b.yaml", "dpo", memory, [*mistral, *keys])
    assert advised[0].startswith(first)
    assert len(advised) <= most
    assert table["fits"].startswith("yes: ")


def test_no_setting_helps_where_the_base_is_too_large(mistral):
    advised, table = followed("recipes/mistral7b.yaml", "dpo", 3, mistral)
    assert advised == []
    assert re.fullmatch(
        r"model\.base: a smaller model; this one takes \d\.\d\d GiB of 3\.00 GiB before .*", table["change"]
    )


@pytest.mark.slow
def test_a_base_that_is_published_in_four_bits_is_forecast_as_it_is_stored(recipe_path, bare, capsys):
    """As a copy that bitsandbytes made, which left one kind of layer in 16 bits; other formats are named."""

    def table(**stored) -> str:
        kept = json.loads((Path(bare) / "config.json").read_text())
        (Path(bare) / "config.json").write_text(json.dumps(kept | stored))
        code = leaving(fit.main, recipe_path, "--memory", "12GB", "sft=", "reward=", "ppo=", "grpo=")
        told = capsys.readouterr()
        return told.out if code == 0 else told.err

    def base_bytes() -> int:
        return forecast_of(recipe_path, "dpo", []).fixed["base"]

    plain, expected = table(), base_bytes()
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert table(quantization_config=nf4 | {"bnb_4bit_use_double_quant": True}) == plain
    assert base_bytes() == expected
    said = table(quantization_config=nf4)
    assert f"note: '{bare}' is stored in nf4, double_quant false, and is used as it is" in said
    table(
        quantization_config=nf4 | {"bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head", "up_proj"]}
    )
    left_out = 2 * 64 * 128  # weights of two layers, in bfloat16 and not in 4 bits with their scales
    assert base_bytes() - expected == pytest.approx(left_out * (2 - 0.5 - 1 / 64), abs=64)
    said = table(quantization_config={"quant_method": "gptq", "bits": 4})
    assert said == (
        f"model.base: '{bare}' is stored in GPTQ, which can't be trained on here; take the 16-bit original, or a copy "
        "in bitsandbytes' 4 bits\n"
    )
