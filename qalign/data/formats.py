"""Any data set in, canonical rows out: preferences, dialogues to imitate, prompts to answer.

The shape of each row is detected (`qalign.data.shapes`). Each `canonical…` function raises a `BadRow` if the shape is
unknown or a part is missing, empty or out of order; `collect` lists such rows as refused, with place and reason.
"""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from qalign.config.stages import Source
from qalign.data.readers import BadRow, NoPair, read
from qalign.data.shapes import Message, RawRow, Shape, Turns, as_turns, detect, opening_turns, split_prompt

Row = TypeVar("Row")
Read = tuple[list[Row], list["Refused"]]  # rows that can be used, and the others


@dataclass(frozen=True)
class Preference:
    """One prompt with two answers, the first preferred."""

    prompt: tuple[Message, ...]  # a user's or a tool's turn last
    chosen: Message
    rejected: Message
    where: str  # its place: file and line, or row number
    margin: float | None = None  # score_chosen − score_rejected, where the row has both as finite numbers
    tools: tuple[dict[str, Any], ...] = ()  # schemas of functions, for `apply_chat_template(tools=…)`


@dataclass(frozen=True)
class Dialogue:
    """A dialogue that ends with an assistant's turn, for supervised fine-tuning."""

    turns: tuple[Message, ...]
    first_trained: int  # the loss covers the assistant's turns from this index on; earlier turns are context
    where: str
    tools: tuple[dict[str, Any], ...] = ()
    untrained: frozenset[int] = frozenset()  # indices of assistant turns that are context too, such as `weight: 0`


@dataclass(frozen=True)
class PlainText:
    """A text without roles; the loss covers every token but the first."""

    text: str
    where: str


@dataclass(frozen=True)
class Prompt:
    """A dialogue that waits for an answer."""

    turns: tuple[Message, ...]  # a user's or a tool's turn last
    where: str
    columns: dict[str, Any]  # the whole row as it came, without nulls, for functions that score answers
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Refused:
    """A row that can't be used, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class LeftOut(Refused):
    """A valid row that holds no preference, such as a vote for a tie."""


def collect(
    sources: tuple[Source, ...], split: str, limit: int | None, seed: int, convert: Callable[[Any, str], Row]
) -> Read[Row]:
    """Reads the rows of every source into one form.

    Args:
        split, limit: the stage's, for sources that don't set their own.
        seed: decides which rows a fractional `weight` takes.
        convert: makes a row from a raw row and its place; a `BadRow` that it raises refuses the row.

    Raises:
        UserError: a file or data set can't be read at all.
    """
    rows: list[Row] = []
    refused: list[Refused] = []
    for source in sources:
        taken: list[Row] = []
        wanted = source.limit or limit
        end = source.skip + wanted if wanted else None
        for where, raw in islice(read(source, source.split or split), source.skip, end):
            try:
                if isinstance(raw, BadRow):
                    raise raw
                taken.append(convert(raw, where))
            except BadRow as reason:
                refused.append((LeftOut if isinstance(reason, NoPair) else Refused)(where, str(reason)))
        whole, part = divmod(source.weight, 1)
        rows += taken * int(whole) + random.Random(seed).sample(taken, round(part * len(taken)))
    return rows, refused


def canonical(raw: Any, where: str) -> Preference:
    """One row of any known shape as a `Preference`; raises `NoPair` if the row says that it holds none."""
    shape = detect(raw)
    _check_no_pair(shape)
    if shape.chosen is None or shape.rejected is None:
        missing = "chosen" if shape.chosen is None else "rejected"
        raise BadRow(f"no '{missing}' answer: a preference row needs chosen and rejected; this one has {shape.keys}")
    prompt, *answers = split_prompt(opening_turns(shape.row, shape.opening), shape.chosen, shape.rejected)
    _check_order(prompt, "the prompt", "user")
    chosen, rejected = (_answer(turns, name) for turns, name in zip(answers, ("chosen", "rejected"), strict=True))
    check_text(turn["content"] for turn in (*prompt, chosen, rejected))
    if chosen["content"].strip() == rejected["content"].strip():
        raise BadRow("chosen and rejected are the same answer")
    return Preference(tuple(prompt), chosen, rejected, where, _margin(shape.row))


def scored(raw: Any, where: str) -> Preference:
    """As `canonical`, but both answers must have a score."""
    row = canonical(raw, where)
    if row.margin is None:
        raise BadRow("no score_chosen and score_rejected as numbers, which `margin: true` needs")
    return row


def _answer(turns: Turns, name: str) -> Message:
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        found = " → ".join(turn["role"] for turn in turns) or "nothing"
        raise BadRow(f"{name}: expected one assistant turn after the prompt, found {found}")
    if not turns[0]["content"].strip():
        raise BadRow(f"{name}: the answer is empty")
    return turns[0]


def _margin(row: RawRow) -> float | None:
    scores: list[Any] = [row.get("score_chosen"), row.get("score_rejected")]
    if not all(type(score) in (int, float) for score in scores):  # not isinstance: True is an int too, but no score
        return None
    try:
        margin = float(scores[0]) - float(scores[1])
    except OverflowError:  # JSON has integers beyond every float
        return None
    return margin if math.isfinite(margin) else None


def canonical_dialogue(raw: Any, where: str) -> Dialogue | PlainText:
    """One row of any known shape as a `Dialogue` or a `PlainText`.

    Of a preference row the chosen answer is trained on, whatever the rejected one is like; the assistant's earlier
    turns are context, since HH-RLHF's were picked to be bad. Raises `NoPair` as `canonical` does.
    """
    shape = detect(raw)
    _check_no_pair(shape)
    _check_system(shape.row)
    if shape.is_ranked:
        if shape.chosen is None:
            raise BadRow(f"no 'chosen' answer to imitate; this row has {shape.keys}")
        prompt, answer, _ = split_prompt(opening_turns(shape.row, shape.opening), shape.chosen, shape.chosen)
        turns, first_trained = prompt + answer, len(prompt)
    elif shape.imitated:
        turns, first_trained = _imitated(shape.row, *shape.imitated)
    else:
        return PlainText(_plain_text(shape), where)
    if first_trained:
        _check_order(turns[:first_trained], "the prompt", "user")
    _check_order(turns, "the dialogue", "assistant")
    check_text(turn["content"] for turn in turns)
    return Dialogue(tuple(turns), first_trained, where)


def _imitated(row: RawRow, before: str | None, answer: str) -> tuple[Turns, int]:
    """(turns, index of the first one that is trained on): all but the turns under `prompt`."""
    if answer == "text":
        return as_turns(row[answer], answer), 0
    if before is None and not isinstance(row[answer], list):
        raise BadRow(f"{answer}: expected a list of turns, found {type(row[answer]).__name__}")
    label = row.get("label")
    if label is False or (isinstance(label, str) and label.strip().lower() == "false"):  # a CSV has only texts
        raise BadRow("label is false: the answer is marked as not to be imitated")
    opening = opening_turns(row, before)
    return opening + as_turns(row[answer], answer, "assistant"), len(opening) if before == "prompt" else 0


def _plain_text(shape: Shape) -> str:
    if "text" not in shape.row:
        raise BadRow(
            f"unknown shape: this row has {shape.keys}; expected messages, conversations, prompt + completion "
            "(or response), instruction + output, chosen (with rejected or without), or text"
        )
    text = shape.row["text"]
    if not isinstance(text, str):
        raise BadRow(f"text: expected a text, found {type(text).__name__}")
    if not text.strip():
        raise BadRow("the text is empty")
    check_text([text])
    return text


def scorable(raw: Any, where: str) -> Preference | Dialogue:
    """One row with an answer to score: a `Preference` if it has both ranked answers, else a `Dialogue`."""
    shape = detect(raw)
    if shape.chosen is not None and shape.rejected is not None:
        return canonical(raw, where)
    row = canonical_dialogue(raw, where)
    if isinstance(row, PlainText):
        raise BadRow("plain text: expected a dialogue with an answer to score")
    return row


def canonical_prompt(raw: Any, where: str) -> Prompt:
    """One row of any known shape as a `Prompt`: the dialogue up to its last answer, which is left out."""
    shape = detect(raw)
    _check_system(shape.row)
    turns = opening_turns(shape.row, shape.opening)
    if shape.is_ranked:
        answer = shape.rejected if shape.chosen is None else shape.chosen
        turns, last, _ = split_prompt(turns, answer, answer)
        if last and last[-1]["role"] == "user":  # a transcript whose last question has no answer
            turns = turns + last
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not any(turn["role"] == "user" for turn in turns):
        raise BadRow(
            f"no user's turn to answer: this row has {shape.keys}; expected prompt, messages, conversations, "
            "instruction, turns, or an HH transcript"
        )
    _check_order(turns, "the prompt", "user")
    check_text(turn["content"] for turn in turns)
    return Prompt(tuple(turns), where, shape.row)


def _check_no_pair(shape: Shape) -> None:
    """`qalign.page.votes` writes `no_pair` with a reason for ties and the like, in place of the answers."""
    if isinstance(shape.row.get("no_pair"), str) and not shape.is_ranked:
        raise NoPair(shape.row["no_pair"])


def _check_system(row: RawRow) -> None:
    if not isinstance(row.get("system", ""), str):
        raise BadRow(f"system: expected a text, found {type(row['system']).__name__}")


def _check_order(turns: Turns, name: str, last: str) -> None:
    """User and assistant must alternate after a system turn, if any, end with `last`, and no turn may be empty."""
    spoken = turns[1:] if turns and turns[0]["role"] == "system" else turns
    if not spoken:
        raise BadRow(f"{name} is empty")
    for number, turn in enumerate(spoken, start=1):
        expected = "user" if number % 2 else "assistant"
        if turn["role"] != expected:
            raise BadRow(f"turn {number} of {name} is the {turn['role']}'s, expected the {expected}'s")
        if not turn["content"].strip():
            raise BadRow(f"turn {number} of {name} is empty")
    if spoken[-1]["role"] != last:
        raise BadRow(f"{name} ends with the {spoken[-1]['role']}'s turn, expected the {last}'s")


def check_text(texts: Iterable[str]) -> None:
    """Requires valid Unicode: JSON can spell half a character (a lone surrogate), which raises a `BadRow`."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"the text is not valid Unicode: {error.reason} ({error.object[error.start]!r})") from None


# (sources, split, limit, seed) to rows and refused rows, as `collect` reads them.
preferences = partial(collect, convert=canonical)
scored_preferences = partial(collect, convert=scored)
dialogues = partial(collect, convert=canonical_dialogue)
prompts = partial(collect, convert=canonical_prompt)
