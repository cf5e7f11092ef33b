"""Takes a finished run anywhere: the trained model in the form that other programs read.

    python -m qalign.export RUN --to merged [--onto dequantized | original]
    python -m qalign.export RUN --to gguf [--quantization q8_0]
    python -m qalign.export RUN --to gguf-adapter | ollama | mlx [--base BASE]
    python -m qalign.export RUN --to hub --repo OWNER/NAME [--base ORG/NAME] [--private] [--dry-run]

`merged` is a plain 16-bit model folder that needs neither qalign nor PEFT (docs/merging.md), `gguf` one file with
weights, tokenizer and chat template for llama.cpp and everything built on it (docs/export.md). Before anything is kept,
the exported model is measured against the trained one on held-out prompts: the KL divergence in nats is printed, and
above `--max-kl` nothing is written, unless with `--force`. `hub` pushes the adapter itself with its card (docs/hub.md).
"""

import argparse
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalign.cli import Parser, new_target, program, run_parsed
from qalign.config.atomic import clear_leftovers, new_folder, replacing
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


@dataclass(frozen=True)
class Target:
    """A form in which a run can be exported."""

    words: str
    name: str  # of the file or folder inside the run
    options: tuple[str, ...] = ()  # that it takes, beside those of all targets
    is_file: bool = False


TARGETS = {
    "merged": Target("a plain 16-bit model folder, for transformers and vLLM", "merged-{onto}{suffix}", ("onto",)),
    "gguf": Target(
        "one file for llama.cpp, LM Studio and others", "{whole}-{quantization}.gguf", ("onto", "quantization", "bare"),
        is_file=True,
    ),
    "gguf-adapter": Target("the adapter alone as llama.cpp's LoRA", "adapter{suffix}.gguf", ("base",), is_file=True),
    "ollama": Target("a Modelfile and what it names", "ollama{suffix}", ("onto", "quantization", "base")),
    "mlx": Target("a folder for mlx-lm on a Mac", "mlx{suffix}", ("onto", "base")),
    "hub": Target("a repository of the Hugging Face hub, with card", "", ("repo", "base", "private", "dry_run")),
}  # fmt: skip
DEFAULTS = {"onto": "dequantized", "quantization": "q8_0", "bare": False, "base": ""}
DEFAULTS |= {"repo": None, "private": False, "dry_run": False}
SIMPLE = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # quantisations of the `gguf` package
OF_LLAMA_CPP = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k")
ROWS = 16  # prompts, or pairs, on which an exported model is measured
MAX_KL = 0.05


def export(args: argparse.Namespace) -> None:
    """Export a finished run in the form that other programs read, and measure how true it stays."""
    _check_options(args)
    run = open_run(args.run, ("grpo", "ppo", "kto", "dpo", "sft", "reward"))
    if run.stage == "reward" and args.to not in ("merged", "hub"):
        raise UserError(f"--to {args.to}: {run.path} is a reward model, which gives scores; use --to merged")
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
    whole = "model" + ("-bare" if args.bare else "") + ("-original" if args.onto == "original" else "") + suffix
    name = TARGETS[args.to].name.format(**vars(args), whole=whole, suffix=suffix)
    place = new_target(args.output, run.path / name, "--output")
    rows, source = measured_rows(run, args.prompts)
    origin.check(run.recipe.model)

    if args.output:
        _write(run, args, place, rows, source)
        return
    with locked(Path(os.path.realpath(run.path))):  # a stage would take the unfinished model for leftovers
        clear_leftovers(run.path)
        _write(run, args, place, rows, source)


def _check_options(args: argparse.Namespace) -> None:
    """Fills in the defaults of options that some targets take; a `UserError` if one doesn't fit."""
    if not args.max_kl >= 0 or math.isinf(args.max_kl):
        raise UserError(f"--max-kl: {args.max_kl:g} is no KL divergence in nats; expected 0 or more, such as {MAX_KL}")
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif name not in TARGETS[args.to].options:
            takers = ", ".join(key for key, target in TARGETS.items() if name in target.options)
            option = name.replace("_", "-")
            raise UserError(f"--{option}: --to {args.to} doesn't take it; it is for --to {takers}")
    if args.base and (wrong := [name for name in ("onto", "quantization") if getattr(args, name) != DEFAULTS[name]]):
        raise UserError(f"--{wrong[0]}: with --base the adapter alone is written; leave one of the two out")
    if args.base.endswith(".gguf") and not Path(args.base).is_file():
        raise UserError(f"--base: {args.base}: there is no such file")
    if args.quantization in OF_LLAMA_CPP and not shutil.which("llama-quantize"):
        raise UserError(
            f"--quantization {args.quantization}: needs llama.cpp's llama-quantize, which is not on the PATH; install "
            f"llama.cpp, or take one of {', '.join(SIMPLE)}"
        )


def measured_rows(run: RunFolder, file: str | None) -> tuple[list[Any], str]:
    """(The prompts, of a reward model pairs, on which an exported model is measured; where they are from, in words):
    from a file, else the run's held-out ones, else its training rows."""
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


def _write(run: RunFolder, args: argparse.Namespace, place: Path, rows: list[Any], source: str) -> None:
    # Imported here, not above: torch takes seconds, and a mistyped folder must not wait for it.
    from qalign.convert.fidelity import Trained
    from qalign.convert.targets import WRITERS

    place.parent.mkdir(parents=True, exist_ok=True)
    with (replacing if TARGETS[args.to].is_file else new_folder)(place) as aside:
        lines, load = WRITERS[args.to](run, args, aside)
        found = Trained(run, rows, bare=args.bare).compare(load())
        found.check(args.max_kl, force=args.force)
    lines = {name: text.replace("{target}", str(place)) for name, text in lines.items()}
    print_exported(run, place, lines, found, source)


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
    parser.add_argument(
        "--to", choices=TARGETS, required=True, help="; ".join(f"{key}: {one.words}" for key, one in TARGETS.items())
    )
    parser.add_argument("--output", metavar="PATH", help="where it is written (default: inside the run)")
    parser.add_argument(
        "--onto", choices=("dequantized", "original"),
        help="which 16-bit base the adapter is merged onto (default: dequantized, on which it was trained)",
    )  # fmt: skip
    parser.add_argument(
        "--quantization", choices=(*SIMPLE, *OF_LLAMA_CPP),
        help=f"of a GGUF file (default: q8_0); {OF_LLAMA_CPP[0]} and the like need llama.cpp's llama-quantize",
    )  # fmt: skip
    parser.add_argument(
        "--bare", action="store_true", default=None, help="the base that it was trained on, without the adapter"
    )
    parser.add_argument(
        "--base", metavar="BASE",
        help="write the adapter alone, for this base: a .gguf file, or what Ollama or mlx-lm call it; with --to hub "
        "the base's hub id, if the recipe has files",
    )  # fmt: skip
    parser.add_argument("--prompts", metavar="FILE", help="prompts to measure on (default: the run's held-out ones)")
    parser.add_argument("--max-kl", type=float, default=MAX_KL, metavar="NATS", help=f"bound (default: {MAX_KL})")
    parser.add_argument("--force", action="store_true", help="keep it even if it is farther away than that")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="with --to hub: the repository, made if there is none")
    for option, words in (("--private", "a new repository is private"), ("--dry-run", "show what would be pushed")):
        parser.add_argument(option, action="store_true", default=None, help=f"with --to hub: {words}")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    run_parsed(options(), export, words)


if __name__ == "__main__":
    main()
