"""What a stage reads: its training and held-out rows, as ids."""

from collections.abc import Callable

from qalign.errors import UserError
from qalign.rows import LeftOut, Refused
from qalign.run import RunFolder


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
