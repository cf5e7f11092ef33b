"""Detects which keys of a raw row hold what; `qalign.data.formats` makes preferences, dialogues and prompts from it.

Known shapes: TRL's (plain or conversational, prompt explicit or shared by the answers), HH-RLHF transcripts,
UltraFeedback binarized, OpenAI messages and preferences, sharegpt, alpaca, KTO (a label), MT-bench, plain text.
"""

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from qalign.data.readers import BadRow

Message = dict[str, Any]
"""One turn of a dialogue: `role` (system, user, assistant or tool) and `content`, a text ("" where an assistant only
calls tools). It may have the texts `reasoning_content`, `name` and `tool_call_id`, and `tool_calls`, a list in OpenAI's
form with parsed arguments. It has no other keys."""
Turns = list[Message]
RawRow = dict[str, Any]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

# (key of the turns before, key of the answer or of the whole dialogue), in order of precedence.
_IMITATED = (
    (None, "messages"),
    (None, "conversations"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
)


@dataclass(frozen=True)
class Shape:
    """A raw row and the keys of its parts. A part is parsed only when it is needed."""

    row: RawRow  # without nulls, with which Parquet and `datasets` fill the columns that only other rows have
    chosen: Any  # the preferred answer as it came; None if the row has none
    rejected: Any
    opening: str | None  # key of the dialogue before the answers; None if there is none (ranked answers may share one)
    imitated: tuple[str | None, str] | None  # keys of the turns before, if any, and of the answer or whole dialogue

    @property
    def is_ranked(self) -> bool:
        return self.chosen is not None or self.rejected is not None

    @property
    def keys(self) -> str:
        """The row's keys for an error message: on one line, whatever characters they hold."""
        return ", ".join(str(key) if str(key).isprintable() else repr(key) for key in self.row) or "no keys"


def detect(raw: Any) -> Shape:
    """The shape of one raw row; a `BadRow` if it isn't an object with keys."""
    if not _is_object(raw):
        raise BadRow(f"expected an object with keys, found {type(raw).__name__}")
    row = {key: value for key, value in raw.items() if value is not None}
    chosen, rejected = _ranked(row)
    is_ranked = chosen is not None or rejected is not None
    return Shape(row, chosen, rejected, _opening_key(row, is_ranked), next(_imitated(row), None))


def _ranked(row: RawRow) -> tuple[Any, Any]:
    """(chosen, rejected) as they came; None for an answer that the row doesn't have."""
    if "preferred_output" in row:  # OpenAI's preference format
        return row["preferred_output"], row.get("non_preferred_output")
    both = row.get("output") if "instruction" in row and "prompt" not in row else None  # alpaca ranking
    chosen, rejected = both if _is_list(both) and len(both) == 2 else (None, None)
    return row.get("chosen", chosen), row.get("rejected", rejected)


def _imitated(row: RawRow) -> Iterator[tuple[str | None, str]]:
    yield from ((before, answer) for before, answer in _IMITATED if answer in row and (before is None or before in row))
    if is_transcript(row.get("text")):  # last: alpaca's first edition has the whole row in 'text' too, in a template
        yield None, "text"


def _opening_key(row: RawRow, is_ranked: bool) -> str | None:
    if "preferred_output" in row:
        return "input"
    # Some alpaca editions have a 'prompt' too: the row in a template, its output included.
    if "instruction" in row and ("prompt" not in row or ("output" in row and not is_ranked)):
        return "instruction"
    # 'prompt' first: UltraFeedback binarized also has 'messages', which hold the chosen answer too.
    keys = ["prompt", "conversations", "messages"]
    if not is_ranked:
        keys += ["turns", "text"] if is_transcript(row.get("text")) else ["turns"]
    return next((key for key in keys if key in row), None)


def opening_turns(row: RawRow, key: str | None) -> Turns:
    """The dialogue under `key`, if any, after the `system` column's turn, if any; a `BadRow` if it is no dialogue."""
    if key == "input":
        opening = row.get("input")
        return as_turns(opening.get("messages") if _is_object(opening) else opening, key)
    text = row.get("system")
    system: Turns = [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []
    if key is None:
        return system
    if key == "instruction":
        return [*system, *_instruction(row)]
    if key == "turns":  # MT-bench: the second question is about the answer to the first
        questions = row[key]
        if not _is_list(questions) or not questions or not isinstance(questions[0], str):
            raise BadRow("turns: expected a list of the user's texts")
        return [*system, {"role": "user", "content": questions[0]}]
    turns = as_turns(row[key], key)
    if key != "text" and turns and turns[-1] == {"role": "assistant", "content": ""}:  # HH's prompts end "Assistant:"
        turns.pop()
    return system + turns


def _instruction(row: RawRow) -> Iterator[Message]:
    """Alpaca's `history`, a list of [question, answer], then its `instruction` with its `input`."""
    parts = [row.get(key, "") for key in ("instruction", "input")]
    if not all(isinstance(part, str) for part in parts):
        raise BadRow("instruction and input: expected texts")
    pairs = row.get("history", [])
    for pair in pairs if _is_list(pairs) else [pairs]:
        if not _is_list(pair, tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow("history: expected a list of [question, answer] texts")
        yield {"role": "user", "content": pair[0]}
        yield {"role": "assistant", "content": pair[1]}
    yield {"role": "user", "content": "\n".join(part for part in parts if part.strip())}


def split_prompt(opening: Turns, chosen: Any, rejected: Any) -> tuple[Turns, Turns, Turns]:
    """(prompt, chosen, rejected) as turns; a `BadRow` if there is no prompt. Answers lose the prompt that they repeat.

    Without an `opening`, the prompt is what both answers begin with: of an answer given twice, all but its last turn.
    """
    if not opening and isinstance(chosen, str) and isinstance(rejected, str):
        if "\n\nHuman:" not in chosen:
            raise BadRow("no prompt: expected a 'prompt', 'conversations' or 'messages' key, or HH transcripts")
        chosen, rejected = _transcript(chosen), _transcript(rejected)
    chosen, rejected = as_turns(chosen, "chosen", "assistant"), as_turns(rejected, "rejected", "assistant")
    asked = [turn for turn in opening if turn["role"] != "system"]
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not asked and not shared:
        raise BadRow("the prompt is empty, and chosen and rejected do not share one")
    repeated = chosen[:shared]
    if [turn for turn in repeated if turn["role"] != "system"][: len(asked)] != asked:
        return opening, chosen, rejected
    system = [turn for turn in opening if turn["role"] == "system"]
    prompt = repeated if repeated and repeated[0]["role"] == "system" else system + repeated
    return prompt, chosen[shared:], rejected[shared:]


def as_turns(value: Any, name: str, role: str = "user") -> Turns:
    """A text (perhaps an HH transcript), one turn or a list of turns, as turns; a `BadRow` if it is none of these.

    `name` is the key that holds the value, for error messages; `role` is the role of a plain text.
    """
    if isinstance(value, str):
        return _transcript(value) if is_transcript(value) else [{"role": role, "content": value}]
    turns: Turns = []
    for item in value if _is_list(value) else [value]:
        if not _is_object(item):
            raise BadRow(f"{name}: expected a text or turns, found {type(value).__name__}")
        turn = {key: part for key, part in item.items() if part is not None}
        speaker, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise BadRow(f"{name}: unknown role {reprlib.repr(speaker)}; known: {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise BadRow(f"{name}: a turn's content is {type(content).__name__}, expected text")
        turns.append({"role": _ROLES[speaker], "content": content})
    return turns


def is_transcript(text: Any) -> bool:
    """Whether a value is an HH-RLHF transcript: `\\n\\nHuman: … \\n\\nAssistant: …`."""
    return isinstance(text, str) and text.startswith("\n\nHuman:")


def _transcript(text: str) -> Turns:
    before, *spoken = text.split("\n\nHuman:")
    if before.strip():
        raise BadRow("the transcript has text before its first 'Human:' turn")
    turns: Turns = []
    for human in spoken:
        said, *replies = human.split("\n\nAssistant:")
        turns.append({"role": "user", "content": said.strip()})
        turns += ({"role": "assistant", "content": reply.strip()} for reply in replies)
    return turns


def _is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _is_list(value: Any, *kinds: type) -> TypeGuard[list[Any]]:
    return isinstance(value, (list, *kinds))
