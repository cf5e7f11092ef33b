"""Votes: an append-only file that can be trained on, and a tally worked out by hand."""

import os
from dataclasses import replace

import pytest

from qalign.config.stages import Source
from qalign.data.formats import LeftOut, preferences
from qalign.errors import UserError
from qalign.page.actions import votes_text
from qalign.page.session import Reply
from qalign.page.votes import Choice, Tally, VoteFile, row, tally
from tests.helpers import metrics, summary, train

PROMPT = ({"role": "system", "content": "Be short."}, {"role": "user", "content": "Why “ü”?\nAnd why?"})
LINES = "It is\n\u2028so\r\nand so."
SAMPLING = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 64}


def reply(text: str, model="base", *, state="ended", prompt=PROMPT, weights=None) -> Reply:
    return Reply(model, weights, prompt, [], 7, text=text, state=state)


def vote(choice: str, a: str = "It is.", b: str = "It isn't.", **right) -> dict:
    return row(Choice(choice), reply(a), reply(b, "demo/dpo", weights="ab12", **right), "tiny", SAMPLING, " so ")


def read(path):
    return preferences((Source(path=str(path)),), "train", None, 0)


@pytest.mark.parametrize(("choice", "chosen", "rejected"), [("a", LINES, "It isn't."), ("b", "It isn't.", LINES)])
def test_a_vote_for_one_answer_is_one_preference_row(choice, chosen, rejected, tmp_path):
    file = VoteFile(tmp_path / "new" / "votes.jsonl")
    file.append(vote(choice, LINES))
    assert file.path.read_bytes().count(b"\n") == 1
    (pair,), refused = read(file.path)
    assert (pair.chosen["content"], pair.rejected["content"], pair.prompt) == (chosen, rejected, PROMPT)
    assert not refused
    (kept,) = file.read().rows
    assert kept["comment"] == "so"
    assert kept["a"] == {"model": "base", "weights": None, "text": LINES, "ended": True, "seed": 7}
    assert kept["b"]["weights"] == "ab12"
    assert (kept["base"], kept["sampling"], kept["vote"]) == ("tiny", SAMPLING, choice)


def test_a_vote_on_a_mixture_names_its_dial_and_is_none_on_the_model_itself():
    mixture = replace(reply("It isn't.", "demo/dpo", weights="ab12 at λ 0.5"), dial=0.5, mixed_with="base")
    kept = row(Choice.B, reply("It is."), mixture, "tiny", SAMPLING)

    assert kept["b"].items() >= {"dial": 0.5, "mixed_with": "base", "model": "demo/dpo"}.items()
    assert "dial" not in kept["a"]
    assert tally([kept], ("demo/dpo", "ab12"), ("base", None)).votes == 0
    assert tally([vote("b")], ("demo/dpo", "ab12"), ("base", None)).votes == 1


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (vote("tie"), "a vote for 'tie'"),
        (vote("both_bad"), "a vote for 'both bad'"),
        (vote("b", state="cut"), "the better answer was cut"),
        (vote("a", b=" "), "an answer is empty"),
        (vote("a", b="It is. "), "both answers are the same"),
        (vote("a", prompt=PROMPT[1:]), "the two answers are to different dialogues"),
    ],
)
def test_a_vote_that_makes_no_pair_is_left_out_and_says_why(kept, reason, write_jsonl):
    pairs, (found,) = read(write_jsonl("votes.jsonl", [kept]))
    assert not pairs
    assert (type(found), found.reason) == (LeftOut, reason)
    assert (kept["a"]["text"], kept["b"]["model"]) == ("It is.", "demo/dpo")
    assert ("prompt" in kept["b"]) == ("different" in reason)


def test_a_worse_answer_that_was_cut_still_makes_a_pair():
    assert vote("a", state="stopped")["rejected"] == "It isn't."


def test_only_a_row_without_answers_can_say_that_it_is_no_pair(write_jsonl):
    strange = {"prompt": "a", "chosen": "b", "rejected": "c", "no_pair": "so it says"}
    pairs, refused = read(write_jsonl("rows.jsonl", [strange, {"prompt": "a", "no_pair": 1}]))
    assert len(pairs) == 1
    assert [type(r).__name__ for r in refused] == ["Refused"]


def test_votes_train_with_most_of_them_ties(recipe_file, write_jsonl, capsys):
    rows = [vote("b", f"It is {number}.") for number in range(4)]
    run = train(recipe_file(data=write_jsonl("votes.jsonl", [*rows, *[vote("tie")] * 5, vote("both_bad")])))
    counted = summary(run)["rows"]
    assert counted == {"used": 4, "held_out": 0, "refused": 0, "shortened": 0, "left_out": 6}
    assert "6 left out" in capsys.readouterr().out
    assert len(metrics(run)) == 1
    assert not (run.path / "rejected_rows.jsonl").exists()
    with pytest.raises(UserError, match=r"2 rows.*a vote for 'tie'"):
        train(recipe_file(output="ties", data=write_jsonl("votes.jsonl", [vote("tie")] * 2)))


@pytest.mark.parametrize("torn", [True, False])
def test_an_incomplete_last_line_is_moved_aside_and_a_missing_newline_is_added(torn, tmp_path):
    path, aside = tmp_path / "votes.jsonl", tmp_path / "votes.jsonl.torn"
    VoteFile(path).append(vote("a"))
    whole = path.read_bytes()
    half = whole[: len(whole) // 2]
    path.write_bytes(whole + half if torn else whole.rstrip(b"\n"))  # as a power cut, or an editor, leaves it
    file = VoteFile(path)
    file.append(vote("b"))
    assert [kept["vote"] for kept in file.read().rows] == ["a", "b"]
    assert path.read_bytes().startswith(whole)
    assert (aside.read_bytes() if aside.exists() else b"") == (half + b"\n" if torn else b"")
    pairs, refused = read(path)
    assert (len(pairs), refused) == (2, [])


def test_a_vote_is_on_the_disk_or_not_there_at_all(tmp_path, monkeypatch):
    file, synced = VoteFile(tmp_path / "votes.jsonl"), []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda opened: (synced.append(opened), real(opened)))
    file.append(vote("a"))
    assert len(synced) == 2  # the file, and the folder that has its name now
    file.append(vote("a"))
    assert len(synced) == 3
    before = file.path.read_bytes()

    monkeypatch.setattr(os, "write", lambda opened, line: len(line) // 2)
    with pytest.raises(OSError, match="no space"):
        file.append(vote("b"))
    assert file.path.read_bytes() == before


DEEP = b'{"vote": "a", "comment": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
NO_VOTES = [
    b"[1]", b"7", b"null", b"{", b"\xff\xfe", b"\0", DEEP, b'{"vote": "a", "a": ' + b"9" * 5000 + b"}",
    *(f'{{"vote": {vote}}}'.encode() for vote in ("1", "null", "[]", "{}", '"c"', '["a"]', "true")),
    *(f'{{"vote": "a", "a": {side}}}'.encode() for side in ("1", "null", '"base"', "[]", '{"model": ["base"]}',
                                                          '{"model": {}}', '{"weights": 3}')),
    b'{"vote": "tie", "no_pair": 1}', b'{"vote": "tie", "no_pair": ["a"]}', b'{"a": {"model": "base"}}',
]  # fmt: skip


@pytest.mark.parametrize("line", NO_VOTES, ids=lambda line: repr(line[:40]))
def test_a_line_that_is_no_vote_is_counted_and_named_and_hides_no_other(line, tmp_path):
    file = VoteFile(tmp_path / "votes.jsonl")
    file.append(vote("b"))
    file.path.write_bytes(file.path.read_bytes() + line + b"\n\n" + file.path.read_bytes())
    votes = VoteFile(file.path).read()
    assert votes.unreadable == [2]
    assert tally(votes.rows, ("base", None), ("demo/dpo", "ab12")) == Tally(wins=0, losses=2, ties=0, both_bad=0)
    assert votes_text(votes) == "2 of 2 votes in the file will train. 1 line of the file can't be read as a vote (2)."


def test_it_is_said_how_many_votes_will_train(tmp_path):
    file = VoteFile(tmp_path / "votes.jsonl")
    assert votes_text(file.read()) == ""
    for kept in (vote("a"), vote("b"), vote("b", state="cut"), vote("b", state="cut"), vote("tie"), {"vote": "a"}):
        file.append(kept)
    text = votes_text(file.read())
    assert text.startswith("2 of 6 votes in the file will train.")
    for reason in ("2 × the better answer was cut", "1 × a vote for 'tie'", "1 × no pair of answers"):
        assert reason in text
    file.path.write_bytes(b"1\n" * 9)
    assert votes_text(file.read()) == "9 lines of the file can't be read as a vote (1, 2, 3, 4, 5, …)."


def test_the_count_of_votes_that_train_is_what_training_reads(tmp_path):
    file = VoteFile(tmp_path / "votes.jsonl")
    for kept in (vote("a"), vote("b"), vote("tie"), vote("b", state="cut")):
        file.append(kept)
    pairs, left_out = read(file.path)
    assert (len(pairs), len(left_out)) == (2, 2)
    assert votes_text(file.read()).startswith("2 of 4 votes")


def nowhere(tmp_path) -> dict:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    return {"folder": tmp_path, "below a file": tmp_path / "file" / "votes.jsonl", "loop": tmp_path / "loop",
            "pipe": tmp_path / "pipe", "device": "/dev/full", "NUL": "a\0b", "too long": "v" * 300,
            "no such user": "~nosuchuser/votes.jsonl", "proc": "/proc/votes.jsonl"}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["folder", "below a file", "loop", "pipe", "device", "NUL", "too long", "no such user", "proc"]
)
def test_a_place_where_votes_cannot_be_written_is_reported_at_the_start(name, tmp_path):
    with pytest.raises(UserError, match="--votes") as error:
        VoteFile(nowhere(tmp_path)[name])
    (line,) = error.value.lines
    assert len(line) < 500


def test_the_tally_counts_votes_between_these_two_models_only_whichever_was_left():
    base, tuned, older = ("base", None), ("demo/dpo", "ab12"), ("demo/dpo", "cd34")

    def voted(choice: str, left: tuple, right: tuple) -> dict:
        a, b = (reply("x", name, weights=weights) for name, weights in (left, right))
        return row(Choice(choice), a, b, "tiny", SAMPLING)

    votes = [voted("a", tuned, base), voted("b", base, tuned), voted("b", tuned, base), voted("tie", base, tuned)]
    votes += [voted("both_bad", tuned, base), voted("a", older, base), {"vote": "a"}]
    assert tally(iter(votes), tuned, base) == Tally(wins=2, losses=1, ties=1, both_bad=1)
    assert tally(iter(votes), base, tuned) == Tally(wins=1, losses=2, ties=1, both_bad=1)


def test_the_tallys_figures_are_those_worked_out_by_hand():
    ten = Tally(wins=7, losses=2, ties=1, both_bad=0)
    assert ten.win_rate == pytest.approx(0.75)
    # Wilson: (0.75 + 1.9208/10 ± 1.96 · √(0.1875/10 + 3.8415/400)) / (1 + 3.8415/10)
    assert ten.interval == pytest.approx([0.44218, 0.91905], abs=1e-5)
    assert ten.votes_missing == 6  # 0.25 > 1.96 · √(0.25 / n) from n = 15.37 on, so 16
    assert Tally(wins=12, losses=4, ties=0, both_bad=0).votes_missing == 0
    assert Tally(wins=12, losses=4, ties=0, both_bad=0).interval[0] > 0.5
    assert Tally(wins=11, losses=4, ties=0, both_bad=0).interval[0] < 0.5
    assert Tally(wins=3, losses=3, ties=2, both_bad=1).votes_missing is None
