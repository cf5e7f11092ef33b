"""Memory that runs out while answers are sampled: the batch is halved, and the same tokens are sampled."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel

from qalign.config.recipe import Lora
from qalign.data.tokenize import encode_prompt
from qalign.model.base import Role
from qalign.model.generation import Sampling, TransformersEngine
from tests.helpers import scramble

TEXTS = ("Why?", "What is a good first line for a book report?", "Name three rivers, please.", "Why?")
TOKENS = 20
FIFTH = tuple(range(0, 128_256, 5))  # a fifth of all tokens ends an answer


@pytest.fixture
def base(tiny_base):
    tiny_base.add_adapter(Role.POLICY, Lora(r=4, alpha=8))
    scramble(tiny_base, Role.POLICY, 0.3)
    return tiny_base


@pytest.fixture
def ids(base) -> list[list[int]]:
    return [encode_prompt(base.template, [{"role": "user", "content": text}]) for text in TEXTS]


def small_memory(monkeypatch, most: int) -> list[int]:
    """Forward passes over more than `most` rows run out of memory; the rows of each."""
    seen, forward = [], LlamaModel.forward

    def limited(model, input_ids=None, **named):
        seen.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return forward(model, input_ids=input_ids, **named)

    monkeypatch.setattr(LlamaModel, "forward", limited)
    return seen


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_batch_that_runs_out_of_memory_is_halved_and_the_same_tokens_are_sampled(
    most, base, ids, monkeypatch, capsys
):
    """Down to one answer: the three answers to a prompt are then decoded one after the other."""
    sampling, engine = Sampling(TOKENS, 1.0, FIFTH), TransformersEngine()
    expected = engine.generate(base, Role.POLICY, ids, sampling, num_samples=3, seed=5)
    assert len({len(answer) for answers in expected for answer in answers}) > 1
    assert "out of memory" not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        seen = small_memory(patch, most)
        assert engine.generate(base, Role.POLICY, ids, sampling, num_samples=3, seed=5) == expected
        said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
        assert [line.split("at most ")[1][0] for line in said] == {
            1: ["6", "3", "1"],
            2: ["6", "3", "1"],
            5: ["6", "3"],
        }[most]
        assert max(seen) > most >= max(seen[-5:])
        before = len(seen)
        assert engine.generate(base, Role.POLICY, ids, sampling, num_samples=3, seed=5) == expected
        assert max(seen[before:]) <= most, "the next call begins with what fitted"
        assert "out of memory" not in capsys.readouterr().out


def test_one_answer_that_does_not_fit_is_an_error(base, ids, monkeypatch):
    small_memory(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        TransformersEngine().generate(base, Role.POLICY, ids, Sampling(4, 1.0, FIFTH), num_samples=2, seed=5)
