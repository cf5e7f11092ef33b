"""Agreement with people: figures worked out by hand, and what is said about them."""

import numpy as np
import pytest

from qalign.judge.ai_feedback.agreement import can_judge, draw, measure, verdict

NAMES = ("harm", "truth")
# P(people's answer is better) of four pairs by two principles, that answer in first and second place.
PROBABILITIES = np.array(
    [
        [[0.9, 0.8], [0.7, 0.6]],  # right by both
        [[0.9, 0.4], [0.2, 0.1]],  # harm: right, truth: wrong; the mean 0.4 is wrong
        [[0.6, 0.4], [0.5, 0.5]],  # a tie
        [[0.3, 0.3], [0.9, 0.7]],  # harm: wrong, truth: right; the mean 0.55 is right
    ]
)
LENGTHS = [(5, 9, 1.0), (9, 5, 1.0), (7, 7, 1.0), (8, 3, 1.0)]  # the longer answer: wrong, right, a tie, right


def test_the_figures_are_those_worked_out_by_hand():
    found = measure(PROBABILITIES, LENGTHS, NAMES)

    assert found["agreement"] == (1 + 0 + 0.5 + 1) / 4
    assert found["length_agreement"] == (0 + 1 + 0.5 + 1) / 4
    assert [each["agreement"] for each in found["by_principle"]] == [(1 + 1 + 0.5 + 0) / 4, (1 + 0 + 0.5 + 1) / 4]
    first = [0.9, 0.7, 0.9, 0.2, 0.6, 0.5, 0.3, 0.9, 0.2, 0.4, 0.6, 0.9, 0.6, 0.5, 0.7, 0.3]  # P("first"), by order
    assert found["first_place"] == pytest.approx(sum(first) / 16)
    assert found["consistent"] == 6 / 8  # two judgements follow the place; 0.5 twice counts as alike
    assert found["means"][1] == pytest.approx([0.55, 0.25])
    low, high = found["interval"]
    assert low < 0.625 < high


def test_people_who_are_unsure_count_as_unsure():
    unsure = [(5, 9, 0.5)] * 4
    found = measure(PROBABILITIES, unsure, NAMES)
    assert found["agreement"] == found["length_agreement"] == 0.5


@pytest.mark.parametrize(
    ("right", "pairs", "can", "words"),
    [
        (60, 100, True, "can judge: it agrees with people on 60.0% of 100 pairs"),  # Wilson: 50.2% to 69.1%
        (59, 100, False, "can't judge: it agrees with people on 59.0% of 100 pairs"),  # 49.2% to 68.1%
        (20, 100, False, "judges the wrong way"),
        (4, 4, True, "can judge"),  # 51.0% to 100%
        (3, 3, False, "can't judge"),  # 43.8% to 100%
    ],
)
def test_the_whole_interval_must_lie_above_a_coin(right, pairs, can, words):
    mean = np.where(np.arange(pairs) < right, 0.9, 0.1)
    found = measure(np.repeat(mean, 2).reshape(pairs, 1, 2), [(1, 1, 1.0)] * pairs, ["harm"])
    assert can_judge(found) is can
    assert words in verdict(found)[0]


def test_a_judge_of_length_is_known_as_one():
    longer = np.tile([0.9, 0.9], (40, 1, 1)).reshape(40, 1, 2)
    said = verdict(measure(longer, [(9, 5, 1.0)] * 40, ["harm"]))
    assert said[1].endswith("agrees on 100.0%, so it is shown to judge by no more than length")
    beside = verdict(measure(longer, [(5, 9, 1.0)] * 20 + [(9, 5, 1.0)] * 20, ["harm"]))
    assert "always preferring the longer answer agrees on 50.0%" in beside[1]


def test_a_bias_for_a_place_is_said():
    first = np.tile([0.8, 0.3], (40, 1, 1)).reshape(40, 1, 2)
    assert "prefers the first place" in verdict(measure(first, [(1, 1, 1.0)] * 40, ["harm"]))[2]
    second = np.tile([0.3, 0.8], (40, 1, 1)).reshape(40, 1, 2)
    assert "prefers the second place" in verdict(measure(second, [(1, 1, 1.0)] * 40, ["harm"]))[2]


@pytest.mark.pictures
def test_the_picture_is_drawn_for_one_pair_and_many(tmp_path):
    for rows in (1, 4):
        draw(measure(PROBABILITIES[:rows], LENGTHS[:rows], NAMES), tmp_path / "report.png")
        assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
