"""What a stage reads: its training and held-out rows, as ids."""

from collections.abc import Callable

from qalign.data.formats import LeftOut, Refused
from qalign.data.prompts import Prompt, prompts
from qalign.errors import UserError
from qalign.train.run_folder import RunFolder


def read_rows(run: RunFolder, tokenizer, read: Callable, encode: Callable):
    """A stage's rows as ids.

    Args:
        read: from sources to canonical rows: `rows.preferences` or `dialogues.dialogues`.
        encode: from these to ids: `tokens.encode_pairs` or `tokens.encode_dialogues`.

    Returns:
        (for training, held out, refused rows, counts of rows for the summary). Rows that say themselves that they are
        no pair are counted as left out, not as refused.

    Raises:
        UserError: too many were refused, or none is left.
    """
    recipe, settings = run.recipe, run.settings
    encoded, used, shortened, left_out = {}, {}, 0, 0
    refused: list[Refused] = []
    for key, sources, limit in (("data", settings.data, settings.limit), ("eval_data", settings.eval_data, None)):
        rows, unread = read(sources or (), settings.split, limit, recipe.seed)
        aside = [row for row in unread if isinstance(row, LeftOut)]
        unread = [row for row in unread if not isinstance(row, LeftOut)]
        if aside and not rows and not unread:
            raise UserError(f"{run.stage}.{key}: none of its {len(aside)} rows is a pair; the first: {aside[0].reason}")
        left_out += len(aside)
        encoded[key], unfit = encode(tokenizer, rows, recipe.model.max_length, recipe.model.chat_template_kwargs)
        used[key] = len(rows) - len(unfit)
        if key == "data":  # a long dialogue gives several sequences, and is one row
            places = {sequence.where for sequence in encoded[key] if sequence.dropped_turns}
            shortened = sum(row.where in places for row in rows)
        if sources:
            run.check_refused(f"{run.stage}.{key}", unread + unfit, used[key])
        refused += unread + unfit
    counts = {
        "used": used["data"],
        "held_out": used["eval_data"],
        "refused": len(refused),
        "shortened": shortened,
    } | ({"left_out": left_out} if left_out else {})
    return encoded["data"], encoded["eval_data"], refused, counts


def read_prompts(run: RunFolder) -> dict[str, tuple[list[Prompt], list[Refused]]]:
    """PPO's prompts under `data` and `eval_data`, and what was refused. It needs no model, so it comes first.

    Raises:
        UserError: too many were refused, or none is left.
    """
    settings, found = run.settings, {}
    for key, sources, limit in (("data", settings.data, settings.limit), ("eval_data", settings.eval_data, None)):
        found[key] = prompts(sources or (), settings.split, limit, run.recipe.seed)
        _check(run, key, *found[key])
    return found


def encode_prompts(run: RunFolder, tokenizer, found: dict[str, tuple[list[Prompt], list[Refused]]]):
    """The same as ids, those left out that leave no room for an answer.

    Returns:
        (for training, held out, both `list[tuple[Prompt, list[int]]]`; refused rows; counts for the summary).

    Raises:
        UserError: too many were refused, or none is left.
    """
    # Imported here, not above: it brings transformers, which `read_prompts` must not wait for.
    from qalign.data.tokenize import encode_questions

    model, encoded, refused = run.recipe.model, {}, []
    room = model.max_length - run.settings.max_new_tokens
    for key, (rows, unread) in found.items():
        encoded[key], unfit = encode_questions(tokenizer, rows, room, model.chat_template_kwargs)
        _check(run, key, encoded[key], unread + unfit)
        refused += unread + unfit
    counts = {"used": len(encoded["data"]), "held_out": len(encoded["eval_data"]), "refused": len(refused)}
    return encoded["data"], encoded["eval_data"], refused, counts


def _check(run: RunFolder, key: str, rows: list, refused: list[Refused]) -> None:
    if getattr(run.settings, key):
        run.check_refused(f"{run.stage}.{key}", refused, len(rows))
