"""How much memory may be used: what is free and what this process holds, less a margin."""

from types import SimpleNamespace

import pytest
import torch

from qalign.model.memory import forecast as memory
from qalign.model.memory.forecast import CUDA_CONTEXT, free_memory, usable_memory, usable_of_card

GIB = 2**30


def test_usable_memory_is_what_is_free_and_what_this_process_holds(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GIB, available=8 * GIB))
    assert usable_memory("cpu") == pytest.approx(7.6 * GIB, abs=1)
    own = SimpleNamespace(rss=3 * GIB, shared=GIB)
    monkeypatch.setattr(memory.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: own))
    assert usable_memory("cpu", held=GIB) == pytest.approx(0.95 * 9 * GIB, abs=1)
    # Weights that are read from a file as needed are among the system's free memory already.
    assert usable_memory("cpu", held=4 * GIB) == pytest.approx(0.95 * 10 * GIB, abs=1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 4 * GIB)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert usable_memory("cuda") == pytest.approx(0.89 * 14 * GIB, abs=1)  # of what CUDA and others hold, nothing
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "garbage_collection_threshold:0.8, expandable_segments:True")
    assert usable_memory("cuda") == pytest.approx(0.93 * 14 * GIB, abs=1)
    assert usable_of_card(24 * GIB) == pytest.approx(0.93 * (24 * GIB - CUDA_CONTEXT), abs=1)


def test_what_may_still_be_allocated_holds_no_context_of_the_driver(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    assert free_memory("cpu") == pytest.approx(7.6 * GIB, abs=1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 4 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 * GIB)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert free_memory("cuda") == pytest.approx((0.93 * 14 - 3) * GIB, abs=1)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 23 * GIB)
    assert free_memory("cuda") == 0
