"""Pairs as tensors: all chosen rows, then all rejected ones, masked by length."""

import pytest
import torch

from qalign.batch import PairCollator
from qalign.tokens import TokenPair

FIRST = TokenPair(prompt_ids=[11, 12], chosen_ids=[21, 22, 2], rejected_ids=[31, 2], where="rows.jsonl:1")
SECOND = TokenPair(prompt_ids=[13], chosen_ids=[23, 2], rejected_ids=[33, 34, 35, 36, 2], where="rows.jsonl:7")


def test_a_batch_to_the_number():
    batch = PairCollator(pad_token_id=0)([FIRST, SECOND])

    assert batch["input_ids"].tolist() == [
        [11, 12, 21, 22, 2, 0],
        [13, 23, 2, 0, 0, 0],
        [11, 12, 31, 2, 0, 0],
        [13, 33, 34, 35, 36, 2],
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    assert batch["completion_mask"].tolist() == [
        [0, 0, 1, 1, 1, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 1],
    ]
    assert batch["where"] == ["rows.jsonl:1", "rows.jsonl:7"]
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask", "where"}


def test_every_tensor_holds_int64():
    batch = PairCollator(pad_token_id=0)([FIRST])

    assert {value.dtype for value in batch.values() if torch.is_tensor(value)} == {torch.int64}


def test_pairs_keep_their_order():
    batch = PairCollator(pad_token_id=0)([SECOND, FIRST])

    assert batch["input_ids"][:, 0].tolist() == [13, 11, 13, 11]
    assert batch["input_ids"].tolist()[0] == [13, 23, 2, 0, 0, 0]
    assert batch["where"] == ["rows.jsonl:7", "rows.jsonl:1"]


@pytest.mark.parametrize("pad", [2, 21, 11])
def test_masks_count_tokens_and_never_look_at_ids(pad):
    """The pad id may be the EOS, and stand in a completion or a prompt."""
    pair = TokenPair([11, 2, 12], [2, 21, 2, 2], [2], "rows.jsonl:1")

    batch = PairCollator(pad_token_id=pad)([pair])

    assert batch["input_ids"].tolist() == [[11, 2, 12, 2, 21, 2, 2], [11, 2, 12, 2, pad, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0]]


def test_a_batch_is_as_wide_as_its_longest_row_and_no_wider():
    collate = PairCollator(pad_token_id=0)

    assert collate([FIRST])["input_ids"].shape == (2, 5)
    assert collate([SECOND])["input_ids"].shape == (2, 6)
    assert len(FIRST) == 5
    assert len(SECOND) == 6


def test_the_company_in_a_batch_changes_nothing_but_the_padding():
    alone, together = PairCollator(pad_token_id=0)([FIRST]), PairCollator(pad_token_id=0)([SECOND, FIRST])

    for name in ("input_ids", "attention_mask", "completion_mask"):
        rows = together[name][[1, 3]]
        assert torch.equal(rows[:, :5], alone[name])
        assert not rows[:, 5:].any()


def test_the_pairs_are_left_as_they_were():
    PairCollator(pad_token_id=0)([FIRST, SECOND])

    assert TokenPair([11, 12], [21, 22, 2], [31, 2], "rows.jsonl:1") == FIRST
