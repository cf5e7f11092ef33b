"""Is every part of a row in the text that a chat template makes of it?

A template leaves out what it has no place for without an error. Each part is looked for in the rendered text, and a row
of which one is missing is refused. Only white space at the ends of a part doesn't count, as templates trim it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from qalign.data.messages import Message
from qalign.data.readers import BadRow, is_object
from qalign.data.templates import MOVE_IT, ChatTemplate, call_of
from qalign.errors import short

PROBES = {"content": "probe of an answer", "reasoning_content": "probe of a thought", "tool_calls": "probe_call"}
MARKS = {"content": "probe {}.", "name": "name{:05}", "tool_call_id": "call{:05}"}  # Mistral's ids have 9 characters
THOUGHT_TAG = re.compile(r"(</?(?:think|thinking|thought|reasoning)>)")
FLAG = re.compile(r"/\w+")  # such as SmolLM3's /no_think, which its template takes out of a system turn


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
