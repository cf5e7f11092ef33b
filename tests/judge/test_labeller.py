"""The labeller: packed judgements equal single ones, places are really swapped, and what can't be judged is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qalign.config.recipe import Lora
from qalign.data.collate import MicroBatchLimit
from qalign.data.readers import BadRow
from qalign.judge.labeller import LEAD, WORDS, Comparison, Labeller
from qalign.judge.principles import read_principles
from tests.helpers import scramble

PRINCIPLES = read_principles()[:8]
ASKED = ({"role": "user", "content": "How do I boil an egg?"},)
LONGER = (*ASKED, {"role": "assistant", "content": "With water."}, {"role": "user", "content": "How long?"})
COMPARISONS = [
    Comparison(ASKED, "Put it into boiling water for seven minutes.", "No."),
    Comparison(LONGER, "Seven minutes.", "It depends on the egg, on its size and on how warm it was before."),
    Comparison(ASKED, "Ask your mother.", "Ask your father, who may know that better than anybody else."),
]


@pytest.fixture
def labeller(tiny_base):
    tiny_base.max_length = 512
    return Labeller(tiny_base, "base", PRINCIPLES)


def judged(labeller, comparisons, limit=100_000):
    return labeller.judge([labeller.encode(one) for one in comparisons], MicroBatchLimit(tokens=limit))


def single(base, comparison: Comparison, principle, *, swapped: bool) -> float:
    """P(a is better), from one plain prompt of its own and the model's whole logits."""
    first, second = (comparison.b, comparison.a) if swapped else (comparison.a, comparison.b)
    dialogue = "\n\n".join(f"{turn['role'].title()}: {turn['content']}" for turn in comparison.turns)
    asked = (
        "Below are a dialogue between a user and an assistant, and two answers that the assistant could give next.\n\n"
        f"Dialogue:\n{dialogue}\n\nFirst answer:\n{first}\n\nSecond answer:\n{second}\n\n"
        f"Which answer is better by this rule, the first or the second? Rule: {principle.choose}"
    )
    tokenizer = base.tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text + LEAD, add_special_tokens=False).input_ids
    words = [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in WORDS]
    with torch.no_grad():
        one, two = base.lm(torch.tensor([ids])).logits[0, -1].double()[words].softmax(dim=0).tolist()
    return two if swapped else one


def test_packed_judgements_equal_single_prompts(labeller):
    found = judged(labeller, COMPARISONS).probabilities

    assert found.shape == (3, 8, 2)
    expected = [
        [[single(labeller.base, one, rule, swapped=swapped) for swapped in (False, True)] for rule in PRINCIPLES]
        for one in COMPARISONS
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert np.ptp(found) > 0.01  # a judge that always says the same would pass for nothing


def test_how_much_goes_through_the_model_at_once_changes_nothing(labeller):
    together, apart = judged(labeller, COMPARISONS), judged(labeller, COMPARISONS, limit=1)
    np.testing.assert_allclose(together.probabilities, apart.probabilities, atol=1e-5, rtol=0)


def test_swapping_the_answers_swaps_the_judgement(labeller):
    swapped = [replace(one, a=one.b, b=one.a) for one in COMPARISONS]
    there, back = (judged(labeller, them).probabilities for them in (COMPARISONS, swapped))
    np.testing.assert_allclose(there, 1 - back[..., ::-1], atol=1e-5, rtol=0)


def test_the_trunk_is_read_once_for_all_principles(labeller, monkeypatch):
    labeller.base.max_length = 2048
    long = Comparison(ASKED, "Boil it. " * 40, "Fry it. " * 40)
    calls = []
    forward = labeller.base.lm.model.forward
    monkeypatch.setattr(
        labeller.base.lm.model, "forward", lambda *a, **k: calls.append(k["input_ids"].numel()) or forward(*a, **k)
    )
    both = labeller.encode(long)
    found = labeller.judge([both], MicroBatchLimit(tokens=100_000))

    trunk, branches = len(both[0].prompt_ids), sum(len(ids) for order in both for ids in order.answers)
    assert calls[-1:] == [found.tokens] == [2 * trunk + branches]
    assert found.tokens_single == 16 * trunk + branches  # 16 judgements: 8 principles in 2 orders
    assert found.tokens < found.tokens_single / 5


def test_an_adapter_is_a_labeller_too(labeller):
    base = labeller.base
    base.add_adapter("labeller", Lora(r=4))
    other = Labeller(base, "labeller", PRINCIPLES)
    np.testing.assert_array_equal(judged(other, COMPARISONS).probabilities, judged(labeller, COMPARISONS).probabilities)
    scramble(base, "labeller")
    assert np.abs(judged(other, COMPARISONS).probabilities - judged(labeller, COMPARISONS).probabilities).max() > 1e-3


def test_one_principle_alone_is_judged_as_among_others(labeller):
    alone = Labeller(labeller.base, "base", PRINCIPLES[3:4])
    np.testing.assert_allclose(
        judged(alone, COMPARISONS).probabilities[:, 0], judged(labeller, COMPARISONS).probabilities[:, 3], atol=1e-5
    )


def test_the_oldest_turns_are_left_out_until_it_fits(labeller):
    turns = ({"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "Yes."}, *ASKED)
    found = labeller.encode(Comparison(turns, "a", "b"))
    assert found[0].prompt_ids == labeller.encode(Comparison(turns[1:], "a", "b"))[0].prompt_ids


@pytest.mark.parametrize(
    ("a", "words"), [("word " * 600, "don't fit model.max_length 512"), ("a<|eot_id|>", "special token")]
)
def test_what_cannot_be_judged_is_refused(labeller, a, words):
    with pytest.raises(BadRow, match=words):
        labeller.encode(Comparison(ASKED, a, "b"))
