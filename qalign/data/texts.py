"""Texts as files hold them: turns written as text (HH transcripts, JSON, lists of pandas and NumPy), and bad texts."""

import ast
import io
import json
import re
import reprlib
import tokenize
from collections.abc import Iterable, Iterator
from typing import Any

from qalign.data.readers import BadRow, is_list, is_object

SPEAKER, CONTENT = ("role", "from"), ("content", "value", "text", "parts")  # keys of a turn
EMPTY: tuple[Any, ...] = ("", [], {})  # CSV and Parquet files give a column to all rows if one has it

# Possessive (`*+`): without it a text of many blanks takes hours.
OBJECTS = re.compile(r"""\s*+(array\()?+[\[(]?+\s*+\{\s*+["']\w+["']\s*+:""")
LONGEST_PYTHON = 1_000_000  # characters: Python's own parser takes a hundred times as much memory, and a minute
_SPOKEN = re.compile(
    r"""["'](role|from)["']\s*:\s*["'](user|assistant|system|human|gpt|model|tool)["']""", re.IGNORECASE
)
# What the chat templates of ChatML, Llama 2, Llama 3, Mistral, Gemma, Phi and Zephyr write around a turn.
_BEGINNING = re.compile(
    r"\s*+(<s>|<bos>|<\|begin_of_text\|>)?+\s*+"
    r"(<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|(system|user|assistant)\|>)"
)
_END = re.compile(r"(<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|end\|>|\[/INST\]) *\n?$")


def is_transcript(text: Any) -> bool:
    """Whether a value is an HH-RLHF transcript: `\\n\\nHuman: … \\n\\nAssistant: …`."""
    return isinstance(text, str) and text.startswith("\n\nHuman:")


def transcript(text: str) -> list[dict[str, Any]]:
    """The turns of an HH transcript; a `BadRow` if it has text before them."""
    before, *spoken = text.split("\n\nHuman:")
    if before.strip():
        raise BadRow("the transcript has text before its first 'Human:' turn")
    turns: list[dict[str, Any]] = []
    for human in spoken:
        said, *replies = human.split("\n\nAssistant:")
        turns.append({"role": "user", "content": said.strip()})
        turns += ({"role": "assistant", "content": reply.strip()} for reply in replies)
    return turns


def unpacked(value: Any, name: str) -> Any:
    """Turns that a CSV or Parquet file holds as text, as a list or an object; any other value as it is."""
    if not isinstance(value, str) or not OBJECTS.match(value):
        return value
    try:
        found = from_text(value, name)
    except BadRow:
        if _SPOKEN.search(value):
            raise BadRow(f"{name}: looks like turns stored as text, but is neither JSON nor a Python list") from None
        return value
    items = found if is_list(found) else [found]
    needed = (SPEAKER, (*CONTENT, "tool_calls", "function_call"))
    is_turns = all(is_object(item) and all(any(key in item for key in keys) for keys in needed) for item in items)
    return found if is_turns else value


def from_text(text: str, name: str) -> Any:
    """What a text spells as JSON, or as Python, the way pandas and NumPy write lists; a `BadRow` if it is neither."""
    readers = (json.loads, ast.literal_eval, _numpy)
    for read in readers if len(text) < LONGEST_PYTHON else readers[:1]:
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError):
            continue
    raise BadRow(f"{name}: {short(text)} is neither JSON nor a Python list")


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


def short(value: Any) -> str:
    return reprlib.repr(value)[:80]


def check_not_templated(text: str) -> None:
    """A text that was put through a chat template would be learned with the marks of that template in it."""
    if mark := _BEGINNING.match(text) or _END.search(text):
        mark = mark[0].strip()[:20]
        raise BadRow(f"the text was put through a chat template ({mark} …); give it as messages, without a template")


def check_text(texts: Iterable[str]) -> None:
    """Requires valid Unicode: JSON can spell half a character (a lone surrogate), which raises a `BadRow`."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"the text is not valid Unicode: {error.reason} ({error.object[error.start]!r})") from None
