"""Bytes of living tensors against bytes counted by hand."""

import pytest
import torch

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
