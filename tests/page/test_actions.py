"""The page's actions without a browser."""

import json
from dataclasses import replace
from unittest.mock import Mock, patch

import pytest

from qalign.errors import UserError
from qalign.page.actions import Inputs, Page, View, figures_text, reward_text, spans_html, tally_text
from qalign.page.chat import Chat, Controls, TokenSpan
from qalign.page.models import available_models
from qalign.page.session import Reply, Reward, Session
from qalign.page.votes import Choice, Tally, VoteFile, Votes
from tests.chat_runs import finished_run

QUESTION = "Is it too late to plant tulips?"
SHORT = Controls(temperature=0, max_new_tokens=6, seed=1)
LONG = replace(SHORT, max_new_tokens=60)
HERE = Inputs("base", "a/dpo", controls=SHORT, prompt=QUESTION, key="me")
BLIND = replace(HERE, blind=True)


@pytest.fixture(scope="module")
def chat(tiny_folder, tmp_path_factory) -> Chat:
    folder = tmp_path_factory.mktemp("page") / "runs"
    finished_run(folder / "a", tiny_folder)
    return Chat(*available_models([], folder))


@pytest.fixture
def page(chat, tmp_path) -> Page:
    return Page(chat, VoteFile(tmp_path / "votes.jsonl"))


@pytest.fixture
def session() -> Session:
    return Session(("base", "a/dpo"))


def send(page, session, inputs=HERE, **changes) -> list[View]:
    return list(page.send(session, replace(inputs, **changes)))


def test_both_answers_grow_and_the_prompt_box_is_emptied(page, session):
    views = send(page, session)
    assert (views[0].prompt, views[-1].can_vote) == ("", False)
    assert [view.busy for view in views] == [True] * (len(views) - 1) + [False]
    assert views[0].dialogues[0] == [{"role": "user", "content": QUESTION}]
    assert [turn["role"] for turn in views[-1].dialogues[1]] == ["user", "assistant"]
    assert views[-1].figures[0].startswith("6 tokens · ")
    assert "cut at max tokens · seed 1" in views[-1].figures[0]
    assert len(send(page, session, prompt="And why?")[-1].dialogues[0]) == 4


def test_a_question_that_fails_comes_back_with_the_reason(page, session):
    last = send(page, session, prompt="x" * 30000)[-1]
    assert "characters long" in last.status
    assert last.prompt == "x" * 30000
    assert (session.turns, last.busy) == (([], []), False)
    assert "no such model" in send(page, session, first="../x")[-1].status
    with patch("qalign.model.generation.nucleus", side_effect=ZeroDivisionError("secret")):
        status = send(page, session)[-1].status
    assert "ZeroDivisionError" in status
    assert "secret" not in status
    assert send(page, session)[-1].status == ""


def test_retry_edit_and_clear(page, session):
    assert "nothing to retry" in list(page.retry(session, HERE))[-1].status
    assert "nothing to edit" in page.edit(session, HERE).status
    answer = send(page, session)[-1].dialogues
    assert list(page.retry(session, replace(HERE, prompt="half a sen")))[-1].dialogues == answer
    edited = page.edit(session, HERE)
    assert (edited.prompt, edited.dialogues) == (QUESTION, ([], []))
    send(page, session)
    assert page.clear(session, HERE).dialogues == ([], [])


def test_answers_that_were_cut_are_named_before_the_vote_and_can_go_on(page, session):
    cut = send(page, session, BLIND)[-1]
    assert cut.can_vote
    assert cut.cut.startswith("A and B have not ended.")
    assert "a/dpo" not in cut.cut
    views = list(page.go_on(session, replace(BLIND, controls=replace(LONG, max_new_tokens=20, temperature=2, seed=9))))
    assert [view.busy for view in views] == [True] * (len(views) - 1) + [False]
    for before, after in zip(cut.dialogues, views[-1].dialogues, strict=True):
        assert [turn["role"] for turn in after] == ["user", "assistant"]
        assert after[1]["content"].startswith(before[1]["content"])
        assert len(after[1]["content"]) > len(before[1]["content"])
    assert views[-1].can_vote
    other = Session(("base", "a/dpo"))
    send(page, other, controls=replace(SHORT, max_new_tokens=26))
    assert [reply.ids for reply in other.replies] == [reply.ids for reply in session.replies]
    page.vote(Choice.A, session, BLIND)
    (vote,) = map(json.loads, page.votes.path.read_text().splitlines())
    assert vote["sampling"] == {"temperature": 0, "top_p": 0.95, "max_new_tokens": 26}
    assert vote["a"]["text"] in (reply.text for reply in session.replies)
    assert "vote is given already" in list(page.go_on(session, BLIND))[-1].status
    assert page.view(session).cut == ""


def test_nothing_goes_on_where_nothing_was_cut(page, session):
    assert "No answer was cut" in list(page.go_on(session, HERE))[-1].status
    send(page, session)
    session.replies = [replace(reply, state="ended") for reply in session.replies]
    assert page.view(session).cut == ""
    session.replies[1] = replace(session.replies[1], state="stopped")
    assert page.view(session).cut.startswith("a/dpo has not ended.")
    before = session.replies[0]
    list(page.go_on(session, HERE))
    assert session.replies[0].ids == before.ids
    assert len(session.replies[1].ids) == 12


@pytest.mark.parametrize("end", ["clear", "leave", "fail"])
def test_answers_that_went_on_in_vain_are_as_before(page, session, end):
    send(page, session)
    before = [*session.turns[0]], [*session.replies]
    if end == "fail":
        last = list(page.go_on(session, replace(HERE, controls=replace(SHORT, max_new_tokens=10**9))))[-1]
        assert "max tokens" in last.status
    growing = page.go_on(session, replace(HERE, controls=LONG))
    next(growing)
    next(growing)
    if end == "clear":
        page.clear(session, HERE)
        assert list(growing)[-1].dialogues == ([], [])
        return
    growing.close()
    assert ([*session.turns[0]], session.replies) == before


@pytest.mark.parametrize("views", [1, 2])  # before the first token, and after it
@pytest.mark.parametrize("end", ["clear", "leave"])
def test_a_growing_answer_that_is_cleared_or_left_is_gone_with_its_question(page, session, views, end):
    growing = page.send(session, replace(HERE, controls=LONG))
    for _ in range(views):
        next(growing)
    if end == "clear":
        page.clear(session, HERE)
        last = list(growing)[-1]  # what the browser is left with
        assert (last.dialogues, last.busy, last.status, last.prompt) == (([], []), False, "", None)
    growing.close()
    assert session.turns == ([], [])
    assert len(send(page, session)[-1].dialogues[0]) == 2


def test_a_dialogue_that_is_cleared_while_colours_are_computed_shows_none(page, session):
    with patch.object(page.chat, "token_spans", lambda _: page.clear(session, HERE) and [TokenSpan("late", 1.0)]):
        last = send(page, session, differences=True)[-1]
    assert (last.dialogues, last.differences) == (([], []), "")


@pytest.mark.parametrize("prompt", ["  ", "x" * 30000])
def test_a_question_that_fails_leaves_the_answers_before_it_to_be_voted_on(page, session, prompt):
    answered = send(page, session, BLIND)[-1]
    failed = send(page, session, BLIND, prompt=prompt)[-1]
    assert failed.status
    assert failed.can_vote
    assert (failed.dialogues, failed.figures) == (answered.dialogues, answered.figures)
    told = page.vote(Choice.A, session, BLIND)
    failed = send(page, session, BLIND, prompt=prompt)[-1]
    assert (failed.titles, failed.dialogues) == (told.titles, told.dialogues)


def test_a_growing_answer_hashes_no_weights_and_counts_no_votes(page, session, monkeypatch):
    send(page, session)
    monkeypatch.setattr("qalign.page.models.adapter_hash", lambda folder: pytest.fail("hashed"))
    monkeypatch.setattr(page.votes, "read", read := Mock(return_value=Votes([], [])))
    views = send(page, session)
    assert len(views) > 5
    assert [view.tally is None for view in views] == [view.busy for view in views]
    read.assert_called_once()


def test_a_blind_vote_is_saved_with_everything_that_it_was_about(page, session):
    hidden = send(page, session, BLIND, differences=True)[-1]
    assert hidden.can_vote
    assert hidden.titles == ("A", "B")
    assert "seed" not in "".join(hidden.figures)
    assert hidden.differences == "<p>Hidden until you vote.</p>"

    later = replace(BLIND, differences=True, comment=" meh ", controls=Controls(temperature=2))  # moved since
    told = page.vote(Choice.BOTH_BAD, session, later)
    assert told.titles[0].startswith("A: ")
    assert "a vote for 'both bad'" in told.status
    assert "nats" in told.differences
    assert (told.can_vote, told.comment) == (False, "")
    (vote,) = map(json.loads, page.votes.path.read_text().splitlines())
    assert vote["sampling"] == {"temperature": 0, "top_p": 0.95, "max_new_tokens": 6}
    assert (vote["comment"], vote["base"]) == ("meh", page.chat.model.base)
    weights = {vote[side]["model"]: vote[side]["weights"] for side in "ab"}
    assert weights == {"base": None, "a/dpo": page.chat.entries["a/dpo"].weights_hash}
    assert {vote["a"]["seed"], vote["b"]["seed"]} == {1, 2}
    assert vote["prompt"] == [{"role": "user", "content": QUESTION}]
    assert "1 blind votes" in told.tally
    assert "ask something first" in page.vote(Choice.A, session, later).status
    assert len(page.votes.path.read_text().splitlines()) == 1


def test_a_vote_that_cannot_be_saved_can_be_given_again(page, session):
    send(page, session, BLIND)
    refused = [page.vote(Choice.A, session, replace(BLIND, comment="half \ud83d"))]
    with patch.object(page.votes, "append", side_effect=OSError(28, "No space left on device")):
        refused.append(page.vote(Choice.A, session, BLIND))
    for view, words in zip(refused, ("Unicode", "No space left"), strict=True):
        assert words in view.status
        assert (view.can_vote, view.comment) == (True, None)
    assert not page.vote(Choice.A, session, BLIND).can_vote


def test_a_run_that_finishes_while_the_page_is_open_can_be_chosen(chat, tiny_folder, tmp_path):
    page = Page(chat, VoteFile(tmp_path / "votes.jsonl"), lambda words: available_models(words, tmp_path / "runs"))
    finished_run(tmp_path / "runs" / "late", tiny_folder, scale=0.1)
    assert len(page.examples(4)) == 4  # held-out questions
    assert "late/dpo" in page.names()
    assert send(page, Session(("base", "late/dpo")), second="late/dpo")[-1].figures[1]


def test_a_page_without_a_run_opens_the_first_one_and_a_run_that_was_trained_again(tiny_folder, tmp_path):
    page = Page(Chat(), VoteFile(tmp_path / "votes.jsonl"), lambda words: available_models(words, tmp_path / "runs"))
    assert (page.names(), page.pair()) == ([], ("", ""))
    assert "there is no finished run yet" in send(page, Session(("", "")), first="", second="")[-1].status
    with pytest.raises(UserError, match="there is no finished"):
        page.open(tmp_path / "runs" / "late" / "dpo")
    run = finished_run(tmp_path / "runs" / "late", tiny_folder, scale=0.1)
    page.open(run)
    assert (page.names(), page.pair()) == (["late/dpo", "base"], ("base", "late/dpo"))
    session = Session(page.pair())
    before = send(page, session, second="late/dpo")[-1]
    lm = page.chat.base.lm
    page.open(run)
    assert page.chat.base.lm is lm  # nothing has changed
    assert [page.chat.unload(), page.chat.unload()] == [True, False]
    session.clear()
    assert send(page, session, second="late/dpo")[-1].dialogues == before.dialogues  # it was loaded again
    finished_run(tmp_path / "runs" / "late", tiny_folder, scale=0.9)
    page.open(run)
    assert page.chat.weights_hash("late/dpo") == page.chat.entries["late/dpo"].weights_hash
    session.clear()
    assert send(page, session, second="late/dpo")[-1].dialogues[1] != before.dialogues[1]


def test_a_named_run_that_is_trained_again_meanwhile_hides_no_other(chat, tmp_path):
    search = Mock(side_effect=UserError("there is no finished run"))
    assert Page(chat, VoteFile(tmp_path / "votes.jsonl"), search).names() == list(chat.entries)


def test_a_model_against_itself_has_no_winner(page):
    page.votes.append({"vote": "a", "a": {"model": "a/dpo"}, "b": {"model": "a/dpo"}})
    assert "no winner to count" in page.view(Session(("a/dpo", "a/dpo"))).tally


def test_coloured_tokens_escape_what_an_answer_says():
    shown = spans_html([TokenSpan("<script>alert(1)</script>", 1.25), TokenSpan("&", -3.0)], 5, "<b>")
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "more likely under &lt;b&gt;" in shown
    assert "sum over 5 tokens: <b>−1.75 nats</b>" in shown
    assert "rgba(37, 99, 235, 0.38)" in shown  # blue, 1.25 of 2 nats
    assert "rgba(217, 119, 6, 0.60)" in shown  # amber at its strongest


def test_figures_hide_what_tells_sides_apart():
    reply = Reply("x", None, (), [], 7, (1, 2), "a", "ended", 0.1, 12.34, reward=Reward(-0.5, "x/reward", 0.381))
    scored = "reward -0.50 by x/reward, above 38% of its held-out answers"
    assert figures_text(reply, hidden=False) == f"2 tokens · 12.3 tokens/s · seed 7 · {scored}"
    assert reward_text(Reward(2.0, "x/reward")) == "reward +2.00 by x/reward"
    assert figures_text(reply, hidden=True) == "2 tokens · 12.3 tokens/s"


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((0, 0, 0, 0), ["No blind votes"]),
        ((7, 2, 1, 0), ["x wins 75% of 10 blind votes against base (95% interval 44% to 92%", "about 6 more"]),
        ((12, 4, 0, 0), ["excludes 50%: x is better"]),
        ((4, 12, 0, 0), ["excludes 50%: x is worse"]),
        ((1, 1, 0, 0), ["are even"]),
    ],
)
def test_a_tally_says_how_sure_it_is(counts, words):
    text = tally_text(Tally(*counts), "x", "base")
    assert all(word in text for word in words), text
