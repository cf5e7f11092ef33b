"""The page's actions without a browser."""

import json

import pytest

from qalign.errors import UserError
from qalign.page.actions import Page, View, Wish, figures_of, tally_words
from qalign.page.chat import Chat, Controls, Reply
from qalign.page.colours import TokenSpan, html
from qalign.page.models import lineup
from qalign.page.session import Session
from qalign.page.votes import Choice, Tally, VoteFile
from tests.chat_runs import finished_run

QUESTION = "Is it too late to plant tulips?"
SHORT = Controls(temperature=0, max_new_tokens=6, seed=1)


@pytest.fixture(scope="module")
def chat(tiny_folder, tmp_path_factory) -> Chat:
    folder = tmp_path_factory.mktemp("page") / "runs"
    finished_run(folder / "a", tiny_folder)
    return Chat.open(*lineup([], folder))


@pytest.fixture
def page(chat, tmp_path) -> Page:
    return Page(chat, VoteFile(tmp_path / "votes.jsonl"))


def wish(**keys) -> Wish:
    return Wish("base", "a/dpo", **{"controls": SHORT, **keys})


def send(page, duel, prompt=QUESTION, **keys) -> list[View]:
    return list(page.send(duel, wish(**keys), prompt, "me"))


def test_both_answers_grow_and_the_prompt_box_is_emptied(page):
    duel = Session(("base", "a/dpo"))
    views = send(page, duel)
    assert views[0].prompt == ""
    assert [view.busy for view in views] == [True] * (len(views) - 1) + [False]
    assert views[0].dialogues[0] == [{"role": "user", "content": QUESTION}]
    assert [turn["role"] for turn in views[-1].dialogues[1]] == ["user", "assistant"]
    assert views[-1].figures[0].startswith("6 tokens · ")
    assert "cut at max tokens · seed 1" in views[-1].figures[0]
    assert not views[-1].can_vote
    follow_up = send(page, duel, "And why?")[-1]
    assert len(follow_up.dialogues[0]) == 4


def test_a_question_that_fails_comes_back_with_the_reason(page):
    duel = Session(("base", "a/dpo"))
    last = send(page, duel, "x" * 30000)[-1]
    assert "characters long" in last.status
    assert last.prompt == "x" * 30000
    assert (duel.turns, last.busy) == (([], []), False)
    assert "no such model" in list(page.send(duel, Wish("../x", "base", controls=SHORT), "a", "me"))[-1].status
    assert send(page, duel)[-1].status == ""


def test_a_failure_inside_is_told_without_its_inside(page, monkeypatch, capsys):
    def broken(*args):
        raise ZeroDivisionError("secret")

    duel = Session(("base", "a/dpo"))
    monkeypatch.setattr("qalign.model.generation.nucleus", broken)
    last = send(page, duel)[-1]
    assert "ZeroDivisionError" in last.status
    assert "secret" not in last.status
    assert "Traceback" in capsys.readouterr().err


def test_retry_edit_and_clear(page):
    duel = Session(("base", "a/dpo"))
    assert "nothing to retry" in list(page.retry(duel, wish(), "me"))[-1].status
    assert "nothing to edit" in page.edit(duel, "me").status
    answer = send(page, duel)[-1].dialogues
    assert list(page.retry(duel, wish(), "me"))[-1].dialogues == answer
    edited = page.edit(duel, "me")
    assert (edited.prompt, edited.dialogues) == (QUESTION, ([], []))
    send(page, duel)
    assert page.clear(duel, "me").dialogues == ([], [])


def test_what_is_cleared_while_it_grows_stays_cleared(page):
    duel = Session(("base", "a/dpo"))
    growing = page.send(duel, wish(controls=Controls(temperature=0, max_new_tokens=60)), QUESTION, "me")
    next(growing), next(growing)
    page.clear(duel, "me")
    list(growing)
    assert duel.turns == ([], [])
    assert len(send(page, duel)[-1].dialogues[0]) == 2


def test_who_clears_an_answer_as_it_grows_sees_nothing_of_it_again(page):
    duel = Session(("base", "a/dpo"))
    growing = page.send(duel, wish(controls=Controls(temperature=0, max_new_tokens=60)), QUESTION, "me")
    next(growing), next(growing)
    page.clear(duel, "me")
    last = list(growing)[-1]  # what the browser is left with
    assert (last.dialogues, last.busy, last.status, last.prompt) == (([], []), False, "", None)

    growing = page.send(duel, wish(), QUESTION, "me")
    next(growing)  # not a token yet
    page.clear(duel, "me")
    last = list(growing)[-1]
    assert (last.dialogues, last.busy, last.status, last.prompt) == (([], []), False, "", None)


def test_who_clears_while_colours_are_computed_sees_none(page, monkeypatch):
    duel, real = Session(("base", "a/dpo")), page.chat.differences

    def cleared(reply):
        page.clear(duel, "me")
        return real(reply)

    monkeypatch.setattr(page.chat, "differences", cleared)
    last = send(page, duel, differences=True)[-1]
    assert (last.dialogues, last.differences) == (([], []), "")


@pytest.mark.parametrize("prompt", ["  ", "x" * 30000])
def test_a_question_that_fails_leaves_the_answers_before_it_to_be_voted_on(page, prompt):
    duel = Session(("base", "a/dpo"))
    answered = send(page, duel, blind=True)[-1]
    failed = send(page, duel, prompt, blind=True)[-1]
    assert failed.status
    assert failed.can_vote
    assert (failed.dialogues, failed.figures) == (answered.dialogues, answered.figures)
    told = page.vote(duel, wish(blind=True), Choice.A, "")
    failed = send(page, duel, prompt, blind=True)[-1]
    assert (failed.titles, failed.dialogues) == (told.titles, told.dialogues)


def test_a_growing_answer_hashes_no_weights_and_counts_no_votes(page, monkeypatch):
    duel, reads = Session(("base", "a/dpo")), []
    send(page, duel)
    monkeypatch.setattr("qalign.page.models.adapter_hash", lambda folder: pytest.fail("hashed"))
    monkeypatch.setattr(VoteFile, "read", lambda votes: reads.append(1) or iter(()))
    views = send(page, duel)
    assert len(views) > 5
    assert [view.tally is None for view in views] == [view.busy for view in views]
    assert len(reads) == 1


def test_a_client_that_leaves_takes_its_question_with_it(page):
    duel = Session(("base", "a/dpo"))
    growing = page.send(duel, wish(controls=Controls(temperature=0, max_new_tokens=60)), QUESTION, "me")
    next(growing), next(growing)
    growing.close()
    assert duel.turns == ([], [])


def test_a_blind_vote_is_kept_with_all_that_it_was_about(page):
    duel = Session(("base", "a/dpo"))
    hidden = send(page, duel, blind=True, differences=True)[-1]
    assert hidden.can_vote
    assert hidden.titles == ("A", "B")
    assert "seed" not in "".join(hidden.figures)
    assert hidden.differences == "<p>Hidden until you vote.</p>"

    later = wish(blind=True, differences=True, controls=Controls(temperature=2))  # moved since the answers came
    told = page.vote(duel, later, Choice.BOTH_BAD, " meh ")
    assert told.titles[0].startswith("A: ")
    assert "It trains nothing: a vote for 'both bad'" in told.status
    assert "nats" in told.differences
    assert not told.can_vote
    (vote,) = map(json.loads, page.votes.path.read_text().splitlines())
    assert vote["sampling"] == {"temperature": 0, "top_p": 0.95, "max_new_tokens": 6}
    assert (vote["comment"], vote["base"]) == ("meh", page.chat.model.base)
    assert {vote["a"]["model"], vote["b"]["model"]} == {"base", "a/dpo"}
    assert {vote["a"]["seed"], vote["b"]["seed"]} == {1, 2}
    assert vote["prompt"] == [{"role": "user", "content": QUESTION}]
    assert "1 blind votes" in told.tally
    assert "ask something first" in page.vote(duel, later, Choice.A, "").status
    assert len(page.votes.path.read_text().splitlines()) == 1


def test_a_vote_that_cannot_be_written_can_be_given_again(page, monkeypatch):
    duel = Session(("base", "a/dpo"))
    send(page, duel, blind=True)

    def full(vote):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page.votes, "append", full)
    refused = page.vote(duel, wish(blind=True), Choice.A, "")
    assert "could not be written: No space left" in refused.status
    assert refused.can_vote


def test_a_run_that_is_finished_while_the_page_is_open_can_be_chosen(chat, tiny_folder, tmp_path):
    page = Page(chat, VoteFile(tmp_path / "votes.jsonl"), lambda: lineup([], tmp_path / "runs")[0])
    finished_run(tmp_path / "runs" / "late", tiny_folder, scale=0.1)
    assert "late/dpo" in page.names()
    assert list(page.send(Session(("base", "late/dpo")), Wish("base", "late/dpo", controls=SHORT), "a", "me"))[
        -1
    ].figures[1]


def test_a_named_run_that_is_trained_again_meanwhile_hides_nobody(chat, tmp_path):
    def search():
        raise UserError("there is no finished run")

    assert Page(chat, VoteFile(tmp_path / "votes.jsonl"), search).names() == list(chat.contenders)


def test_a_comment_that_no_file_can_hold_leaves_the_vote_to_be_given(page):
    duel = Session(("base", "a/dpo"))
    send(page, duel, blind=True)
    refused = page.vote(duel, wish(blind=True), Choice.A, "half \ud83d")
    assert "Unicode" in refused.status
    assert refused.can_vote
    assert "Vote kept" in page.vote(duel, wish(blind=True), Choice.A, "whole").status


def test_a_model_against_itself_has_no_winner(page):
    duel = Session(("a/dpo", "a/dpo"))
    page.votes.append({"vote": "a", "a": {"model": "a/dpo"}, "b": {"model": "a/dpo"}})
    assert "no winner to count" in page.view(duel).tally


def test_examples_come_from_held_out_rows(page):
    assert len(page.examples(4)) == 4
    assert all(isinstance(text, str) for text in page.examples(4))


def test_colours_escape_what_an_answer_says():
    shown = html([TokenSpan("<script>alert(1)</script>", 1.25), TokenSpan("&", -3.0)], "<b>", "base")
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "more likely to &lt;b&gt;" in shown
    assert "sum over 2 tokens: <b>−1.75 nats</b>" in shown
    assert "sum over 4 tokens" in html([TokenSpan("🦊", 1.0, 3), TokenSpan("!", 0.0)], "a", "b")
    assert "rgba(37, 99, 235, 0.38)" in shown  # blue, 1.25 of 2 nats
    assert "rgba(217, 119, 6, 0.60)" in shown  # amber at its strongest


def test_figures_hide_what_tells_sides_apart():
    reply = Reply("x", (), [], 7, (1, 2), "a", "ended", 0.1, 12.34, reward=-0.5)
    assert figures_of(reply, hidden=False) == "2 tokens · 12.3 tokens/s · seed 7 · reward -0.50"
    assert figures_of(reply, hidden=True) == "2 tokens · 12.3 tokens/s"


def test_a_tally_says_how_sure_it_is():
    assert "No blind votes" in tally_words(Tally(0, 0, 0, 0), "x", "base")
    words = tally_words(Tally(7, 2, 1, 0), "x", "base")
    assert "x wins 75% of 10 blind votes against base (95% interval 44% to 92%" in words
    assert "about 6 more" in words
    assert "sure enough: better" in tally_words(Tally(12, 4, 0, 0), "x", "base")
    assert "sure enough: worse" in tally_words(Tally(4, 12, 0, 0), "x", "base")
    assert "no number of such votes" in tally_words(Tally(1, 1, 0, 0), "x", "base")
