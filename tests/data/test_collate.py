"""Pairs as tensors: packed rows and padded ones to the number, and pairs shared out among forward passes."""

import itertools
import random

import pytest
import torch

from qalign.data.collate import Layout, MicroBatchLimit, micro_batches, pack, packed_tokens, pad
from qalign.data.store.sequences import TokenPair
from qalign.train.processes.world import deal
from tests.families import random_pairs

FIRST = TokenPair(prompt_ids=[11, 12], chosen_ids=[21, 22, 2], rejected_ids=[31, 2], where="rows.jsonl:1")
SECOND = TokenPair(prompt_ids=[13], chosen_ids=[23, 2], rejected_ids=[33, 34, 35, 36, 2], where="rows.jsonl:7")
ALIKE = TokenPair(prompt_ids=[14, 15], chosen_ids=[41, 42, 43, 2], rejected_ids=[41, 42, 2], where="rows.jsonl:8")


TARGETS = {
    "targets": [21, 22, 2, 31, 2, 23, 2, 33, 34, 35, 36, 2],
    "owners": [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3],
    "lengths": [[3, 2], [2, 5]],
}
BATCHES = {
    "packed; an answer's last token predicts none": (
        pack([FIRST, SECOND]),
        TARGETS
        | {
            "input_ids": [[11, 12, 21, 22, 31, 13, 23, 33, 34, 35, 36]],
            "position_ids": [[0, 1, 2, 3, 2, 0, 1, 1, 2, 3, 4]],
            "layout": Layout(((2, (2, 1)), (1, (1, 4)))),
            "predictors": [1, 2, 3, 1, 4, 5, 6, 5, 7, 8, 9, 10],
            "last_tokens": [3, 4, 6, 10],
            "attention_mask": None,
        },
    ),
    "packed, with the last tokens": (
        pack([FIRST, SECOND], last_token="kept"),
        TARGETS
        | {
            "input_ids": [[11, 12, 21, 22, 2, 31, 2, 13, 23, 2, 33, 34, 35, 36, 2]],
            "layout": Layout(((2, (3, 2)), (1, (2, 5)))),
            "predictors": [1, 2, 3, 1, 5, 7, 8, 7, 10, 11, 12, 13],
            "last_tokens": [4, 6, 9, 14],
        },
    ),
    "packed; what answers begin with alike is stored once": (
        pack([ALIKE]),
        {
            "input_ids": [[14, 15, 41, 42, 43]],
            "layout": Layout(((4, (1, 0)),)),
            "predictors": [1, 2, 3, 4, 1, 2, 3],
            "targets": [41, 42, 43, 2, 41, 42, 2],
            "last_tokens": [4, 3],
        },
    ),
    "packed; answers of one token add nothing": (
        pack([TokenPair([7, 8], [5], [6], "one token each")]),
        {"input_ids": [[7, 8]], "predictors": [1, 1], "targets": [5, 6]},
    ),
    "padded": (
        pad([FIRST, SECOND], 0),
        TARGETS
        | {
            "input_ids": [
                [11, 12, 21, 22, 2, 0],
                [11, 12, 31, 2, 0, 0],
                [13, 23, 2, 0, 0, 0],
                [13, 33, 34, 35, 36, 2],
            ],
            "attention_mask": [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
            "predictors": [1, 2, 3, 7, 8, 12, 13, 18, 19, 20, 21, 22],
            "last_tokens": [4, 9, 14, 23],
            "layout": None,
        },
    ),
}


@pytest.mark.parametrize(("batch", "expected"), BATCHES.values(), ids=BATCHES.keys())
def test_a_batch_to_the_number(batch, expected):
    for name, value in expected.items():
        found = getattr(batch, name)
        assert (found.tolist() if torch.is_tensor(found) else found) == value, name


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


@pytest.mark.parametrize("token", [2, 21, 11])
def test_masks_count_tokens_and_never_look_at_ids(token):
    """The pad id may be the EOS, and stand in a completion or a prompt."""
    batch = pad([TokenPair([11, 2, 12], [2, 21, 2, 2], [2], "rows.jsonl:1")], pad_token_id=token)
    assert batch.input_ids.tolist() == [[11, 2, 12, 2, 21, 2, 2], [11, 2, 12, 2, token, token, token]]
    assert batch.attention_mask.tolist() == [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    assert batch.targets.tolist() == [2, 21, 2, 2, 2]


def test_both_ways_ask_for_the_same_log_probs():
    pairs = random_pairs()
    packed, padded = pack(pairs), pad(pairs, 0)
    for name in ("targets", "owners", "lengths"):
        assert torch.equal(getattr(packed, name), getattr(padded, name)), name
    one, other = (batch.input_ids.flatten()[batch.predictors] for batch in (packed, padded))
    assert torch.equal(one, other)


@pytest.mark.parametrize("batch", [pack([FIRST, ALIKE]), pad([FIRST, ALIKE], 0)], ids=["packed", "padded"])
def test_every_tensor_holds_int64_and_moves_along(batch):
    tensors = {name: value for name, value in vars(batch).items() if torch.is_tensor(value)}
    assert {value.dtype for value in tensors.values()} == {torch.int64}
    moved = batch.to(torch.device("meta"))
    assert all(getattr(moved, name).is_meta for name in tensors)
    assert moved.layout is batch.layout


# --- micro-batches ---------------------------------------------------------------------------------------------------


def pairs_of(seed: int) -> list[TokenPair]:
    """Up to 40 pairs, most of them short and some very long, in no order."""
    draw = random.Random(seed)

    def ids() -> list[int]:
        return [1] * max(1, round(draw.lognormvariate(3, 1)))

    return [TokenPair(ids(), ids(), ids(), f"row {number}") for number in range(draw.randint(1, 40))]


def names(groups: list[list[TokenPair]]) -> list[list[str]]:
    return [[pair.where for pair in group] for group in groups]


LIMITS = [*(MicroBatchLimit(pairs=most) for most in (1, 2, 3, 8)), *(MicroBatchLimit(tokens=most) for most in (1, 300))]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_every_pair_is_in_one_micro_batch_within_the_limit_the_largest_first(limit, layout):
    """A pair that alone is longer than a limit in tokens is run all the same; as many tokens as it has then fit."""
    size = packed_tokens if layout == "packed" else lambda pair: 2 * len(pair)
    for seed in range(50):
        rows = pairs_of(seed)
        groups = micro_batches(rows, limit, layout=layout)
        assert sorted(itertools.chain(*names(groups))) == sorted(pair.where for pair in rows)
        assert names(groups) == names(micro_batches(rows, limit, layout=layout))  # the same each time
        sizes = [sum(map(size, g)) if layout == "packed" else len(g) * max(map(size, g)) for g in groups]
        firsts = sizes if layout == "packed" else [max(map(len, g)) for g in groups]
        assert firsts == sorted(firsts, reverse=True)  # if memory is too small, the first one tells
        if limit.pairs:
            assert max(map(len, groups)) <= limit.pairs
            assert len(groups) == -(-len(rows) // limit.pairs)
        else:
            assert max(sizes) <= max(limit.tokens, *map(size, rows))
            if layout == "packed":  # balanced: the shortest group had been filled up first
                assert sizes[0] - sizes[-1] <= max(map(size, rows))


def test_one_long_pair_does_not_drive_the_others_together():
    """By tokens alone the seven short ones would all share the second forward pass."""
    pairs = [TokenPair([1] * 500, [1], [1], "long"), *(TokenPair([1], [1], [1], f"short {n}") for n in range(7))]
    assert sorted(map(len, micro_batches(pairs, MicroBatchLimit(pairs=4), layout="packed"))) == [4, 4]


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


@pytest.mark.parametrize("hands", [2, 3, 8])
def test_each_process_gets_as_many_micro_batches(hands):
    """So that none of them waits long for another: the longest share is near to the mean."""
    draws = random.Random(0)
    pairs = [TokenPair([1] * draws.randint(1, 400), [1] * 300, [1] * 300, f"row {n}") for n in range(64)]
    sizes = [*map(packed_tokens, pairs)]
    for tokens in (2000, 8192, 10**6):
        groups = micro_batches(pairs, MicroBatchLimit(tokens=tokens).among(hands, sizes), layout="packed")
        taken = [sum(map(packed_tokens, group)) for group in groups]
        shares = [sum(taken[number] for number in numbers) for numbers in deal(taken, hands)]
        assert max(shares) < 1.1 * sum(sizes) / hands
        assert max(taken) <= tokens
    assert MicroBatchLimit(pairs=3).among(hands, sizes) == MicroBatchLimit(pairs=3), "the recipe's own choice"


def test_padded_micro_batches_are_of_like_length():
    pairs = [TokenPair([1], [1] * n, [1], f"{n}") for n in (3, 40, 5, 41, 4, 42)]
    assert names(micro_batches(pairs, MicroBatchLimit(pairs=3), layout="padded")) == [
        ["42", "41", "40"],
        ["5", "4", "3"],
    ]
