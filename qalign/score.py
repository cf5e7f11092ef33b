"""Scores of a trained reward model.

    python -m qalign.score RUN FILE [--to FILE] [--limit N]

Rows of prompt and completion (or any dialogue that ends with the assistant's turn) get a `reward`; preference rows get
`reward_chosen`, `reward_rejected` and `reward_margin`. Rows come out as they went in, in their order.
"""

import argparse
import json
import sys
from pathlib import Path

from qalign.command import exit_code
from qalign.errors import UserError
from qalign.finished import open_run
from qalign.recipe import Source

SHOWN_REFUSALS = 5


def score(folder: str, file: str, to: str | None, limit: int | None) -> None:
    """Score answers with a trained reward model."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit: {limit} is no number of rows; expected at least 1")
    run = open_run(folder, ("reward",))
    target = Path(to) if to else _beside(Path(file))
    if target.exists():
        raise UserError(f"{target}: exists already; name another with --to, or remove it")
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}")

    # Imported here, not above: torch takes seconds, and a mistyped folder must not wait for it.
    from qalign import lineage
    from qalign.base import Role, load
    from qalign.dialogues import Dialogue, scorable
    from qalign.rows import collect
    from qalign.scoring import score_sequences
    from qalign.tokens import encode_answer, encode_pair

    model = run.recipe.model
    base = load(model)
    lineage.check(str(run.path), run.adapter, base.lineage("reward"))
    base.load_adapter(Role.REWARD, str(run.adapter), trainable=False)

    def encode(raw, where):
        row = scorable(raw, where)
        if isinstance(row, Dialogue):
            return raw, [encode_answer(base.tokenizer, row, model.max_length, model.chat_template_kwargs)]
        pair = encode_pair(base.tokenizer, row, model.max_length, model.chat_template_kwargs)
        return raw, [pair.prompt_ids + pair.chosen_ids, pair.prompt_ids + pair.rejected_ids]

    rows, refused = collect((Source(path=file),), "train", limit, 0, encode)
    for row in refused[:SHOWN_REFUSALS]:
        print(f"refused: {row.where}: {row.reason}", file=sys.stderr)
    if not rows:
        raise UserError(f"{file}: holds no rows that can be scored ({len(refused)} were refused)")
    scores = iter(score_sequences(base, [ids for _, sequences in rows for ids in sequences]))
    aside = target.with_name(target.name + ".part")
    with aside.open("w", encoding="utf-8") as opened:
        for raw, sequences in rows:
            found = [round(next(scores), 6) for _ in sequences]
            names = ("reward",) if len(found) == 1 else ("reward_chosen", "reward_rejected")
            row = raw | dict(zip(names, found, strict=True))
            if len(found) == 2:
                row["reward_margin"] = round(found[0] - found[1], 6)
            opened.write(_line(row))
    aside.rename(target)
    print(f"{target}: {len(rows):,} rows scored, {len(refused):,} refused")


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
    return file.with_name(f"{file.name.partition('.')[0]}.scored.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qalign.score", description=score.__doc__)
    parser.add_argument("run", help="a reward run, such as runs/demo/reward")
    parser.add_argument("file", help="rows to score: .jsonl, .json, .jsonl.gz, .parquet or .csv")
    parser.add_argument("--to", metavar="FILE", help="where the scores go; FILE.scored.jsonl beside it if left out")
    parser.add_argument("--limit", type=int, metavar="N", help="score only the first N rows")
    args = parser.parse_args()
    sys.exit(exit_code(lambda: score(args.run, args.file, args.to, args.limit)))


if __name__ == "__main__":
    main()
