"""Rows in their canonical form, and what is checked of them: order, texts, and that a chat template keeps all.

A template leaves out what it has no place for without an error. Each part is looked for in the rendered text, and a row
of which one is missing is refused. Only white space at the ends of a part doesn't count, as templates trim it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from qalign.data.messages import UNTRAINED, Message, Turns, calls, is_empty
from qalign.data.readers import BadRow, is_object
from qalign.data.templates import MOVE_IT, ChatTemplate, call_of, special_tokens
from qalign.data.texts import check_not_templated, check_text
from qalign.errors import short

PROBES = {"content": "probe of an answer", "reasoning_content": "probe of a thought", "tool_calls": "probe_call"}
MARKS = {"content": "probe {}.", "name": "name{:05}", "tool_call_id": "call{:05}"}  # Mistral's ids have 9 characters
THOUGHT_TAG = re.compile(r"(</?(?:think|thinking|thought|reasoning)>)")
FLAG = re.compile(r"/\w+")  # such as SmolLM3's /no_think, which its template takes out of a system turn
# A longer row is refused before it is tokenised, which takes a second and 250 MB for each million characters. English
# has 4 to 5 of them a token; the longest tokens in use, runs of spaces or of one sign, have 128.
CHARACTERS_PER_TOKEN, LEAST_CHARACTERS, LEAST_TURNS = 200, 1_000_000, 1000


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
class Labelled:
    """One prompt with one answer or more, each good or bad by itself, for KTO. A pair is one with two answers."""

    prompt: tuple[Message, ...]  # a user's or a tool's turn last
    answers: tuple[Message, ...]
    desirable: tuple[bool, ...]  # of each answer
    where: str
    tools: tuple[dict[str, Any], ...] = ()


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


def rows_hash(rows: Iterable[Any], *, places: bool = False) -> str:
    """A hash of what rows hold, wherever they lie; with `places`, of where they lie too."""

    def plain(part: Any) -> Any:  # what JSON has no place for: a set of turns, or an image or a date in a column
        return sorted(part) if isinstance(part, frozenset) else type(part).__name__  # pyright: ignore

    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        fields: dict[str, Any] = row.__dict__
        parts = [part for name, part in fields.items() if places or name != "where"]
        digest.update(json.dumps(parts, default=plain, skipkeys=True).encode())
    return digest.hexdigest()


def check_order(turns: Turns, name: str, last: str) -> None:
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


def settled(turns: Turns) -> tuple[Turns, frozenset[int]]:
    """(turns, indices of the turns that are not trained on), after the last checks of their texts."""
    for turn in turns:
        check_not_templated(turn["content"])
        check_text([json.dumps(turn, ensure_ascii=False)])
    untrained = frozenset(number for number, turn in enumerate(turns) if turn.get(UNTRAINED))
    return [{key: value for key, value in turn.items() if key != UNTRAINED} for turn in turns], untrained


def check_texts(template: ChatTemplate, turns: Sequence[Message | str], max_length: int) -> None:
    """Refuses a row before anything is computed from it: one that is far too long, or one that spells a special token,
    which would be read as one (a forged end of turn)."""
    texts = [leaf for leaf in leaves((turns, template.tools)) if isinstance(leaf, str)]
    most = max(LEAST_CHARACTERS, CHARACTERS_PER_TOKEN * max_length)
    if (size := sum(map(len, texts))) > most:
        raise BadRow(f"the row is {size:,} characters long; at most {most:,} are taken at this max_length; split it")
    if len(turns) > (most_turns := max(LEAST_TURNS, max_length)):
        raise BadRow(f"the row has {len(turns):,} turns; at most {most_turns:,} are taken at this max_length; split it")
    text = "\0".join(texts)
    if found := next((token for token in special_tokens(template.tokenizer) if token in text), None):
        raise BadRow(f"the text contains the model's special token {found}")


def check_prompt(template: ChatTemplate, turns: Sequence[Message], text: str) -> None:
    """Raises a `BadRow` if the template leaves out a turn, a part of one, a call or the tools of a prompt. (Thoughts of
    earlier answers may be left out: that is what the model sees at inference.)

    Args:
        text: the prompt as the template rendered it.
    """
    leaves_out = f"the chat template ({template.words}) leaves out"
    if template.tools or any(turn.keys() > {"role", "content"} for turn in turns):
        lost = _lost_turns(template, turns)
    else:
        lost = _lost_roles(template, tuple(turn["role"] for turn in turns))
    if lost:
        role = turns[lost[0]]["role"]
        fix = f"; {MOVE_IT}" if role == "system" else ""
        raise BadRow(f"{leaves_out} turn {lost[0] + 1}, the {role}'s{fix}")
    at = 0
    for number, turn in enumerate(turns, start=1):
        said = turn["content"].strip()
        if (found := text.find(said, at)) >= 0:  # most templates keep the order, so a long dialogue is read once
            at = found + len(said)
        elif missing := _missing_part(text, turn):
            raise BadRow(f"{leaves_out} part of turn {number}, the {turn['role']}'s: {short(missing)}")
        if (missing := _missing_word(turn.get("tool_calls", ()), text)) is not None:
            raise BadRow(f"{leaves_out} part of a tool call: {short(missing)}")
        _note_facts(template, turn, text)
    if template.tools:
        missing = next((word for word in _schema_words(template.tools) if not _spells(text, word)), None)
        if missing is not None or text == replace(template, tools=()).render(turns, add_generation_prompt=True):
            raise BadRow(f"{leaves_out} the row's tools" + (f": {short(missing)}" if missing else ""))


@lru_cache(maxsize=4096)
def _lost_roles(template: ChatTemplate, roles: tuple[str, ...]) -> list[int]:
    return _lost_turns(template, [{"role": role, "content": "a"} for role in roles])


def _lost_turns(template: ChatTemplate, turns: Sequence[Message]) -> list[int]:
    """Indices of the turns that the template doesn't render, whatever they say."""
    probes = [
        turn | {key: mark.format(number) for key, mark in MARKS.items() if turn.get(key)}
        for number, turn in enumerate(turns)
    ]
    try:
        text = template.render(probes, add_generation_prompt=True)
    except BadRow:  # it refuses the probes, but took what the turns say
        return []
    for probe in probes:
        _note_facts(template, probe, text)
    return [number for number, probe in enumerate(probes) if probe["content"] not in text]


def _note_facts(template: ChatTemplate, turn: Message, text: str) -> None:
    """Notes in `template.left_out` which facts about a turn the text lacks. They don't refuse a row."""
    facts = [(key, turn.get(key, "")) for key in ("name", "tool_call_id")]
    facts += [("id of a tool call", str(call.get("id", ""))) for call in turn.get("tool_calls", ())]
    template.left_out.update(key for key, fact in facts if fact not in text)


def check_answer(template: ChatTemplate, prompt: Sequence[Message], answer: Message, text: str, start: int) -> None:
    """Raises a `BadRow` if the template leaves out a part of an answer.

    Args:
        text: the dialogue as the template rendered it; the answer begins at `start`.
    """
    leaves_out = f"the chat template ({template.words}) leaves out"
    for key in ("content", "reasoning_content"):
        said = answer.get(key, "").strip()
        if text.find(said, start) < 0 and (missing := _missing_line(text, THOUGHT_TAG.split(said), start)):
            raise BadRow(f"{leaves_out} part of the answer's {key}: {short(missing)}")
    calls = answer.get("tool_calls", ())
    if (missing := _missing_word(calls, text[start:])) is not None:
        raise BadRow(f"{leaves_out} part of the answer's tool_calls: {short(missing)}")
    _note_facts(template, answer, text)
    if not (calls or answer.get("reasoning_content")):
        return
    # What the parts say may stand in the text by chance, such as a thought "4" before an answer "4".
    probes = {key: probe for key, probe in PROBES.items() if answer.get(key)}
    other = answer | probes | ({"tool_calls": [call_of(PROBES["tool_calls"], {})]} if calls else {})
    try:
        found = template.render([*prompt, other], add_generation_prompt=False)
    except BadRow:  # it refuses the probes, but took what the answer says
        return
    if lost := next((key for key, probe in probes.items() if probe not in found), None):
        raise BadRow(f"{leaves_out} the answer's {lost}")


def _missing_part(text: str, turn: Message) -> str | None:
    """What a text lacks of a turn of a prompt: without the thoughts of an answer, and the flags of a system turn."""
    said, role = turn["content"], turn["role"]
    if role == "tool" and _spells(text, said):
        return None
    parts = FLAG.split(said) if role == "system" else THOUGHT_TAG.split(said)[-1:] if role == "assistant" else [said]
    return _missing_line(text, parts)


def _missing_line(text: str, parts: Sequence[str], start: int = 0) -> str | None:
    """The first line that a text lacks of parts that follow one another from `start` on."""
    parts = [part.strip() for part in parts if part.strip()]
    if parts and THOUGHT_TAG.fullmatch(parts[0]) and text[:start].rstrip().endswith(parts[0]):
        parts = parts[1:]  # the generation prompt ends with it
    for part in parts:
        if (found := text.find(part, start)) < 0:
            return next((line for line in part.splitlines() if text.find(line.strip(), start) < 0), part)
        start = found + len(part)
    return None


def _spells(text: str, value: Any) -> bool:
    """Whether a value is in a text: as it is, as JSON, or as Python prints it."""
    spellings = [str(value), json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value)]
    if isinstance(value, str):
        spellings += [spelling[1:-1] for spelling in spellings[1:]]
    return any(spelling.strip() in text for spelling in spellings)


def _missing_word(calls: Sequence[dict[str, Any]], text: str) -> str | None:
    """A name or an argument of calls that a text lacks, in whichever way the template writes them."""
    functions = [call["function"] for call in calls]
    words = (word for function in functions for word in (function["name"], *leaves(function["arguments"])))
    return next((str(word) for word in words if not _spells(text, word)), None)


def _schema_words(schemas: Any) -> Iterator[str]:
    """The names, descriptions, parameters and choices in the schemas of functions."""
    left: list[Any] = [schemas]
    while left:
        item = left.pop(0)
        if is_object(item):
            properties = item.get("properties")
            parameters = properties if is_object(properties) else {}
            words = [item.get("name"), item.get("description"), *parameters, *leaves(item.get("enum"))]
            yield from (word for word in words if isinstance(word, str))
            left += [*parameters.values(), *(part for key, part in item.items() if key != "properties")]
        elif isinstance(item, (list, tuple)):
            left += item


def leaves(value: Any) -> Iterator[Any]:
    """Everything in a value of JSON that is no list and no object, the keys of objects included."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left += [*item.values(), *item]
        elif isinstance(item, (list, tuple)):
            left += item
        else:
            yield item
