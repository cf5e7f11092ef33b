"""Any data set to imitate in, dialogues and plain texts out; what is refused is named by place and reason.

The shape of each row is detected: preference rows (the chosen answer), OpenAI messages, sharegpt conversations, TRL's
prompt and completion, alpaca, KTO (rows with a label), plain text.
"""

from dataclasses import dataclass
from typing import Any

from qalign.config.stages import Source
from qalign.data.formats import (
    Message,
    Preference,
    answers,
    as_turns,
    canonical,
    check_is_pair,
    check_order,
    check_text,
    collect,
    columns,
    named_keys,
    prompt_turns,
    split_prompt,
    system_turns,
)
from qalign.data.readers import BadRow


@dataclass(frozen=True)
class Dialogue:
    """Turns that end with the assistant's, to learn to speak its part."""

    turns: tuple[Message, ...]
    """`{"role", "content"}` each: system first if at all, then user and assistant in turn."""
    first_trained: int
    """Only the assistant's turns at or after this index are learned from; those before are context."""
    where: str
    """File and line (or row) it came from."""


@dataclass(frozen=True)
class PlainText:
    """A text to continue, every token of it learned."""

    text: str
    where: str
    """File and line (or row) it came from."""


Spoken = tuple[list[Message], int]  # the turns of a row, and the index of the first to learn from


def dialogues(sources: tuple[Source, ...], split: str, limit: int | None, seed: int):
    """(`list[Dialogue | PlainText]`, `list[Refused]`) of every source, read as `collect` says."""
    return collect(sources, split, limit, seed, canonical_dialogue)


def scorable(raw: Any, where: str) -> Preference | Dialogue:
    """One row with an answer to score: a preference row as a `Preference`, any other as a `Dialogue`.

    Raises:
        BadRow: as `canonical` and `canonical_dialogue`, or the row is plain text.
    """
    if None not in answers(columns(raw)):
        return canonical(raw, where)
    row = canonical_dialogue(raw, where)
    if isinstance(row, PlainText):
        raise BadRow("plain text: expected a dialogue, whose last answer could be scored")
    return row


def canonical_dialogue(raw: Any, where: str) -> Dialogue | PlainText:
    """One row of any known shape as a `Dialogue` or a `PlainText`.

    Raises:
        BadRow: the shape is unknown, or something in it is missing, empty, out of order or not to be learned from.
    """
    raw = columns(raw)
    check_is_pair(raw)
    if not isinstance(raw.get("system", ""), str):
        raise BadRow(f"system: expected a text, found {type(raw['system']).__name__}")
    # 'text' last: alpaca's first edition has its rows in it once more, in a template.
    spoken = _preferred(raw) or _listed(raw) or _completed(raw) or _instructed(raw) or _transcribed(raw)
    if not spoken:
        return PlainText(_text(raw), where)
    turns, first_trained = spoken
    if first_trained:
        check_order(turns[:first_trained], "the prompt", "user")
    check_order(turns, "the dialogue", "assistant")
    check_text([turn["content"] for turn in turns])
    return Dialogue(tuple(turns), first_trained, where)


def _preferred(raw: dict) -> Spoken | None:
    """The chosen answer of a preference row, whatever the rejected one is like.

    The assistant's earlier turns are context: HH-RLHF's were picked to be bad.
    """
    chosen, rejected = answers(raw)
    if chosen is None and rejected is None:
        return None
    if chosen is None:
        raise BadRow(f"no 'chosen' answer to learn from; this row has {named_keys(raw)}")
    prompt, answer, _ = split_prompt(prompt_turns(raw), chosen, chosen)  # with itself it shares all but the last turn
    return prompt + answer, len(prompt)


def _listed(raw: dict) -> Spoken | None:
    """A whole dialogue under one key: OpenAI's or sharegpt's."""
    key = next((key for key in ("messages", "conversations") if key in raw), None)
    if key is None:
        return None
    if not isinstance(raw[key], list):
        raise BadRow(f"{key}: expected a list of turns, found {type(raw[key]).__name__}")
    _refuse_disliked(raw)
    return system_turns(raw) + as_turns(raw[key], key), 0


def _completed(raw: dict) -> Spoken | None:
    """TRL's prompt and completion, texts or turns."""
    key = next((key for key in ("completion", "response") if key in raw), None)
    if key is None or "prompt" not in raw:
        return None
    _refuse_disliked(raw)
    prompt = prompt_turns(raw)
    return prompt + as_turns(raw[key], key, "assistant"), len(prompt)


def _instructed(raw: dict) -> Spoken | None:
    """Alpaca's instruction and output; its history is learned from too."""
    if "instruction" not in raw or "output" not in raw:
        return None
    _refuse_disliked(raw)
    # Some editions have a 'prompt' beside: the row once more in a template, its output included.
    request = prompt_turns({key: value for key, value in raw.items() if key != "prompt"})
    return request + as_turns(raw["output"], "output", "assistant"), 0


def _transcribed(raw: dict) -> Spoken | None:
    """An HH-RLHF transcript under `text`."""
    text = raw.get("text")
    return (as_turns(text, "text"), 0) if isinstance(text, str) and text.startswith("\n\nHuman:") else None


def _text(raw: dict) -> str:
    if "text" not in raw:
        raise BadRow(
            f"unknown shape: this row has {named_keys(raw)}; expected messages, conversations, prompt + completion "
            "(or response), instruction + output, chosen (with rejected or without), or text"
        )
    text = raw["text"]
    if not isinstance(text, str):
        raise BadRow(f"text: expected a text, found {type(text).__name__}")
    if not text.strip():
        raise BadRow("the text is empty")
    check_text([text])
    return text


def _refuse_disliked(raw: dict) -> None:
    label = raw.get("label")
    if label is False or (isinstance(label, str) and label.strip().lower() == "false"):  # a CSV has only texts
        raise BadRow("label is false: an answer not to learn from")
