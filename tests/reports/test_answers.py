"""Figures of answers, and the verdict of `qalign.evaluate` in words."""

import pytest

from qalign.reports.answers import Answer, measure_answers, verdict

PLAIN = Answer("Restart it. Then call me.", [1, 2, 3, 4, 5, 6], ended=True)
LOOP = Answer("and so on and so on and so on", [7, 8, 9] * 5, ended=False)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3] * 4, True),
        ([5, 6, 7, 8, 9, *[1, 2, 3] * 4], True),
        ([1, 2, 3] * 4 + [1, 2], True),  # cut within a turn
        ([4] * 12, True),
        ([4] * 11, False),
        ([*[1, 2, 3] * 4, 9], False),  # it went on
        (list(range(20)) * 2, False),  # said twice
        (list(range(20)) * 3, True),
        ([], False),
    ],
)
def test_a_tail_that_repeats_is_a_loop(ids, expected):
    assert Answer("x", ids, ended=False).loops == expected


def test_an_answer_whose_lines_mostly_repeat_is_a_loop():
    assert Answer("1. Rest.\n2. Rest.\n3. Rest.\n4. Drink.", range(30), ended=True).loops is False  # half of them
    assert Answer("1. Rest.\n2. Rest.\n3. Rest.\n4. Rest.", range(30), ended=True).loops


def test_figures_of_answers_by_hand():
    found = measure_answers([PLAIN, PLAIN, LOOP, PLAIN])
    assert found["answers"] == 4
    assert found["ended"] == 0.75
    assert found["looping"] == 0.25
    assert found["length"] == (6 * 3 + 15) / 4
    assert found["distinct"] == pytest.approx((3 * 1.0 + 3 / 8) / 4)


def figures(*, before=0.4, after=0.4, gained=0, lost=0, reward=1.0, pairs=50, loss="sigmoid", was=(), now=()) -> dict:
    """The figures of a run; `was` and `now` are answers before and after."""
    found = {"pairs": pairs, "accuracy_before": before, "accuracy_after": after, "reward_accuracy": reward,
             "pairs_gained": gained, "pairs_lost": lost, "loss": loss}  # fmt: skip
    if now:
        same = sum(one.text == other.text for one, other in zip(was, now, strict=True))
        found["answers"] = {"before": measure_answers(was), "after": measure_answers(now), "unchanged": same}
    return found


@pytest.mark.parametrize(
    ("given", "words", "tried"),
    [
        ({"after": 0.7, "gained": 16, "lost": 1}, "it helped: 16 pairs won and 1 lost, preferred 40.0% → 70.0%", ""),
        ({}, "a small shift: reward 100.0% counts any move from the reference", "dpo.epochs=3, twice the dpo.learning"),
        ({"after": 0.42, "gained": 3, "lost": 2}, "a small shift", "half the dpo.beta"),
        (
            {"reward": 0.52},
            "no effect shown on what is preferred (reward 52.0% of 50 pairs, a coin has 50%)",
            "dpo.epoc",
        ),
        ({"reward": 1.0, "pairs": 3}, "no effect shown", "more pairs"),
        ({"reward": 0.1}, "the wrong way", "swapped?"),
        ({"after": 0.2, "gained": 0, "lost": 10}, "worse than before", "half the dpo.learning_rate"),
        ({"before": 0.98, "after": 1.0, "gained": 1}, "little was left to learn", ""),
        # Without a reference, the reward says how many pairs are right, and nothing of what changed.
        ({"loss": "simpo", "reward": 0.35, "after": 0.8, "gained": 30}, "it helped: 30 pairs won and 0 lost", ""),
        ({"loss": "orpo", "reward": 0.8, "before": 0.8, "after": 0.8}, "no effect shown", "dpo.epochs=3"),
        ({"loss": "simpo", "reward": 0.8, "after": 0.2, "lost": 10}, "worse than before", "half the dpo.learning_rate"),
    ],
)
def test_a_verdict_on_the_pairs(given, words, tried):
    (sentence,) = verdict(figures(**given))
    assert words in sentence
    assert tried in sentence


def test_answers_that_loop_since_training_are_in_the_verdict():
    """One of three loops to its end, while every pair is right: the case in which 100% misleads."""
    was, now = [PLAIN] * 6, [PLAIN, PLAIN, LOOP] * 2
    helped, *others = verdict(figures(after=1.0, gained=30, was=was, now=now))
    assert helped.startswith("it helped")
    (line,) = others
    assert line.startswith("2 of 6 answers don't end, 2 loop (before: 0, 0); try fewer dpo.epochs")


def test_answers_that_looped_before_as_well_call_for_sft():
    _, line = verdict(figures(was=[PLAIN, LOOP, LOOP], now=[Answer("Other words.", [1, 2], True), LOOP, LOOP]))
    assert "as before training" in line
    assert "dpo.start_from=sft" in line


def test_answers_word_for_word_as_before_and_answers_that_grew_are_said():
    assert verdict(figures(was=[PLAIN] * 2, now=[PLAIN] * 2))[1] == "all 2 answers are word for word as before"
    long = Answer("One two three. Four five six.", list(range(40)), ended=True)
    assert verdict(figures(was=[PLAIN] * 2, now=[long] * 2))[1].startswith("answers grew long, 6 → 40 tokens")
