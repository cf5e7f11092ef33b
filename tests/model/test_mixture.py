"""Decoding-time realignment: λ · aligned + (1 − λ) · other at each token, both models as rows of one batch."""

import pytest
import torch

from qalign.config.recipe import Lora
from qalign.errors import UserError
from qalign.model.base import Role
from qalign.model.decoding.mixture import Mixture, RowPlan, mixed
from qalign.model.generation import Request, Sampling, TransformersEngine, inverse_cdf, stream, uniform_draws
from tests.helpers import scramble

PROMPTS = [[5, 9, 30, 12], [7, 3, 44, 8, 21, 2], [11]]
SAMPLING = Sampling(12, 1.0, (2,))


@pytest.fixture
def base(tiny_base):
    tiny_base.add_adapter(Role.POLICY, Lora(r=4, alpha=8))
    scramble(tiny_base, scale=0.2)
    return tiny_base


def collected(base, requests) -> list[list[list[int]]]:
    found = [[[] for _ in request.draws] for request in requests]
    for step in stream(base, requests, SAMPLING, inverse_cdf):
        for number, sample, token in step:
            found[number][sample].append(token)
    return found


def requests(role: str, mixture: Mixture | None = None) -> list[Request]:
    return [Request(role, ids, uniform_draws(seed, 2, 12), mixture) for seed, ids in enumerate(PROMPTS)]


@torch.no_grad()
def naive(base, weight: float) -> list[list[list[int]]]:
    """The same by the definition: both models read the whole row anew at every token."""
    found = []
    for request in requests(Role.POLICY):
        answers = []
        for draws in request.draws:
            ids: list[int] = []
            while len(ids) < 12 and (not ids or ids[-1] not in SAMPLING.stop_ids):
                logits = {}
                for role in (Role.BASE, Role.POLICY):
                    with base.acting_as(role) as lm:
                        logits[role] = lm(torch.tensor([[*request.prompt_ids, *ids]])).logits[0, -1].float()
                both = weight * logits[Role.POLICY] + (1 - weight) * logits[Role.BASE]
                ids.append(int(inverse_cdf(both[None], draws[len(ids)][None], SAMPLING)))
            answers.append(ids)
        found.append(answers)
    return found


@pytest.mark.parametrize("weight", [0.5, 1.7])
def test_a_mixture_is_what_the_definition_says(base, weight):
    found = collected(base, requests(Role.POLICY, Mixture(Role.BASE, weight)))

    assert found == naive(base, weight)
    assert found != collected(base, requests(Role.POLICY))
    assert found != collected(base, requests(Role.BASE))


@pytest.mark.parametrize(("weight", "role"), [(1.0, Role.POLICY), (0.0, Role.BASE)])
def test_at_0_and_1_a_mixture_is_one_of_its_sides(base, weight, role):
    assert collected(base, requests(Role.POLICY, Mixture(Role.BASE, weight))) == collected(base, requests(role))


def test_both_models_are_rows_of_one_batch(base):
    passes = []
    handle = base.lm.register_forward_pre_hook(lambda *_, **__: passes.append(1))
    found = collected(base, requests(Role.POLICY, Mixture(Role.BASE, 0.5)))
    handle.remove()

    longest = max(len(answer) for answers in found for answer in answers)
    assert len(passes) <= longest + 1  # that the adapters keep rows apart is tried once


def test_mixtures_and_others_in_one_batch_change_nothing(base):
    mixture = requests(Role.POLICY, Mixture(Role.BASE, 0.5))
    others = [*requests(Role.BASE), *mixture, *requests(Role.POLICY)]

    found = collected(base, others)

    assert found[3:6] == collected(base, mixture)
    assert found[:3] == collected(base, requests(Role.BASE))


def test_the_engine_collects_mixtures(base):
    draws, half = uniform_draws(4, 6, 12), Mixture(Role.BASE, 0.5)
    asked = [Request(Role.POLICY, ids, draws[2 * number : 2 * number + 2], half) for number, ids in enumerate(PROMPTS)]
    expected = collected(base, asked)

    found = TransformersEngine().generate(base, Role.POLICY, PROMPTS, SAMPLING, num_samples=2, seed=4, mixture=half)

    assert found == expected


def test_adapters_that_cannot_share_a_batch_are_not_mixed(tiny_base):
    tiny_base.add_adapter(Role.POLICY, Lora(r=4, alpha=8, dora=True))

    with pytest.raises(UserError, match="no DoRA"):
        collected(tiny_base, requests(Role.POLICY, Mixture(Role.BASE, 0.5)))


def test_logits_at_the_ends_are_the_sides_to_the_bit_and_ruled_out_tokens_stay_so():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 50, generator=draw) * 30 for _ in range(2))
    a[:, 0] = b[:, 0] = -torch.inf
    a[0, 1] = -torch.inf

    found = mixed(a, b, torch.tensor([[1.0], [0.0], [0.25]]))

    assert torch.equal(found[0], a[0])
    assert torch.equal(found[1], b[1])
    assert found[2, 0] == -torch.inf
    assert torch.equal(found[2, 1:], 0.25 * a[2, 1:] + 0.75 * b[2, 1:])


def test_rows_of_a_plan_follow_their_answers():
    mixture = Mixture("b", 0.5)
    plan = RowPlan([(0, None), (1, mixture), (1, mixture), (3, None)])
    assert plan.prompts == [0, 1, 2, 1, 2, 3]

    assert plan.tokens(torch.tensor([7, 8, 9, 4])).tolist() == [7, 8, 8, 9, 9, 4]
    logits = torch.arange(6.0)[:, None]
    assert plan.logits(logits)[:, 0].tolist() == [0, 1.5, 3.5, 5]
    fewer, rows = plan.keep([0, 2])
    assert (rows, fewer.prompts) == ([0, 3, 4], [0, 1, 2])
