"""A stage's rows: read and checked before the base is loaded, then turned into token ids and checked again.

Imports no torch, so a misspelt column is reported within seconds.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

from qalign.config.stages import PPO, Source, Stage
from qalign.data.formats import LeftOut, Message, Refused
from qalign.data.templates import ChatTemplate
from qalign.errors import UserError
from qalign.train.run_folder import RunFolder

Reader = Callable[[tuple[Source, ...], str, int | None, int], tuple[list[Any], list[Refused]]]
Encoder = Callable[[ChatTemplate, list[Any], int], tuple[list[Any], list[Refused]]]
ReadRows = dict[str, tuple[list[Any], list[Refused]]]


class StageRows(NamedTuple):
    """Rows as token ids."""

    train: list[Any]
    held_out: list[Any]
    refused: list[Refused]
    counts: dict[str, int]
    """Numbers of rows for the header and the summary: used, held_out, refused, shortened and left_out."""


def read_rows(run: RunFolder, read: Reader) -> ReadRows:
    """The rows under `data` and `eval_data`, each with its refused rows; `read` is `preferences`, `dialogues` or
    `prompts`. Raises a `UserError` if too many rows were refused, or none is left."""
    found: ReadRows = {}
    for key in ("data", "eval_data"):
        rows, refused = found[key] = rows_under(key, run.settings, run.recipe.seed, read)
        left_out = _left_out(refused)
        if left_out and len(left_out) == len(rows) + len(refused):
            reason = f"none of its {len(left_out)} rows is a pair; the first: {left_out[0].reason}"
            raise UserError(f"{run.stage}.{key}: {reason}")
        _check(run, key, refused, len(rows))
    return found


def rows_under(key: str, settings: Stage, seed: int, read: Reader) -> tuple[list[Any], list[Refused]]:
    """(rows, refused rows) under `data` or `eval_data` of a stage. With `holdout`, both come from `data`."""
    if not settings.holdout:
        sources, limit = (settings.data, settings.limit) if key == "data" else (settings.eval_data or (), None)
        return read(sources, settings.split, limit, seed)
    rows, refused = read(settings.data, settings.split, settings.limit, seed)
    if key == "data":
        return [row for row in rows if not _is_held_out(row, settings.holdout, seed)], refused
    held_out = {
        row.where: row for row in rows if _is_held_out(row, settings.holdout, seed)
    }  # once, whatever its weight
    if rows and len(held_out) in (0, len({row.where for row in rows})):
        raise UserError(f"holdout: {settings.holdout:g} of {len(rows)} rows leaves none on one side; use `eval_data`")
    return list(held_out.values()), []


def _is_held_out(row: Any, share: float, seed: int) -> bool:
    """Decided by a hash of the row's first question, so that every stage holds out the same ones. One that stands in
    several rows is never on both sides."""
    turns: tuple[Message, ...] = getattr(row, "prompt", getattr(row, "turns", ()))
    asked = next((turn["content"] for turn in turns if turn["role"] == "user"), getattr(row, "text", ""))
    digest = hashlib.blake2b(f"{seed} {asked.strip()}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def encode_rows(
    run: RunFolder, template: ChatTemplate, found: ReadRows, encode: Encoder, max_tokens: int | None = None
) -> StageRows:
    """The rows of `read_rows` as token ids; `encode` is `encode_pairs`, `encode_dialogues` or `encode_questions`, and
    `max_tokens` the longest row, by default `model.max_length`. Raises a `UserError` if too many rows were refused, the
    unreadable ones included, or none is left."""
    model, encoded, used, refused, left_out, shortened = run.recipe.model, {}, {}, [], 0, 0
    for key, (rows, unread) in found.items():
        encoded[key], unfit = encode(template, rows, max_tokens or model.max_length)
        used[key] = len(rows) - len(unfit)
        _check(run, key, unread + unfit, used[key])
        left_out += len(_left_out(unread))
        refused += [row for row in unread + unfit if not isinstance(row, LeftOut)]
        if key == "data":  # a long dialogue gives several sequences, and is one row
            places = {sequence.where for sequence in encoded[key] if getattr(sequence, "dropped_turns", 0)}
            shortened = sum(row.where in places for row in rows)
    counts = {"used": used["data"], "held_out": used["eval_data"], "refused": len(refused)}
    counts |= {} if isinstance(run.settings, PPO) else {"shortened": shortened}
    counts |= {"left_out": left_out} if left_out else {}
    return StageRows(encoded["data"], encoded["eval_data"], refused, counts)


def _left_out(refused: list[Refused]) -> list[LeftOut]:
    """Rows that say themselves that they are no pair, such as a vote for a tie: they count as left out, not refused."""
    return [row for row in refused if isinstance(row, LeftOut)]


def _check(run: RunFolder, key: str, refused: list[Refused], used: int) -> None:
    if key == "data" or run.settings.eval_data:
        run.check_refused(f"{run.stage}.{key}", [row for row in refused if not isinstance(row, LeftOut)], used)
