"""True claims against false ones, P(true) and its calibration, and giving in: against plain forwards and by hand."""

from math import exp

import numpy as np
import pytest
import torch

from qalign.config.recipe import Lora, Model
from qalign.data.tokenize import encode_prompt, end_of_turn_id
from qalign.errors import UserError
from qalign.judge.measures.honesty import ASKED, INSISTED, Honesty, calibration_change, encode, measure, read_claims
from qalign.model.base import Role, load
from tests.helpers import scramble


def honesty(told=(1.0, -1.0), judged=((0.9, 0.2), (0.6, 0.7)), insisted=(1.0, -1.0)) -> Honesty:
    return Honesty(np.array(told), np.array(judged), np.array(insisted))


def test_the_claims_are_certain_pairs_alike_in_length():
    claims = read_claims()
    assert len(claims) >= 80
    assert len({claim.question for claim in claims}) == len(claims)
    assert len({claim.subject for claim in claims}) >= 8
    for claim in claims:
        assert claim.question.endswith("?")
        assert claim.true != claim.false
        assert abs(len(claim.true) - len(claim.false)) <= 8, claim
    lead = sum(len(claim.true) - len(claim.false) for claim in claims) / len(claims)
    assert abs(lead) < 0.5, "a judge of length must not find the true ones"


def test_log_probs_are_those_of_single_rows(tiny_folder):
    base = load(Model(base=tiny_folder, compute_dtype="float32"))
    base.add_adapter(Role.POLICY, Lora(r=4))
    scramble(base)
    claims = read_claims()[:3]
    end = end_of_turn_id(base.template)

    def logp(lm, turns, answer):
        prompt = encode_prompt(base.template, turns)
        ids = [*base.tokenizer(answer, add_special_tokens=False).input_ids, end]
        logits = lm(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
        return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()

    found = measure(base, [Role.BASE, Role.POLICY], encode(base, claims))
    for role in (Role.BASE, Role.POLICY):
        with torch.no_grad(), base.acting_as(role) as lm:
            for number, claim in enumerate(claims):
                asked = {"role": "user", "content": claim.question}
                gap = logp(lm, [asked], claim.true) - logp(lm, [asked], claim.false)
                assert found[role].told[number] == pytest.approx(gap, abs=1e-3)
                for side, text in enumerate((claim.true, claim.false)):
                    turns = [{"role": "user", "content": ASKED.format(claim=text)}]
                    gap = logp(lm, turns, "True") - logp(lm, turns, "False")
                    assert found[role].judged[number, side] == pytest.approx(1 / (1 + exp(-gap)), abs=1e-4)
                again = INSISTED.format(false=claim.false, question=claim.question)
                turns = [asked, {"role": "assistant", "content": claim.true}, {"role": "user", "content": again}]
                gap = logp(lm, turns, claim.true) - logp(lm, turns, claim.false)
                assert found[role].insisted[number] == pytest.approx(gap, abs=1e-3)
    assert np.abs(found[Role.BASE].told - found[Role.POLICY].told).max() > 0.1, "the test would show nothing"


def test_claims_that_do_not_fit_are_one_line_and_keep_all_their_turns(tiny_base, monkeypatch):
    claims = read_claims()[:2]
    needed = max(map(len, encode(tiny_base, claims)))
    monkeypatch.setattr(tiny_base, "max_length", needed)
    assert all(not pair.dropped_turns for pair in encode(tiny_base, claims))
    monkeypatch.setattr(tiny_base, "max_length", needed - 1)
    with pytest.raises(UserError, match=rf"^model\.max_length: {needed - 1} is too short .* {needed} or more$"):
        encode(tiny_base, claims)


def test_shares_by_hand():
    found = honesty(
        told=(2.0, -1.0, 0.0, 3.0), judged=((0.9, 0.2), (0.9, 0.8), (0.5, 0.4), (0.1, 0.9)), insisted=[0] * 4
    )
    assert found.right == [1.0, 0.0, 0.5, 1.0]
    assert found.judged_right == [1.0, 0.5, 0.75, 0.0]


def test_giving_in_counts_where_the_true_answer_was_there_to_give_up():
    found = honesty(told=(2.0, -1.0, 0.0, 3.0), insisted=(-1.0, -5.0, -5.0, 1.0), judged=np.full((4, 2), 0.5))
    assert found.gave_in == [1.0, None, None, 0.0]


def test_the_calibration_error_by_hand():
    # Bins: 0.2 alone (false), 0.6 alone (true), 0.7 alone (false), 0.9 alone (true).
    expected = (abs(0.2 - 0) + abs(0.6 - 1) + abs(0.7 - 0) + abs(0.9 - 1)) / 4
    assert honesty().calibration() == pytest.approx(expected)
    assert honesty(judged=((1.0, 0.0), (1.0, 0.0))).calibration() == 0.0
    assert honesty(judged=((0.0, 1.0), (0.0, 1.0))).calibration() == 1.0
    assert honesty(judged=((0.5, 0.5), (0.5, 0.5))).calibration() == 0.0, "it says that it doesn't know"
    together = honesty(judged=((0.81, 0.89), (0.85, 0.05)))
    assert [bin["observed"] for bin in together.reliability()] == [0.0, pytest.approx(2 / 3)]
    assert together.calibration() == pytest.approx(0.75 * (0.85 - 2 / 3) + 0.25 * 0.05)


def test_the_interval_of_a_calibration_that_gets_better_leaves_zero_out():
    generator = np.random.default_rng(1)
    sure = np.where(generator.random((80, 1)) < 0.5, [[0.95, 0.9]], [[0.9, 0.05]])
    modest = np.full((80, 2), 0.5)
    before, after = honesty([1.0] * 80, sure, [1.0] * 80), honesty([1.0] * 80, modest, [1.0] * 80)
    found = calibration_change(before, after)
    assert found["change"][1] < 0
    low, high = found["before"]
    assert low <= before.calibration() <= high
