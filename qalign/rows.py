"""Any preference data set in, canonical rows out; what is refused is named by place and reason.

The shape of each row is detected: TRL's (plain or conversational, prompt explicit or shared), HH-RLHF transcripts,
UltraFeedback binarized, sharegpt ranking, alpaca ranking, OpenAI messages.
"""

import csv
import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalign.errors import UserError
from qalign.recipe import Source
from qalign.recipe_file import looks_local

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


class BadRow(Exception):
    """Why one row can't be used."""


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
        for count, (where, raw) in enumerate(_read(source, source.split or split), start=1):
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


# --- one row ---------------------------------------------------------------------------------------------------------


def canonical(raw: Any, where: str) -> Preference:
    """One row of any known shape as a `Preference`.

    Raises:
        BadRow: the shape is unknown, or something in it is missing, empty or out of order.
    """
    if not isinstance(raw, dict):
        raise BadRow(f"not an object with keys but {type(raw).__name__}")
    prompt, chosen, rejected = _parts(raw)
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
    if answers[0].strip() == answers[1].strip():
        raise BadRow("chosen and rejected are the same answer")
    return Preference(tuple(prompt), *answers, where)


def _parts(raw: dict) -> tuple[list[Message], Any, Any]:
    """(prompt turns, chosen, rejected), the answers still as they came."""
    system = [{"role": "system", "content": raw["system"]}] if _text(raw.get("system")) else []
    if "preferred_output" in raw:  # OpenAI's preference format
        opening = raw.get("input")
        opening = opening.get("messages") if isinstance(opening, dict) else opening
        return _turns(opening, "input"), raw["preferred_output"], raw.get("non_preferred_output")
    if "instruction" in raw and "prompt" not in raw:  # alpaca ranking
        request = "\n".join(raw[key] for key in ("instruction", "input") if _text(raw.get(key)))
        history = [
            {"role": role, "content": text}
            for pair in raw.get("history") or []
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        both = raw["output"] if isinstance(raw.get("output"), list) and len(raw["output"]) == 2 else (None, None)
        chosen, rejected = raw.get("chosen", both[0]), raw.get("rejected", both[1])
        _need(chosen, rejected, raw)
        return [*system, *history, {"role": "user", "content": request}], chosen, rejected
    chosen, rejected = raw.get("chosen"), raw.get("rejected")
    _need(chosen, rejected, raw)
    # 'prompt' first: UltraFeedback binarized has 'messages' beside it, which hold the chosen answer too.
    for key in ("prompt", "conversations", "messages"):
        if key in raw:
            return system + _turns(raw[key], key), chosen, rejected
    return system, chosen, rejected


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
        speaker, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if speaker not in _ROLES:
            raise BadRow(f"{name}: unknown role {speaker!r}; known: {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise BadRow(f"{name}: a turn's content is {type(content).__name__}, expected text")
        turns.append({"role": _ROLES[speaker], "content": content})
    return turns


def _transcript(text: str) -> list[Message]:
    """Turns of an HH-RLHF transcript: `\\n\\nHuman: … \\n\\nAssistant: …`."""
    turns: list[Message] = []
    for human in text.split("\n\nHuman:")[1:]:
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


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


# --- files and hub ---------------------------------------------------------------------------------------------------


def _read(source: Source, split: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of a file, a folder or a hub data set; a row that can't be parsed comes as a `BadRow`."""
    path = Path(source.path).expanduser()
    if not looks_local(source.path) or path.is_dir():
        yield from _dataset(source.path, split)
    elif not path.is_file():
        raise UserError(f"{source.path}: there is no such file")
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_lines(path)
    elif path.suffix == ".json":
        yield from _json_array(path)
    elif path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in (reader := csv.DictReader(file)):
                yield f"{path}:{reader.line_num}", row
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: not a readable parquet file: {error}") from None
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(table.to_pylist(), start=1))
    else:
        raise UserError(f"{path}: expected a .json, .jsonl, .jsonl.gz, .parquet or .csv file")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parsed(line)
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON: {error.msg} at column {error.colno}")


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows, found {type(rows).__name__}; one row a line is .jsonl")
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _dataset(name: str, split: str) -> Iterator[tuple[str, Any]]:
    """A hub id or a local folder, through `datasets`."""
    import datasets

    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub, the network, the split, the files: its message says which
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name}: the data set can't be loaded (split '{split}'): {reason}") from None
    yield from ((f"{name}[{split}], row {number}", row) for number, row in enumerate(data, start=1))
