"""The state of one visitor."""

import pytest

from qalign.errors import UserError
from qalign.page.session import Reply, Session

HASHES = {"base": None, "demo/dpo": "ab12"}


def replies(dialogues) -> list[Reply]:
    return [Reply(name, HASHES[name], tuple(turns), [], 3, text=f"{name} says") for name, turns in dialogues]


def asked(*, blind: bool = False) -> Session:
    session = Session(("base", "demo/dpo"), blind=blind)
    session.clear()
    session.add_replies(replies(session.ask("Why?")), {"top_p": 1})
    return session


def test_each_side_keeps_its_own_history_and_the_last_question_can_be_removed():
    session = asked()
    assert session.titles == ("base", "demo/dpo")
    with pytest.raises(UserError, match="ask something first"):
        session.vote()  # only in a blind test
    for name, turns in session.ask("And why?"):
        assert [turn["content"] for turn in turns] == ["Why?", f"{name} says", "And why?"]
    assert session.remove_last() == "And why?"
    assert [len(turns) for turns in session.turns] == [2, 2]
    assert session.remove_last() == "Why?"
    assert (session.turns, session.remove_last()) == (([], []), "")


def test_a_blind_test_shuffles_sides_and_names_them_after_the_vote():
    seen = set()
    for _ in range(40):
        session = asked(blind=True)
        assert session.titles == ("A", "B")
        a, b = session.vote()
        left = session.names[session.order[0]]
        assert (a.model, a.text, a.weights) == (left, f"{left} says", HASHES[left])
        assert {a.model, b.model} == set(HASHES)
        assert session.titles[0] == f"A: {left}"
        seen.add(left)
    assert seen == set(HASHES)


def test_a_vote_counts_once_and_the_next_question_starts_a_new_unnamed_dialogue():
    session = asked(blind=True)
    session.vote()
    with pytest.raises(UserError):
        session.vote()
    dialogues = session.ask("Next?")
    assert [len(turns) for _, turns in dialogues] == [1, 1]
    assert session.titles == ("A", "B")
    session.add_replies(replies(dialogues), {})
    session.vote()
    assert session.remove_last() == "Next?"
    assert (session.turns, session.hides) == (([], []), True)


def test_only_a_change_of_models_or_of_blindness_starts_a_new_dialogue():
    session = asked()
    before = session.round
    session.choose("base", "demo/dpo", blind=False)
    assert (len(session.turns[0]), session.round) == (2, before)
    session.choose("demo/dpo", "demo/dpo", blind=False)
    assert session.turns == ([], [])
    assert session.round > before


def test_the_aligned_side_is_the_second_unless_that_is_the_base():
    assert [Session(names).aligned for names in (("base", "x"), ("x", "base"), ("x", "y"))] == [1, 0, 1]
