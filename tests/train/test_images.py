"""Models that also read images train on texts: what reads images is left off the device, and merged models have it."""

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file

from qalign.config.load import load as read
from qalign.config.recipe import Model
from qalign.model.adapters.files import WEIGHTS
from qalign.model.base import Role, load
from qalign.model.loading import guard_4bit, load_config
from qalign.model.memory.forecast import Forecast
from tests.helpers import merge, metrics
from tests.reward_runs import quantised, run_stage, write_recipe
from tests.train.test_reward_families import saved

TOWERS = ["vision_tower", "multi_modal_projector"]
IDS = torch.arange(20, 60)[None]


@pytest.fixture(scope="module", params=["gemma3", "mistral3"])
def folder(request, tiny_folder, tmp_path_factory) -> str:
    return saved(request.param, tiny_folder, tmp_path_factory.mktemp("images") / request.param, images=True)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_a_run_trains_the_language_model_alone_and_merges_the_whole(folder, tmp_path, capsys, targets):
    """`q_proj` is a layer of the vision tower too."""
    path = write_recipe(tmp_path, folder, "dpo", limit=8, max_steps=2, lora={"targets": targets})
    run = run_stage(path)
    assert f"left out       {', '.join(TOWERS)}: no text reaches it" in capsys.readouterr().out
    assert metrics(run)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    names = load_file(run.adapter / WEIGHTS)
    assert all(".language_model." in name and tensor.norm() > 0 for name, tensor in names.items())

    base = load(run.recipe.model)
    base.load_adapter(Role.POLICY, str(run.adapter), trainable=False)
    with torch.no_grad(), base.acting_as(Role.POLICY) as lm:
        expected = lm(input_ids=IDS).logits
    whole = tf.AutoModelForImageTextToText.from_pretrained(folder, quantization_config=quantised(), dtype=torch.float32)
    guard_4bit(whole)
    with torch.no_grad():
        plain = PeftModel.from_pretrained(whole, run.adapter).eval()(input_ids=IDS).logits
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)

    merge(str(run.path), "original", None)
    published, merged = (load_file(f"{where}/model.safetensors") for where in (folder, run.path / "merged-original"))
    assert merged.keys() == published.keys()
    towers = [name for name in published if any(tower in name for tower in TOWERS)]
    assert towers
    for name in towers:
        torch.testing.assert_close(merged[name], published[name].to(merged[name].dtype))


def test_what_reads_images_is_not_held_and_not_forecast(folder, tmp_path):
    spec = Model(base=folder, compute_dtype="float32", quantization="none")
    base = load(spec)
    assert base.left_out == TOWERS
    whole = tf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    towers = [getattr(whole.model, name) for name in TOWERS]
    saved_bytes = sum(p.nbytes for tower in towers for p in (*tower.parameters(), *tower.buffers()))
    every = sum(t.nbytes for t in (*whole.parameters(), *whole.buffers()))
    assert base.held_bytes == every - saved_bytes
    assert torch.equal(base.lm(input_ids=IDS).logits, whole(input_ids=IDS).logits)
    recipe = read(write_recipe(tmp_path, folder, "dpo", model={"quantization": "none"}), stage="dpo")
    buffers = sum(buffer.nbytes for buffer in base.lm.buffers())
    assert Forecast(recipe, "dpo", load_config(spec), "cpu", torch.float32).fixed["base"] == base.held_bytes - buffers


def test_a_text_model_that_is_loaded_alone_is_said(tiny_folder, tmp_path, capsys):
    folder = saved("qwen3_5", tiny_folder, tmp_path / "model", images=True)
    run = run_stage(write_recipe(tmp_path / "run", folder, "sft", limit=4, max_steps=1))
    assert "left out       vision: no text reaches it" in capsys.readouterr().out
    merge(str(run.path), "dequantized", None)
    assert "left out       vision: this is the text model alone" in capsys.readouterr().out


def test_other_models_are_held_whole(tiny_folder):
    assert load(Model(base=tiny_folder, compute_dtype="float32")).left_out == []
