"""Any preference data set in, canonical rows out; what is refused is named by place and reason.

The shape of each row is detected: TRL's (plain or conversational, prompt explicit or shared), HH-RLHF transcripts,
UltraFeedback binarized, sharegpt ranking, alpaca ranking, OpenAI messages.
"""

import random
from dataclasses import dataclass
from typing import Any

from qalign.files import BadRow, read
from qalign.recipe import Source

Message = dict[str, str]


@dataclass(frozen=True)
class Preference:
    """One prompt with two answers, the first preferred."""

    prompt: tuple[Message, ...]
    """The dialogue so far, `{"role", "content"}` each: system first if at all, a user's turn last."""
    chosen: str
    rejected: str
    where: str
    """File and line (or row) it came from."""


@dataclass(frozen=True)
class Refused:
    """A row that can't be used, and why."""

    where: str
    reason: str


def preferences(sources: tuple[Source, ...], split: str, limit: int | None, seed: int):
    """Reads preference rows of every source.

    Args:
        sources: where from; `split` and `limit` are the stage's, for a source that has none of its own.
        seed: which rows a fractional `weight` takes.

    Returns:
        (rows, refused): `list[Preference]` and `list[Refused]`, in the order of the files.

    Raises:
        UserError: a file or data set can't be read at all.
    """
    rows, refused = [], []
    for source in sources:
        mine = []
        for count, (where, raw) in enumerate(read(source, source.split or split), start=1):
            if count > (source.limit or limit or count):
                break
            try:
                if isinstance(raw, BadRow):
                    raise raw
                mine.append(canonical(raw, where))
            except BadRow as reason:
                refused.append(Refused(where, str(reason)))
        rows += _weighted(mine, source.weight, seed)
    return rows, refused


def _weighted(rows: list, weight: float, seed: int) -> list:
    whole, part = divmod(weight, 1)
    return rows * int(whole) + random.Random(seed).sample(rows, round(part * len(rows)))


def canonical(raw: Any, where: str) -> Preference:
    """One row of any known shape as a `Preference`.

    Raises:
        BadRow: the shape is unknown, or something in it is missing, empty or out of order.
    """
    if not isinstance(raw, dict):
        raise BadRow(f"not an object with keys but {type(raw).__name__}")
    # Parquet and `datasets` fill the columns that other rows have with nulls.
    prompt, chosen, rejected = _parts({key: value for key, value in raw.items() if value is not None})
    prompt, chosen_turns, rejected_turns = _split(prompt, chosen, rejected)
    _check_order(prompt)
    answers = []
    for name, turns in (("chosen", chosen_turns), ("rejected", rejected_turns)):
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            found = " → ".join(turn["role"] for turn in turns) or "nothing"
            raise BadRow(f"{name}: expected one assistant turn after the prompt, found {found}")
        if not turns[0]["content"].strip():
            raise BadRow(f"{name}: the answer is empty")
        answers.append(turns[0]["content"])
    _check_text([*(turn["content"] for turn in prompt), *answers])
    if answers[0].strip() == answers[1].strip():
        raise BadRow("chosen and rejected are the same answer")
    return Preference(tuple(prompt), *answers, where)


def _parts(raw: dict) -> tuple[list[Message], Any, Any]:
    """(prompt turns, chosen, rejected), the answers still as they came."""
    system = [{"role": "system", "content": raw["system"]}] if _text(raw.get("system")) else []
    if "preferred_output" in raw:  # OpenAI's preference format
        opening = raw.get("input")
        opening = opening.get("messages") if isinstance(opening, dict) else opening
        chosen, rejected = raw["preferred_output"], raw.get("non_preferred_output")
        _need(chosen, rejected, raw)
        return _turns(opening, "input"), chosen, rejected
    if "instruction" in raw and "prompt" not in raw:  # alpaca ranking
        parts = [raw.get(key, "") for key in ("instruction", "input")]
        if not all(isinstance(part, str) for part in parts):
            raise BadRow("instruction and input: expected texts")
        request = "\n".join(part for part in parts if part.strip())
        history = _history(raw.get("history", []))
        both = raw["output"] if isinstance(raw.get("output"), list) and len(raw["output"]) == 2 else (None, None)
        chosen, rejected = raw.get("chosen", both[0]), raw.get("rejected", both[1])
        _need(chosen, rejected, raw)
        return [*system, *history, {"role": "user", "content": request}], chosen, rejected
    chosen, rejected = raw.get("chosen"), raw.get("rejected")
    _need(chosen, rejected, raw)
    # 'prompt' first: UltraFeedback binarized has 'messages' beside it, which hold the chosen answer too.
    for key in ("prompt", "conversations", "messages"):
        if key in raw:
            turns = _turns(raw[key], key)
            if turns and turns[-1] == {"role": "assistant", "content": ""}:  # an HH prompt ends with "Assistant:"
                turns.pop()
            return system + turns, chosen, rejected
    return system, chosen, rejected


def _history(pairs: Any) -> list[Message]:
    """Alpaca's `history`: a list of [question, answer]."""
    turns = []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow("history: expected a list of [question, answer] texts")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _need(chosen: Any, rejected: Any, raw: dict) -> None:
    if chosen is None or rejected is None:
        missing = "chosen" if chosen is None else "rejected"
        raise BadRow(f"no '{missing}' answer: a preference row needs both; this one has {', '.join(map(str, raw))}")


def _split(prompt: list[Message], chosen: Any, rejected: Any):
    """Answers as turns, without the prompt that they may repeat; the prompt from what they share if there is none."""
    if not prompt and isinstance(chosen, str) and isinstance(rejected, str):
        if "\n\nHuman:" not in chosen:
            raise BadRow("no prompt: expected a 'prompt', 'conversations' or 'messages' key, or HH transcripts")
        chosen, rejected = _transcript(chosen), _transcript(rejected)
    chosen, rejected = _turns(chosen, "chosen", "assistant"), _turns(rejected, "rejected", "assistant")
    opening = [turn for turn in prompt if turn["role"] != "system"]
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not opening and not shared:
        raise BadRow("the prompt is empty, and chosen and rejected do not share one")
    repeated = chosen[:shared]
    spoken = [turn for turn in repeated if turn["role"] != "system"]
    if not opening or (repeated and spoken[: len(opening)] == opening):
        system = [turn for turn in prompt if turn["role"] == "system"]
        own = repeated if repeated and repeated[0]["role"] == "system" else [*system, *repeated]
        return own, chosen[shared:], rejected[shared:]
    return prompt, chosen, rejected


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _turns(value: Any, name: str, role: str = "user") -> list[Message]:
    """A text, one turn or a list of turns, as `{"role", "content"}` each. A text may be an HH transcript."""
    if isinstance(value, str):
        return _transcript(value) if value.startswith("\n\nHuman:") else [{"role": role, "content": value}]
    turns = []
    for turn in [value] if isinstance(value, dict) else value if isinstance(value, list) else [None]:
        if not isinstance(turn, dict):
            raise BadRow(f"{name}: expected a text or turns, found {type(value).__name__}")
        turn = {key: value for key, value in turn.items() if value is not None}
        speaker, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise BadRow(f"{name}: unknown role {speaker!r}; known: {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise BadRow(f"{name}: a turn's content is {type(content).__name__}, expected text")
        turns.append({"role": _ROLES[speaker], "content": content})
    return turns


def _transcript(text: str) -> list[Message]:
    """Turns of an HH-RLHF transcript: `\\n\\nHuman: … \\n\\nAssistant: …`."""
    turns: list[Message] = []
    before, *spoken = text.split("\n\nHuman:")
    if before.strip():
        raise BadRow("the transcript begins with text that nobody speaks")
    for human in spoken:
        said, *replies = human.split("\n\nAssistant:")
        turns.append({"role": "user", "content": said.strip()})
        turns += ({"role": "assistant", "content": reply.strip()} for reply in replies)
    return turns


def _check_order(prompt: list[Message]) -> None:
    """System first if at all, then user and assistant in turn, a user's turn last, none empty."""
    spoken = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    if not spoken:
        raise BadRow("the prompt is empty")
    for number, turn in enumerate(spoken, start=1):
        expected = "user" if number % 2 else "assistant"
        if turn["role"] != expected:
            raise BadRow(f"turn {number} of the prompt is the {turn['role']}'s, expected the {expected}'s")
        if not turn["content"].strip():
            raise BadRow(f"turn {number} of the prompt is empty")
    if spoken[-1]["role"] != "user":
        raise BadRow("the prompt ends with the assistant's turn, expected the user's")


def _check_text(texts: list[str]) -> None:
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"the text is not valid Unicode: {error.reason} ({error.object[error.start]!r})") from None


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
