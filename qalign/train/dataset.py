"""A stage's rows: read and checked before the base is loaded, then turned into token ids and checked again.

Imports no torch, so a misspelt column is reported within seconds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from qalign.config.stages import PPO, Source
from qalign.data.formats import LeftOut, Refused
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
    settings, found = run.settings, {}
    for key, sources, limit in (("data", settings.data, settings.limit), ("eval_data", settings.eval_data, None)):
        rows, refused = found[key] = read(sources or (), settings.split, limit, run.recipe.seed)
        left_out = _left_out(refused)
        if left_out and len(left_out) == len(rows) + len(refused):
            reason = f"none of its {len(left_out)} rows is a pair; the first: {left_out[0].reason}"
            raise UserError(f"{run.stage}.{key}: {reason}")
        _check(run, key, refused, len(rows))
    return found


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
    if getattr(run.settings, key):
        run.check_refused(f"{run.stage}.{key}", [row for row in refused if not isinstance(row, LeftOut)], used)
