"""`--to merged`: merged weights against a float64 calculation, answers against those of base and adapter."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)

import qalign.convert.merging
import qalign.model.loading
from qalign.data.collate import MicroBatchLimit
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import end_of_turn_id
from qalign.errors import UserError
from qalign.export import main
from qalign.model.adapters.files import SCORE_HEAD
from qalign.model.adapters.members import answer_scores
from qalign.model.base import Role, load
from tests.helpers import house_style, leaving, merge, refusal, slow
from tests.reward_runs import run_stage, write_recipe

BFLOAT16 = {"compute_dtype": "bfloat16"}
IDS = torch.arange(20, 60).view(2, 20)
# Two steps far above what rounding can hide; four pairs, as bfloat16 is slow on a CPU without it.
STRONG = {"learning_rate": 4e-2, "scheduler": "constant", "warmup_ratio": 0.0, "limit": 4, "batch_size": 2}


@pytest.fixture(scope="module")
def published(tiny_folder, tmp_path_factory) -> str:
    """The tiny model as models are published: in bfloat16. Its end of turn is not its end of text."""
    folder = tmp_path_factory.mktemp("published") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.eos_token = "<|end_of_text|>"
    lm = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    lm.config.attention_dropout = 0.1  # off in training, but the published config's, and so the merged one's
    lm.config.eos_token_id = lm.generation_config.eos_token_id = tokenizer.eos_token_id
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def policy(published, tmp_path_factory):
    """A DPO run in bfloat16, and where it was merged; tests only read them."""
    run = run_stage(write_recipe(tmp_path_factory.mktemp("policy"), published, "dpo", model=BFLOAT16, **STRONG))
    merge(str(run.path), "dequantized", None)
    return run, run.path / "merged-dequantized"


@pytest.fixture
def copied(policy, tmp_path) -> Path:
    """A copy of that run, to change."""
    target = tmp_path / "runs" / "dpo"
    return Path(shutil.copytree(policy[0].path, target, ignore=shutil.ignore_patterns("merged-*")))


def stored(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def dequantised(run, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """The weights that the run computed with, by bitsandbytes' own function."""
    lm = load(run.recipe.model).lm
    found = {}
    for name, module in lm.named_modules():
        if hasattr(module, "quant_state") or "4bit" in type(module).__name__:
            found[f"{name}.weight"] = dequantize_4bit(module.weight.data, module.weight.quant_state).to(dtype)
    assert len(found) == 2 * 7
    return found


def assert_merged(run, found: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], scale: float) -> None:
    """W + scale B A in float64, and for DoRA (arXiv:2402.09353, eq. 5) each output's row at its learned length; `found`
    may be off by what rounding to bfloat16 does: 2^-9 of a number, for the update, the sum and DoRA's product each."""
    saved = load_file(run.adapter / "adapter_model.safetensors")
    for name, weight in weights.items():
        a, b, length = (
            saved.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{part}", torch.zeros(0)).double()
            for part in ("A.weight", "B.weight", "magnitude_vector")
        )
        update = scale * b @ a
        assert update.abs().max() > 0.01, name
        expected, roundings = weight.double() + update, 2
        if len(length):
            expected, roundings = length[:, None] * expected / expected.norm(dim=1, keepdim=True), 4
        assert found[name].dtype == torch.bfloat16
        allowed = roundings * 2**-9 * (expected.abs() + update.abs())
        worst = ((found[name].double() - expected).abs() / allowed).max().item()
        assert worst <= 1, (name, worst)


def logits(lm) -> torch.Tensor:
    with torch.no_grad():
        return lm.eval()(input_ids=IDS).logits.float()


def unmerged(run) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the run's base, bare and with the adapter beside it."""
    base = load(run.recipe.model)
    bare = logits(base.lm)
    base.load_adapter(Role.POLICY, str(run.adapter), trainable=False)
    with base.acting_as(Role.POLICY) as lm:
        return bare, logits(lm)


def test_it_answers_as_base_and_adapter_do(policy):
    """Seen: 0.008 apart on average from base and adapter in bfloat16; the bare base is 0.36 away."""
    run, target = policy
    bare, expected = unmerged(run)
    plain = AutoModelForCausalLM.from_pretrained(target)
    assert plain.dtype == torch.bfloat16
    apart, learned = (logits(plain) - expected).abs().mean(), (bare - expected).abs().mean()
    assert learned > 0.3
    assert apart < 0.02


def test_the_weights_are_those_trained_on_plus_the_update_and_nothing_of_the_four_bits_is_left(policy):
    run, target = policy
    found = stored(target)
    assert_merged(run, found, dequantised(run), scale=8 / 4)
    original = stored(run.recipe.model.base)
    untouched = set(found) - set(dequantised(run))
    assert "model.embed_tokens.weight" in untouched
    assert all(torch.equal(found[name], original[name]) for name in untouched)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in original.items()}
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert not list(target.glob("adapter*"))
    card = (target / "README.md").read_text()
    assert run.recipe.model.base in card
    assert "the dequantised base, on which the adapter was trained" in card


def test_the_config_is_the_published_one(policy, published):
    _, target = policy
    before, after = (json.loads((Path(folder) / "config.json").read_text()) for folder in (published, target))
    assert after["attention_dropout"] == 0.1
    assert {key for key in before | after if before.get(key) != after.get(key)} == {"pad_token_id"}


def test_tokenizer_template_and_end_of_turn_come_along(policy):
    run, target = policy
    ours, plain = load(run.recipe.model).tokenizer, AutoTokenizer.from_pretrained(target)
    turns = [{"role": "user", "content": "Warum?"}, {"role": "assistant", "content": "Darum."}]
    for generating in (False, True):
        one, other = (
            t.apply_chat_template(turns, add_generation_prompt=generating, tokenize=False) for t in (ours, plain)
        )
        assert one == other
        assert ours(one).input_ids == plain(other).input_ids
    lm = AutoModelForCausalLM.from_pretrained(target)
    end_of_turn, end_of_text = (plain.convert_tokens_to_ids(f"<|{name}|>") for name in ("eot_id", "end_of_text"))
    assert end_of_turn_id(ChatTemplate(ours)) == end_of_turn
    assert lm.generation_config.eos_token_id == [end_of_turn, end_of_text]
    lm.lm_head.weight.data.zero_()
    lm.lm_head.weight.data[end_of_turn] = 1
    lm.model.norm.weight.data.fill_(1)
    lm.model.norm.register_forward_hook(lambda module, args, hidden: torch.ones_like(hidden))
    assert lm.generate(IDS[:1], max_new_tokens=5, do_sample=False).shape[1] == 21  # the end of turn, and no more


@pytest.mark.parametrize(("lora", "scale"), [({"rslora": True}, 8 / math.sqrt(4)), slow({"dora": True}, 8 / 4)])
def test_other_kinds_of_lora(published, tmp_path, lora, scale):
    run = run_stage(write_recipe(tmp_path, published, "dpo", model=BFLOAT16, lora=lora, **STRONG))
    weights = dequantised(run)
    original = {name: stored(published)[name] for name in weights}
    for onto, before in (("dequantized", weights), ("original", original)):
        merge(str(run.path), onto, None)
        assert_merged(run, stored(run.path / f"merged-{onto}"), before, scale)


def test_onto_the_original_the_update_is_the_same(policy, tmp_path):
    run, dequantized = policy
    target = tmp_path / "original"
    merge(str(run.path), "original", str(target))
    original = stored(run.recipe.model.base)
    weights = {name: original[name] for name in dequantised(run)}
    assert_merged(run, stored(target), weights, scale=8 / 4)
    name = "model.layers.1.mlp.up_proj.weight"
    away = (stored(target)[name].float() - stored(dequantized)[name].float()).abs().mean()
    assert away > 4e-3  # NF4's rounding, which this one hasn't
    assert "the original 16-bit base, which the adapter was not trained on" in (target / "README.md").read_text()


def test_the_dtype_of_training_is_used_whatever_this_machine_would_take(policy, copied, tmp_path, monkeypatch):
    """A run in bfloat16 with `compute_dtype: auto`, merged where auto is float32: the same file to the bit."""
    expected = stored(policy[1])
    recipe = yaml.safe_load((copied / "recipe.yaml").read_text())
    recipe["model"]["compute_dtype"] = "auto"
    (copied / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(qalign.model.loading, "compute_dtype", lambda spec: torch.float32)
    kept = json.loads((copied / "adapter" / "lineage.json").read_text())
    found = {}
    for dtype in ("bfloat16", "float32", "float16"):  # float16 as on a T4
        (copied / "adapter" / "lineage.json").write_text(json.dumps(kept | {"compute_dtype": dtype}))
        merge(str(copied), "dequantized", str(tmp_path / dtype))
        found[dtype] = stored(tmp_path / dtype)
    assert kept["compute_dtype"] == "bfloat16"
    assert_same(found["bfloat16"], expected)
    assert any(not torch.equal(found["float32"][name], expected[name]) for name in expected)  # it makes a difference
    assert {tensor.dtype for tensor in found["float16"].values()} == {torch.float16}
    for name, weight in expected.items():
        torch.testing.assert_close(found["float16"][name].float(), weight.float(), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_reward_run_becomes_a_sequence_classifier_with_the_same_scores(published, tmp_path, compute, capsys):
    """Seen, where scores have a standard deviation of 1.2: for a run in bfloat16 0.009 apart on average and 0.022 at
    most, in float32 0.002 and 0.005. The classifier computes in float32 here; its weights are rounded to 16 bits."""
    run = run_stage(write_recipe(tmp_path, published, model={"compute_dtype": compute}, **STRONG))
    capsys.readouterr()
    merge(str(run.path), "dequantized", None)
    target = run.path / "merged-dequantized"
    assert f'LlamaForSequenceClassification.from_pretrained("{target}")' in capsys.readouterr().out
    base = load(run.recipe.model)
    base.load_adapter(Role.REWARD, str(run.adapter), trainable=False)
    pairs = house_style(base.tokenizer, 8)
    sequences = [pair.prompt_ids + ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    expected = answer_scores(base, Role.REWARD, pairs, MicroBatchLimit(pairs=4)).flatten()
    plain = AutoModelForSequenceClassification.from_pretrained(target, dtype=torch.float32).eval()
    assert plain.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(target, padding_side="right")
    assert tokenizer.pad_token_id == plain.config.pad_token_id != end_of_turn_id(ChatTemplate(tokenizer))
    batch = tokenizer.pad([{"input_ids": ids} for ids in sequences], return_tensors="pt")
    with torch.no_grad():
        found = plain(**batch).logits[:, 0]
        alone = torch.stack([plain(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences])
    torch.testing.assert_close(alone, found, rtol=0, atol=1e-5)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=0.06)
    assert (found - expected).abs().mean() < 0.02
    head = load_file(run.adapter / "adapter_model.safetensors")[SCORE_HEAD]
    torch.testing.assert_close(stored(target)["score.weight"].float(), head, rtol=2**-8, atol=0)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_bases_held_otherwise(published, tmp_path, quantization):
    model = BFLOAT16 | {"quantization": quantization}
    run = run_stage(write_recipe(tmp_path, published, "dpo", model=model, **STRONG))
    merge(str(run.path), "dequantized", None)
    bare, expected = unmerged(run)
    found = logits(AutoModelForCausalLM.from_pretrained(run.path / "merged-dequantized"))
    assert (found - expected).abs().mean() < 0.1 * (bare - expected).abs().mean()


def test_a_model_published_in_float32_is_merged_there_and_kept_in_16_bits(tiny_folder, tmp_path):
    run = run_stage(write_recipe(tmp_path, tiny_folder, "sft", **STRONG))
    merge(str(run.path), "dequantized", None)
    assert_merged(run, stored(run.path / "merged-dequantized"), dequantised(run, torch.float32), scale=8 / 4)


def test_an_adapter_from_before_lineage_merges_in_the_recipes_dtype(policy, copied):
    (copied / "adapter" / "lineage.json").unlink()
    merge(str(copied), "dequantized", None)
    assert_same(stored(copied / "merged-dequantized"), stored(policy[1]))


def test_an_adapter_that_mends_rounding_is_not_merged_where_nothing_was_rounded(tiny_folder, tmp_path, capsys):
    """LoftQ's start is W - Q: on W itself it would be a mistake as large as the rounding."""
    keys = {"lora": {"init": "loftq", "r": 32}, "max_steps": 1, "learning_rate": 1e-9}
    run = run_stage(write_recipe(tmp_path, tiny_folder, "sft", **keys))
    assert "init: loftq" in refusal(capsys, merge, str(run.path), "original", None)
    assert not (run.path / "merged-original").exists()
    merge(str(run.path), "dequantized", None)
    original, merged = stored(tiny_folder), stored(run.path / "merged-dequantized")
    for name, held in dequantised(run, torch.float32).items():
        assert (merged[name].float() - original[name]).norm() < 0.7 * (held - original[name]).norm(), name


def test_what_cannot_be_merged_is_one_line(policy, copied, tmp_path, capsys):
    run, target = policy
    before = (target / "model.safetensors").stat().st_mtime_ns
    assert refusal(capsys, merge, str(run.path), "dequantized", None) == (
        f"{target}: exists already; name another with --output, or remove it"
    )
    assert (target / "model.safetensors").stat().st_mtime_ns == before
    for to in ("a\0b", "~nosuchuser/x"):
        assert refusal(capsys, merge, str(run.path), "original", to).startswith("--output: ")
    (tmp_path / "taken").symlink_to("nowhere")
    assert "exists already" in refusal(capsys, merge, str(run.path), "original", str(tmp_path / "taken"))
    (tmp_path / "taken").unlink()
    (tmp_path / "taken").write_text("precious")
    assert "exists already" in refusal(capsys, merge, str(run.path), "original", str(tmp_path / "taken"))
    (copied / "adapter" / "adapter_model.safetensors").write_bytes(b"cut short")
    assert "is not as it was written: damaged" in refusal(capsys, merge, str(copied), "dequantized", None)
    assert not (copied / "merged-dequantized").exists()
    assert not list(copied.glob(".merged*"))


@pytest.mark.filterwarnings("ignore:.*lora_bias=True", "ignore:.*invalid shape")
def test_an_adapter_that_peft_cannot_merge_is_one_line(published, tmp_path, capsys):
    """A bias of LoRA needs a layer that has a bias itself."""
    config = LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(published), config).save_pretrained(tmp_path / "biased")
    changes = STRONG | {"start_from": str(tmp_path / "biased")}
    run = run_stage(write_recipe(tmp_path, published, "dpo", **changes))
    line = refusal(capsys, merge, str(run.path), "dequantized", None)
    assert line.startswith(f"{run.path}: its adapter can't be merged: Impossible to merge LoRA with `lora_bias=True`")
    assert not list(run.path.glob("*merged*"))


def test_a_merge_that_fails_leaves_no_half_a_folder(policy, tmp_path, monkeypatch):
    run, _ = policy
    failing = lambda *_: (_ for _ in ()).throw(UserError("disk full"))  # noqa: E731
    monkeypatch.setattr(qalign.convert.merging, "save_tokenizer", failing)
    with pytest.raises(UserError, match="disk full"):
        merge(str(run.path), "dequantized", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_the_command_itself(policy, tmp_path, capsys):
    run, target = policy
    assert leaving(main, str(run.path.parent), "--to", "merged", "--output", str(tmp_path / "merged"), "--force") == 0
    said = capsys.readouterr().out
    assert "the dequantised base" in said
    assert f'LlamaForCausalLM.from_pretrained("{tmp_path / "merged"}")' in said
    assert_same(stored(tmp_path / "merged"), stored(target))
    assert leaving(main, "nowhere", "--to", "merged") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nowhere: there is no finished grpo or ppo or kto or dpo or sft or reward run")
    assert leaving(main, str(run.path), "--to", "merged", "--onto", "4bit") == 2
    assert "choose from" in capsys.readouterr().err
