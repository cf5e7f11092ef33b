import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qalign.config.http import RequestFailed, ask
from qalign.data.formats import Prompt
from qalign.errors import UserError
from qalign.judge.comparison.answer_files import Compared
from qalign.judge.comparison.judges import ANNOTATIONS, UrlJudge, choice_of, judged, votes_between


def pair(question: str, a: str, b: str) -> Compared:
    return Compared(Prompt(({"role": "user", "content": question},), question, {}), a, b)


ROWS = [pair(f"question {n}", f"A's {n}" + " better" * (n % 2), f"B's {n}" + " better" * (1 - n % 2)) for n in range(6)]
EXPECTED = [0.0, 1.0] * 3  # what `sees_better` says


def sees_better(asked: str) -> str:
    return "First" if "better" in asked.partition("First answer:")[2].partition("Second answer:")[0] else "The second."


@contextmanager
def server(reply, failures: dict[int, int] | None = None):
    """An OpenAI-compatible server: `reply` maps the question to an answer, `failures` the number of a request, from 1,
    to the status that it gets. Yields (its URL, the bodies that it was sent)."""
    bodies: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status = (failures or {}).get(len(bodies), 200)
            text = reply(bodies[-1]["messages"][-1]["content"])
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if status == 200 else b"{}")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.server_port}/v1", bodies
        finally:
            found.shutdown()
            thread.join()


def test_a_url_is_asked_in_both_orders():
    with server(sees_better) as (url, bodies):
        assert [*UrlJudge("x", url, "some-model").judge(ROWS)] == EXPECTED

    assert len(bodies) == 2 * len(ROWS)
    assert {body["model"] for body in bodies} == {"some-model"}


def test_a_judge_that_always_prefers_the_first_place_finds_ties():
    with server(lambda _: "first") as (url, _):
        assert [*UrlJudge("x", url, "m").judge(ROWS)] == [0.5] * 6


def test_a_reply_that_names_neither_is_no_judgement():
    with server(lambda _: "I can't say.") as (url, _):
        assert [*UrlJudge("x", url, "m").judge(ROWS[:2])] == [None, None]


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("First", "first"),
        ("**second**.", "second"),
        ("The first answer is better than the second.\n\nFirst\n", "first"),
        ("The second is longer. The first is right.\nFinal answer: **Second**", "second"),
        ("The first.", "first"),
        ("I prefer the second answer, as it is correct.", "second"),
        ("The first answer is better than the second.", None),
        ("First. The second is wrong.", None),
        ("The first is good.\nThe worse answer: second", None),
        ("Secondly, I can't say.", None),
        ("", None),
    ],
)
def test_what_a_reply_chooses(reply, choice):
    assert choice_of(reply) == choice


def test_a_busy_server_is_asked_again():
    with server(sees_better, {1: 503, 2: 429, 3: 500}) as (url, bodies):
        assert [*UrlJudge("x", url, "m", (0.0, 0.0, 0.0, 0.0)).judge(ROWS)] == EXPECTED

    assert len(bodies) == 2 * len(ROWS) + 3


def test_a_refusal_is_not_repeated(tmp_path):
    with server(sees_better, {1: 401}) as (url, bodies), pytest.raises(UserError, match="answers 401"):
        judged(tmp_path, UrlJudge("x", url, "m", (0.0,) * 4), ROWS[:1])

    assert len(bodies) <= 2


def test_what_was_judged_before_a_server_failed_is_kept_and_not_asked_again(tmp_path):
    later = dict.fromkeys(range(5, 500), 500)
    with server(sees_better, later) as (url, _), pytest.raises(UserError) as failed:
        judged(tmp_path, UrlJudge("x", url, "m", (0.0, 0.0)), ROWS)
    assert "answers 500" in str(failed.value)
    assert "after 3 tries" in str(failed.value)
    kept = [json.loads(line) for line in (tmp_path / ANNOTATIONS).read_text().splitlines() if line]
    assert len(kept) < len(ROWS)
    assert f"{len(kept)} of 6 pairs are judged" in str(failed.value)

    with (tmp_path / ANNOTATIONS).open("a") as file:
        file.write('{"key": "torn')
    with server(sees_better) as (url, bodies):
        assert judged(tmp_path, UrlJudge("x", url, "m"), ROWS) == EXPECTED
    assert len(bodies) == 2 * (len(ROWS) - len(kept))
    assert [json.loads(line)["preference"] for line in (tmp_path / ANNOTATIONS).read_text().splitlines()] == EXPECTED


def test_nobody_at_the_url_is_one_line(tmp_path):
    with pytest.raises(UserError) as failed:
        judged(tmp_path, UrlJudge("x", "http://127.0.0.1:9/v1", "m", (0.0, 0.0)), ROWS)

    assert len(failed.value.lines) == 1
    assert "doesn't answer" in failed.value.lines[0]
    assert "0 of 6 pairs" in failed.value.lines[0]


@pytest.mark.parametrize(
    "url",
    ["http://[bad", "http://", "http://host:port/v1", "http://host/v\u00e9", "http://a b/v1", "http://me:secret@host"],
)
def test_what_is_no_url_is_a_line_when_the_judge_is_opened(url):
    with pytest.raises(UserError, match=r"^--judge: http://") as failed:
        UrlJudge("x", url, "m")
    assert len(failed.value.lines) == 1


def test_a_key_is_sent_without_the_space_around_it_and_one_that_no_header_can_hold_is_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1\n")
    with server(lambda _: "first") as (url, _):
        assert [*UrlJudge("x", url, "m").judge(ROWS[:1])] == [0.5]

    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u00e9\u20ac")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds") as failed:
        [*UrlJudge("x", "http://127.0.0.1:9/v1", "m").judge(ROWS[:1])]
    assert "sk-" not in str(failed.value)


def test_a_request_that_no_server_could_answer_is_not_sent_again():
    for url in ("http://127.0.0.1:9/v\u00e9", "http://[bad", "http://127.0.0.1:port"):
        with pytest.raises(RequestFailed, match="can't be asked") as failed:
            ask(url, key="none", pauses=(0.0,), seconds=1)
        assert "tries" not in str(failed.value)


class Counting:
    """A judge that counts what it is asked for."""

    def __init__(self, name: str):
        self.name, self.asked = name, 0

    def judge(self, rows):
        for _ in rows:
            self.asked += 1
            yield 1.0


def test_another_judge_judges_anew_and_equal_answers_are_a_tie(tmp_path):
    rows = [*ROWS, pair("same", "an answer", "an answer ")]
    first, again, other = Counting("one"), Counting("one"), Counting("other")

    assert judged(tmp_path, first, rows) == [1.0] * 6 + [0.5]
    judged(tmp_path, again, rows)
    judged(tmp_path, other, rows)

    assert (first.asked, again.asked, other.asked) == (6, 0, 6)


def test_judgements_of_other_prompts_and_judges_stay_in_the_file(tmp_path):
    judged(tmp_path, Counting("one"), ROWS)
    judged(tmp_path, Counting("other"), ROWS[2:4])
    with (tmp_path / ANNOTATIONS).open("a") as file:
        file.write("[" * 100_000 + "\n")

    again = Counting("one")
    judged(tmp_path, again, ROWS[:2])

    lines = [json.loads(line) for line in (tmp_path / ANNOTATIONS).read_text().splitlines()]
    assert again.asked == 0
    assert sorted((line["judge"], line["a"]) for line in lines) == sorted(
        [("one", row.a) for row in ROWS] + [("other", row.a) for row in ROWS[2:4]]
    )


def test_half_a_surrogate_pair_in_an_answer_is_kept_as_it_is(tmp_path):
    rows = [pair("question", "A\ud800", "B")]
    judged(tmp_path, Counting("one"), rows)

    assert json.loads((tmp_path / ANNOTATIONS).read_text())["a"] == "A\ud800"


def vote(a: str | None, b: str | None, choice: str, **more) -> str:
    answers = {
        "a": {"model": "x", "weights": a, "text": f"of {a}"},
        "b": {"model": "y", "weights": b, "text": f"of {b}"},
    }
    return json.dumps({"prompt": [{"role": "user", "content": "q"}], "vote": choice, **answers, **more})


def test_votes_are_turned_to_the_sides(tmp_path):
    file = tmp_path / "votes.jsonl"
    lines = [vote("h", None, "a"), vote(None, "h", "a"), vote(None, "h", "tie"), vote("h", None, "both_bad")]
    lines += [vote("old", None, "a"), "{torn", vote("h", None, "a", prompt=[{"role": "user"}])]
    lines += [vote("h", None, "a", prompt=[{"role": "user", "content": "\ud800"}]), "[" * 100_000]
    file.write_text("\n".join(lines))

    found, others = votes_between(file, [("run", "h"), ("base", None)])

    assert [each["preference"] for each in found] == [1.0, 0.0, 0.5, 0.5]
    assert {(each["a"], each["b"]) for each in found} == {("of h", "of None")}
    assert others == 5
