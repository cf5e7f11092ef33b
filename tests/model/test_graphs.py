"""Captured steps, with a stand-in for CUDA graphs: what a step calls is recorded, and replayed on the same tensors. So
whatever a real graph would freeze is frozen here as well: Python's numbers and branches, and addresses."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from qalign.model.decoding import decoder, graphs, rows
from qalign.model.generation import Request, Sampling, stream, uniform_draws
from tests.helpers import scramble
from tests.model.test_decoding import small
from tests.model.test_generation import sample
from tests.model.test_generation_families import FIFTH, KINDS, prompts
from tests.model.test_packed_training import small_base

WAITS = "called a synchronizing CUDA operation"
# Without a cache of keys and values, or with positions that a step asks the device for, nothing is captured.
CAPTURED = sorted({*KINDS} - {"mamba2", "minimax", "mpt", "recurrent_gemma"})


class Recording(TorchDispatchMode):
    """A graph. Reading a number from a tensor fails while it records, as it does in a real one."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.calls.append((function, args, kwargs or {}, function(*args, **(kwargs or {}))))
        return self.calls[-1][-1]

    def replay(self):
        for function, args, kwargs, found in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_flatten(found)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def recorded(graph, *_, **__):
    """A capture: what it did to the caches is undone, as a real one does nothing."""
    seen = {}

    class Keep(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.is_mutable:
                for each in tree_flatten((args, kwargs or {}))[0]:
                    if isinstance(each, torch.Tensor):
                        seen.setdefault(each.data_ptr(), (each, each.clone()))
            return function(*args, **(kwargs or {}))

    with Keep(), graph:
        yield
    for each, before in reversed(seen.values()):
        each.copy_(before)


class Waits(TorchDispatchMode):
    """Warns as PyTorch does where the host would wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            graphs.warnings.warn(WAITS, stacklevel=2)
        return function(*args, **(kwargs or {}))


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def cuda(monkeypatch):
    """A CPU that takes itself for a GPU, as far as steps go."""

    class Steps(graphs.Steps):
        _on_cuda = property(lambda self: True, lambda self, value: None)

    monkeypatch.setattr(decoder, "Steps", Steps)
    monkeypatch.setattr(decoder, "DEVICES", ("cpu",))
    for name, stand_in in {
        "CUDAGraph": Recording, "graph": recorded, "graph_pool_handle": lambda: 0, "Stream": Stream,
        "current_stream": Stream, "stream": lambda stream: Waits(), "set_stream": lambda stream: None,
        "memory_reserved": lambda: 0, "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": lambda mode: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen2", *CAPTURED])
def test_replayed_steps_sample_what_a_growing_cache_samples(name, tmp_path, cuda, monkeypatch):
    base, ids, how = small_base(name, tmp_path), prompts(), Sampling(24, 1.0, FIFTH[::4])
    monkeypatch.setattr(rows, "COLUMNS", 8)
    found = sample(base, ids, how, num_samples=3)
    used = decoder.decoder_of(base)
    assert (used.reason, used.traceback) == (None, "")
    assert used.graphs > 1
    monkeypatch.setattr(decoder, "DEVICES", ())
    assert sample(base, ids, how, num_samples=3) == found


def test_replays_read_the_adapters_as_they_are_now(cuda, monkeypatch):
    base, how = small(), Sampling(8, 0.0, ())
    found = []
    for scale in (0.2, 0.4, 0.2):
        scramble(base, scale=scale)
        found.append(sample(base, prompts(), how))
    used = decoder.decoder_of(base)
    assert (used.reason, used.graphs) == (None, 1), "captured in the first call, replayed in the others"
    monkeypatch.setattr(decoder, "DEVICES", ())
    for scale, answers in zip((0.2, 0.4, 0.2), found, strict=True):
        scramble(base, scale=scale)
        assert sample(base, prompts(), how) == answers
    assert found[0] != found[1]


def test_two_roles_are_replayed_beside_each_other(cuda, monkeypatch):
    base, how, both = small(), Sampling(8, 1.0, ()), []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(decoder, "DEVICES", devices)
        requests = [Request(role, [5, 6, 7], uniform_draws(3, 1, 8)) for role in ("policy", "base")]
        both.append([sorted(step) for step in stream(base, requests, how)])
    assert both[0] == both[1]
    assert any(first[2] != second[2] for first, second in both[0]), "two roles"
    assert decoder.decoder_of(base).graphs == 1


def test_a_step_that_waits_for_the_device_is_not_captured(cuda, monkeypatch, capsys):
    base = small()
    expected = sample(base, prompts(), Sampling(8, 1.0, ()))
    decoder._DECODERS.clear()
    norm = base.lm.model.norm
    norm.register_forward_hook(lambda module, inputs, found: found + 0 * found.sum().item())
    assert sample(base, prompts(), Sampling(8, 1.0, ())) == expected
    assert "sampling runs without CUDA graphs: a step waits for the device: " in capsys.readouterr().err
    assert decoder.decoder_of(base).graphs == 0
