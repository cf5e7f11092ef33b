"""Any preference data set in, canonical rows out; what is refused is named by place and reason.

The shape of each row is detected: TRL's (plain or conversational, prompt explicit or shared), HH-RLHF transcripts,
UltraFeedback binarized, sharegpt ranking, alpaca ranking, OpenAI messages.
"""

import math
import random
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qalign.config.stages import Source
from qalign.data.readers import BadRow, NoPair, read

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
    margin: float | None = None
    """`score_chosen` − `score_rejected`, where the row has both as finite numbers."""


@dataclass(frozen=True)
class Refused:
    """A row that can't be used, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class LeftOut(Refused):
    """A row that says itself that it is no pair to learn from, such as a vote for a tie; nothing is wrong with it."""


def preferences(sources: tuple[Source, ...], split: str, limit: int | None, seed: int):
    """(`list[Preference]`, `list[Refused]`) of every source, read as `collect` says."""
    return collect(sources, split, limit, seed, canonical)


def scored_preferences(sources: tuple[Source, ...], split: str, limit: int | None, seed: int):
    """As `preferences`, but a row whose answers the raters gave no scores is refused."""

    def scored(raw: Any, where: str) -> Preference:
        row = canonical(raw, where)
        if row.margin is None:
            raise BadRow("no score_chosen and score_rejected as numbers, which `margin: true` needs")
        return row

    return collect(sources, split, limit, seed, scored)


def collect(
    sources: tuple[Source, ...], split: str, limit: int | None, seed: int, convert: Callable[[Any, str], Any]
) -> tuple[list, list[Refused]]:
    """Reads the rows of every source into one form.

    Args:
        sources: where from; `split` and `limit` are the stage's, for a source that has none of its own.
        seed: which rows a fractional `weight` takes.
        convert: (raw row, its place) to a row; a `BadRow` that it raises refuses the row.

    Returns:
        (rows, refused): what `convert` made, and `list[Refused]`, in the order of the files; rows that say themselves
        that they are no pair are among the latter, as `LeftOut`.

    Raises:
        UserError: a file or data set can't be read at all.
    """
    rows, refused = [], []
    for source in sources:
        mine = []
        for count, (where, raw) in enumerate(read(source, source.split or split), start=1 - source.skip):
            if count < 1:
                continue
            if count > (source.limit or limit or count):
                break
            try:
                if isinstance(raw, BadRow):
                    raise raw
                mine.append(convert(raw, where))
            except BadRow as reason:
                refused.append((LeftOut if isinstance(reason, NoPair) else Refused)(where, str(reason)))
        rows += _weighted(mine, source.weight, seed)
    return rows, refused


def _weighted(rows: list, weight: float, seed: int) -> list:
    whole, part = divmod(weight, 1)
    return rows * int(whole) + random.Random(seed).sample(rows, round(part * len(rows)))


def canonical(raw: Any, where: str) -> Preference:
    """One row of any known shape as a `Preference`.

    Raises:
        BadRow: the shape is unknown, or something in it is missing, empty or out of order; `NoPair`: the row says so.
    """
    raw = columns(raw)
    check_is_pair(raw)
    chosen, rejected = answers(raw)
    if chosen is None or rejected is None:
        missing = "chosen" if chosen is None else "rejected"
        raise BadRow(f"no '{missing}' answer: a preference row needs both; this one has {named_keys(raw)}")
    prompt, chosen_turns, rejected_turns = split_prompt(prompt_turns(raw), chosen, rejected)
    check_order(prompt, "the prompt", "user")
    texts = []
    for name, turns in (("chosen", chosen_turns), ("rejected", rejected_turns)):
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            found = " → ".join(turn["role"] for turn in turns) or "nothing"
            raise BadRow(f"{name}: expected one assistant turn after the prompt, found {found}")
        if not turns[0]["content"].strip():
            raise BadRow(f"{name}: the answer is empty")
        texts.append(turns[0]["content"])
    check_text([*(turn["content"] for turn in prompt), *texts])
    if texts[0].strip() == texts[1].strip():
        raise BadRow("chosen and rejected are the same answer")
    return Preference(tuple(prompt), *texts, where, _margin(raw))


def check_is_pair(raw: dict) -> None:
    """Holds a row that has no answers to what its `no_pair` says, which `qalign.page.votes` writes for ties and the like.

    Raises:
        NoPair: with the reason that the row gives.
    """
    if isinstance(raw.get("no_pair"), str) and answers(raw) == (None, None):
        raise NoPair(raw["no_pair"])


def _margin(raw: dict) -> float | None:
    scores = raw.get("score_chosen"), raw.get("score_rejected")
    if not all(type(score) in (int, float) for score in scores):  # True is an int too, but no score
        return None
    try:
        margin = float(scores[0]) - float(scores[1])
    except OverflowError:  # JSON has integers beyond every float
        return None
    return margin if math.isfinite(margin) else None


def columns(raw: Any) -> dict:
    """A row without its nulls, with which Parquet and `datasets` fill the columns that other rows have.

    Raises:
        BadRow: it is not an object with keys.
    """
    if not isinstance(raw, dict):
        raise BadRow(f"not an object with keys but {type(raw).__name__}")
    return {key: value for key, value in raw.items() if value is not None}


def named_keys(raw: dict) -> str:
    """A row's keys for a message, in one line whatever they hold."""
    return ", ".join(str(key) if str(key).isprintable() else repr(key) for key in raw) or "no keys"


def answers(raw: dict) -> tuple[Any, Any]:
    """(chosen, rejected) as they came, in any of the known shapes; None for what the row does not have."""
    if "preferred_output" in raw:  # OpenAI's preference format
        return raw["preferred_output"], raw.get("non_preferred_output")
    both = raw.get("output") if "instruction" in raw and "prompt" not in raw else None  # alpaca ranking
    chosen, rejected = both if isinstance(both, list) and len(both) == 2 else (None, None)
    return raw.get("chosen", chosen), raw.get("rejected", rejected)


def system_turns(raw: dict) -> list[Message]:
    """The `system` column as a turn; no turn where it is missing or empty."""
    text = raw.get("system")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []


def prompt_turns(raw: dict) -> list[Message]:
    """The dialogue before the answers, out of whichever key has it; the system turn alone, or none, where none has.

    Raises:
        BadRow: what the key holds is no text and no turns.
    """
    if "preferred_output" in raw:
        opening = raw.get("input")
        return as_turns(opening.get("messages") if isinstance(opening, dict) else opening, "input")
    system = system_turns(raw)
    if "instruction" in raw and "prompt" not in raw:
        parts = [raw.get(key, "") for key in ("instruction", "input")]
        if not all(isinstance(part, str) for part in parts):
            raise BadRow("instruction and input: expected texts")
        request = "\n".join(part for part in parts if part.strip())
        return [*system, *_history(raw.get("history", [])), {"role": "user", "content": request}]
    # 'prompt' first: UltraFeedback binarized has 'messages' beside it, which hold the chosen answer too.
    for key in ("prompt", "conversations", "messages"):
        if key in raw:
            turns = as_turns(raw[key], key)
            if turns and turns[-1] == {"role": "assistant", "content": ""}:  # an HH prompt ends with "Assistant:"
                turns.pop()
            return system + turns
    return system


def _history(pairs: Any) -> list[Message]:
    """Alpaca's `history`: a list of [question, answer]."""
    turns = []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow("history: expected a list of [question, answer] texts")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def split_prompt(prompt: list[Message], chosen: Any, rejected: Any):
    """(prompt, chosen, rejected) as turns. Answers lose the prompt that they repeat; what they share may be the prompt.

    Raises:
        BadRow: there is no prompt, or an answer is no text and no turns.
    """
    if not prompt and isinstance(chosen, str) and isinstance(rejected, str):
        if "\n\nHuman:" not in chosen:
            raise BadRow("no prompt: expected a 'prompt', 'conversations' or 'messages' key, or HH transcripts")
        chosen, rejected = _transcript(chosen), _transcript(rejected)
    chosen, rejected = as_turns(chosen, "chosen", "assistant"), as_turns(rejected, "rejected", "assistant")
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


def as_turns(value: Any, name: str, role: str = "user") -> list[Message]:
    """A text, one turn or a list of turns, as `{"role", "content"}` each.

    Args:
        value: a text may be an HH transcript.
        name: the key that held it, for messages.
        role: who speaks where `value` is a plain text.

    Raises:
        BadRow: it is none of these, or a turn has another role or no text.
    """
    if isinstance(value, str):
        return _transcript(value) if value.startswith("\n\nHuman:") else [{"role": role, "content": value}]
    turns = []
    for turn in [value] if isinstance(value, dict) else value if isinstance(value, list) else [None]:
        if not isinstance(turn, dict):
            raise BadRow(f"{name}: expected a text or turns, found {type(value).__name__}")
        turn = {key: value for key, value in turn.items() if value is not None}
        speaker, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise BadRow(f"{name}: unknown role {reprlib.repr(speaker)}; known: {', '.join(_ROLES)}")
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


def check_order(turns: list[Message], name: str, last: str) -> None:
    """Holds turns to: system first if at all, then user and assistant in turn, `last` speaking last, none empty.

    Raises:
        BadRow: they are not so; `name` says what they are, such as "the prompt".
    """
    spoken = turns[1:] if turns and turns[0]["role"] == "system" else turns
    if not spoken:
        raise BadRow(f"{name} is empty")
    for number, turn in enumerate(spoken, start=1):
        expected = "user" if number % 2 else "assistant"
        if turn["role"] != expected:
            raise BadRow(f"turn {number} of {name} is the {turn['role']}'s, expected the {expected}'s")
        if not turn["content"].strip():
            raise BadRow(f"turn {number} of {name} is empty")
    if spoken[-1]["role"] != last:
        raise BadRow(f"{name} ends with the {spoken[-1]['role']}'s turn, expected the {last}'s")


def check_text(texts: list[str]) -> None:
    """Holds texts to valid Unicode: JSON can spell half a character, which no tokenizer takes.

    Raises:
        BadRow: one of them has a lone surrogate.
    """
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"the text is not valid Unicode: {error.reason} ({error.object[error.start]!r})") from None
