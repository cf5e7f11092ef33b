"""Bytes of living tensors against bytes counted by hand."""

import pytest
import torch
import transformers as tf

from qalign.config.recipe import Recipe
from qalign.model.memory import forecast as memory
from qalign.model.memory.step import LiveBytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_bytes_are_those_of_storages(device):
    outside = torch.zeros(1000, device=device)
    with LiveBytes() as counted:
        first = torch.zeros(100, device=device)
        assert counted.live == 400
        view = first[10:].view(9, 10)
        first.add_(1)
        outside[:10].mul_(2)
        assert counted.live == 400  # neither a view nor work in place takes more
        wide = first.double()
        assert (counted.live, counted.peak) == (1200, 1200)
        del wide
        assert (counted.live, counted.peak) == (400, 1200)
        del first
        assert counted.live == 400  # the view holds all of it
        del view
        assert (counted.live, counted.peak) == (0, 1200)
        parts = torch.zeros(6, device=device, dtype=torch.int8).split(2)
        assert (len(parts), counted.live) == (3, 6)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_bytes_see_what_autograd_keeps(device):
    weight = torch.zeros(100, device=device, requires_grad=True)
    with LiveBytes() as counted:
        loss = (weight.exp() * 2).sum()
        assert counted.live == 400 + 4  # exp keeps its result; the product is gone, its sum is there
        loss.backward()
        del loss
        assert counted.live == 400  # the gradient
        assert counted.peak >= 400 + 400 + 4
        weight.grad = None
        assert counted.live == 0


def test_a_plan_builds_the_model_once_and_runs_each_step_once(tiny_folder, monkeypatch):
    """A model of 32 layers with its adapter takes a second; a plan tries some numbers of tokens, with and without
    checkpointing."""
    built, run, real, step = [], [], memory.meta_model, memory.StepModel.run
    monkeypatch.setattr(memory, "meta_model", lambda *args: built.append(args) or real(*args))

    def counted(self, tokens, **way):
        run.append((tokens, *way.values()))
        return step(self, tokens, **way)

    monkeypatch.setattr(memory.StepModel, "run", counted)
    keys = {"model": {"base": tiny_folder}, "output": "unused", "dpo": {"data": "unused"}}
    config = tf.AutoConfig.from_pretrained(tiny_folder)
    forecast = memory.Forecast(Recipe.model_validate(keys), "dpo", config, "cuda", torch.bfloat16)
    with_all, with_none = (forecast.total(8192, layers) for layers in (forecast.layers, 0))
    assert with_all < with_none
    planned = forecast.plan((with_all + with_none) // 2, 300)
    assert 0 < planned.checkpointed_layers <= forecast.layers
    assert len(built) == 1
    assert len(run) == len(set(run)) <= 6
    assert forecast.total(8192, 0) == with_none  # whatever ran in between
    again = memory.Forecast(Recipe.model_validate(keys), "dpo", config, "cuda", torch.bfloat16)
    assert (again.total(8192, 0), again.total(8192, again.layers)) == (with_none, with_all)
