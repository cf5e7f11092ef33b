"""One turn, or a list of turns, as people store them, in qalign's own form: a `Message`.

Known: OpenAI's messages (text parts, tool calls, thoughts, weights), sharegpt's `from` and `value`, Gemini's `parts`,
HH transcripts, and turns stored as text. What a turn holds beside role and content is read, or refuses the row.
"""

import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from qalign.data.readers import BadRow
from qalign.data.texts import (
    CALLS,
    CONTENT,
    EMPTY,
    SPEAKER,
    from_text,
    is_list,
    is_nothing,
    is_object,
    is_transcript,
    json_list,
    kind_of,
    listed,
    role_of,
    transcript,
    unpacked,
    unwrapped,
)
from qalign.errors import short

Message = dict[str, Any]
"""One turn of a dialogue: `role` (system, user, assistant or tool) and `content`, a text ("" where an assistant only
calls tools). It may have the texts `reasoning_content`, `name` and `tool_call_id`, and `tool_calls`, a list in OpenAI's
form with parsed arguments. It has no other keys."""
Turns = list[Message]

UNTRAINED = "untrained"  # key of an assistant's turn with `weight: 0`, until `qalign.data.formats` takes it out
_ASKS = {"input", "human", "user", "question", "query", "instruction", "prompt"}  # keys of a pair, as Capybara has it
_ANSWERS = {"output", "assistant", "gpt", "bot", "answer", "response", "completion"}
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts", "thought")
# How a text calls a tool: Hermes', Mistral's, Llama 3's, Glaive's and ToolACE's way.
_CALL_IN_TEXT = re.compile(
    r"<tool_call|<function|\[TOOL_CALLS\]|<\|python_tag\|>|[\"']name[\"']\s*:|^\s*+\[[\w .]+\(.*\)\]\s*$"
)
_TRAINED = ("weight", "train", "training", "loss")  # of OpenAI, Axolotl and ms-swift
_MEDIA = {"image": "images are", "audio": "audio is", "video": "videos are", "file": "files are"}
# Facts about a turn that no template reads. They are named in the header as not used; other unknown keys refuse a row.
_HARMLESS = re.compile(
    r"(.*_)?(id|ids|uuid|time|timestamp|date|tokens|token_count)|\w+_at|created|updated|index|idx|number|turn|turn_(index|number|identifier)"
    r"|rank|score|rating|source|model|model_(name|version)|lang|language|meta|metadata|hashed_ip|country|state|header|toxic|redacted"
    r"|annotations|citations|cache_control|signature"
)


def as_turns(value: Any, name: str, role: str = "user") -> Turns:
    """A text (perhaps an HH transcript), one turn or a list of turns, as turns; a `BadRow` if it is none of these. An
    empty system turn is none.

    `name` is the key that holds the value, for error messages; `role` is the role of a plain text.
    """
    value = unpacked(value, name)
    if isinstance(value, str):
        return transcript(value) if is_transcript(value) else [{"role": role, "content": value}]
    turns: Turns = []
    found = unwrapped(value, name)
    for item in found if is_list(found) else [found]:
        item = unpacked(item, name)
        if not is_object(item):
            raise BadRow(f"{name}: expected a text or turns, found {kind_of(value)}")
        turn = _turn({key: part for key, part in item.items() if part is not None}, name)
        if turn.pop(CALLS, False) and turns and turns[-1]["role"] == "assistant":
            _join(turns[-1], turn, name)
        elif turn["role"] != "system" or turn["content"].strip():
            turns.append(turn)
    return turns


def as_dialogue(value: Any, name: str) -> Turns:
    """The turns of a list in any spelling: turns, pairs of question and answer, or texts of the user and the assistant
    in turn (LIMA)."""
    value = unpacked(value, name)
    if isinstance(value, str):
        try:
            value = from_text(value, name)
        except BadRow:
            raise BadRow(f"{name}: expected a list of turns, found str") from None
    found = unwrapped(value, name)
    if not is_list(found):
        raise BadRow(f"{name}: expected a list of turns, found {type(found).__name__}")
    items = [unpacked(item, name) for item in found]
    pairs = [[item] if isinstance(item, str) else _pair(item) for item in items]
    texts = [text for pair in pairs for text in pair]
    if not all(pairs) or len(texts) not in (len(items), 2 * len(items)):
        return as_turns(items, name)
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def _pair(value: Any) -> list[str]:
    """[question, answer], also of an object with these two alone; empty for anything else."""
    if is_object(value):
        told = {key: text for key, text in value.items() if text is not None}
        value = [told[key] for keys in (_ASKS, _ANSWERS) for key in told if key in keys] if len(told) == 2 else []
    return [*value] if is_list(value) and len(value) == 2 and all(isinstance(text, str) for text in value) else []


def calls(turn: Message) -> bool:
    """Whether an assistant's turn calls a tool. Hermes' and Glaive's rows spell the call in the text."""
    return bool(turn.get("tool_calls") or (turn["role"] == "assistant" and _CALL_IN_TEXT.search(turn["content"])))


def is_empty(turn: Message) -> bool:
    """Whether a turn says nothing. A tool may return nothing, and a call needs no words."""
    return not (turn["content"].strip() or turn["role"] == "tool" or turn.get("tool_calls"))


def same(one: Message, other: Message, within: bool = False) -> bool:
    """Whether two turns are equal but for white space around the text, and `within` it."""
    return one == other or _bare(one, within) == _bare(other, within)


def _bare(turn: Message, within: bool) -> Message:
    return {
        key: (" ".join(value.split()) if within else value.strip()) if isinstance(value, str) else value
        for key, value in turn.items()
        if key != UNTRAINED
    }


def _join(turn: Message, calls: Message, name: str) -> None:
    """Adds the calls of sharegpt's `function_call` turns to the assistant's turn before, of which they are a part."""
    if turn.get(UNTRAINED) != calls.get(UNTRAINED):
        raise BadRow(f"{name}: an answer and its tool call have different weights")
    turn["tool_calls"] = [*turn.get("tool_calls", []), *calls["tool_calls"]]


def _turn(raw: dict[str, Any], name: str) -> Message:
    """One turn; `raw` is emptied of what is read."""
    if media := next((key for key in raw if raw[key] and medium(key)), None):
        raise BadRow(f"{name}: {medium(media)} not supported")
    speaker = take(raw, SPEAKER, name)
    role = role_of(speaker)
    if speaker is None:
        raise BadRow(f"{name}: a turn has no role" + (f"; it has {listed(raw)}" if raw else ""))
    if role is None:
        raise BadRow(
            f"{name}: unknown role {reprlib.repr(speaker)}; known: system, user, assistant, tool, human, gpt …"
        )
    content, calls = take(raw, CONTENT, name), _calls(raw, name)
    if role == CALLS:
        content, calls = "", [*calls, *_parsed_calls(content, name)]
    if content is None and not calls:
        raise BadRow(f"{name}: the {role}'s turn has no content" + (f"; it has {listed(raw)}" if raw else ""))
    text, thoughts = _text("" if content is None else content, name)
    turn: Message = {"role": "assistant" if role == CALLS else role, "content": text}
    raw |= {"thoughts in the content": thoughts}
    extras = {"reasoning_content": take(raw, (*_THOUGHTS, "thoughts in the content"), name), "tool_calls": calls}
    extras |= {"name": take(raw, ("name", "tool_name"), name), "tool_call_id": raw.pop("tool_call_id", None)}
    turn |= {key: _checked(key, value, turn["role"], name) for key, value in extras.items() if value}
    if _is_untrained(raw, turn["role"], name):
        turn[UNTRAINED] = True
    if unknown := [key for key, value in raw.items() if not is_harmless(key) and value not in EMPTY]:
        raise BadRow(
            f"{name}: a turn has {listed(unknown)}, which nothing here reads; remove it, or say it in the text"
        )
    return turn | {CALLS: True} if role == CALLS else turn


def take(raw: dict[str, Any], keys: Iterable[str], name: str) -> Any:
    """Removes and returns the value that stands under one of several keys; a `BadRow` if two hold different ones."""
    found = {key: raw.pop(key) for key in keys if key in raw}
    told = {key: value for key, value in found.items() if value not in EMPTY} or found
    values = list(told.values())
    if any(value != values[0] for value in values[1:]):
        raise BadRow(f"{name}: {listed(told)} mean the same, but differ")
    return values[0] if values else None


def is_harmless(key: Any) -> bool:
    """Whether a turn's key is a fact about it, such as an id or a time, which a row may have unused."""
    return isinstance(key, str) and _HARMLESS.fullmatch(key.lower()) is not None


def unread_keys(value: Any) -> Iterator[str]:
    """Keys of turns under a column that was read, which nothing reads: the harmless ones, as others refuse the row."""
    with suppress(BadRow):  # a text that is none of turns may look like turns
        turns = unwrapped(unpacked(value, ""), "")
        for turn in turns if is_list(turns) else [turns]:
            if is_object(turn) and any(key in turn for key in SPEAKER):
                yield from (key for key, part in turn.items() if part not in (None, *EMPTY) and is_harmless(key))


def _checked(key: str, value: Any, role: str, name: str) -> Any:
    if key in ("reasoning_content", "tool_calls") and role != "assistant":
        raise BadRow(f"{name}: the {role}'s turn has {key}; only an assistant's can")
    if key != "tool_calls" and not isinstance(value, str):
        raise BadRow(f"{name}: {key} is {type(value).__name__}, expected text")
    return value


def _is_untrained(raw: dict[str, Any], role: str, name: str) -> bool:
    given = {key: raw.pop(key) for key in _TRAINED if key in raw}
    if unclear := [key for key, value in given.items() if type(value) not in (bool, int, float) or value not in (0, 1)]:
        raise BadRow(f"{name}: {unclear[0]} is {reprlib.repr(given[unclear[0]])}; expected 1, or 0 for not trained on")
    if len({bool(value) for value in given.values()}) > 1:
        raise BadRow(f"{name}: {listed(given)} contradict each other")
    if role != "assistant" and any(given.values()):
        raise BadRow(f"{name}: {listed(given)}: the {role}'s turn can't be trained on; only the assistant's are")
    return role == "assistant" and bool(given) and not any(given.values())


# --- content ---------------------------------------------------------------------------------------------------------


def _text(content: Any, name: str) -> tuple[str, str]:
    """(text, thoughts) of a turn's content: a text, or parts that are texts."""
    content = _unpacked_parts(content)
    if isinstance(content, str):
        return content, ""
    if not is_list(content) and not is_object(content):
        raise BadRow(f"{name}: a turn's content is {type(content).__name__}, expected text")
    text, thoughts = "", ""
    for part in content if is_list(content) else [content]:
        said, is_thought = _part(part, name)
        text, thoughts = (text, thoughts + said) if is_thought else (text + said, thoughts)
    return text, thoughts


def _part(raw: Any, name: str) -> tuple[str, bool]:
    """(text, whether it is a thought) of one part of a turn's content."""
    if isinstance(raw, str):
        return raw, False
    part = {key: value for key, value in raw.items() if value is not None} if is_object(raw) else {}
    kind = part.pop("type", "text" if "text" in part else next(iter(part), type(raw).__name__))
    if unread := medium(kind):
        raise BadRow(f"{name}: {unread} not supported")
    is_thought = kind in ("thinking", "reasoning") or part.pop("thought", False) is True
    text = take(part, ("text", "content", "thinking", "reasoning"), name)
    if kind not in ("text", "input_text", "output_text", "thinking", "reasoning") or not isinstance(text, str):
        raise BadRow(f"{name}: a part of a turn's content is {reprlib.repr(kind)}; only text is supported")
    if unknown := [key for key, value in part.items() if not is_harmless(key) and value not in EMPTY]:
        raise BadRow(f"{name}: a part of a turn's content has {listed(unknown)}, which nothing here reads")
    return text, is_thought


def medium(kind: Any) -> str | None:
    """ "images are", if `kind` names images."""
    if not isinstance(kind, str) or is_harmless(kind):
        return None
    words = re.split(r"[^a-z]+", kind.lower())
    return next((are for word, are in _MEDIA.items() if {word, f"{word}s"} & {*words}), None)


def _unpacked_parts(value: Any) -> Any:
    """Parts of a turn's content that a file holds as JSON text, as a list; any other value as it is."""
    found = json_list(value)
    is_part = [
        is_object(part) and (medium(part.get("type")) or ("text", {"type", "text"}) == (part.get("type"), part.keys()))
        for part in found
    ]
    return found if is_part and all(is_part) else value


# --- tool calls ------------------------------------------------------------------------------------------------------


def _calls(raw: dict[str, Any], name: str) -> list[dict[str, Any]]:
    given = [raw.pop(key, None) for key in ("tool_calls", "function_call")]
    return [call for some in given if not is_nothing(some) for call in _parsed_calls(some, name)]


def _parsed_calls(given: Any, name: str) -> list[dict[str, Any]]:
    found = given
    if isinstance(given, str) and given.strip().startswith("<tool_call>"):
        found = [text for text in re.split(r"\s*</?tool_call>\s*", given) if text]
    found = _read(found, name)
    return [_call(_read(call, name), name) for call in (found if is_list(found) else [found])]


def _read(value: Any, name: str) -> Any:
    return from_text(value, name) if isinstance(value, str) and not is_nothing(value) else value


def _call(raw: Any, name: str) -> dict[str, Any]:
    """One call in OpenAI's form, with parsed arguments; `raw` may also be the function's part alone."""
    call: dict[str, Any] = dict(raw) if is_object(raw) else {}
    function = call.pop("function", None)
    call |= function if is_object(function) else {"name": function} if function else {}
    call = {key: value for key, value in call.items() if value is not None}
    kind, called, number = call.pop("type", "function"), call.pop("name", None), call.pop("id", None)
    arguments = take(call, ("arguments", "parameters", "args"), name)
    arguments = dict[str, Any]() if is_nothing(arguments) else _read(arguments, name)
    if (
        kind != "function"
        or not isinstance(called, str)
        or not is_object(arguments)
        or not is_json([arguments, number])
    ):
        raise BadRow(f"{name}: a tool call needs a function's name and an object of arguments, found {short(raw)}")
    if unknown := [key for key in call if not is_harmless(key)]:
        raise BadRow(f"{name}: a tool call has {listed(unknown)}, which nothing here reads")
    identity = {} if number is None else {"id": number}
    return {"type": "function", **identity, "function": {"name": called, "arguments": arguments}}


def as_tools(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    """A row's tools, schemas of functions, in OpenAI's form: one or a list, each and all perhaps as JSON text."""
    found: Any = _read(value, name)
    schemas: list[Any] = [] if is_nothing(value) or is_nothing(found) else found if is_list(found) else [found]
    tools = [_tool(_read(schema, name)) for schema in schemas]
    if not all(isinstance(tool["function"].get("name"), str) and is_json(tool) for tool in tools):
        raise BadRow(f"{name}: expected a list of function schemas, each with a name; found {short(value)}")
    return tuple(tools)


def _tool(schema: Any) -> dict[str, Any]:
    if not is_object(schema):
        return {"function": {}}
    if is_object(schema.get("function")):
        return schema
    return {"type": "function", "function": {key: value for key, value in schema.items() if key != "type"}}


def is_json(value: Any) -> bool:
    for _ in range(100):  # what renders it or prints it needs some depth of its own
        value = [value]
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # dates and bytes out of Parquet, for example
        return False
    return True
