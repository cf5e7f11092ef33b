"""Scores answers with a trained reward model.

    python -m qalign.score RUN FILE [--to FILE] [--limit N] [--column NAME]

A row with one answer (a prompt and its completion, answer or response, or any dialogue that ends with the assistant's
turn) gets a `reward`; a preference row gets `reward_chosen`, `reward_rejected` and `reward_margin`. With an ensemble
these are means over its members, and a row also gets `reward_spread`, the standard deviation of the members' scores (of
their margins, for a preference): where it is large, the members disagree. The output keeps the rows' order and all
their columns; an existing column is never replaced. Several processes (`torchrun`) share the rows.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import TYPE_CHECKING, Any

from qalign.cli import Parser, new_target, program, run_parsed
from qalign.config.atomic import replacing
from qalign.config.paths import DATA_SUFFIXES, adapters_in
from qalign.config.stages import Source
from qalign.data.formats import Dialogue, Preference, Refused, collect, scorable
from qalign.data.readers import BadRow
from qalign.data.rows import rows_hash
from qalign.errors import UserError, one_line, scores_not_finite
from qalign.evaluate import check_usable
from qalign.model import lineage, origin
from qalign.train.dataset import rendered_at
from qalign.train.processes.world import current
from qalign.train.run_folder import open_run, print_table

if TYPE_CHECKING:
    from qalign.data.collate import AnsweredPrompt
    from qalign.model.adapters.members import Ensemble
    from qalign.model.base import Base

SHOWN, SHOWN_CHARACTERS = 3, 72
SHAPES = '{"prompt", "completion"} (or "answer", "response"), {"messages"}, or {"prompt", "chosen", "rejected"}'
EXPECTED = f"; a row is {SHAPES}"

Scored = tuple[list[float], float | None]  # the scores of a row's answers, and the spread of an ensemble's members
Read = tuple[dict, Preference | Dialogue, list[str]]  # a row of the file, its parsed form, the columns that it gets


def score(folder: str, file: str, to: str | None, limit: int | None, column: str = "reward") -> None:
    """Score answers with a trained reward model."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit: {limit} is not a number of rows; expected at least 1")
    if not column.strip():
        raise UserError("--column: the name is empty; expected a name such as 'reward'")
    run = open_run(folder, ("reward",))
    target = new_target(to, _scored_name(Path(file)))
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}")
    origin.check(run.recipe.model)
    folders = adapters_in(run.adapter)
    parsed = partial(_parsed, column=column, is_ensemble=len(folders) > 1)
    read, refused = collect((Source(path=file),), "train", limit, 0, parsed)
    if not read:
        check_usable(file, 0, refused, EXPECTED)

    # Imported here, not above: torch takes seconds, and a mistyped folder must not wait for it.
    from qalign.model.adapters.members import load_rewards
    from qalign.model.base import Role, load

    world = current()
    hashes = {str(folder): lineage.adapter_hash(folder) for folder in folders}
    world.connect(hashes | {file: rows_hash([row for _, row, _ in read])}, "")
    base = world.in_turn(lambda: load(run.recipe.model, now=rendered_at(run)))
    model = load_rewards(base, str(run.path), Role.REWARD, folders)
    rows, tokens, unfit = _encoded(base, read)
    refused += unfit
    check_usable(file, len(rows), refused, EXPECTED)
    scores = _scores(base, model, tokens)
    world.first(lambda: _write(target, rows, scores))
    print(f"{target}: {len(rows):,} rows scored, {len(refused):,} refused")
    _print_scores(rows, scores)


def _write(target: Path, rows: list[Read], scores: list[Scored]) -> None:
    with replacing(target) as aside, aside.open("w", encoding="utf-8") as opened:
        for (raw, _, names), (answers, spread) in zip(rows, scores, strict=True):
            found = [round(score, 6) for score in answers]
            if len(found) == 2:
                found.append(round(found[0] - found[1], 6))
            found += [] if spread is None else [round(spread, 6)]
            opened.write(_line(raw | dict(zip(names, found, strict=True))))


def _print_scores(rows: list[Read], scores: list[Scored]) -> None:
    """Mean and spread of all scores, how often chosen beats rejected, and the first rows with theirs."""
    spreads = [spread for _, spread in scores if spread is not None]
    every, pairs = [score for found, _ in scores for score in found], [found for found, _ in scores if len(found) == 2]
    spread = f"standard deviation {pstdev(every):.3f}, from {min(every):+.3f} to {max(every):+.3f}"
    lines = [("scores", f"mean {mean(every):+.3f}, {spread}")]
    if pairs:
        wins = mean(1.0 if one > other else 0.5 if one == other else 0.0 for one, other in pairs)
        lines.append(("pairs", f"chosen scores higher in {wins:.1%} of {len(pairs):,}"))
    if spreads:
        lines.append(("members", f"{mean(spreads):.3f} apart (standard deviation), at most {max(spreads):.3f}"))
    for (_, row, _), (found, _) in list(zip(rows, scores, strict=True))[:SHOWN]:
        answer = row.chosen if isinstance(row, Preference) else row.turns[-1]
        said = one_line(answer["content"], SHOWN_CHARACTERS)
        lines.append((Path(row.where).name, f"{' / '.join(f'{score:+.3f}' for score in found)}  {said}"))
    print_table("scored", lines)


def _parsed(raw: dict, where: str, column: str, is_ensemble: bool) -> Read:
    """Raises a `UserError` if the row has one of the new columns already."""
    row = scorable(raw, where)
    pair = isinstance(row, Preference)
    names = [f"{column}_{side}" for side in ("chosen", "rejected", "margin")] if pair else [column]
    names += [f"{column}_spread"] if is_ensemble else []
    if taken := [name for name in names if name in raw]:
        raise UserError(f"{where}: has a column '{taken[0]}' already; name others with --column, or remove it")
    return raw, row, names


def _encoded(base: "Base", read: Sequence[Read]) -> tuple[list[Read], list["AnsweredPrompt"], list[Refused]]:
    """(the rows that fit the model, their ids, the refused rows)."""
    from qalign.data.store.sequences import TokenAnswers
    from qalign.data.tokenize import encode_answer, encode_pair

    rows, tokens, refused = [], [], []
    for raw, row, names in read:
        try:
            if isinstance(row, Preference):
                tokens.append(encode_pair(base.template, row, base.max_length))
            else:
                ids = encode_answer(base.template, row, base.max_length)
                tokens.append(TokenAnswers(ids[:-1], (ids[-1:],)))  # only the last token, the end of turn, is scored
            rows.append((raw, row, names))
        except BadRow as reason:
            refused.append(Refused(row.where, str(reason)))
    return rows, tokens, refused


def _scores(base: "Base", model: "str | Ensemble", rows: Sequence["AnsweredPrompt"]) -> list[Scored]:
    """The reward model's score of each answer of each row, packed as in training: two answers share their prompt. For
    the spread of single answers each member's mean over all of them is its zero, which Bradley-Terry leaves open."""
    from qalign.data.collate import MicroBatchLimit
    from qalign.losses.ensemble import spread
    from qalign.model.adapters.members import answer_scores
    from qalign.rl.scorers import together

    limit = MicroBatchLimit(tokens=2 * base.spec.max_length)
    found: dict[int, Scored] = {}
    for num_answers in (1, 2):
        if numbers := [number for number, row in enumerate(rows) if len(row.answers) == num_answers]:
            some = [rows[number] for number in numbers]
            scores = together(
                lambda world, some=some: answer_scores(base, model, some, limit, progress=True, mine=world.mine)
            )
            if not scores.isfinite().all():
                raise scores_not_finite(base.precision)
            apart: list[Any] = [None] * len(some)
            if not isinstance(model, str):
                told = scores[:, 0] - (scores[:, 1] if num_answers == 2 else scores[:, 0].mean(dim=0))
                scores, apart = scores.mean(dim=-1), spread(told).tolist()
            found.update(zip(numbers, zip(scores.tolist(), apart, strict=True), strict=True))
    return [found[number] for number in range(len(rows))]


def _line(row: dict) -> str:
    """A row as a line of JSON; dates and bytes, which Parquet has and JSON lacks, become text."""
    line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair, in a field that is not scored
        line = json.dumps(row, default=str) + "\n"
    return line


def _scored_name(file: Path) -> Path:
    """`answers.jsonl` or `answers.jsonl.gz` to `answers.scored.jsonl`."""
    kind = next((suffix for suffix in DATA_SUFFIXES if file.name.endswith(suffix)), "")
    return file.with_name(f"{file.name.removesuffix(kind)}.scored.jsonl")


def main(words: Sequence[str] | None = None) -> None:
    parser = Parser(prog=program("score"), description=score.__doc__)
    parser.add_argument("run", help="a finished reward run, such as runs/demo/reward")
    parser.add_argument("file", help=f"the rows to score, as .jsonl, .json, .jsonl.gz, .parquet or .csv: {SHAPES}")
    parser.add_argument("--to", metavar="FILE", help="the output file (default: FILE.scored.jsonl beside the input)")
    parser.add_argument("--limit", type=int, metavar="N", help="score only the first N rows")
    parser.add_argument(
        "--column", metavar="NAME", default="reward", help="name of the new column or columns (default: reward)"
    )
    run_parsed(parser, lambda args: score(args.run, args.file, args.to, args.limit, args.column), words, shared=True)


if __name__ == "__main__":
    main()
