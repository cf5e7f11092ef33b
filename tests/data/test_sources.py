"""Several sources become one list of rows: limits, skipped rows, weights, and which rows are refused."""

import pytest

from qalign.config.stages import Source
from qalign.data.formats import LeftOut, Refused, preferences


def row(number: int) -> dict:
    return {"prompt": f"{number}?", "chosen": str(number), "rejected": "No"}


@pytest.fixture
def ten(write_jsonl) -> str:
    return write_jsonl("ten.jsonl", [row(n) for n in range(1, 11)])


def read(*sources: Source, limit=None, seed=0):
    return preferences(sources, "train", limit, seed)


def numbers(rows) -> list[int]:
    return [int(row.chosen["content"]) for row in rows]


@pytest.mark.parametrize(
    ("limit", "source", "expected"),
    [
        (3, {}, [1, 2, 3]),
        (99, {}, [*range(1, 11)]),
        (3, {"limit": 2}, [1, 2]),
        (3, {"limit": 7}, [*range(1, 8)]),
        (3, {"skip": 2}, [3, 4, 5]),
        (None, {"skip": 8}, [9, 10]),
        (3, {"limit": 2, "weight": 2.0}, [1, 2, 1, 2]),
    ],
)
def test_a_source_gives_its_rows_after_skip_up_to_its_own_limit_or_the_stages(ten, limit, source, expected):
    assert numbers(read(Source(path=ten, **source), limit=limit)[0]) == expected


def test_sources_are_read_one_after_the_other(ten, write_jsonl):
    other = write_jsonl("other.jsonl", [row(n) for n in range(11, 21)])

    rows, _ = read(Source(path=ten, limit=2), Source(path=other), Source(path=ten, limit=7), limit=4)

    assert numbers(rows) == [1, 2, 11, 12, 13, 14, *range(1, 8)]


def test_a_refused_row_counts_towards_the_limit_and_nothing_is_read_beyond(write_jsonl):
    path = write_jsonl("rows.jsonl", [row(1), "{", row(3), row(4), "{"])

    rows, refused = read(Source(path=path, skip=1), limit=2)

    assert numbers(rows) == [3]
    assert [row.where for row in refused] == [f"{path}:2"]


def test_half_a_weight_takes_a_random_half_of_the_rows_once_each(ten):
    halves = [numbers(read(Source(path=ten, weight=0.5), seed=seed)[0]) for seed in range(20)]

    for half in halves:
        assert len(half) == len(set(half)) == 5
    assert len({tuple(sorted(half)) for half in halves}) > 10  # the seed decides which
    assert {n for half in halves for n in half} == set(range(1, 11))
    assert numbers(read(Source(path=ten, weight=0.5), seed=7)[0]) == halves[7]  # and nothing else does


def test_a_weight_of_two_and_a_half_takes_every_row_twice_and_half_of_them_thrice(ten):
    taken = numbers(read(Source(path=ten, weight=2.5))[0])

    assert sorted(taken.count(n) for n in range(1, 11)) == [2] * 5 + [3] * 5


def test_refused_rows_of_all_sources_are_listed_once_and_in_order(write_jsonl):
    first = write_jsonl("first.jsonl", ['{"prompt": ', row(1)])
    second = write_jsonl("second.jsonl", [row(2), {"prompt": "Why?", "no_pair": "a tie"}])

    rows, refused = read(Source(path=first, weight=3.0), Source(path=second))

    assert [row.where for row in rows] == [f"{first}:2"] * 3 + [f"{second}:1"]
    assert [(type(row), row.where) for row in refused] == [(Refused, f"{first}:1"), (LeftOut, f"{second}:2")]
