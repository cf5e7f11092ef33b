"""Pairs as tensors: packed rows and padded ones to the number, and pairs shared out among forward passes."""

import itertools
import random

import pytest
import torch

from qalign.data.collate import MicroBatchLimit, micro_batches, pack, packed_tokens, pad
from qalign.data.tokenize import TokenPair
from tests.families import random_pairs

FIRST = TokenPair(prompt_ids=[11, 12], chosen_ids=[21, 22, 2], rejected_ids=[31, 2], where="rows.jsonl:1")
SECOND = TokenPair(prompt_ids=[13], chosen_ids=[23, 2], rejected_ids=[33, 34, 35, 36, 2], where="rows.jsonl:7")
ALIKE = TokenPair(prompt_ids=[14, 15], chosen_ids=[41, 42, 43, 2], rejected_ids=[41, 42, 2], where="rows.jsonl:8")


# --- packed ----------------------------------------------------------------------------------------------------------


def test_a_packed_batch_to_the_number():
    batch = pack([FIRST, SECOND])
    assert batch.input_ids.tolist() == [
        [11, 12, 21, 22, 31, 13, 23, 33, 34, 35, 36]
    ]  # no end of turn: it predicts none
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2, 3, 4]]
    assert batch.layout.groups == ((2, (2, 1)), (1, (1, 4)))
    assert batch.predictors.tolist() == [1, 2, 3, 1, 4, 5, 6, 5, 7, 8, 9, 10]
    assert batch.targets.tolist() == [21, 22, 2, 31, 2, 23, 2, 33, 34, 35, 36, 2]
    assert batch.owners.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3]
    assert batch.last_tokens.tolist() == [3, 4, 6, 10]
    assert batch.lengths.tolist() == [[3, 2], [2, 5]]
    assert batch.attention_mask is None


def test_a_packed_batch_with_its_last_tokens_to_the_number():
    batch = pack([FIRST, SECOND], last_token="kept")
    assert batch.input_ids.tolist() == [[11, 12, 21, 22, 2, 31, 2, 13, 23, 2, 33, 34, 35, 36, 2]]
    assert batch.layout.groups == ((2, (3, 2)), (1, (2, 5)))
    assert batch.predictors.tolist() == [1, 2, 3, 1, 5, 7, 8, 7, 10, 11, 12, 13]
    assert batch.last_tokens.tolist() == [4, 6, 9, 14]
    assert batch.input_ids[0, batch.last_tokens].tolist() == [2] * 4
    assert batch.lengths.tolist() == [[3, 2], [2, 5]]  # the same whatever is computed


def test_what_answers_begin_with_alike_is_stored_once():
    batch = pack([ALIKE])
    assert batch.input_ids.tolist() == [[14, 15, 41, 42, 43]]
    assert batch.layout.groups == ((4, (1, 0)),)
    assert batch.predictors.tolist() == [1, 2, 3, 4, 1, 2, 3]
    assert batch.targets.tolist() == [41, 42, 43, 2, 41, 42, 2]
    assert batch.last_tokens.tolist() == [4, 3]


def test_one_token_answers_add_nothing_to_the_row():
    batch = pack([TokenPair([7, 8], [5], [6], "one token each")])
    assert batch.input_ids.tolist() == [[7, 8]]
    assert batch.predictors.tolist() == [1, 1]
    assert batch.targets.tolist() == [5, 6]


@pytest.mark.parametrize("last_token", ["dropped", "kept"])
@pytest.mark.parametrize("seed", range(5))
def test_whoever_follows_a_packed_row_reads_the_pairs(last_token, seed):
    """Prefix and branch, read one after the other, are a sequence; its predictors stand right before their targets."""
    pairs = random_pairs(seed)
    batch = pack(pairs, last_token=last_token)
    row, cut = batch.input_ids[0].tolist(), -1 if last_token == "dropped" else None
    number = 0
    for pair, (prefix, branches), starts in zip(pairs, batch.layout.groups, batch.layout.starts, strict=True):
        for answer, length, start in zip((pair.chosen_ids, pair.rejected_ids), branches, starts[1:], strict=True):
            places = [*range(starts[0], starts[0] + prefix), *range(start, start + length)]
            assert [row[place] for place in places] == (pair.prompt_ids + answer)[:cut]
            own = batch.owners == number
            assert batch.targets[own].tolist() == answer
            first = len(pair.prompt_ids) - 1
            assert batch.predictors[own].tolist() == places[first : first + len(answer)]
            assert batch.last_tokens[number] == places[-1]
            assert batch.position_ids[0, places].tolist() == list(range(len(places)))
            number += 1
    assert batch.layout.tokens == len(row)


# --- padded ----------------------------------------------------------------------------------------------------------


def test_a_padded_batch_to_the_number():
    batch = pad([FIRST, SECOND], pad_token_id=0)
    assert batch.input_ids.tolist() == [
        [11, 12, 21, 22, 2, 0],
        [11, 12, 31, 2, 0, 0],
        [13, 23, 2, 0, 0, 0],
        [13, 33, 34, 35, 36, 2],
    ]
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    assert batch.predictors.tolist() == [1, 2, 3, 7, 8, 12, 13, 18, 19, 20, 21, 22]
    assert batch.targets.tolist() == [21, 22, 2, 31, 2, 23, 2, 33, 34, 35, 36, 2]
    assert batch.owners.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3]
    assert batch.last_tokens.tolist() == [4, 9, 14, 23]
    assert batch.layout is None


@pytest.mark.parametrize("token", [2, 21, 11])
def test_masks_count_tokens_and_never_look_at_ids(token):
    """The pad id may be the EOS, and stand in a completion or a prompt."""
    batch = pad([TokenPair([11, 2, 12], [2, 21, 2, 2], [2], "rows.jsonl:1")], pad_token_id=token)
    assert batch.input_ids.tolist() == [[11, 2, 12, 2, 21, 2, 2], [11, 2, 12, 2, token, token, token]]
    assert batch.attention_mask.tolist() == [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    assert batch.targets.tolist() == [2, 21, 2, 2, 2]


def test_a_padded_batch_is_as_wide_as_its_longest_row_and_no_wider():
    assert pad([FIRST], 0).input_ids.shape == (2, 5)
    assert pad([SECOND], 0).input_ids.shape == (2, 6)
    assert (len(FIRST), len(SECOND)) == (5, 6)


def test_both_ways_ask_for_the_same_log_probs():
    pairs = random_pairs()
    packed, padded = pack(pairs), pad(pairs, 0)
    for name in ("targets", "owners", "lengths"):
        assert torch.equal(getattr(packed, name), getattr(padded, name)), name
    one, other = (batch.input_ids.flatten()[batch.predictors] for batch in (packed, padded))
    assert torch.equal(one, other)


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [pack([FIRST, ALIKE]), pad([FIRST, ALIKE], 0)], ids=["packed", "padded"])
def test_every_tensor_holds_int64_and_moves_along(batch):
    tensors = {name: value for name, value in vars(batch).items() if torch.is_tensor(value)}
    assert {value.dtype for value in tensors.values()} == {torch.int64}
    moved = batch.to(torch.device("meta"))
    assert all(getattr(moved, name).is_meta for name in tensors)
    assert moved.layout is batch.layout


def test_a_model_is_called_with_what_it_knows():
    assert set(pack([FIRST]).inputs) == {"input_ids", "position_ids", "layout"}
    assert set(pad([FIRST], 0).inputs) == {"input_ids", "attention_mask"}


# --- micro-batches ---------------------------------------------------------------------------------------------------


def pairs_of(seed: int) -> list[TokenPair]:
    """Up to 40 pairs, most of them short and some very long, in no order."""
    draw = random.Random(seed)

    def ids() -> list[int]:
        return [1] * max(1, round(draw.lognormvariate(3, 1)))

    return [TokenPair(ids(), ids(), ids(), f"row {number}") for number in range(draw.randint(1, 40))]


def names(groups: list[list[TokenPair]]) -> list[list[str]]:
    return [[pair.where for pair in group] for group in groups]


LIMITS = [
    MicroBatchLimit(pairs=1),
    MicroBatchLimit(pairs=3),
    MicroBatchLimit(pairs=8),
    MicroBatchLimit(tokens=1),
    MicroBatchLimit(tokens=300),
]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_every_pair_is_in_one_micro_batch(limit, layout):
    for seed in range(50):
        pairs = pairs_of(seed)
        groups = micro_batches(pairs, limit, layout=layout)
        assert sorted(itertools.chain(*names(groups))) == sorted(pair.where for pair in pairs)
        assert all(groups)
        assert names(groups) == names(micro_batches(pairs, limit, layout=layout))  # the same each time


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_limits_hold(limit, layout):
    """A pair that alone is longer than the limit is run all the same; so much then fits."""
    for seed in range(50):
        rows = pairs_of(seed)
        size = packed_tokens if layout == "packed" else lambda pair: 2 * len(pair)
        for group in micro_batches(rows, limit, layout=layout):
            tokens = sum(map(size, group)) if layout == "packed" else len(group) * max(map(size, group))
            if limit.pairs:
                assert len(group) <= limit.pairs
            else:
                assert tokens <= max(limit.tokens, *map(size, rows))


def test_one_long_pair_does_not_drive_the_others_together():
    """By tokens alone the seven short ones would all share the second forward pass."""
    pairs = [TokenPair([1] * 500, [1], [1], "long"), *(TokenPair([1], [1], [1], f"short {n}") for n in range(7))]
    assert sorted(map(len, micro_batches(pairs, MicroBatchLimit(pairs=4), layout="packed"))) == [4, 4]


@pytest.mark.parametrize("pairs", [1, 2, 3, 8])
def test_a_number_of_pairs_gives_as_few_micro_batches_as_it_can(pairs):
    for seed in range(20):
        rows = pairs_of(seed)
        for layout in ("packed", "padded"):
            assert len(micro_batches(rows, MicroBatchLimit(pairs=pairs), layout=layout)) == -(-len(rows) // pairs)


def test_the_largest_micro_batch_comes_first():
    """If memory is too small, the first one tells."""
    for seed in range(50):
        sizes = [
            sum(map(packed_tokens, g))
            for g in micro_batches(pairs_of(seed), MicroBatchLimit(tokens=300), layout="packed")
        ]
        assert sizes == sorted(sizes, reverse=True)
        widths = [max(map(len, g)) for g in micro_batches(pairs_of(seed), MicroBatchLimit(pairs=3), layout="padded")]
        assert widths == sorted(widths, reverse=True)


def test_micro_batches_are_balanced():
    """Within the longest pair of each other: the shortest group had been filled up first."""
    for seed in range(50):
        rows = pairs_of(seed)
        sizes = [sum(map(packed_tokens, g)) for g in micro_batches(rows, MicroBatchLimit(tokens=300), layout="packed")]
        assert sizes[0] - sizes[-1] <= max(map(packed_tokens, rows))


def test_no_more_than_four_thirds_of_the_best_split():
    """Graham's bound, against every way of sharing out eight pairs between two groups."""
    for seed in range(30):
        rows = (pairs_of(seed) + pairs_of(seed + 100))[:8]
        sizes = list(map(packed_tokens, rows))
        splits = (sum(s for s, side in zip(sizes, sides, strict=True) if side)
                  for sides in itertools.product((0, 1), repeat=len(sizes)))  # fmt: skip
        best = min(max(part, sum(sizes) - part) for part in splits)
        groups = micro_batches(rows, MicroBatchLimit(tokens=max(best * 4 // 3, *sizes)), layout="packed")
        assert len(groups) <= 2


def test_a_token_limit_is_filled():
    """64 pairs of 30 tokens and a limit of 300: ten a time, and no pair on its own."""
    pairs = [TokenPair([1] * 10, [1] * 10, [1] * 10, f"row {n}") for n in range(64)]
    sizes = [len(group) for group in micro_batches(pairs, MicroBatchLimit(tokens=300), layout="packed")]
    assert max(sizes) <= 10
    assert len(sizes) == 7
    assert min(sizes) == 9


def test_padded_micro_batches_are_of_like_length():
    pairs = [TokenPair([1], [1] * n, [1], f"{n}") for n in (3, 40, 5, 41, 4, 42)]
    assert names(micro_batches(pairs, MicroBatchLimit(pairs=3), layout="padded")) == [
        ["42", "41", "40"],
        ["5", "4", "3"],
    ]


def test_a_limit_in_words():
    assert str(MicroBatchLimit(pairs=1000)) == "1,000 at a time"
    assert str(MicroBatchLimit(tokens=4096)) == "up to 4,096 tokens at a time"
