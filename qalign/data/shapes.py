"""Detects which keys of a raw row hold what; `qalign.data.formats` makes preferences, dialogues and prompts from it.

Known shapes: TRL's (plain or conversational, prompt explicit or shared by the answers), HH-RLHF transcripts,
UltraFeedback binarized, OpenAI messages and preferences, sharegpt, alpaca, two answers with a winner, KTO (a label),
MT-bench, questions with answers, plain text.
"""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from qalign.data.messages import Turns, as_dialogue, as_tools, as_turns, medium, same, take
from qalign.data.readers import BadRow, NoPair
from qalign.data.texts import (
    DIALOGUES,
    EMPTY,
    LABELS,
    TOOLS,
    check_text,
    from_text,
    is_blank,
    is_list,
    is_nothing,
    is_object,
    is_transcript,
    json_list,
    listed,
    transcript,
    unpacked,
)
from qalign.errors import short

_REQUESTS = ("instruction", "question", "query")  # texts that an `input` or a `context` may complete
_SYSTEM = (
    *("system", "system_prompt", "system_message", "sys_prompt", "systemPrompt"),
    *("system_instruction", "systemInstruction"),  # Gemini's
)
# (key of the turns before, key of the answer), in order of precedence.
OPENINGS = ("prompt", *DIALOGUES, "turns", "question", "query", "input", "instruction")
_ANSWERED = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    *product(("prompt", *_REQUESTS, "input"), ("completion", "response", "output", "answer")),
)
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_STEMS = ("conversation", "response", "answer", "completion", "output")  # of two answers, and their endings
_SIDES = (("a", "b"), ("0", "1"), ("1", "2"), ("j", "k"))
REJECTED = ("rejected", "non_preferred_output")
_WINNERS = ("winner", "better_response_id", "preferred", "preference")
_ABSENT_IF_EMPTY = ("history", *LABELS)


class RawRow(dict[str, Any]):
    """A raw row that notes which of its keys were read. `in` and iteration read nothing."""

    def __init__(self, raw: dict[str, Any]):
        super().__init__(raw)
        self.read: set[str] = raw.read if isinstance(raw, RawRow) else set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]

    def peek(self, key: str) -> Any:
        """The value of a key, which doesn't count as read."""
        return super().get(key)


@dataclass(frozen=True)
class Shape:
    """A raw row and the keys of its parts. A part is parsed only when it is needed."""

    row: RawRow  # without nulls, with which Parquet and `datasets` fill the columns that only other rows have
    chosen: Any  # the preferred answer as it came; None if the row has none
    rejected: Any
    no_pair: BadRow | None  # why the two answers are no preference: a tie, or none is named as the better one
    opening: str | None  # key of the dialogue before the answers; None if there is none (ranked answers may share one)
    imitated: tuple[str | None, str] | None  # keys of the turns before, if any, and of the answer or whole dialogue

    @property
    def is_ranked(self) -> bool:
        return self.chosen is not None or self.rejected is not None

    @property
    def keys(self) -> str:
        """The row's keys for an error message."""
        return listed(self.row) or "no keys"


def detect(raw: Any) -> Shape:
    """The shape of one raw row; a `BadRow` if it isn't an object with keys, or not one of texts."""
    if not is_object(raw):
        raise BadRow(f"expected an object with keys, found {type(raw).__name__}")
    row = RawRow(raw)
    for key, value in raw.items():
        if value is None or (key in _ABSENT_IF_EMPTY and is_nothing(value)):
            del row[key]
    for key in _MEDIA:
        if row.peek(key) not in (None, *EMPTY):
            raise BadRow(f"{key}: {medium(key)} not supported")
    _system(row)
    filled = RawRow(row)  # in a file of several shapes, each row leaves the columns of the others empty
    for key in row:
        if is_blank(row.peek(key)) and not (key in _REQUESTS and _told(row)):
            del filled[key]
    shape, other = _shape(row), replace(_shape(filled), row=row)
    answers = (other.chosen is not None, other.rejected is not None)
    is_whole = all(answers) or (not any(answers) and (other.imitated or ("text" in filled and not other.opening)))
    found = other if is_whole else shape
    if shape.opening and not other.opening and (not isinstance(found.chosen or "", str) or _is_dialogue(row, "chosen")):
        return replace(found, opening=None)  # its empty prompt is another shape's: the answers hold their own
    return replace(found, opening=other.opening or shape.opening)


def _shape(row: RawRow) -> Shape:
    chosen, rejected, no_pair = _ranked(row)
    is_ranked = chosen is not None or rejected is not None
    return Shape(row, chosen, rejected, no_pair, _opening_key(row, is_ranked), next(_imitated(row), None))


def _ranked(row: RawRow) -> tuple[Any, Any, BadRow | None]:
    """(chosen, rejected) as they came, None for an answer that the row doesn't have, and why they are no preference."""
    if "preferred_output" in row:  # OpenAI's preference format
        return row["preferred_output"], row.get("non_preferred_output"), None
    if "chosen" in row or "rejected" in row:
        return row.get("chosen"), row.get("rejected"), None
    answers = row.peek("output") if "instruction" in row and "prompt" not in row else None  # alpaca ranking
    if is_list(answers) and len(answers) == 2:
        return *row["output"], None
    if is_list(answers) and all(isinstance(answer, str) for answer in answers):
        return None, None, BadRow(f"output: expected two answers, the better one first, found {len(answers)}")
    return _contest(row)


def _contest(row: RawRow) -> tuple[Any, Any, BadRow | None]:
    """Two answers under `conversation_a` and `conversation_b`, `response_0` and `response_1` and the like, and which
    one won: LMSYS's arenas, PKU-SafeRLHF, HelpSteer. (Of `response_j` and `response_k`, j is the better one.)"""
    for stem, (one, two) in product(_STEMS, _SIDES):
        first, second = f"{stem}_{one}", f"{stem}_{two}"
        if first in row and second in row:
            break
    else:
        return None, None, None
    lists = [json_list(row.peek(key)) for key in ("prompt", first, second)]
    if all(lists) and all(isinstance(text, str) for texts in lists for text in texts):  # Kaggle's edition
        raise BadRow(f"prompt, {first}, {second}: lists of texts, stored as text; write one prompt and its answers")
    winner = one if one == "j" else _winner(row, one, two)
    if winner is None:
        return None, None, BadRow(f"no 'winner' says which answer is better; this row has {listed(row)}")
    first, second = row[first], row[second]
    if winner in (one, f"model_{one}", f"{stem}_{one}"):
        return first, second, None
    if winner in (two, f"model_{two}", f"{stem}_{two}"):
        return second, first, None
    if winner.startswith("tie") or winner in ("draw", "both", "neither", "none", "both_bad", "bothbad", "equal"):
        return first, second, NoPair("a tie")
    return first, second, BadRow(f"winner: expected {one}, {two} or tie, found {short(winner)}")


def _winner(row: RawRow, one: str, two: str) -> str | None:
    flags = {side: row.get(f"winner_model_{side}") for side in (one, two)} | {"tie": row.get("winner_tie")}
    for side, flag in flags.items():  # Kaggle's edition of LMSYS's arena
        if flag is not None and str(flag).lower() in ("1", "1.0", "true"):
            return side
    value = next((row[key] for key in _WINNERS if key in row), None)
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return None if value is None else str(value).strip().lower()


def _imitated(row: RawRow) -> Iterator[tuple[str | None, str]]:
    yield from ((None, key) for key in DIALOGUES if key in row)
    yield from ((before, answer) for before, answer in _ANSWERED if before in row and answer in row)
    if _is_dialogue(row, "text"):  # last: alpaca's first edition has the whole row in 'text' too, in a template
        yield None, "text"


def _is_dialogue(row: RawRow, key: str) -> bool:
    text = row.peek(key)
    return is_transcript(text) or unpacked(text, key) is not text


def _opening_key(row: RawRow, is_ranked: bool) -> str | None:
    if "preferred_output" in row:
        return "input" if "input" in row else None
    # Some alpaca editions have a 'prompt' too: the row in a template, its output included.
    if "instruction" in row and ("prompt" not in row or ("output" in row and not is_ranked)):
        return "instruction"
    # 'prompt' first: UltraFeedback binarized also has 'messages', which hold the chosen answer too.
    if found := next((key for key in OPENINGS if key in row and not (is_ranked and key == "turns")), None):
        return found
    return "text" if not is_ranked and _is_dialogue(row, "text") else None


def opening_turns(row: RawRow, key: str | None) -> Turns:
    """The dialogue under `key`, if any, after the system prompt, if any; a `BadRow` if it is no dialogue."""
    return with_system(row, _opening(row, key) if key else [])


def with_system(row: RawRow, turns: Turns) -> Turns:
    """Turns after the row's own system prompt, if it has one; a `BadRow` if they begin with another."""
    row.read.update(key for key in _SYSTEM if key in row)
    system = _system(row)
    if not system or not turns or turns[0]["role"] != "system":
        return system + turns
    if not same(system[0], turns[0], within=True):
        raise BadRow("two system prompts that differ: a column, and the dialogue's first turn")
    return turns


def _system(row: RawRow) -> Turns:
    """The turn of a `system` column, which is none if it is empty."""
    found = {key: row.peek(key) for key in _SYSTEM if not is_nothing(row.peek(key))}
    for key, value in found.items():
        text = unpacked(value, key)
        if text is not value or (is_object(text) and "parts" in text):  # turns stored as text, and Gemini's turn
            turns = as_turns(text | {"role": "system"} if is_object(text) else text, key)
            if others := [turn["role"] for turn in turns if turn["role"] != "system"]:
                raise BadRow(f"{key}: expected a text, found turns of the {others[0]}")
            text = found[key] = "".join(turn["content"] for turn in turns)
        if not isinstance(text, str):
            raise BadRow(f"{key}: expected a text, found {type(text).__name__}")
    text = take(found, _SYSTEM, "the row")
    return [{"role": "system", "content": text}] if text else []


def tools(row: RawRow) -> tuple[dict[str, Any], ...]:
    """The functions that the row says may be called."""
    if "preferred_output" in row and is_object(opening := row.peek("input")):
        found = as_tools(opening.get("tools"), "input.tools")
    else:
        found = next((found for key in TOOLS if key in row and (found := as_tools(row[key], key))), ())
    check_text([json.dumps(found, ensure_ascii=False)])
    return found


def score_margin(row: RawRow) -> float | None:
    """How much better the row's own scores say that the chosen answer is; None if it hasn't both as finite numbers."""
    margin = _number(row.get("score_chosen")) - _number(row.get("score_rejected"))
    return margin if math.isfinite(margin) else None


def chosen_probability(row: RawRow) -> float:
    """Of a preference row, the probability that its chosen answer is the better one; 1 if the row doesn't say."""
    value = row.get("chosen_probability")
    if value is None or (
        isinstance(value, str) and not value.strip()
    ):  # NaN is no missing cell here: it may be a fault
        return 1.0
    if not 0 <= (found := _number(value)) <= 1:
        raise BadRow(f"chosen_probability: expected a number from 0 to 1, found {short(value)}")
    return found


def _number(value: Any) -> float:
    """A score, NaN if it is none; a CSV has numbers as texts. (Not isinstance: True is an int too, but no score.)"""
    try:
        return float(value) if type(value) in (int, float, str) else math.nan
    except (ValueError, OverflowError):  # JSON has integers beyond every float
        return math.nan


def _opening(row: RawRow, key: str) -> Turns:
    value = row[key]
    if key == "turns":  # MT-bench: the second question is about the answer to the first
        if not is_list(value) or not value or not isinstance(value[0], str):
            raise BadRow("turns: expected a list of the user's texts")
        return [{"role": "user", "content": value[0]}]
    if key == "input":  # OpenAI's preferences have the messages in it
        value = from_text(value, key) if isinstance(value, str) and value.lstrip().startswith('{"messages"') else value
        value = value.get("messages") if is_object(value) and "messages" in value else value
    value = unpacked(value, key)
    if key == "instruction" and not (isinstance(value, str) or value is not row[key]):
        raise BadRow("instruction and input: expected texts")
    is_text = isinstance(value, str)
    value = _request(row, key, value) if is_text and key in ("prompt", *_REQUESTS) else value
    turns = as_dialogue(value, key) if key in DIALOGUES else as_turns(value, key)
    if key != "text" and turns and turns[-1] == {"role": "assistant", "content": ""}:  # HH's prompts end "Assistant:"
        turns.pop()
    return [*_history(row["history"]), *turns] if is_text and "history" in row else turns


def _request(row: RawRow, key: str, text: str) -> str:
    """An instruction or question with its `input`; Dolly's and question answering's is a `context`. A prompt may hold
    it already."""
    names = _told(row)
    if key == "prompt" and (not names or row.peek(names[0]) in text or any(name in row for name in _REQUESTS)):
        return text
    more = row[names[0]] if names else row.get("input", "")
    if not isinstance(more, str) and not is_blank(more):
        raise BadRow("instruction and input: expected texts")
    return "\n".join(part for part in (text, more) if part.strip()) if names else text


def _told(row: RawRow) -> list[str]:
    """Names of the texts that complete an instruction or a question, the one that counts first."""
    return [name for name in ("input", "context") if isinstance(row.peek(name), str) and not is_blank(row.peek(name))]


def _history(value: Any) -> Turns:
    """The turns before a request: a list of [question, answer], as alpaca has it, or of turns."""
    with suppress(BadRow):
        turns = as_dialogue(value, "history")
        if not turns or turns[-1]["role"] == "assistant":
            return turns
    raise BadRow("history: expected a list of [question, answer] texts, or of turns that end with an answer")


def split_prompt(opening: Turns, chosen: Any, rejected: Any) -> tuple[Turns, Turns, Turns]:
    """(prompt, chosen, rejected) as turns; a `BadRow` if there is no prompt. Answers lose the prompt that they repeat.

    Without an `opening`, the prompt is what both answers begin with: of an answer given twice, all but its last turn.
    """
    asked = [turn for turn in opening if turn["role"] != "system"]
    if not asked and isinstance(chosen, str) and isinstance(rejected, str) and "\n\nHuman:" in chosen:
        chosen, rejected = transcript(chosen), transcript(rejected)
    told = chosen
    chosen, rejected = as_turns(chosen, "chosen", "assistant"), as_turns(rejected, "rejected", "assistant")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and same(chosen[shared], rejected[shared], within=True):
        shared += 1
    if not asked and not shared:
        if isinstance(told, str) and not opening:
            raise BadRow(f"no prompt: expected {', '.join(OPENINGS)}, or HH transcripts")
        raise BadRow("the prompt is empty, and chosen and rejected do not share one")
    repeated, system = chosen[:shared], [turn for turn in opening if turn["role"] == "system"]
    again = [turn for turn in repeated if turn["role"] != "system"]
    if asked and asked[-1]["role"] == "assistant" and _same(again, asked[:-1]):  # of a whole dialogue, all but the end
        opening, asked = opening[:-1], asked[:-1]
    if len(again) < len(asked) or not _same(again[: len(asked)], asked):
        return opening, chosen, rejected
    if len(again) == len(repeated):  # no system turn is repeated
        return opening + repeated[len(asked) :], chosen[shared:], rejected[shared:]
    if system and not _same(system, [turn for turn in repeated if turn["role"] == "system"]):
        raise BadRow("two system prompts that differ: the prompt's own, and the one that chosen and rejected repeat")
    return repeated, chosen[shared:], rejected[shared:]


def _same(turns: Turns, others: Turns) -> bool:
    return len(turns) == len(others) and all(map(partial(same, within=True), turns, others))
