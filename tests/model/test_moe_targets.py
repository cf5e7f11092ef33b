"""Which layers of a mixture of experts get an adapter, and roles on one."""

import peft
import pytest
import torch
import transformers as tf
from peft.tuners.tuners_utils import BaseTunerLayer

from qalign.config.recipe import Lora, Model
from qalign.errors import UserError
from qalign.model.adapters import targets
from qalign.model.base import Role, load
from qalign.model.generation import Request, Sampling, stream, uniform_draws
from tests.helpers import scramble
from tests.moe_models import config, save

LORA = Lora(r=4, alpha=8)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    folders = {}

    def of(name: str):
        if name not in folders:
            folders[name] = save(name, tmp_path_factory.mktemp(name) / "model")
        return load(Model(base=folders[name], compute_dtype="float32"))

    return of


def adapted(base) -> set[str]:
    found = {name for name, module in base.lm.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name.split("layers.")[1].partition(".")[2] for name in found}


ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
SHARED = {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")} | {"mlp.shared_expert_gate"}
LINEAR = {"linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_b", "linear_attn.in_proj_a"}
EXPECTED = {
    "qwen3_moe": ATTENTION,
    "gpt_oss": ATTENTION,
    "hunyuan_v1_moe": ATTENTION,  # `mlp.gate.wg` chooses the experts
    "gemma4_text": ATTENTION | MLP,  # `router.proj` does
    "qwen3_5_moe_text": ATTENTION | SHARED | LINEAR | {"linear_attn.out_proj"},
    "jamba": ATTENTION | {f"mamba.{name}_proj" for name in ("in", "x", "dt", "out")},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_adapters_are_on_attention_and_shared_experts(name, base_of):
    base = base_of(name)
    base.add_adapter(Role.POLICY, LORA)
    assert adapted(base) == EXPECTED[name]
    scramble(base)
    with base.acting_as(Role.POLICY) as lm:
        lm(input_ids=torch.arange(20, 60)[None], use_cache=False).logits.float().softmax(-1)[..., ::7].sum().backward()
    for weight_name, weight in base.trained_weights(Role.POLICY).items():  # all of them learn
        assert weight.grad is not None, weight_name
        assert weight.grad.abs().sum() > 0, weight_name


def test_layers_that_the_forward_never_calls_get_none():
    torch.manual_seed(0)
    lm = tf.AutoModelForCausalLM.from_config(config("jamba"))
    names = targets.new_config(LORA, lm, "jamba").target_modules
    assert any(name.endswith("x_proj") for name in names)
    assert not any(name.endswith("dt_proj") for name in names)  # in 16 bits, jamba takes its weight alone


def test_layers_that_peft_refuses_are_left_out(base_of):
    base = base_of("nemotron_h")
    base.add_adapter(Role.POLICY, LORA)
    assert not {name for name in adapted(base) if name.endswith("out_proj")}
    base = base_of("deepseek_v3")  # PEFT takes gate_proj, up_proj and down_proj for experts of transformers 4
    base.add_adapter(Role.POLICY, LORA)
    assert {name.split(".")[0] for name in adapted(base)} == {"self_attn"}


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("qwen3_moe", "experts", "holds all experts in one tensor"),
        ("qwen3_moe", "gate_up_proj", "holds all experts in one tensor"),
        ("hunyuan_v1_moe", "wg", "chooses the experts, so it gets no adapter"),
        ("deepseek_v3", "down_proj", "PEFT puts no adapter on 'down_proj' of deepseek_v3"),
        ("gpt_oss", "q_prj", "fits no layer of .*did you mean 'q_proj'"),
    ],
)
def test_targets_that_get_no_adapter_are_one_line(name, target, reason, base_of):
    with pytest.raises(UserError, match=rf"^lora\.targets: .*{reason}.*; it has [^\n]*q_") as caught:
        base_of(name).add_adapter(Role.POLICY, Lora(targets=[target]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma4_text", "qwen3_5_moe_text", "hunyuan_v1_moe"])
def test_roles_are_decoded_together_as_they_are_alone(name, base_of, monkeypatch):
    base = base_of(name)
    for role in (Role.POLICY, Role.REFERENCE):
        base.add_adapter(role, LORA)
        scramble(base, role, 0.1 if role == Role.POLICY else 0.3)
    sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=8, stop_ids=[])
    roles = [Role.POLICY, Role.REFERENCE, Role.BASE]
    requests = [Request(role, list(range(20, 30)), uniform_draws(0, 1, 8)) for role in roles]

    def decoded(some):
        answers = {number: [] for number in range(len(some))}
        for step in stream(base, some, sampling):
            for number, _, token in step:
                answers[number].append(token)
        return list(answers.values())

    together = decoded(requests)
    assert together == [decoded([request])[0] for request in requests]
    assert together[0] != together[1]


def test_an_adapter_from_elsewhere_that_changes_routers_is_said(base_of, tmp_path, capsys):
    for target, count in (("wg", 1), ("q_proj", 0)):
        config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=[target])
        peft.get_peft_model(base_of("hunyuan_v1_moe").lm, config).save_pretrained(tmp_path / target)
        capsys.readouterr()
        base_of("hunyuan_v1_moe").load_adapter(Role.POLICY, str(tmp_path / target), trainable=False)
        said = capsys.readouterr().out
        assert said.count(f"{tmp_path / target} changes routers (model.layers.0.mlp.gate.wg)") == count
