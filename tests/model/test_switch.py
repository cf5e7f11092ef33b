"""What a change of role costs: counts of what is visited and called, for times depend on the machine."""

import sys

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from qalign.config.recipe import Lora
from qalign.model.base import Role, load
from qalign.model.generation import Sampling, TransformersEngine


@pytest.mark.parametrize("from_adapter", [False, True])
def test_a_switch_walks_no_module(spec, adapter_folder, from_adapter, monkeypatch):
    """What it flips was found when the adapters were added; walking a model of 32 layers takes 10 to 40 ms a switch."""
    base = load(spec)
    base.load_adapter(Role.POLICY, adapter_folder, trainable=True)
    if from_adapter:
        base.load_reference(adapter_folder)
    walked = []
    walks = ("named_modules", "named_parameters", "named_children", "train", "requires_grad_")  # others call these
    for kind, names in ((nn.Module, walks), (BaseTunerLayer, ("set_adapter", "enable_adapters"))):
        for name in names:
            real = getattr(kind, name)
            note = lambda self, *args, _real=real, **kwargs: walked.append(self) or _real(self, *args, **kwargs)  # noqa: E731
            monkeypatch.setattr(kind, name, note)
    base.train()
    for role in (Role.REFERENCE, Role.POLICY):
        with base.acting_as(role), torch.no_grad(), base.acting_as(Role.REFERENCE):
            pass
    assert not walked
    base.model.set_adapter("policy")
    assert walked


def test_an_answer_walks_no_module(spec, adapter_folder, monkeypatch):
    """The layers with adapters are known to the switch."""
    base, walked = load(spec), []
    base.load_adapter(Role.POLICY, adapter_folder, trainable=True)
    for _ in range(2):
        walked.clear()
        TransformersEngine().generate(base, Role.POLICY, [[5, 6, 7]], Sampling(2, 1.0, ()), num_samples=2, seed=0)
        monkeypatch.setattr(nn.Module, "modules", lambda self: walked.append(self) or iter(()))
    assert not walked


def calls(work) -> int:
    """The number of Python's calls."""
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_a_switch_makes_few_calls_a_layer(spec):
    """In and out, with dropout; by the difference between many layers with an adapter and few."""
    found = []
    for targets in (["q_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]):
        base = load(spec)
        base.add_adapter(Role.POLICY, Lora(r=4, dropout=0.1, targets=targets))
        base.train()

        def switch(base=base):
            with base.acting_as(Role.REFERENCE):
                pass

        switch()
        found.append((len(base.adapter_layers(Role.POLICY)), calls(switch)))
    (few, least), (many, most) = found
    assert most - least <= 40 * (many - few)
