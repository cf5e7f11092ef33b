"""The members of an ensemble in one forward pass: the same scores and gradients as with each alone."""

import pytest
import torch
from transformers import AutoTokenizer

from qalign.config.recipe import Lora, Model, Recipe
from qalign.data.collate import MicroBatchLimit
from qalign.model.adapters.members import Ensemble, answer_scores
from qalign.model.adapters.targets import decoder_layers
from qalign.model.base import load
from qalign.model.memory.forecast import Forecast
from tests.conftest import FIXTURES
from tests.families import HYBRIDS, SERVED, UNSERVED, family, random_pairs

ROLES = ("member_1", "member_2", "member_3")


def members_on(base, share: float = 0.5, **lora) -> None:
    for number, role in enumerate(ROLES):
        torch.manual_seed(number)
        base.add_adapter(role, Lora(r=4, **lora), share)
        for weight in base.trained_weights(role).values():
            weight.data.normal_(std=0.3)


def family_base(name: str, folder):
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3")
    family(name, len(tokenizer) + 10, dtype=torch.float32, spread=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(Model(base=str(folder), compute_dtype="float32", quantization="none"))


def gradients(base, role: str) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in base.trained_weights(role).items() if weight.grad is not None}


# Later layers of some Gemma 4 use the keys of earlier ones, which have one row for all members; MPT's position bias has
# a dimension of heads in front.
@pytest.mark.parametrize("name", [*SERVED, *HYBRIDS, *UNSERVED])
def test_scores_and_gradients_are_those_of_each_member_alone(name, tmp_path):
    base = family_base(name, tmp_path / "model")
    members_on(base)
    ensemble, rows = Ensemble(base, ROLES), random_pairs(vocabulary=2000)[:4]
    assert (ensemble.reason is not None) == (name in ("gemma4", "mpt")), ensemble.reason
    with base.packed_attention(), ensemble.open():
        together = ensemble.pair_scores(rows)
    assert together.std(dim=-1).min() > 1e-3
    for number, role in enumerate(ROLES):
        with base.packed_attention():
            alone = base.pair_scores(role, rows)
        torch.testing.assert_close(together[..., number], alone, rtol=0, atol=1e-5)
    if ensemble.reason is None:
        with base.packed_attention(), ensemble.open():
            ensemble.pair_scores(rows).square().sum().backward()
        together = {role: gradients(base, role) for role in ROLES}
        for role in ROLES:
            base.model.zero_grad()
            with base.packed_attention(), base.acting_as(role):
                base.pair_scores(role, rows).square().sum().backward()
            alone = gradients(base, role)
            assert alone.keys() == together[role].keys()
            assert "score.weight" in alone
            for weight, found in alone.items():
                torch.testing.assert_close(together[role][weight], found, rtol=1e-4, atol=1e-4, msg=weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_in_any_order_and_any_groups_have_the_same_scores(dtype, tiny_folder):
    base = load(Model(base=tiny_folder, compute_dtype=dtype, max_length=256))
    members_on(base)
    ensemble, rows = Ensemble(base, ROLES), random_pairs(vocabulary=2000)
    assert ensemble.reason is None
    alone = torch.stack([answer_scores(base, role, rows, MicroBatchLimit(pairs=2)) for role in ROLES], dim=-1)
    tolerance = {"rtol": 0, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.05, "atol": 0.1}
    for limit in (MicroBatchLimit(pairs=1), MicroBatchLimit(pairs=9), MicroBatchLimit(tokens=400)):
        torch.testing.assert_close(answer_scores(base, ensemble, rows, limit), alone, **tolerance)
    found = answer_scores(base, ensemble, rows[::-1], MicroBatchLimit(pairs=3)).flip(0)
    torch.testing.assert_close(found, alone, **tolerance)
    other = answer_scores(base, Ensemble(base, ROLES[::-1]), rows, MicroBatchLimit(pairs=3)).flip(2)
    torch.testing.assert_close(other, alone, **tolerance)


@pytest.mark.parametrize(("share", "expected"), [(0.2, 1), (0.5, 1), (0.8, 2), (1.0, 2)])
def test_adapters_are_on_the_last_layers(share, expected, tiny_base):
    base = tiny_base
    members_on(base, share)
    layers = decoder_layers(base.lm)
    adapted = set(base.routes(ROLES))
    holds = [not adapted.isdisjoint(layer.modules()) for layer in layers]
    assert holds == [False] * (len(layers) - expected) + [True] * expected


def test_a_member_with_other_matrices_gets_a_pass_of_its_own(tiny_base):
    members_on(tiny_base)
    tiny_base.add_adapter("member_4", Lora(r=8), 0.5)
    assert Ensemble(tiny_base, (*ROLES, "member_4")).reason == (
        "the adapters are more than LoRA on linear layers, or differ in shape"
    )
    assert Ensemble(tiny_base, ROLES).reason is None


def test_a_model_in_which_members_are_not_exact_is_noticed(tiny_base, monkeypatch):
    members_on(tiny_base)
    exact = Ensemble._last_states
    monkeypatch.setattr(Ensemble, "_last_states", lambda *given: exact(*given)[::-1])
    assert Ensemble(tiny_base, ROLES).reason == "members in one pass don't have the states that each has alone"


def test_the_forecast_has_all_members_and_what_their_layers_keep(tiny_base, tiny_folder):
    """A token goes through the members' layers three times; the layers below keep nothing."""

    def forecast(**keys) -> Forecast:
        reward = {"data": "unused.jsonl", **keys}
        recipe = Recipe.model_validate({"model": {"base": tiny_folder}, "output": "runs", "reward": reward})
        return Forecast(recipe, "reward", tiny_base.lm.config, "cpu", torch.float32)

    one, full, half = forecast(), forecast(members=3, member_layers=1.0), forecast(members=3, member_layers=0.5)
    for part in ("adapters", "gradients", "optimiser"):
        assert full.fixed[part] == 3 * one.fixed[part]
        assert half.fixed[part] == pytest.approx(full.fixed[part] / 2, rel=0.01)
    assert (one.layers, half.layers) == (2, 1)
    kept = [found.step(300, checkpointing=False).activations for found in (one, full, half)]
    assert kept[1] == pytest.approx(3 * kept[0], rel=0.1)
    assert kept[2] == pytest.approx(kept[1] / 2, rel=0.15)
