"""One score from the scores of an ensemble's members, and the members' resamples: by hand."""

import math

import pytest
import torch

from qalign.losses.ensemble import aligned, combined_scores, member_seed, resample_counts, spread

SCORES = torch.tensor([[1.0, 3.0, 5.0, 7.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("how", "uncertainty", "expected"),
    [
        ("mean", 1.0, [4.0, 2.0]),
        ("min", 1.0, [1.0, 2.0]),
        ("mean_minus_std", 1.0, [4 - math.sqrt(5), 2.0]),  # the mean of 9, 1, 1, 9 is 5
        ("mean_minus_std", 0.5, [4 - 0.5 * math.sqrt(5), 2.0]),
        ("mean_minus_std", 0.0, [4.0, 2.0]),
    ],
)
def test_scores_become_one(how, uncertainty, expected):
    assert combined_scores(SCORES, how, uncertainty).tolist() == pytest.approx(expected)
    assert combined_scores(SCORES.flip(1), how, uncertainty).tolist() == pytest.approx(expected)


def test_the_spread_is_the_standard_deviation_of_the_members():
    assert spread(SCORES).tolist() == pytest.approx([math.sqrt(5), 0.0])


def test_an_offset_of_a_member_changes_nothing_but_the_level():
    """Bradley-Terry doesn't see it. Without one zero, the member with the lowest scores would always be the least."""
    offsets = torch.tensor([0.0, -100.0, 3.0, 50.0], dtype=torch.float64)
    plain, moved = (aligned(scores, scores.mean(dim=0)) for scores in (SCORES, SCORES + offsets))
    torch.testing.assert_close(moved, plain + offsets.mean())
    assert moved.mean(dim=1).tolist() == pytest.approx((SCORES + offsets).mean(dim=1).tolist())
    assert combined_scores(plain, "min")[0] != combined_scores(plain, "min")[1]


def test_a_resample_has_as_many_rows_and_leaves_about_a_third_out():
    counts = resample_counts(10_000, seed=1)
    assert counts.sum() == 10_000
    assert (counts == 0).float().mean().item() == pytest.approx(math.exp(-1), abs=0.02)
    assert torch.equal(counts, resample_counts(10_000, seed=1))
    assert not torch.equal(counts, resample_counts(10_000, seed=2))


def test_members_have_seeds_of_their_own_and_the_first_that_of_the_recipe():
    assert member_seed(42, 1) == 42
    seeds = [member_seed(seed, number) for seed in (0, 1, 2, 2**32 - 1) for number in range(1, 65)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
