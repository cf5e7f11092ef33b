"""Judges of pairs of answers, behind one method: a reward run, the base as labeller, a Python function, a model behind
an OpenAI-compatible URL. Each gives P(A is better), row by row, so that what was judged can be kept.

A score (of a reward model or a function) says which answer is better, so its preference is 1, 0, or 0.5 for a tie. A
labeller's is a probability. A model behind a URL is asked in both orders, and its two choices are averaged.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qalign.config.atomic import write_rows
from qalign.config.http import BUSY, RequestFailed, ask, at_once, url_problem
from qalign.config.paths import adapters_in
from qalign.errors import UserError, disk_problem, one_line, scores_not_finite, short
from qalign.judge.comparison.answer_files import Compared, as_text
from qalign.reports.plots import counted

if TYPE_CHECKING:
    from qalign.model.base import Base

ANNOTATIONS = "annotations.jsonl"
AT_ONCE = 32  # rows in one call of a judge on the base
REQUESTS = 8  # to a URL at the same time
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before a request is sent again
TIMEOUT_SECONDS = 120
QUESTION = """\
Which of two answers to a user is better: more helpful, more correct, and without harm? Their length must not count.

{dialogue}

First answer:
{first}

Second answer:
{second}

Reply with one word, first or second."""
WORD = re.compile(r"\b(first|second)\b")
LABEL = r"(?:(?:my|the|final|best|better|answer|choice|verdict)\b[\W_]*)"  # before a choice in a line of its own
CHOICE = re.compile(rf"[\W_]*{LABEL}*(first|second)(?: (?:answer|one))?[\W_]*")

Preferences = Iterator[float | None]  # P(A is better) of each row in turn; None where the judge says nothing usable


class Judge(Protocol):
    """Judges rows one after the other."""

    name: str  # of the judge, in files and reports

    def judge(self, rows: Sequence[Compared]) -> Preferences: ...


def by_scores(a: float, b: float) -> float:
    """The preference of two scores."""
    return 1.0 if a > b else 0.5 if a == b else 0.0


class RewardJudge:
    """A reward run on the base in memory; of an ensemble, the mean of its members."""

    def __init__(self, name: str, base: "Base", folder: Path):
        from qalign.model.adapters.members import load_rewards
        from qalign.model.base import Role

        self.name, self._base = name, base
        self._model = load_rewards(base, "--judge", Role.REWARD, adapters_in(folder))

    def judge(self, rows: Sequence[Compared]) -> Preferences:
        for start in range(0, len(rows), AT_ONCE):
            yield from self._some(rows[start : start + AT_ONCE])

    def _some(self, rows: Sequence[Compared]) -> list[float | None]:
        from qalign.data.collate import MicroBatchLimit
        from qalign.data.formats import Preference
        from qalign.data.readers import BadRow
        from qalign.data.tokenize import encode_pair
        from qalign.model.adapters.members import answer_scores

        base, pairs = self._base, {}
        found: list[float | None] = [None] * len(rows)
        for number, row in enumerate(rows):
            a, b = ({"role": "assistant", "content": text} for text in (row.a, row.b))
            pair = Preference(row.prompt.turns, a, b, row.prompt.where, None, row.prompt.tools)
            try:
                pairs[number] = encode_pair(base.template, pair, base.max_length)
            except BadRow:  # too long, or empty
                continue
        if pairs:
            scores = answer_scores(base, self._model, [*pairs.values()], MicroBatchLimit(tokens=2 * base.max_length))
            scores = scores if isinstance(self._model, str) else scores.mean(dim=-1)
            if not scores.isfinite().all():
                raise scores_not_finite(base.precision)
            for number, (a, b) in zip(pairs, scores.tolist(), strict=True):
                found[number] = by_scores(a, b)
        return found


class LabellerJudge:
    """The base itself, asked which answer is better by each of our principles, in both orders: the mean."""

    def __init__(self, name: str, base: "Base"):
        from qalign.judge.labeller import Labeller
        from qalign.judge.principles import read_principles
        from qalign.model.base import Role

        self.name, self._base = name, base
        self._labeller = Labeller(base, Role.BASE, read_principles())

    def judge(self, rows: Sequence[Compared]) -> Preferences:
        from qalign.data.collate import MicroBatchLimit
        from qalign.data.readers import BadRow
        from qalign.judge.labeller import Comparison

        limit = MicroBatchLimit(tokens=2 * self._base.max_length)
        for row in rows:
            try:
                encoded = self._labeller.encode(Comparison(row.prompt.turns, row.a, row.b))
            except BadRow:
                yield None
                continue
            yield float(self._labeller.judge([encoded], limit).probabilities.mean())


class FunctionJudge:
    """A Python function that scores answers, as the rewards of `ppo` do: `function(prompts, completions, **row)`."""

    def __init__(self, name: str, source: str):
        from qalign.rl.scorers import FunctionScorer

        self.name, self._scorer = name, FunctionScorer("--judge", source, 1.0)

    def judge(self, rows: Sequence[Compared]) -> Preferences:
        from qalign.data.store.sequences import TokenAnswers
        from qalign.rl.rollout_batch import SampledAnswers

        for start in range(0, len(rows), AT_ONCE):
            some = [
                SampledAnswers(row.prompt, TokenAnswers([], ([], [])), (row.a, row.b), row.ended)
                for row in rows[start : start + AT_ONCE]
            ]
            yield from (by_scores(a, b) for a, b in self._scorer.scores(some).tolist())


class UrlJudge:
    """A model behind an OpenAI-compatible URL, such as `http://localhost:8000/v1`. The key is read from
    `OPENAI_API_KEY`."""

    def __init__(self, name: str, url: str, model: str, pauses: Sequence[float] = PAUSES):
        self.name, self._pauses, self._model = name, pauses, model
        self._url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        if problem := url_problem(self._url):
            raise UserError(f"--judge: {url} {problem}")

    def judge(self, rows: Sequence[Compared]) -> Preferences:
        yield from at_once(self._both_orders, rows, REQUESTS)

    def _both_orders(self, row: Compared) -> float | None:
        first, second = (self._choice(row, answers) for answers in ((row.a, row.b), (row.b, row.a)))
        return None if first is None or second is None else (first + 1 - second) / 2

    def _choice(self, row: Compared, answers: tuple[str, str]) -> float | None:
        """1 if the model prefers the first answer, 0 for the second; None if its reply doesn't say."""
        dialogue = as_text(row.turns)
        asked = QUESTION.format(dialogue=dialogue, first=answers[0], second=answers[1])
        reply = self._ask({"model": self._model, "messages": [{"role": "user", "content": asked}], "temperature": 0})
        chosen = choice_of(reply)
        return None if chosen is None else float(chosen == "first")

    def _ask(self, body: dict[str, Any]) -> str:
        again = (*BUSY, *range(500, 600))
        try:
            said = ask(self._url, body, key="OPENAI_API_KEY", pauses=self._pauses, seconds=TIMEOUT_SECONDS, again=again)
            return str(said["choices"][0]["message"]["content"])
        except RequestFailed as error:
            raise UserError(f"--judge: {self._url} {error}") from None
        except (LookupError, TypeError) as error:
            problem = one_line(f"answers something else than a chat completion ({short(error)})", 120)
            raise UserError(f"--judge: {self._url} {problem}") from None


def choice_of(reply: str) -> str | None:
    """`first` or `second`: the one that the last line of a reply is, as in `second` or `Answer: **Second**.`, else the
    only one that it names; None if it names neither, or both."""
    *_, last = reply.lower().strip().splitlines() or [""]
    if found := CHOICE.fullmatch(last):
        return found[1]
    named = {*WORD.findall(reply.lower())}
    return named.pop() if len(named) == 1 else None


def judged(folder: Path, judge: Judge, rows: Sequence[Compared]) -> list[float | None]:
    """P(A is better) of each row. Every judgement is a line of `annotations.jsonl` at once, and one that is there isn't
    asked for again; those of other rows and judges stay. Answers that are the same are a tie, which no judge is asked
    about."""
    from tqdm.auto import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    file, keys = folder / ANNOTATIONS, [_digest(judge.name, row) for row in rows]
    before = _read(file)
    known = {key: line["preference"] for key, line in before.items()}
    known |= {key: 0.5 for key, row in zip(keys, rows, strict=True) if row.a.strip() == row.b.strip()}
    left = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
    if kept := len(rows) - len(left):
        print(f"{file}: {kept} of {counted(len(rows), 'pair')} are judged already, or the same on both sides")
    try:
        with file.open("ab") as opened, ExitStack() as closing:
            preferences = judge.judge([*left.values()])
            closing.callback(getattr(preferences, "close", lambda: None))
            opened.write(b"\n" if opened.tell() else b"")  # after a line that a power cut tore
            for key, preference in tqdm(
                zip(left, preferences, strict=True), total=len(left), desc="judging", unit="pair"
            ):
                known[key] = preference
                opened.write((json.dumps(_line(key, judge.name, left[key], preference)) + "\n").encode())
                opened.flush()
    except UserError as error:
        done = sum(key in known for key in keys)
        again = f"{done} of {counted(len(rows), 'pair')} are judged and kept in {file}; the same command goes on"
        raise UserError(*error.lines[:-1], f"{error.lines[-1]}; {again}") from None
    except OSError as error:
        raise UserError(disk_problem(error, file) or str(error)) from None
    lines = {key: _line(key, judge.name, row, known[key]) for key, row in zip(keys, rows, strict=True)}
    write_rows(file, [*(line for key, line in before.items() if key not in lines), *lines.values()])
    return [known[key] for key in keys]


def _digest(judge: str, row: Compared) -> str:
    text = json.dumps([judge, row.turns, row.a, row.b], default=str)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _line(key: str, judge: str, row: Compared, preference: float | None) -> dict[str, Any]:
    return {"key": key, "judge": judge, "prompt": row.turns, "a": row.a, "b": row.b, "preference": preference}


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file of judgements by their keys; torn ones are left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in file.read_bytes().split(b"\n") if file.is_file() else ():
        try:
            kept = json.loads(line)
            given = kept["preference"]
            found[kept["key"]] = {**kept, "preference": None if given is None else float(given)}
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            continue
    return found


def votes_between(file: Path, sides: Sequence[tuple[str, str | None]]) -> tuple[list[dict[str, Any]], int]:
    """(The page's votes between two models in their order, the number of other votes in the file.)

    A model is known by the hash of its weights, so one that was trained again starts anew. Lines that are no votes, and
    votes on different dialogues, count as others. Each vote becomes `{turns, a, b, preference}`.
    """
    found, others = [], 0
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"--judge: {file} can't be read: {error.strerror}") from None
    hashes = [weights for _, weights in sides]
    for line in filter(bytes.strip, lines):
        try:
            vote = json.loads(line)
            answers = [vote[side] for side in ("a", "b")]
            of = [answer["weights"] for answer in answers]
            shown = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}[vote["vote"]]
            texts, is_one = [str(answer["text"]) for answer in answers], not any("prompt" in each for each in answers)
            turns = tuple({"role": str(t["role"]), "content": str(t["content"])} for t in vote["prompt"])
            json.dumps([turns, texts], ensure_ascii=False).encode()  # half a surrogate pair can't be written
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            others += 1
            continue
        if sorted(map(str, of)) != sorted(map(str, hashes)) or not is_one:
            others += 1
        elif of == hashes:
            found.append({"turns": turns, "a": texts[0], "b": texts[1], "preference": shown})
        else:
            found.append({"turns": turns, "a": texts[1], "b": texts[0], "preference": 1 - shown})
    return found, others
