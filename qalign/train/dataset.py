"""A stage's rows: read and checked before the base is loaded, then turned into token ids and checked again.

Imports no torch, so a misspelt column is reported within seconds.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import combinations
from typing import Any, NamedTuple

from qalign.config.atomic import write_whole
from qalign.config.stages import PPO, Reward, Source, Stage
from qalign.data.formats import LeftOut, Message, Refused
from qalign.data.messages import unread_keys
from qalign.data.rows import rows_hash
from qalign.data.shapes import RawRow
from qalign.data.store.rows import selected
from qalign.data.templates import ChatTemplate
from qalign.errors import UserError
from qalign.train.run_folder import RunFolder, print_table

SHOWN = 20  # refused rows that are printed
RENDERED_AT, ROWS_HASH = "rendered_at", "rows_hash.json"  # files of the run

Rows = tuple[Sequence[Any], list[Refused]]
Reader = Callable[..., Rows]  # `preferences`, `dialogues` and the like of `qalign.data.formats`
Encoder = Callable[[ChatTemplate, Sequence[Any], int], Rows]


class Intake:
    """What was read of the rows of a stage, and what they have in common, for the stage's header."""

    def __init__(self) -> None:
        self.seen: dict[str, None] = {}  # a set in order: every column of every row that is used
        self.read: dict[str, None] = {}
        self.by_rewards: set[str] = set()
        self._rows: dict[str, list[tuple[str, list[int]]]] = {}  # of each key of the recipe: source and rows

    def reader(self, key: str, sources: Iterable[Source]) -> Callable[[Source, RawRow, Any], None]:
        """A function for `qalign.data.formats.collect`, which tells it of each row that is used."""
        found = self._rows[key] = [(source.path, list[int]()) for source in sources]
        rows_of = {id(source): rows for source, (_, rows) in zip(sources, found, strict=True)}

        def saw(source: Source, raw: RawRow, row: Any) -> None:
            self.seen |= dict.fromkeys(name for name in raw if raw.peek(name) is not None)
            self.read |= dict.fromkeys(name for name in raw if name in raw.read)
            for name in raw.read:
                self.seen |= dict.fromkeys(f"{name}[].{inner}" for inner in unread_keys(raw.peek(name)))
            parts = ("prompt", "answers", "chosen", "rejected", "turns", "text")
            rows_of[id(source)].append(hash(repr([getattr(row, part, None) for part in parts])))

        return saw

    def notes(self) -> Iterator[tuple[str, str]]:
        """Lines for the header, as (name, text)."""
        unread = [name for name in self.seen if name not in self.read and name not in self.by_rewards]
        yield "data", f"columns read: {', '.join(self.read)}"
        if rewarded := [name for name in self.seen if name in self.by_rewards]:
            yield "", f"columns for the rewards: {', '.join(rewarded)}"
        if unread:
            yield "", f"columns not used: {', '.join(unread)}"
        data, held_out = self._rows.get("data", []), self._rows.get("eval_data", [])
        for (one, rows), (other, others) in combinations(data, 2):
            if both := _shared(others, rows):
                yield "overlap", f"{both:,} of the {len(others):,} rows of {other} are in {one} too"
        if both := _shared([row for _, rows in held_out for row in rows], [row for _, rows in data for row in rows]):
            yield "overlap", f"{both:,} rows of eval_data are in data too: they don't measure what was learned"


def _shared(rows: list[int], others: list[int]) -> int:
    known = set(others)
    return sum(row in known for row in rows)


class ReadRows(NamedTuple):
    """Rows under `data` and `eval_data`, each with its refused rows."""

    rows: dict[str, Rows]
    intake: Intake


class StageRows(NamedTuple):
    """Rows as token ids."""

    train: Sequence[Any]
    held_out: Sequence[Any]
    refused: list[Refused]
    counts: dict[str, int]
    """Numbers of rows for the header and the summary: used, held_out, refused, shortened and left_out."""
    notes: tuple[tuple[str, str], ...] = ()
    """More lines for the header: columns, and rows that are in two places."""
    hashes: dict[str, str] = {}
    """Of what the rows hold under each key of the recipe."""


def read_rows(run: RunFolder, read: Reader) -> ReadRows:
    """The rows under `data` and `eval_data`, each with its refused rows; `read` is `preferences`, `dialogues` or
    `prompts`. Raises a `UserError` if too many rows were refused, or none is left."""
    found, intake, settings, seed = dict[str, Rows](), Intake(), run.settings, run.recipe.seed
    whole: Rows = [], []
    for key in ("data", "eval_data"):
        if key == "data" or not settings.holdout:
            whole = _read_under(key, settings, seed, read, intake)
        rows, refused = found[key] = _side(key, whole, settings, seed)
        left_out = _left_out(refused)
        if left_out and len(left_out) == len(rows) + len(refused):
            reason = f"none of its {len(left_out)} rows is a pair; the first: {left_out[0].reason}"
            raise UserError(f"{run.stage}.{key}: {reason}")
        _check(run, key, refused, len(rows))
        soft = sum(getattr(row, "chosen_probability", 1.0) != 1 for row in rows)
        if soft and (why := run.settings.against_probabilities):
            raise UserError(
                f"{run.stage}.{key}: {soft:,} of its {len(rows):,} rows have a chosen_probability, which {why}"
            )
        if run.resume:
            check_same_rows(run, key, rows)
    if not isinstance(run.settings, Reward):  # nothing else reads how much better an answer is
        intake.read = {name: None for name in intake.read if name not in ("score_chosen", "score_rejected")}
    return ReadRows(found, intake)


def print_rows(run: RunFolder, found: ReadRows) -> None:
    """Prints which rows a stage would use, and which were refused and why."""
    facts = list[tuple[str, str]]()
    for key, (rows, unread) in found.rows.items():
        refused, left_out = [row for row in unread if not isinstance(row, LeftOut)], _left_out(unread)
        more = f", {len(left_out):,} left out, as they are no pairs" if left_out else ""
        if rows or unread:
            facts.append((key, f"{len(rows):,} rows are used, {len(refused):,} refused{more}"))
        facts += [("", f"{row.where}: {row.reason}") for row in refused[:SHOWN]]
        if len(refused) > SHOWN:
            facts.append(("", f"and {len(refused) - SHOWN:,} more"))
    length = run.recipe.model.max_length
    limit = ("max_length", f"rows longer than {length:,} tokens are found when the stage has loaded the tokenizer")
    print_table(f"{run.path}: the rows of {run.stage}", [*facts, *found.intake.notes(), limit])


def rows_under(key: str, settings: Stage, seed: int, read: Reader, intake: Intake | None = None) -> Rows:
    """(rows, refused rows) under `data` or `eval_data` of a stage, of which `intake` is told. With `holdout`, both come
    from `data`."""
    return _side(key, _read_under(key, settings, seed, read, intake), settings, seed)


def _read_under(key: str, settings: Stage, seed: int, read: Reader, intake: Intake | None) -> Rows:
    """All rows of the files under a key; with `holdout`, those of `data`."""
    sources, limit = settings.data, settings.limit
    if key == "eval_data" and not settings.holdout:
        sources, limit = settings.eval_data or (), None
    told = intake if key == "data" or not settings.holdout else None  # the same rows count once
    return read(sources, settings.split, limit, seed, saw=told.reader(key, sources) if told else None)


def _side(key: str, whole: Rows, settings: Stage, seed: int) -> Rows:
    """Of rows that `holdout` splits, those under `data` or under `eval_data`."""
    rows, refused = whole
    if not settings.holdout:
        return whole
    places, held_out = set[str](), dict[str, int]()  # a row is held out once, whatever its weight
    train: list[int] = []
    for number, row in enumerate(rows):
        places.add(row.where)
        if _is_held_out(row, settings.holdout, seed):
            held_out[row.where] = number
        else:
            train.append(number)
    if key == "data":
        return selected(rows, train), refused
    if rows and len(held_out) in (0, len(places)):
        raise UserError(f"holdout: {settings.holdout:g} of {len(rows)} rows leaves none on one side; use `eval_data`")
    return selected(rows, held_out.values()), []


def _is_held_out(row: Any, share: float, seed: int) -> bool:
    """Decided by a hash of the row's first question, so that every stage holds out the same ones. One that stands in
    several rows is never on both sides."""
    turns: tuple[Message, ...] = getattr(row, "prompt", getattr(row, "turns", ()))
    asked = next((turn["content"] for turn in turns if turn["role"] == "user"), getattr(row, "text", ""))
    digest = hashlib.blake2b(f"{seed} {asked.strip()}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def encode_rows(
    run: RunFolder, template: ChatTemplate, found: ReadRows, encode: Encoder, max_tokens: int | None = None
) -> StageRows:
    """The rows of `read_rows` as token ids; `encode` is `encode_pairs`, `encode_dialogues` or `encode_questions`, and
    `max_tokens` the longest row, by default `model.max_length`. Raises a `UserError` if too many rows were refused, the
    unreadable ones included, or none is left."""
    from qalign.data.store.tokens import outlines  # it imports numpy, for which a bad recipe must not wait

    model, encoded, used, refused, left_out, shortened = run.recipe.model, {}, {}, [], 0, 0
    for key, (rows, unread) in found.rows.items():
        encoded[key], unfit = encode(template, rows, max_tokens or model.max_length)
        used[key] = len(rows) - len(unfit)
        _check(run, key, unread + unfit, used[key])
        left_out += len(_left_out(unread))
        refused += [row for row in unread + unfit if not isinstance(row, LeftOut)]
        if key == "data" and not isinstance(run.settings, PPO):
            # A long dialogue gives several sequences, and is one row.
            places = {each.where for each in outlines(encoded[key]) if getattr(each, "dropped_turns", 0)}
            shortened = sum(row.where in places for row in rows) if places else 0
    counts = {"used": used["data"], "held_out": used["eval_data"], "refused": len(refused)}
    counts |= {} if isinstance(run.settings, PPO) else {"shortened": shortened}
    counts |= {"left_out": left_out} if left_out else {}
    notes = [*found.intake.notes(), *_worse(run, found), *_soft(found)]
    if template.left_out:
        notes.append(("", f"not used by the chat template: {', '.join(sorted(template.left_out))}"))
    hashes = {key: rows_hash(rows) for key, (rows, _) in found.rows.items()}
    return StageRows(encoded["data"], encoded["eval_data"], refused, counts, tuple(notes), hashes)


def _worse(run: RunFolder, found: ReadRows) -> Iterator[tuple[str, str]]:
    """With `margin: true`, rows whose chosen answer has the lower score: the loss asks for a negative margin there."""
    rows, _ = found.rows["data"]
    if isinstance(run.settings, Reward) and run.settings.margin and (worse := sum(row.margin < 0 for row in rows)):
        yield "margins", f"score_chosen is below score_rejected in {worse:,} of {len(rows):,} rows"


def _soft(found: ReadRows) -> Iterator[tuple[str, str]]:
    """How many rows have a probability below 1 that their chosen answer is the better one."""
    rows, _ = found.rows["data"]
    if soft := [row.chosen_probability for row in rows if getattr(row, "chosen_probability", 1.0) != 1]:
        said = (
            f"{len(soft):,} of {len(rows):,} rows have a chosen_probability below 1, {soft.count(0.5):,} of them a tie"
        )
        yield "soft labels", said


def _left_out(refused: list[Refused]) -> list[LeftOut]:
    """Rows that say themselves that they are no pair, such as a vote for a tie: they count as left out, not refused."""
    return [row for row in refused if isinstance(row, LeftOut)]


def _check(run: RunFolder, key: str, refused: list[Refused], used: int) -> None:
    if key == "data" or run.settings.eval_data:
        run.check_refused(f"{run.stage}.{key}", [row for row in refused if not isinstance(row, LeftOut)], used)


def rendered_at(run: RunFolder) -> datetime | None:
    """The time that a chat template with a date was given when the run that is here began, so that `--resume`, and what
    measures the run, see the same ids; None if the template has no date."""
    file = run.path / RENDERED_AT
    try:
        return datetime.fromisoformat(file.read_text(encoding="utf-8").strip()) if file.is_file() else None
    except ValueError:
        raise UserError(f"{file}: is damaged; write the date on which the run began into it, as YYYY-MM-DD") from None


def check_same_rows(run: RunFolder, key: str, rows: Sequence[Any]) -> None:
    """Compares the rows under a key of the recipe with those that the run began with: a `UserError` if they differ, as
    after a file was edited, because a resumed run would count steps of other rows."""
    file, was = run.path / ROWS_HASH, None
    with suppress(OSError, ValueError, AttributeError):  # an older run, or a damaged file
        was = json.loads(file.read_text(encoding="utf-8")).get(key)
    if was and was != rows_hash(rows):
        fix = "put those back, or train again with --overwrite"
        raise UserError(f"{run.stage}.{key}: its rows are no longer those that {run.path} began with; {fix}")


def record(run: RunFolder, rows: StageRows, template: ChatTemplate) -> None:
    """Keeps what a run began with: a hash of its rows, and the time that a chat template with a date is given."""
    write_whole(run.path / ROWS_HASH, json.dumps(rows.hashes) + "\n")
    if template.is_dated:
        write_whole(run.path / RENDERED_AT, template.now.isoformat() + "\n")
