"""What the tests of roles on one base have in common: the tiny model, logits of a role, and what a role may disturb."""

from pathlib import Path

import peft
import pytest
import torch

from qalign.config.recipe import Model
from qalign.model.base import Role, load

IDS = torch.arange(20, 60).view(2, 20)


@pytest.fixture
def spec(tiny_folder):
    return Model(base=tiny_folder, compute_dtype="float32")


@pytest.fixture
def adapter_folder(spec, tmp_path):
    """A PEFT adapter made with plain PEFT, as a user would bring it."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(load(spec).lm, config).save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


def logits(base, role=Role.POLICY) -> torch.Tensor:
    base.model.eval()
    with torch.no_grad(), base.acting_as(role) as lm:
        return lm(input_ids=IDS).logits


def state(base):
    """What a change of role may disturb."""
    return (
        base.role,
        [parameter.requires_grad for parameter in base.model.parameters()],
        [module.training for module in base.model.modules()],
        base.model.active_adapter,
    )


def gradient(base) -> torch.Tensor:
    """The policy's, in training mode."""
    base.model.zero_grad()
    base.lm(input_ids=IDS, labels=IDS).loss.backward()
    return torch.cat([p.grad.flatten() for n, p in base.model.named_parameters() if ".lora_B.policy." in n])


def save_plain(spec, folder: Path, **settings) -> str:
    """An adapter made by plain PEFT on the base of a recipe, with weights that do something."""
    options = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False} | settings
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    torch.manual_seed(1)  # of the weights that PEFT draws, so that rounding is the same in any order of the tests
    model = peft.get_peft_model(load(spec).lm, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "default" in name:
            parameter.data = parameter.data.float() + 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return str(folder)
