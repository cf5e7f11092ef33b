"""An adapter that qalign writes is one that vLLM loads. Its rules stand here a second time, as read in vLLM 0.33."""

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from qalign.config.recipe import Lora
from qalign.model.adapters.files import read_files
from qalign.model.adapters.serving import vllm_options, vllm_problem
from qalign.model.base import Role
from tests.model.conftest import save_plain


def refused_by_vllm(folder, max_lora_rank: int = 512) -> list[str]:
    """What vLLM 0.33 would raise: `vllm/lora/peft_helper.py` for the config; `vllm/lora/utils.py`
    (`parse_fine_tuned_lora_name`) and `vllm/lora/lora_model.py` (`from_local_checkpoint`) for each tensor."""
    config, found = json.loads((folder / "adapter_config.json").read_text()), []
    assert {"r", "lora_alpha", "target_modules"} <= config.keys(), "PEFTHelper's required fields"
    found += [name for name in config.get("modules_to_save") or [] if name not in ("classifier", "score")]
    forbidden = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
    found += [name for name in forbidden if config.get(name)]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal", "mica", "lora_ga"):
        found.append(init)
    if max(config["r"], *(config.get("rank_pattern") or {}).values(), 0) > max_lora_rank:
        found.append("rank")
    if config.get("bias") != "none":
        found.append("bias")
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118
            assert name.startswith("base_model.model.")
            *_, before, last = name.split(".")
            lora = last == "weight" and before in ("lora_A", "lora_B")
            head = last in ("weight", "bias") and before in ("score", "classifier")
            if not (lora or head or last in ("lora_embedding_A", "lora_embedding_B")):
                found.append(name)
    return found


@pytest.mark.parametrize(
    ("lora", "options"),
    [
        ({"r": 1}, "--enable-lora"),
        ({"r": 16}, "--enable-lora"),
        ({"r": 17}, "--enable-lora --max-lora-rank 32"),
        ({"r": 64, "rslora": True}, "--enable-lora --max-lora-rank 64"),
        ({"r": 300, "init": "gaussian"}, "--enable-lora --max-lora-rank 320"),
        ({"targets": ["layers.0.mlp.up_proj", "q_proj"]}, "--enable-lora"),
    ],
)
def test_what_qalign_writes_is_served(tiny_base, tmp_path, lora, options):
    tiny_base.add_adapter(Role.POLICY, Lora(**lora))
    tiny_base.save_adapter(Role.POLICY, tmp_path)
    assert not refused_by_vllm(tmp_path)
    assert vllm_problem(read_files(tmp_path)) is None
    assert vllm_options(tmp_path) == options


def test_a_reward_adapter_with_its_head_is_served(tiny_base, tmp_path):
    tiny_base.add_adapter(Role.REWARD, Lora())
    tiny_base.save_adapter(Role.REWARD, tmp_path)
    assert not refused_by_vllm(tmp_path)
    assert vllm_problem(read_files(tmp_path)) is None


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"use_dora": True}, "no DoRA"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"trainable_token_indices": [20, 21]}, "LoRA alone, .*trainable_tokens"),
        ({"r": 600}, "ranks up to 512, and this adapter has 600"),
        ({"rank_pattern": {"q_proj": 600}}, "ranks up to 512, and this adapter has 600"),
    ],
)
def test_what_vllm_refuses_is_known_before(spec, tmp_path, settings, problem):
    folder = Path(save_plain(spec, tmp_path / "plain", **settings))
    assert refused_by_vllm(folder)
    assert re.search(problem, vllm_problem(read_files(folder)) or "")
