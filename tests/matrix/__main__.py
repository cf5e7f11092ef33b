"""Runs every command on a tiny random model of every family, and writes docs/models.md.

    python -m tests.matrix [NAME …] [--short] [--jobs N]

Exits 1 if something became worse than docs/models.md says. With --short or names it writes nothing.
"""

import argparse
import importlib
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
import yaml
from torch import nn

from qalign.config.recipe import Model
from qalign.errors import UserError
from qalign.judge.measures import held_out
from qalign.model.base import Base, load
from tests.campaign.lab import Outcome, start
from tests.conftest import ROOT
from tests.matrix.families import FAMILIES, SHORT, save

DOCUMENT = ROOT / "docs" / "models.md"
CPU_SECONDS = 60  # a command may take; it needs one to three
# By column: the command and the words behind the recipe.
COMMANDS = {
    "sft": ("sft", ()),
    "sft packed": ("sft", ("sft.packing=true", "--overwrite")),
    "reward": ("reward", ()),
    "dpo": ("dpo", ()),
    "kto": ("kto", ()),
    "ppo, function": ("ppo", ()),
    "ppo, reward model": ("ppo", ("ppo.reward=reward", "--overwrite")),
    "grpo": ("grpo", ()),
    "best_of": ("best_of", ("n=2",)),
    "evaluate": ("evaluate", ()),
    "export": ("export", ("--to", "merged")),
    "fit": ("fit", ("model.compute_dtype=bfloat16", "--memory", "8GB")),
}
NEEDED = {"ppo, reward model": "reward", "evaluate": "dpo", "export": "dpo"}  # what a command works on
FIRST_LOSSES = {"dpo": math.log(2), "kto": 0.5}
RANKS = ("FAILS", "no", "yes")
PAIRS, SHARE = "pairs", "4 bits"
COLUMNS = ("family", "models", *COMMANDS, PAIRS, SHARE)
TEXT = """# Which model families work

Family is `model_type` in a model's `config.json`; what isn't listed may work too, as qalign has no list of families.
Every command ran on a tiny random model of each family, with its peculiarities on (windows shorter than rows, shared
keys, experts, towers …), for a step or two on a CPU in float32 with an NF4 base. That shows what runs, not how well a
published model learns. `python -m tests.matrix` wrote this page, with
{versions}.

- **sft** to **fit** are commands. *sft packed* has `sft.packing: true`. *ppo, function* is rewarded by a Python
  function, as *grpo* is, *ppo, reward model* by the recipe's own reward run.
- **yes** the command ended well; DPO's first loss was ln 2 too and KTO's a half, as they must be while policy and
  reference are equal.
  **no** it refused with one line, which stands below, or what it works on is missing. **FAILS** a fault of qalign's.
- **pairs**: *packed* runs the prompt of a pair once, both answers behind it, without padding. Modules named behind it
  mix tokens without attention, and inside them each answer has a row with the prompt of its own. *padded* runs the
  prompt twice, and says why.
- **4 bits**: the share of the weights in the layers' matrices that is held in 4 bits. Embeddings and the output layer
  never are; convolutions stay as they are published.

{table}

## What is refused or fails
{notes}
"""


@dataclass
class Row:
    """What a family's commands did: a cell for each column, and what was said where one isn't `yes`."""

    name: str
    cells: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def line(self) -> str:
        return _line(f"`{self.name}`", FAMILIES[self.name][0], *self.cells.values())


def try_family(name: str, folder: Path) -> Row:
    """Makes a family's model, runs every command on it, and reads from its base how it is held and run."""
    row, folder = Row(name), folder / name
    save(name, folder / "base")
    recipe = write_recipe(folder)
    for column, (command, words) in COMMANDS.items():
        if row.cells.get(NEEDED.get(column, ""), "yes") != "yes":
            row.cells[column] = "no"
            continue
        first = str(folder / "runs" / "dpo") if command == "export" else recipe
        outcome = start(command, [first, *words], _limit_time)
        wrong = _first_loss_off(folder / "runs", column) if outcome.code == 0 else None
        row.cells[column] = "FAILS" if wrong else {0: "yes", 2: "no"}.get(outcome.code, "FAILS")
        if row.cells[column] != "yes":
            row.notes[column] = wrong or _said(outcome, str(folder))
    try:
        base = load(Model(base=str(folder / "base"), compute_dtype="float32"))
        mixers = str(base.packing.mixers)
        packed = f"packed ({mixers})" if mixers else "packed"
        row.cells |= {PAIRS: f"padded: {base.padding_reason}" if base.padding_reason else packed, SHARE: share(base)}
    except UserError:
        row.cells |= {PAIRS: "", SHARE: ""}
    except Exception as error:
        row.cells |= {PAIRS: "FAILS", SHARE: "FAILS"}
        row.notes[PAIRS] = f"{type(error).__name__}: {error}"
    shutil.rmtree(folder)
    print(name, *row.notes.items(), sep="\n    " if row.notes else " ", flush=True)
    return row


def write_recipe(folder: Path) -> str:
    """A recipe of all stages on four short pairs, which are rows longer than the families' windows."""
    pairs = [
        {"prompt": f"How do I boil {n} eggs?", "chosen": f"Boil all {n} for eight minutes.", "rejected": "No idea."}
        for n in ("two", "three", "six", "ten", "twelve", "twenty")
    ]
    dialogues = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    for name, rows in (("pairs", pairs[:4]), ("test", pairs[4:]), ("dialogues", dialogues[:4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text("def length(completions):\n    return [float(len(c)) for c in completions]\n")
    steps = {"batch_size": 2, "micro_batch_size": 2, "max_steps": 1, "learning_rate": 1e-3}
    sampling = {"reward": "mine.py:length", "samples_per_prompt": 2, "max_new_tokens": 4}
    once = {"batch_size": 4, "mini_batches": 1, "update_epochs": 1, "kl_stop": None}
    recipe = {
        "model": {"base": "base", "compute_dtype": "float32", "max_length": 128},
        "lora": {"r": 4, "alpha": 8},
        "output": "runs",
        "sft": {"data": "dialogues.jsonl", **steps},
        "reward": {"data": "pairs.jsonl", **steps},
        "dpo": {"data": "pairs.jsonl", "eval_data": "test.jsonl", **steps},
        "kto": {"data": "pairs.jsonl", "eval_data": "test.jsonl", **steps},
        "ppo": {"data": "pairs.jsonl", **steps, **sampling, **once},
        "grpo": {"data": "pairs.jsonl", **steps, **sampling, **once},
    }
    recipe["model"]["base"], recipe["output"] = str(folder / "base"), str(folder / "runs")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def share(base: Base) -> str:
    """The share of the layers' matrices that is held in 4 bits: two weights a byte, as bytes or as blocks of them."""
    outside = [module for module in base.lm.modules() if isinstance(module, nn.Embedding)]
    outside += [head] if (head := base.lm.get_output_embeddings()) is not None else []
    left_out = {id(parameter) for module in outside for parameter in module.parameters()}
    matrices = [p for p in base.lm.parameters() if p.dim() > 1 and id(p) not in left_out]
    blocks = [buffer for name, buffer in base.lm.named_buffers() if name.endswith("_blocks")]
    four = sum(2 * each.numel() for each in (*matrices, *blocks) if each.dtype == torch.uint8)
    return f"{four / (four + sum(p.numel() for p in matrices if p.dtype != torch.uint8)):.0%}"


def _limit_time() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    held_out.MAX_NEW_TOKENS = 8


def _first_loss_off(runs: Path, stage: str) -> str | None:
    """What is wrong with a stage's first loss, where policy and reference are equal."""
    if stage not in FIRST_LOSSES:
        return None
    lines = map(json.loads, (runs / stage / "metrics.jsonl").read_text().splitlines())
    loss, right = next(line["loss"] for line in lines if "loss" in line), FIRST_LOSSES[stage]
    return None if abs(loss - right) < 1e-4 else f"the first loss is {loss:.4f}, not {right:.4f}"


def _said(outcome: Outcome, folder: str) -> str:
    """What a command said at its end, and after a traceback the last line of qalign's in it."""
    if outcome.code < 0:
        return f"stopped by signal {-outcome.code}, after {CPU_SECONDS} seconds of computing if it is 9"
    line, place = outcome.last_line, ""
    if outcome.code != 2:  # a progress bar may stand behind the traceback
        line = (re.findall(r"^[\w.]+(?:Error|Exception)\b.*", outcome.said, flags=re.MULTILINE) or [line])[-1]
        places = re.findall(rf'File "{ROOT}/(qalign/\S+)", line (\d+)', outcome.said)
        place = f" ({':'.join(places[-1])})" if places else ""
    line = line.replace(f"{folder}/", "").replace("|", "/")
    return f"{line[:240]}{'…' * (len(line) > 240)}{place}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def recorded(text: str) -> dict[str, dict[str, str]]:
    """The cells of each family in the text of docs/models.md, by the columns that it has."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| family", "| `"))]
    columns = rows[0][2:] if rows else []
    return {row[0].strip("`"): dict(zip(columns, row[2:], strict=True)) for row in rows[1:]}


def worse(row: Row, before: dict[str, str]) -> list[str]:
    """The cells of a family that became worse than they were."""
    cells = row.cells
    found = [c for c in COMMANDS if c in before and RANKS.index(cells[c]) < RANKS.index(before[c])]
    found += [PAIRS] * (before.get(PAIRS, "").startswith("packed") and not cells[PAIRS].startswith("packed"))
    shares = [int(each.rstrip("%")) if each.endswith("%") else 0 for each in (cells[SHARE], before.get(SHARE, ""))]
    found += [SHARE] * (shares[0] < shares[1])
    return [f"{row.name}, {c}: {cells[c]}, was {before[c]}. {row.notes.get(c, '')}" for c in found]


def document(rows: list[Row]) -> str:
    names = ("transformers", "peft", "trl", "bitsandbytes", "torch")
    versions = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in names)
    table = [_line(*COLUMNS), _line(*["---"] * len(COLUMNS)), *(row.line for row in rows)]
    notes = [_notes(row) for row in rows if row.notes]
    return TEXT.format(versions=versions, table="\n".join(table), notes="\n".join(notes) or "Nothing.")


def _notes(row: Row) -> str:
    by_reason: dict[str, list[str]] = {}
    for column, reason in row.notes.items():
        by_reason.setdefault(reason, []).append(column)
    return f"\n`{row.name}`:\n" + "".join(f"\n- {'; '.join(columns)}: {why}" for why, columns in by_reason.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *FAMILIES], metavar="NAME", help="families (default: all)")
    parser.add_argument("--short", action="store_true", help="one family of each kind, as CI runs it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    before = recorded(DOCUMENT.read_text()) if DOCUMENT.is_file() else {}
    names = args.names or (SHORT if args.short else sorted(FAMILIES))
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    importlib.import_module("tests.everything")
    folder = Path(tempfile.mkdtemp(prefix="matrix-"))
    try:
        with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
            rows = sorted(pool.imap_unordered(partial(try_family, folder=folder), names), key=lambda row: row.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not (args.names or args.short):
        DOCUMENT.write_text(document(rows), encoding="utf-8")
    found = [line for row in rows for line in worse(row, before.get(row.name, {}))]
    print("\n", *(row.line for row in rows), "", *found, f"{len(found)} became worse", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
