"""Scores of a trained reward model.

    python -m qalign.score RUN FILE [--to FILE] [--limit N] [--column NAME]

Rows of prompt and completion (or any dialogue that ends with the assistant's turn) get a `reward`; preference rows get
`reward_chosen`, `reward_rejected` and `reward_margin`. Rows come out as they went in, in their order; a column that is
there already is never replaced.
"""

import argparse
import json
import sys
from pathlib import Path

from qalign.cli import exit_code
from qalign.config.paths import DATA_SUFFIXES
from qalign.config.stages import Source
from qalign.data.dialogues import Dialogue, scorable
from qalign.data.formats import Preference, Refused, collect
from qalign.data.readers import BadRow
from qalign.errors import UserError
from qalign.train.run_folder import open_run

SHOWN_REFUSALS = 5


def score(folder: str, file: str, to: str | None, limit: int | None, column: str = "reward") -> None:
    """Score answers with a trained reward model."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit: {limit} is no number of rows; expected at least 1")
    run = open_run(folder, ("reward",))
    target = Path(to) if to else _beside(Path(file))
    if target.exists():
        raise UserError(f"{target}: exists already; name another with --to, or remove it")
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}")

    read, refused = collect((Source(path=file),), "train", limit, 0, lambda raw, where: _read(raw, where, column))

    # Imported here, not above: torch takes seconds, and a mistyped folder must not wait for it.
    from qalign.data.tokenize import encode_answer, encode_pair
    from qalign.model import lineage
    from qalign.model.base import Role, load
    from qalign.model.scoring import score_sequences

    model = run.recipe.model
    base = load(model)
    lineage.check(str(run.path), run.adapter, base.lineage("reward"))
    base.load_adapter(Role.REWARD, str(run.adapter), trainable=False)

    def encode(row):
        if isinstance(row, Dialogue):
            return [encode_answer(base.tokenizer, row, model.max_length, model.chat_template_kwargs)]
        pair = encode_pair(base.tokenizer, row, model.max_length, model.chat_template_kwargs)
        return [pair.prompt_ids + pair.chosen_ids, pair.prompt_ids + pair.rejected_ids]

    rows = []
    for raw, row, names in read:
        try:
            rows.append((raw, names, encode(row)))
        except BadRow as reason:
            refused.append(Refused(row.where, str(reason)))
    for row in refused[:SHOWN_REFUSALS]:
        print(f"refused: {row.where}: {row.reason}", file=sys.stderr)
    if not rows:
        raise UserError(f"{file}: holds no rows that can be scored ({len(refused)} were refused)")
    scores = iter(score_sequences(base, [ids for *_, sequences in rows for ids in sequences]))
    aside = target.with_name(target.name + ".part")
    with aside.open("w", encoding="utf-8") as opened:
        for raw, names, sequences in rows:
            found = [round(next(scores), 6) for _ in sequences]
            if len(found) == 2:
                found.append(round(found[0] - found[1], 6))
            opened.write(_line(raw | dict(zip(names, found, strict=True))))
    aside.rename(target)
    print(f"{target}: {len(rows):,} rows scored, {len(refused):,} refused")


def _read(raw: dict, where: str, column: str) -> tuple[dict, Dialogue | Preference, list[str]]:
    """A row as it came, as it is understood, and the columns that it gets; a `UserError` if it has one of them."""
    row = scorable(raw, where)
    pair = isinstance(row, Preference)
    names = [f"{column}_{side}" for side in ("chosen", "rejected", "margin")] if pair else [column]
    if taken := next((name for name in names if name in raw), None):
        raise UserError(
            f"{where}: has a column '{taken}' already; name others with --column, or remove it from the rows"
        )
    return raw, row, names


def _line(row: dict) -> str:
    """A row as a line of JSON; dates and bytes, which Parquet has and JSON lacks, become text."""
    line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:  # half an emoji, in a field that is not scored
        line = json.dumps(row, default=str) + "\n"
    return line


def _beside(file: Path) -> Path:
    """`answers.jsonl` or `answers.jsonl.gz` to `answers.scored.jsonl`."""
    kind = next((suffix for suffix in DATA_SUFFIXES if file.name.endswith(suffix)), "")
    return file.with_name(f"{file.name.removesuffix(kind)}.scored.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qalign.score", description=score.__doc__)
    parser.add_argument("run", help="a reward run, such as runs/demo/reward")
    parser.add_argument("file", help="rows to score: .jsonl, .json, .jsonl.gz, .parquet or .csv")
    parser.add_argument("--to", metavar="FILE", help="where the scores go; FILE.scored.jsonl beside it if left out")
    parser.add_argument("--limit", type=int, metavar="N", help="score only the first N rows")
    parser.add_argument(
        "--column", metavar="NAME", default="reward", help="what the scores are called in the rows (default: reward)"
    )
    args = parser.parse_args()
    sys.exit(exit_code(lambda: score(args.run, args.file, args.to, args.limit, args.column)))


if __name__ == "__main__":
    main()
