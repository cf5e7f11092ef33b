"""Any data set in, canonical rows out: preferences, dialogues to imitate, prompts to answer.

The shape of each row is detected (`qalign.data.shapes`). Each `canonical…` function raises a `BadRow` if the shape is
unknown or a part is missing, empty or out of order; `collect` lists such rows as refused, with place and reason.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from qalign.config.stages import Source
from qalign.data.messages import UNTRAINED, Message, Turns, as_dialogue, as_turns, calls, is_empty, same
from qalign.data.readers import BadRow, NoPair, read
from qalign.data.shapes import (
    OPENINGS,
    REJECTED,
    RawRow,
    Shape,
    chosen_probability,
    detect,
    opening_turns,
    score_margin,
    split_prompt,
    tools,
    with_system,
)
from qalign.data.texts import DIALOGUES, SPEAKER, check_not_templated, check_text, is_object, without_nulls

Row = TypeVar("Row")
Read = tuple[list[Row], list["Refused"]]  # rows that can be used, and the others


@dataclass(frozen=True)
class Preference:
    """One prompt with two answers, the first preferred, or as good as the other."""

    prompt: tuple[Message, ...]  # a user's or a tool's turn last
    chosen: Message
    rejected: Message
    where: str  # its place: file and line, or row number
    margin: float | None = None  # score_chosen − score_rejected, where the row has both as finite numbers
    tools: tuple[dict[str, Any], ...] = ()  # schemas of functions, for `apply_chat_template(tools=…)`
    chosen_probability: float = 1.0  # that the chosen answer is the better one, from 0.5 (a tie) to 1


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
    sources: tuple[Source, ...],
    split: str,
    limit: int | None,
    seed: int,
    convert: Callable[[Any, str], Row],
    saw: Callable[[Source, RawRow, Row], None] | None = None,
) -> Read[Row]:
    """Reads the rows of every source into one form.

    Args:
        split, limit: the stage's, for sources that don't set their own.
        seed: decides which rows a fractional `weight` takes.
        convert: makes a row from a raw row and its place; a `BadRow` that it raises refuses the row.
        saw: is told of each row that is used: its source, the raw row, which knows what was read of it, and the row.

    Raises:
        UserError: a file or data set can't be read at all.
    """
    rows: list[Row] = []
    refused: list[Refused] = []
    for source in sources:
        taken: list[Row] = []
        wanted = source.limit or limit
        end = source.skip + wanted if wanted else None
        is_json = source.path.removesuffix(".gz").endswith((".json", ".jsonl"))  # its nulls are the writer's own
        for where, raw in islice(read(source, source.split or split), source.skip, end):
            try:
                if isinstance(raw, BadRow):
                    raise raw
                noted = RawRow(raw if is_json else without_nulls(raw)) if is_object(raw) else raw
                taken.append(convert(noted, where))
                if saw:
                    saw(source, noted, taken[-1])
            except BadRow as reason:
                refused.append((LeftOut if isinstance(reason, NoPair) else Refused)(where, str(reason)))
        whole, part = divmod(source.weight, 1)
        rows += taken * int(whole) + random.Random(seed).sample(taken, round(part * len(taken)))
    return rows, refused


def canonical(raw: Any, where: str) -> Preference:
    """One row of any known shape as a `Preference`; raises `NoPair` if the row says that it holds none. Where the
    rejected answer is the more probable one, the two change places."""
    row = as_written(raw, where)
    if row.chosen_probability >= 0.5:
        return row
    margin, probability = None if row.margin is None else -row.margin, 1 - row.chosen_probability
    return replace(row, chosen=row.rejected, rejected=row.chosen, margin=margin, chosen_probability=probability)


def as_written(raw: Any, where: str) -> Preference:
    """As `canonical`, but the chosen answer is the row's own, whatever its probability."""
    shape = detect(raw)
    _check_pair(shape)
    if shape.no_pair:
        raise shape.no_pair
    if shape.chosen is None or shape.rejected is None:
        missing = "chosen" if shape.chosen is None else "rejected"
        raise BadRow(f"no '{missing}' answer: a preference row needs chosen and rejected; this one has {shape.keys}")
    prompt, *answers = split_prompt(opening_turns(shape.row, shape.opening), shape.chosen, shape.rejected)
    _check_order(prompt, "the prompt", "user")
    chosen, rejected = (_answer(turns, name) for turns, name in zip(answers, ("chosen", "rejected"), strict=True))
    (*prompt, chosen, rejected), untrained = _settled([*prompt, chosen, rejected])
    if untrained & {len(prompt), len(prompt) + 1}:
        raise BadRow("an answer has weight 0, so it can't be trained on")
    if same(chosen, rejected):
        raise BadRow("chosen and rejected are the same answer")
    margin, probability = score_margin(shape.row), chosen_probability(shape.row)
    return Preference(tuple(prompt), chosen, rejected, where, margin, tools(shape.row), probability)


def scored(raw: Any, where: str) -> Preference:
    """As `canonical`, but both answers must have a score."""
    row = canonical(raw, where)
    if row.margin is None:
        raise BadRow("no score_chosen and score_rejected as numbers, which `margin: true` needs")
    return row


def _answer(turns: Turns, name: str) -> Message:
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        found = " → ".join(turn["role"] for turn in turns[:8]) or "nothing"
        raise BadRow(f"{name}: expected one assistant turn after the prompt, found {found}")
    if is_empty(turns[0]):
        raise BadRow(f"{name}: the answer is empty")
    return turns[0]


def canonical_dialogue(raw: Any, where: str) -> Dialogue | PlainText:
    """One row of any known shape as a `Dialogue` or a `PlainText`.

    Of a preference row the chosen answer is trained on, whatever the rejected one is like; the assistant's earlier
    turns are context, since HH-RLHF's were picked to be bad. Raises `NoPair` as `canonical` does.
    """
    shape = detect(raw)
    if shape.rejected is None:
        _check_label(shape)
    return _imitable(shape, where)


def _imitable(shape: Shape, where: str) -> Dialogue | PlainText:
    _check_pair(shape)
    if shape.is_ranked:
        if shape.chosen is None:
            raise BadRow(f"no 'chosen' answer to imitate; this row has {shape.keys}")
        better = shape.chosen
        if shape.rejected is not None and chosen_probability(shape.row) < 0.5:
            better = shape.rejected
        else:
            shape.row.read.difference_update(REJECTED)
        prompt, answer, _ = split_prompt(opening_turns(shape.row, shape.opening), better, better)
        turns, first_trained = prompt + answer, len(prompt)
    elif shape.imitated:
        turns, first_trained = _imitated(shape.row, *shape.imitated)
    else:
        return PlainText(_plain_text(shape), where)
    if first_trained:
        _check_order(turns[:first_trained], "the prompt", "user")
    _check_order(turns, "the dialogue", "assistant")
    turns, untrained = _settled(turns)
    trained = (number for number, turn in enumerate(turns) if turn["role"] == "assistant" and number >= first_trained)
    if untrained.issuperset(trained):
        raise BadRow("all of the assistant's turns have weight 0")
    return Dialogue(tuple(turns), first_trained, where, tools(shape.row), untrained)


def _imitated(row: RawRow, before: str | None, answer: str) -> tuple[Turns, int]:
    """(turns, index of the first one that is trained on): all but the turns under `prompt` or a question."""
    if before:
        opening = opening_turns(row, before)
        return opening + as_turns(row[answer], answer, "assistant"), 0 if before == "instruction" else len(opening)
    return with_system(row, (as_dialogue if answer in DIALOGUES else as_turns)(row[answer], answer)), 0


def _plain_text(shape: Shape) -> str:
    if "text" not in shape.row:
        raise BadRow(
            f"unknown shape: this row has {shape.keys}; expected messages, conversations, prompt (or question) + "
            "completion (or response, answer), instruction + output, chosen (with rejected or without), or text"
        )
    if speaker := next((key for key in SPEAKER if isinstance(shape.row.get(key), str)), None):
        raise BadRow(f"a single turn, with its own '{speaker}': join the turns of a dialogue into one row's messages")
    text = shape.row["text"]
    if not isinstance(text, str):
        raise BadRow(f"text: expected a text, found {type(text).__name__}")
    if not text.strip():
        raise BadRow("the text is empty")
    check_not_templated(text)
    check_text([text])
    return text


def scorable(raw: Any, where: str) -> Preference | Dialogue:
    """One row with an answer to score: a `Preference` if it has both ranked answers, else a `Dialogue`."""
    shape = detect(raw)
    if shape.chosen is not None and shape.rejected is not None:
        return as_written(raw, where)
    row = _imitable(shape, where)  # with a disliked answer, too
    if isinstance(row, PlainText):
        raise BadRow("plain text: expected a dialogue with an answer to score")
    return row


def canonical_prompt(raw: Any, where: str) -> Prompt:
    """One row of any known shape as a `Prompt`: the dialogue up to its last answer, which is left out."""
    shape = detect(raw)
    turns = opening_turns(shape.row, shape.opening)
    if shape.is_ranked:
        if shape.chosen is not None:
            shape.row.read.difference_update(REJECTED)
        answer = shape.rejected if shape.chosen is None else shape.chosen
        turns, last, _ = split_prompt(turns, answer, answer)
        if last and last[-1]["role"] == "user":  # a transcript whose last question has no answer
            turns = turns + last
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not any(turn["role"] == "user" for turn in turns):
        expected = f"{', '.join(OPENINGS)}, or an HH transcript"
        raise BadRow(f"no user's turn to answer: this row has {shape.keys}; expected {expected}")
    _check_order(turns, "the prompt", "user")
    turns, _ = _settled(turns)
    return Prompt(tuple(turns), where, dict(shape.row), tools(shape.row))


def _check_pair(shape: Shape) -> None:
    """`qalign.page.votes` writes `no_pair` with a reason for ties and the like, in place of the answers."""
    if isinstance(shape.row.peek("no_pair"), str) and not shape.is_ranked:
        raise NoPair(shape.row["no_pair"])
    if shape.no_pair and (shape.is_ranked or not shape.imitated):
        raise shape.no_pair


def _check_label(shape: Shape) -> None:
    """A false label marks a disliked answer, as 0 does in KTO's rows. Beside a text or messages 0 may be a class."""
    is_answered = shape.imitated and shape.imitated[0]
    false = {"false", "0", "0.0", "no"} if is_answered else {"false"}
    for key in ("label", "kto_tag"):
        if str(shape.row.get(key)).strip().lower() in false:  # a CSV has only texts
            raise BadRow(f"{key} is false: the answer is marked as not to be imitated")


def _check_order(turns: Turns, name: str, last: str) -> None:
    """Nobody but a tool speaks twice in a row (system turns aside), a tool answers a call, no turn is empty, and the
    last is `last`'s; where that is the user's, it may be a tool's."""
    before: Message = {"role": "nobody", "content": ""}
    for number, turn in enumerate((spoken := [turn for turn in turns if turn["role"] != "system"]), start=1):
        role = turn["role"]
        if role == before["role"] != "tool":
            other = "assistant" if role == "user" else "user"
            raise BadRow(f"turn {number} of {name} is the {role}'s, expected the {other}'s")
        if role == "tool" and before["role"] != "tool" and not calls(before):
            raise BadRow(f"turn {number} of {name} is a tool's, but the turn before calls none")
        if is_empty(turn):
            raise BadRow(f"turn {number} of {name} is empty")
        before = turn
    if not spoken:
        raise BadRow(f"{name} is empty")
    if not any(turn["role"] == "user" for turn in spoken):
        raise BadRow(f"{name} has no user's turn")
    end = before if last == "user" else turns[-1]  # nothing follows a system turn after the last answer
    if end["role"] not in (last, "tool" if last == "user" else last):
        raise BadRow(f"{name} ends with the {end['role']}'s turn, expected the {last}'s")


def _settled(turns: Turns) -> tuple[Turns, frozenset[int]]:
    """(turns, indices of the turns that are not trained on), after the last checks of their texts."""
    for turn in turns:
        check_not_templated(turn["content"])
        check_text([json.dumps(turn, ensure_ascii=False)])
    untrained = frozenset(number for number, turn in enumerate(turns) if turn.get(UNTRAINED))
    return [{key: value for key, value in turn.items() if key != UNTRAINED} for turn in turns], untrained


# (sources, split, limit, seed) to rows and refused rows, as `collect` reads them.
preferences = partial(collect, convert=canonical)
scored_preferences = partial(collect, convert=scored)
dialogues = partial(collect, convert=canonical_dialogue)
prompts = partial(collect, convert=canonical_prompt)
