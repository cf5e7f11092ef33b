"""Every kind of cache samples what full forward passes give: windows, states, shared keys, heads of two sizes."""

import pytest
import torch

from qalign.model import generation
from qalign.model.base import Role
from qalign.model.decoding import decoder, rows
from qalign.model.generation import Request, Sampling, stream, uniform_draws
from tests.families import HYBRIDS, SERVED, UNSERVED
from tests.model.test_generation import one_by_one, sample
from tests.model.test_packed_training import small_base

FIFTH = tuple(range(0, 2000, 5))  # a fifth of all tokens ends an answer
KINDS = [
    "gemma3",
    "gemma4",
    "gpt-oss",
    *HYBRIDS,
    *UNSERVED,
]


def prompts() -> list[list[int]]:
    """Of unequal lengths, so that some are padded."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 2000, (length,), generator=generator).tolist() for length in (5, 17, 1, 30)]


@pytest.mark.parametrize("name", KINDS)
def test_answers_in_a_batch_are_those_of_full_forward_passes(name, tmp_path):
    base, ids = small_base(name, tmp_path), prompts()
    how = Sampling(10, 1.0, FIFTH)
    found = sample(base, ids, how, num_samples=3, seed=5)
    draws = torch.rand(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).view(4, 3, 10)
    assert found == [
        [one_by_one(base, Role.POLICY, prompt, how, own) for own in each]
        for prompt, each in zip(ids, draws, strict=True)
    ]
    assert len({len(answer) for answers in found for answer in answers}) > 2, "some left long before others"
    greedy = Sampling(8, 0.0, ())
    expected = [[one_by_one(base, Role.POLICY, prompt, greedy, torch.zeros(8))] for prompt in ids]
    assert sample(base, ids, greedy, num_samples=1) == expected


@pytest.mark.parametrize("name", ["gemma4", "qwen3_5_moe_text", "lfm2", "minimax"])
def test_two_roles_side_by_side_say_what_each_says_alone(name, tmp_path):
    """Also where experts that all tokens share are given the tokens of both rows as one row, and without a cache."""
    base, how = small_base(name, tmp_path), Sampling(8, 1.0, ())
    first, second = prompts()[:2]
    requests = [Request(Role.POLICY, first, uniform_draws(1, 1, 8)), Request(Role.BASE, second, uniform_draws(2, 1, 8))]
    found: dict[int, list[int]] = {0: [], 1: []}
    for step in stream(base, requests, how, generation.inverse_cdf):
        for number, _, token in step:
            found[number].append(token)
    assert list(found.values()) == [
        one_by_one(base, wanted.role, wanted.prompt_ids, how, wanted.draws[0]) for wanted in requests
    ]


@pytest.mark.parametrize("name", sorted({*SERVED, *HYBRIDS, *UNSERVED}))
def test_a_static_cache_gives_what_a_growing_one_gives(name, tmp_path, monkeypatch):
    """With padding, several answers a prompt, rows that leave, windows that are passed, and more columns half-way."""
    base, ids, how = small_base(name, tmp_path), prompts(), Sampling(24, 1.0, FIFTH[::4])
    monkeypatch.setattr(rows, "COLUMNS", 8)
    expected = sample(base, ids, how, num_samples=3)
    monkeypatch.setattr(decoder, "DEVICES", ("cpu",))
    shapes = set()
    hook = base.lm.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.update(
            tuple(kwargs[name].shape) for name in ("attention_mask",) if name in kwargs
        ),
        with_kwargs=True,
    )
    assert sample(base, ids, how, num_samples=3) == expected
    hook.remove()
    is_static = decoder.decoder_of(base).reason is None
    assert is_static == (base.row_cache.name == "past_key_values")
    assert is_static or name not in SERVED
    if not is_static:
        return
    assert len({count for count, _ in shapes if count > 4}) > 1, "some left"
    assert len({columns for _, columns in shapes if columns > 30}) > 1, "and the columns became more"
