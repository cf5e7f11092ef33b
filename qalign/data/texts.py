"""Texts as files hold them: turns written as text (HH transcripts, JSON, lists of pandas and NumPy), and bad texts."""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterable, Iterator
from typing import Any

from qalign.data.readers import BadRow, is_list, is_object
from qalign.errors import short

DIALOGUES = ("messages", "conversations", "conversation", "contents")  # keys of a list of turns
SPEAKER, CONTENT = ("role", "from"), ("content", "value", "text", "parts")  # keys of a turn
EMPTY: tuple[Any, ...] = ("", [], {})  # CSV and Parquet files give a column to all rows if one has it
TOOLS = ("tools", "functions")  # columns
LABELS = ("label", "kto_tag", "desirable", "thumb", "feedback")  # columns that say whether an answer is good
_GOOD = frozenset(["true", "1", "1.0", "yes", "good", "up", "thumbs_up", "positive", "like", "desirable", "👍"])
_BAD = frozenset(
    ["false", "0", "0.0", "-1", "-1.0", "no", "bad", "down", "thumbs_down", "negative", "dislike", "undesirable", "👎"]
)
CALLS = "calls"  # sharegpt's speaker of tool calls, who is the assistant
_NAMES = {
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt bard bing model ai bot chatbot agent",
    "system": "system developer",
    "tool": "tool function observation environment ipython tool_response function_response tool_result function_result"
    " tool_results",
    CALLS: "function_call tool_call",
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}

LONGEST_PYTHON = 1_000_000  # characters: Python's own parser takes a hundred times as much memory, and a minute
# How stored turns begin and what they hold, well written or not: with doubled, escaped, curly or no quotes, in YAML, or
# as Python prints objects. Possessive (`*+`): without it a text of many blanks takes hours.
_QUOTES = r"""(?:["'`\\“”‘’]|&quot;|&#3[49];)"""
_KNOWN = f"(?:{'|'.join(sorted(_ROLES, reverse=True)).replace('_', '[ _-]')})"
_ROLE = rf"(?:role|from){_QUOTES}*+\s*+[:=]\s*+[\[<]?\s*+(?:\w+\.)?{_QUOTES}*+{_KNOWN}"
_STORED = re.compile(
    rf"(?:array\(|[\[(\s]|{_QUOTES})*+"
    rf"(?:\{{\s*+{_QUOTES}*+\w+{_QUOTES}*+\s*+[:=]|\w*Message\(|(?:(?<=\[)\w+\()?(?:role|from|content)\s*+="
    rf"|{_KNOWN}{_QUOTES}++\s*+,)",
    re.IGNORECASE,
)
_SPOKEN = re.compile(
    rf"\b{_ROLE}(?![\w@.-])|[\[(]\s*+{_QUOTES}++{_KNOWN}{_QUOTES}++\s*+,|\b(?:Human|AI|System|User|Assistant)Message\(",
    re.IGNORECASE,
)
_YAML = re.compile(
    rf"(?:\w+:\s*+)?(?:- *)?(?:{_ROLE}{_QUOTES}*+[ \r]*\n[ -]*(?:content|value|text):"
    rf"|(?:content|value|text):[^\n]*\n(?:[ \t]+[^\n]*\n)*[ ]*{_ROLE}{_QUOTES}*+[ \r]*(?:\n|\Z))"
)
# Who speaks in a transcript: HH-RLHF's, with any line ends, and Guanaco's, `### Human: … ### Assistant: …`; others
# write `User:` or `USER:`.
_ASKED = re.compile(r"[\s\ufeff]*?(\r?\n\r?\n|### ?)?(Human|User|USER):")
_SPEAKERS = {
    mark: re.compile(rf"(?:\A[\s\ufeff]*+(?:### ?)?|{mark})(Human|User|USER|Assistant|ASSISTANT):")
    for mark in (r"\r?\n\r?\n", "### ?")
}
# What chat templates write around a turn: `<|im_start|>`, `<｜User｜>`, `<turn|>`, `[|user|]` … A mark without a part
# of `_SIDE` in its name may belong to an answer: <|begin_of_thought|>, <|tool_call|>, <|fim_prefix|>.
_SIDE = (
    r"(?<![a-z])im_|(?:[be]o[stm]|bot|chatbot)(?![a-z])|user|human|assistant|system|observation|role|turn|header|message"
    r"|channel|sentence|of_?text"
)
_NAME = rf"(?:start|begin|end|[^\s<>|｜]{{0,40}}?(?:{_SIDE})[^\s<>|｜]{{0,40}})"
_MARK = (
    rf"(?:[<\[][|｜]{_NAME}[|｜]?[>\]]|<{_NAME}[|｜]>|<\w{{1,9}}_of_turn>|<<SYS>>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|gMASK)\])"
)
_TEMPLATED = re.compile(rf"\A\s*+(?:<(?:s|(?:\w+:)?bos|BOS_TOKEN)>\s*+)?{_MARK}|{_MARK} *\n?\Z", re.IGNORECASE)


def role_of(speaker: Any) -> str | None:
    """The role that a speaker's name means, however it is written: `Tool-Response:` is a tool's."""
    return _ROLES.get(re.sub(r"[\s_-]+", "_", speaker.strip(" :.\n").lower())) if isinstance(speaker, str) else None


def is_blank(value: Any) -> bool:
    """Whether a cell is empty; pandas has NaN there."""
    return value is None or value in EMPTY or value != value or (isinstance(value, str) and not value.strip())


def is_nothing(value: Any) -> bool:
    """Whether a cell is empty or says so, where no text can stand: `nan`, `null` …"""
    return is_blank(value) or (isinstance(value, str) and value.strip().lower() in ("nan", "none", "null"))


def as_label(value: Any) -> bool | None:
    """Whether a label says good or bad, as a boolean, a number or a word; None if it says neither. A CSV has texts."""
    word = str(value).strip().lower().replace(" ", "_")
    return True if word in _GOOD else False if word in _BAD else None


def without_nulls(value: Any, within: bool = False) -> Any:
    """A row without the nulls `within` tool calls and tools: Parquet gives every object all keys that any row's has."""
    if is_list(value):
        return [without_nulls(item, within) for item in value]
    if not is_object(value):
        return value
    return {
        key: without_nulls(item, within or key in ("tool_calls", "function_call", *TOOLS))
        for key, item in value.items()
        if not (within and item is None)
    }


def is_transcript(text: Any) -> bool:
    """Whether a value is a transcript: `\\n\\nHuman: … \\n\\nAssistant: …`, perhaps without the line before it."""
    asked = _ASKED.match(text) if isinstance(text, str) else None
    if asked is None:
        return False
    sure = asked[2] == "Human" and (asked[1] or "#")[0] != "#"
    return sure or any(role_of(name) == "assistant" for name in _speakers(text).findall(text))


def _speakers(text: str) -> re.Pattern[str]:
    return _SPEAKERS["### ?" if text.lstrip("\ufeff \t\r\n").startswith("#") else r"\r?\n\r?\n"]


def transcript(text: str) -> list[dict[str, Any]]:
    """The turns of a transcript; a `BadRow` if it has text before them."""
    before, *spoken = _speakers(text).split(text)
    if before.strip() or (spoken and role_of(spoken[0]) == "assistant"):
        raise BadRow("the transcript has text before its first 'Human:' turn")
    turns = zip(spoken[::2], spoken[1::2], strict=True)
    return [{"role": role_of(name), "content": said.strip()} for name, said in turns]


def unpacked(value: Any, name: str) -> Any:
    """Turns that a file holds as text, as a list or an object; any other value as it is. A `BadRow` if a text is
    spoken turns from its beginning on, but can't be read: it would be learned as an answer."""
    if not isinstance(value, str):
        return value
    text = value.strip("\ufeff \t\r\n")
    if (fenced := re.fullmatch(r"```\w*\s*\n(.*)```", text, re.DOTALL)) and "```" not in fenced[1]:
        text = fenced[1].strip()
    if not (_YAML.match(text) or (_STORED.match(text) and _SPOKEN.search(text))):
        return value
    try:
        found = from_text(text, name)
    except BadRow:
        if _goes_on_in_prose(text):
            return value
        raise BadRow(f"{name}: looks like turns stored as text, but is neither JSON nor a Python list") from None
    found = unwrapped(found, name)
    return found if any(_is_turn(unpacked(item, name)) for item in (found if is_list(found) else [found])) else value


def _goes_on_in_prose(text: str) -> bool:
    """Whether a text is JSON and then words, such as an answer that explains what it shows."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return text[end:].lstrip(" \t\r\n,;")[:1].isalpha()


def unwrapped(value: Any, name: str) -> Any:
    """Turns out of what may stand around them: a text of its own, a list of one list, `{"messages": …}`, a list of
    [role, text], and columns of lists, as Arrow has them."""
    for _ in range(3):
        if isinstance(value, str):
            value = from_text(value, name)
        elif is_list(value) and value and all(map(_is_role_and_text, value)):
            return [{"role": role, "content": text} for role, text in value]
        elif is_list(value) and len(value) == 1 and (is_list(value[0]) or _wrapper(value[0])):
            value = value[0]
        elif is_object(value) and (key := _wrapper(value)):
            if others := [other for other in value if other != key and value[other] not in (None, *EMPTY)]:
                raise BadRow(f"{name}: holds {key} and {listed(others)}; give each a column of its own")
            value = value[key]
    if is_object(value) and any(is_list(value.get(key)) for key in SPEAKER):
        lists = {key: parts for key, parts in value.items() if is_list(parts)}
        if len({len(parts) for parts in lists.values()}) == 1 and len(lists) == len(value):
            return [dict(zip(lists, parts, strict=True)) for parts in zip(*lists.values(), strict=True)]
    return value


def _wrapper(value: Any) -> str | None:
    return next((key for key in DIALOGUES if is_object(value) and key in value), None)


def _is_role_and_text(value: Any) -> bool:
    return is_list(value) and len(value) == 2 and role_of(value[0]) is not None and isinstance(value[1], str)


def _is_turn(value: Any) -> bool:
    keys = (*CONTENT, "tool_calls", "function_call")
    return is_object(value) and any(role_of(value.get(key)) for key in SPEAKER) and any(key in value for key in keys)


def from_text(text: str, name: str) -> Any:
    """What a text spells as JSON, or as Python, the way pandas and NumPy write lists; a `BadRow` if it is neither."""
    readers = (json.loads, ast.literal_eval, _numpy)
    for read in readers if len(text) < LONGEST_PYTHON else readers[:1]:
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError):
            continue
    raise BadRow(f"{name}: {short(text)} is neither JSON nor a Python list")


def json_list(value: Any) -> list[Any]:
    """The list that a text spells as JSON; empty if it spells none."""
    if not (isinstance(value, str) and value.startswith("[")):
        return []
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return []


def _numpy(text: str) -> Any:
    """NumPy writes an array of objects without commas: `[{…}\\n {…}]`, or as `array([…], dtype=object)`."""
    inside = re.fullmatch(r"array\((.*?)(,\s*dtype=object)?\)", text, re.DOTALL)

    def tokens() -> Iterator[str]:
        before = ""
        for token in tokenize.generate_tokens(io.StringIO(inside[1] if inside else text).readline):
            if before == "}" and token.string == "{":
                yield ","
            yield token.string
            before = token.string if token.string.strip() else before

    return ast.literal_eval(" ".join(tokens()).strip())


def kind_of(value: Any) -> str:
    """A value's type, and the type of its items if they have one: `list of str`."""
    inside: set[str] = {type(item).__name__ for item in value} if is_list(value) else set()
    return type(value).__name__ + (f" of {inside.pop()}" if len(inside) == 1 else "")


def listed(names: Iterable[Any]) -> str:
    """Names as a list, on one line, whatever characters they hold."""
    printable = [str(name) if str(name).isprintable() else repr(name) for name in names]
    short_ones = [name if len(name) <= 40 else f"{name[:39]}…" for name in printable]
    return ", ".join(short_ones[:12]) + (f" and {len(short_ones) - 12} more" if len(short_ones) > 12 else "")


def check_not_templated(text: str) -> None:
    """A text that was put through a chat template would be learned with the marks of that template in it."""
    if mark := _TEMPLATED.search(text):
        found = mark[0].strip()[:20]
        raise BadRow(f"the text was put through a chat template ({found} …); give it as messages, without a template")


def check_text(texts: Iterable[str]) -> None:
    """Requires valid Unicode: JSON can spell half a character (a lone surrogate), which raises a `BadRow`."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"the text is not valid Unicode: {error.reason} ({error.object[error.start]!r})") from None
