"""Any data set in, canonical rows out: preferences, answers with labels, dialogues to imitate, prompts.

The shape of each row is detected (`qalign.data.shapes`). Each `canonical…` function raises a `BadRow` if the shape is
unknown or a part is missing, empty or out of order; `collect` lists such rows as refused, with place and reason.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from tqdm.auto import tqdm

from qalign.config.stages import Source
from qalign.data.messages import Message, Turns, as_dialogue, as_turns, is_empty, same
from qalign.data.readers import BadRow, NoPair, read
from qalign.data.rows import (
    Dialogue,
    Labelled,
    LeftOut,
    PlainText,
    Preference,
    Prompt,
    Refused,
    check_order,
    settled,
)
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
from qalign.data.store.rows import RowPool
from qalign.data.texts import (
    DIALOGUES,
    LABELS,
    SPEAKER,
    as_label,
    check_not_templated,
    check_text,
    is_nothing,
    is_object,
    without_nulls,
)
from qalign.errors import short

Row = TypeVar("Row")
Read = tuple[Sequence[Row], list[Refused]]  # rows that can be used, and the others
PATIENCE = 5  # seconds of reading after which there is a progress bar


def collect(
    sources: tuple[Source, ...],
    split: str,
    limit: int | None,
    seed: int,
    convert: Callable[[Any, str], Row],
    saw: Callable[[Source, RawRow, Row], None] | None = None,
) -> Read[Row]:
    """Reads the rows of every source into one form: a list, or a `RowFile` where they would take much memory.

    Args:
        split, limit: the stage's, for sources that don't set their own.
        seed: decides which rows a fractional `weight` takes.
        convert: makes a row from a raw row and its place; a `BadRow` that it raises refuses the row.
        saw: is told of each row that is used: its source, the raw row, which knows what was read of it, and the row.

    Raises:
        UserError: a file or data set can't be read at all.
    """
    pool, order, refused = RowPool[Row](), list[int](), list[Refused]()
    for source in sources:
        first, wanted = len(pool), source.limit or limit
        end = source.skip + wanted if wanted else None
        is_json = source.path.removesuffix(".gz").endswith((".json", ".jsonl"))  # its nulls are the writer's own
        raws = islice(read(source, source.split or split), source.skip, end)
        for where, raw in tqdm(raws, desc="reading", unit="row", delay=PATIENCE):
            try:
                if isinstance(raw, BadRow):
                    raise raw
                noted = RawRow(raw if is_json else without_nulls(raw)) if is_object(raw) else raw
                row = convert(noted, where)
                pool.append(row)
                if saw:
                    saw(source, noted, row)
            except BadRow as reason:
                refused.append((LeftOut if isinstance(reason, NoPair) else Refused)(where, str(reason)))
        whole, part = divmod(source.weight, 1)
        taken = range(first, len(pool))
        order += [*taken] * int(whole) + random.Random(seed).sample(taken, round(part * len(taken)))
    return pool.rows(order), refused


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
    check_order(prompt, "the prompt", "user")
    chosen, rejected = (_answer(turns, name) for turns, name in zip(answers, ("chosen", "rejected"), strict=True))
    (*prompt, chosen, rejected), untrained = settled([*prompt, chosen, rejected])
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
        check_order(turns[:first_trained], "the prompt", "user")
    check_order(turns, "the dialogue", "assistant")
    turns, untrained = settled(turns)
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
    check_order(turns, "the prompt", "user")
    turns, _ = settled(turns)
    return Prompt(tuple(turns), where, dict(shape.row), tools(shape.row))


def _check_pair(shape: Shape) -> None:
    """`qalign.page.votes` writes `no_pair` with a reason for ties and the like, in place of the answers."""
    if isinstance(shape.row.peek("no_pair"), str) and not shape.is_ranked:
        raise NoPair(shape.row["no_pair"])
    if shape.no_pair and (shape.is_ranked or not shape.imitated):
        raise shape.no_pair


def _check_label(shape: Shape) -> None:
    """A false label marks a disliked answer, as 0 does in KTO's rows. Beside a text or messages, 0 and "negative" may
    be a class."""
    is_answered = shape.imitated and shape.imitated[0]
    for key in LABELS:
        value = shape.row.get(key)
        if as_label(value) is False and (is_answered or str(value).strip().lower() in ("false", "undesirable")):
            raise BadRow(f"{key} is false: the answer is marked as not to be imitated")


def canonical_labelled(raw: Any, where: str) -> Labelled:
    """One row of any known shape as answers that are good or bad: one answer with a label, a chosen or a rejected one
    alone, a pair, or a vote of `qalign.page.votes` that both answers are bad. Raises `NoPair` as `canonical` does."""
    shape = detect(raw)
    if shape.row.peek("vote") == "both_bad" and not shape.is_ranked:
        return _both_bad(shape.row, where)
    if shape.chosen is not None and shape.rejected is not None:
        pair = canonical(raw, where)
        if pair.chosen_probability == 0.5:
            raise NoPair("a tie: neither answer is good or bad")
        return Labelled(pair.prompt, (pair.chosen, pair.rejected), (True, False), where, pair.tools)
    _check_pair(shape)
    label = _label(shape)
    row = _imitable(replace(shape, chosen=shape.rejected if shape.chosen is None else shape.chosen), where)
    if shape.rejected is not None:
        shape.row.read.update(key for key in REJECTED if key in shape.row)
    if isinstance(row, PlainText):
        raise BadRow("plain text: expected a prompt and an answer with a label")
    *prompt, answer = row.turns
    check_order(prompt, "the prompt", "user")
    if len(prompt) in row.untrained:
        raise BadRow("the answer has weight 0, so it can't be trained on")
    return Labelled(tuple(prompt), (answer,), (label,), where, row.tools)


def _label(shape: Shape) -> bool:
    """Whether a row's only answer is good."""
    found = next((key for key in LABELS if not is_nothing(shape.row.peek(key))), None)
    if found is None and shape.is_ranked:
        return shape.rejected is None
    if found is None:
        known = f"{', '.join(LABELS)}, or chosen and rejected"
        raise BadRow(f"no label says whether the answer is good: this row has {shape.keys}; expected {known}")
    label = as_label(shape.row[found])
    if label is None:
        raise BadRow(f"{found}: expected true or false (or 1 and 0, good and bad), found {short(shape.row[found])}")
    return label


def _both_bad(row: RawRow, where: str) -> Labelled:
    sides = [answer for side in ("a", "b") if is_object(answer := row.get(side))]
    texts = [text for side in sides if isinstance(text := side.get("text"), str) and text.strip()]
    if not texts or any("prompt" in side for side in sides):
        raise NoPair("a vote for 'both bad' without answers to the same dialogue")
    prompt = opening_turns(row, "prompt")
    check_order(prompt, "the prompt", "user")
    answers: Turns = [{"role": "assistant", "content": text} for text in dict.fromkeys(texts)]
    turns, _ = settled([*prompt, *answers])
    prompt, answers = turns[: len(prompt)], turns[len(prompt) :]
    return Labelled(tuple(prompt), tuple(answers), (False,) * len(answers), where, tools(row))


# (sources, split, limit, seed) to rows and refused rows, as `collect` reads them.
preferences = partial(collect, convert=canonical)
scored_preferences = partial(collect, convert=scored)
labelled_answers = partial(collect, convert=canonical_labelled)
dialogues = partial(collect, convert=canonical_dialogue)
prompts = partial(collect, convert=canonical_prompt)
