"""Takes a finished run anywhere: the trained model in the form that other programs read.

    python -m qalign.export RUN --to merged [--onto dequantized | original]
    python -m qalign.export RUN --to hub --repo OWNER/NAME [--base ORG/NAME] [--private] [--dry-run]

`merged` is a plain 16-bit model folder that needs neither qalign nor PEFT (docs/merging.md). Before anything is kept,
the exported model is measured against the trained one on held-out prompts: the KL divergence in nats is printed, and
above `--max-kl` nothing is written, unless with `--force`. `hub` pushes the adapter itself with its card (docs/hub.md).
"""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalign.cli import Parser, new_target, program, run_parsed
from qalign.config.atomic import clear_leftovers, new_folder
from qalign.config.paths import adapters_in
from qalign.config.stages import Source
from qalign.convert import hub
from qalign.data.formats import preferences, prompts
from qalign.errors import UserError
from qalign.evaluate import check_usable
from qalign.model import origin
from qalign.reports.answers import spread
from qalign.train.dataset import rows_under
from qalign.train.lock import locked
from qalign.train.run_folder import RunFolder, open_run, print_table

if TYPE_CHECKING:
    from qalign.convert.fidelity import Fidelity

TARGETS = {
    "merged": "a plain 16-bit model folder, for transformers and vLLM",
    "hub": "a repository of the Hugging Face hub, with the adapter, its card, figures and recipe",
}
ROWS = 16  # prompts, or pairs, on which an exported model is measured
MAX_KL = 0.05


def export(args: argparse.Namespace) -> None:
    """Export a finished run in the form that other programs read, and measure how true it stays."""
    if not args.max_kl >= 0 or math.isinf(args.max_kl):
        raise UserError(f"--max-kl: {args.max_kl:g} is no KL divergence in nats; expected 0 or more, such as {MAX_KL}")
    run = open_run(args.run, ("grpo", "ppo", "kto", "dpo", "sft", "reward"))
    if members := [place.name for place in adapters_in(run.adapter)][1:]:
        fix = f"name one of them, such as {run.path / members[0]}"
        raise UserError(f"{args.run}: is an ensemble of {len(members) + 1} members, and a model can hold one; {fix}")
    if args.to == "hub":
        hub.export(run, args)
        return
    if args.onto == "original" and run.recipe.lora.init == "loftq":
        raise UserError(
            f"--onto original: {run.path} has `init: loftq`, so its adapter corrects the rounding to 4 bits, and the "
            "original was never rounded; use --onto dequantized"
        )
    suffix = "" if run.adapter.name == "adapter" else f"-{run.adapter.name}"
    target = new_target(args.output, run.path / f"merged-{args.onto}{suffix}", "--output")
    rows, source = measured_rows(run, args.prompts)
    origin.check(run.recipe.model)

    if args.output:
        _write_merged(run, args, target, rows, source)
        return
    with locked(Path(os.path.realpath(run.path))):  # a stage would take the unfinished model for leftovers
        clear_leftovers(run.path)
        _write_merged(run, args, target, rows, source)


def measured_rows(run: RunFolder, file: str | None) -> tuple[list[Any], str]:
    """(The prompts, of a reward model pairs, on which an exported model is measured; where they are from, in words):
    those of a file, else the run's held-out ones, else those that it was trained on."""
    read, kind = (preferences, "pairs") if run.stage == "reward" else (prompts, "prompts")
    if file:
        rows, refused = read((Source(path=file),), "train", ROWS, 0)
        check_usable(f"--prompts {file}", len(rows), refused)
        return [*rows], f"{kind} of {file}"
    settings, key = run.settings, "eval_data" if run.settings.has_held_out else "data"
    if key == "data":  # 16 are enough, however many there are
        settings = settings.model_copy(update={"limit": min(settings.limit or ROWS, ROWS)})
    try:
        rows, refused = rows_under(key, settings, run.recipe.seed, read)
        check_usable(f"{run.stage}.{key}", len(rows), refused)
    except UserError as error:
        raise UserError(f"{error}; to measure the exported model, give {kind} with --prompts FILE") from None
    words = f"held-out {kind}" if key == "eval_data" else f"{kind} that it was trained on, as none are held out"
    return spread(rows, ROWS), words


def _write_merged(run: RunFolder, args: argparse.Namespace, target: Path, rows: list[Any], source: str) -> None:
    # Imported here, not above: torch takes seconds, and a mistyped folder must not wait for it.
    from qalign.convert import merging
    from qalign.convert.fidelity import Trained, load_exported

    with new_folder(target) as aside:
        lines = merging.write(run, args.onto, aside)
        trained = Trained(run, rows)
        found = trained.compare(load_exported(aside, is_reward=trained.is_reward))
        found.check(args.max_kl, force=args.force)
    lines = {name: text.format(target=target) for name, text in lines.items()}
    print_exported(run, target, lines, found, source)


def print_exported(run: RunFolder, target: Path, lines: dict[str, str], found: "Fidelity", source: str) -> None:
    """What was written where, and how true it is."""
    files = [target] if target.is_file() else [file for file in target.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    about = {"written": f"{target} ({size / 1e9:,.2f} GB)", **lines, "KL": str(found), "measured on": source}
    print_table(f"exported {run.path}", about.items())


def options() -> Parser:
    """The command line."""
    parser = Parser(prog=program("export"), description=export.__doc__)
    parser.add_argument("run", help="a finished run, such as runs/demo/dpo")
    parser.add_argument("--to", choices=TARGETS, required=True, help="; ".join(f"{k}: {v}" for k, v in TARGETS.items()))
    parser.add_argument("--output", metavar="PATH", help="where it is written (default: inside the run)")
    parser.add_argument(
        "--onto", choices=("dequantized", "original"), default="dequantized",
        help="which 16-bit base the adapter is merged onto (default: dequantized, on which it was trained)",
    )  # fmt: skip
    parser.add_argument("--prompts", metavar="FILE", help="prompts to measure on (default: the run's held-out ones)")
    parser.add_argument("--max-kl", type=float, default=MAX_KL, metavar="NATS", help=f"bound (default: {MAX_KL})")
    parser.add_argument("--force", action="store_true", help="keep it even if it is farther away than that")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="with --to hub: the repository, made if there is none")
    parser.add_argument("--base", metavar="ORG/NAME", help="with --to hub: the base's hub id, if the recipe has files")
    parser.add_argument("--private", action="store_true", help="with --to hub: a new repository is private")
    parser.add_argument("--dry-run", action="store_true", help="with --to hub: show what would be pushed")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    run_parsed(options(), export, words)


if __name__ == "__main__":
    main()
