"""Stages on mixtures of experts: the loss of SFT, the first loss of DPO, routers, merged weights."""

import json
import math

import pytest
import torch
import transformers as tf

import qalign.model.experts.weights as experts
from qalign.config.recipe import Lora, Model
from qalign.model.base import Role, load
from tests.helpers import merge
from tests.moe_models import publish_in_mxfp4, save
from tests.reward_runs import run_stage, write_recipe

IDS = torch.arange(20, 60).view(2, 20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in ("qwen3_moe", "gpt_oss"):
        path = tmp_path_factory.mktemp(name) / "model"
        made[name] = save(name, path)
    path = tmp_path_factory.mktemp("published") / "model"
    save("gpt_oss", path)
    made["mxfp4"] = publish_in_mxfp4(path)
    return made


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_sft_adds_no_router_loss_unless_it_is_asked_for(folders, tmp_path):
    logged = {}
    for name, trainer in (("plain", {}), ("asked", {"trainer": {"router_aux_loss_coef": 0.5}})):
        path = write_recipe(tmp_path / name, folders["qwen3_moe"], "sft", limit=4, max_steps=1, **trainer)
        logged[name] = metrics(run_stage(path))
    assert not any("aux_loss" in line for line in logged["plain"])
    plain, asked = (next(line for line in lines if "loss" in line) for lines in logged.values())
    assert asked["loss"] == pytest.approx(plain["loss"] + 0.5 * asked["aux_loss"], abs=1e-3)
    assert asked["aux_loss"] > 0.5


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "mxfp4"])
def test_dpo_starts_at_ln_2_and_is_merged_exactly(name, folders, tmp_path):
    run = run_stage(write_recipe(tmp_path, folders[name], "dpo", limit=8))
    first = next(line for line in metrics(run) if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    merge(str(run.path), "dequantized", str(tmp_path / "merged"))
    plain, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert plain.dtype == torch.bfloat16
    lm = load(run.recipe.model).lm
    held = [(n, m) for n, m in lm.named_modules() if getattr(m, "four_bit", None)]
    assert len(held) == 2
    for module_name, module in held:  # as they were computed with, rounded to 16 bits once
        for part in module.four_bit:
            found = plain.get_submodule(module_name).get_parameter(part)
            for number, weight in enumerate(found):
                wanted = experts.expert_weight(module, part, number, torch.float32)
                assert torch.equal(weight, (wanted if module.is_transposed else wanted.T).bfloat16())


def test_all_roles_choose_experts_by_the_same_weights(folders):
    """With an adapter that changes nothing yet, policy and reference choose the same experts of every layer."""
    base = load(Model(base=folders["qwen3_moe"], compute_dtype="float32"))
    base.add_adapter(Role.POLICY, Lora(r=4, alpha=8))
    chosen: dict[str, list[torch.Tensor]] = {Role.POLICY: [], Role.BASE: []}
    for module in base.lm.modules():
        if experts.names_of(module):
            module.register_forward_pre_hook(lambda _, inputs: chosen[base.role].append(inputs[1]))
    for role in chosen:
        with torch.no_grad(), base.acting_as(role) as lm:
            lm(input_ids=IDS, use_cache=False)
    assert len(chosen[Role.POLICY]) == 2
    assert all(torch.equal(*both) for both in zip(*chosen.values(), strict=True))
    trained = [name for name, p in base.model.named_parameters() if p.requires_grad]
    assert not [name for name in trained if ".gate." in name or "experts" in name]
