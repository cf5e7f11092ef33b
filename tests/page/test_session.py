"""What one visitor has in front of them."""

from types import SimpleNamespace

import pytest

from qalign.errors import UserError
from qalign.page.session import Session
from qalign.page.votes import Choice

WEIGHTS = {"base": None, "demo/dpo": "ab12"}


def reply(model: str, text: str, prompt=(), state: str = "ended"):
    return SimpleNamespace(model=model, prompt=tuple(prompt), text=text, state=state, seed=3)


def asked(*, blind: bool = False, question: str = "Why?") -> Session:
    duel = Session(("base", "demo/dpo"), blind=blind)
    duel.clear()
    turns = duel.ask(question)
    duel.take([reply(name, f"{name} says", prompt) for name, prompt in turns], {"top_p": 1})
    return duel


def test_each_side_keeps_its_own_history():
    duel = asked()
    (first, left), (second, right) = duel.ask("And why?")
    assert (first, second) == ("base", "demo/dpo")
    assert [turn["content"] for turn in left] == ["Why?", "base says", "And why?"]
    assert [turn["content"] for turn in right] == ["Why?", "demo/dpo says", "And why?"]


def test_the_last_question_can_be_taken_back():
    duel = asked()
    duel.ask("And why?")
    assert duel.take_back() == "And why?"
    assert [len(turns) for turns in duel.turns] == [2, 2]
    assert duel.take_back() == "Why?"
    assert duel.turns == ([], [])
    assert duel.take_back() == ""


def test_without_a_blind_test_names_stand_over_their_sides_and_there_is_no_vote():
    duel = asked()
    assert duel.titles == ("base", "demo/dpo")
    with pytest.raises(UserError, match="ask something first"):
        duel.vote(Choice.A, WEIGHTS)


def test_a_blind_test_shuffles_sides_and_names_them_after_the_vote():
    seen = set()
    for _ in range(40):
        duel = asked(blind=True)
        assert duel.titles == ("A", "B")
        a, b = duel.vote(Choice.A, WEIGHTS)
        left = "demo/dpo" if duel.flipped else "base"
        assert (a.model, a.text, a.weights) == (left, f"{left} says", WEIGHTS[left])
        assert {a.model, b.model} == set(WEIGHTS)
        assert duel.titles[0] == f"A: {left}"
        seen.add(left)
    assert seen == set(WEIGHTS)


def test_a_vote_counts_once_and_the_next_question_begins_anew_and_unnamed():
    duel = asked(blind=True)
    duel.vote(Choice.TIE, WEIGHTS)
    with pytest.raises(UserError):
        duel.vote(Choice.A, WEIGHTS)
    turns = duel.ask("Next?")
    assert [len(prompt) for _, prompt in turns] == [1, 1]
    assert duel.titles == ("A", "B")
    duel.take([reply(name, "x", prompt) for name, prompt in turns], {})
    duel.vote(Choice.B, WEIGHTS)
    assert duel.take_back() == "Next?"
    assert (duel.turns, duel.hides) == (([], []), True)


def test_only_a_change_of_models_or_of_blindness_begins_a_new_dialogue():
    duel = asked()
    before = duel.round
    duel.choose("base", "demo/dpo", blind=False)
    assert (len(duel.turns[0]), duel.round) == (2, before)
    duel.choose("demo/dpo", "demo/dpo", blind=False)
    assert duel.turns == ([], [])
    assert duel.round > before


def test_the_aligned_side_is_the_second_unless_that_is_the_base():
    assert Session(("base", "x")).aligned == 1
    assert Session(("x", "base")).aligned == 0
    assert Session(("x", "y")).aligned == 1
