"""Where what stands in a packed row, to the number, and who sees whom, against the rule said pair by pair."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from qalign.data.collate import Layout, Segment

# A prefix of 2 with branches of 3 and 1, one of 1 without a second branch, one without tokens of its own.
GROUPS = ((2, (3, 1)), (1, (2, 0)), (0, (1, 2)))


def tokens(groups) -> list[tuple[int, int, int]]:
    """(group, branch, position) of every token of the row; the prefix is branch 0."""
    found = []
    for group, (prefix, branches) in enumerate(groups):
        found += [(group, 0, position) for position in range(prefix)]
        for branch, length in enumerate(branches, start=1):
            found += [(group, branch, prefix + number) for number in range(length)]
    return found


def sees(groups, window: int | None = None) -> torch.Tensor:
    """bool `(tokens, tokens)`: a query sees its own group's prefix and its own branch, up to itself, in the window."""
    row = tokens(groups)
    return torch.tensor([
        [
            q[0] == k[0] and k[1] in (0, q[1]) and k[2] <= q[2] and (window is None or q[2] - k[2] < window)
            for k in row
        ]
        for q in row
    ])  # fmt: skip


def test_a_row_to_the_number():
    layout = Layout(GROUPS)
    assert layout.tokens == 12
    assert layout.starts == [[0, 2, 5], [6, 7, 9], [9, 9, 10]]
    assert layout.positions().dtype == torch.int64
    assert layout.positions().tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 2, 0, 0, 1]]
    assert layout.segments[:3] == [Segment((0, 0), (0, 2)), Segment((0, 2), (2, 5)), Segment((0, 2), (5, 6))]
    assert [segment.own for segment in layout.segments[3:]] == [(6, 7), (7, 9), (9, 9), (9, 9), (9, 10), (10, 12)]


@pytest.mark.parametrize(
    ("start", "end", "places"),
    [
        (0, 2, [(10, 12)]),  # in the prefix
        (1, 5, [(11, 13), (20, 22)]),  # over its end
        (3, 6, [(20, 23)]),  # in the branch
        (4, 5, [(21, 22)]),
        (0, 6, [(10, 13), (20, 23)]),
    ],
)
def test_a_segment_finds_positions_in_the_row(start, end, places):
    segment = Segment(prefix=(10, 13), own=(20, 23))
    assert segment.first_position == 3
    assert list(segment.row_ranges(start, end)) == places


@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("groups", [GROUPS, ((5, (4, 3)), (3, (1, 6))), ((4, (0, 0)),), ((1, (1, 1)),)])
def test_the_mask_of_flex_attention_is_the_rule(groups, window):
    layout = Layout(groups)
    place = torch.arange(layout.tokens)
    mask = layout.block_mask(window, torch.device("cpu"))
    assert torch.equal(mask.mask_mod(0, 0, place[:, None], place[None, :]), sees(groups, window))


def test_segments_see_what_the_rule_lets_them_see():
    layout, expected = Layout(GROUPS), sees(GROUPS)
    found = torch.zeros_like(expected)
    for segment in layout.segments:
        for place in range(*segment.own):
            for start, end in segment.row_ranges(0, segment.first_position + place - segment.own[0] + 1):
                found[place, start:end] = True
    assert torch.equal(found, expected)


def test_a_mask_is_made_once_for_each_window():
    layout, cpu = Layout(GROUPS), torch.device("cpu")
    assert layout.block_mask(None, cpu) is layout.block_mask(None, cpu)
    assert layout.block_mask(2, cpu) is layout.block_mask(2, cpu)
    assert layout.block_mask(2, cpu) is not layout.block_mask(None, cpu)


@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("groups", [((700, (300, 260)), (90, (500, 1))), ((128, (256, 128)),), ((3, (0, 5)),)])
def test_the_lists_of_blocks_are_those_that_pytorch_finds_all_at_once(groups, window):
    """Which blocks are looked into, and which are taken whole: the kernel asks no further about the latter."""
    mask = Layout(groups).block_mask(window, torch.device("cpu"))
    tokens = mask.seq_lengths[0]
    expected = create_block_mask(mask.mask_mod, None, None, tokens, tokens, device="cpu")
    for kind in ("kv", "full_kv"):
        counts, found = getattr(expected, f"{kind}_num_blocks")[0, 0], getattr(mask, f"{kind}_num_blocks")[0, 0]
        assert found.tolist() == counts.tolist(), kind
        for ours, theirs, count in zip(
            getattr(mask, f"{kind}_indices")[0, 0], getattr(expected, f"{kind}_indices")[0, 0], counts, strict=True
        ):
            assert ours[:count].tolist() == theirs[:count].tolist(), kind
