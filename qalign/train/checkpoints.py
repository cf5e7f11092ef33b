"""Checkpoints of a run: folders `checkpoints/checkpoint-STEP`, each whole once it has a manifest. Imports no torch."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from qalign.config import manifest
from qalign.config.atomic import sync_folder, sync_tree, write_whole
from qalign.config.manifest import MANIFEST, damage
from qalign.errors import UserError

METRICS = "metrics.jsonl"  # the run's, as it was at the checkpoint
KEPT = 2  # checkpoints of a run, so that one is always whole


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint folder; -1 for a folder of another name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in `checkpoints/` that was written completely; whether it is damaged is not looked at."""
    return max((file.parent for file in folder.glob(f"checkpoint-*/{MANIFEST}")), key=step_of, default=None)


def mark_whole(checkpoint: Path, tokens_seen: int, wall_seconds: float, metrics: Path, keep: str | None = None) -> None:
    """Writes a checkpoint's manifest once all of it is on the disk, and deletes checkpoints older than the last two,
    except the one named `keep`."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    write_whole(checkpoint / METRICS, metrics.read_bytes() if metrics.is_file() else b"")
    sync_tree(checkpoint)
    manifest.write(checkpoint, tokens_seen=tokens_seen, wall_seconds=wall_seconds)
    sync_folder(checkpoint.parent)
    marked = sorted((file.parent for file in checkpoint.parent.glob(f"checkpoint-*/{MANIFEST}")), key=step_of)
    for old in marked[:-KEPT]:
        if old.name != keep:
            discard(old)


def discard(checkpoint: Path) -> None:
    """Deletes a checkpoint, its manifest first: one that is deleted in part doesn't count as whole."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint in `checkpoints/` that is undamaged, after a line about each newer one that isn't. None if
    there is none, nor a damaged one: a folder without a manifest was only cut short as it was written. A `UserError` if
    all are damaged."""
    found = sorted((path for path in folder.glob("checkpoint-*") if path.is_dir()), key=step_of, reverse=True)
    problems: dict[Path, str] = {}
    for checkpoint in found:
        if (problem := damage(checkpoint)) is None:
            for path, reason in problems.items():
                print(f"{path}: can't be used: {reason}; going back to {checkpoint.name}", flush=True)
            return checkpoint
        problems[checkpoint] = problem
    if any((path / MANIFEST).exists() for path in problems):
        lines = (f"{path}: can't be used: {reason}" for path, reason in problems.items())
        raise UserError(*lines, f"{folder}: no checkpoint is whole; --overwrite starts again")
    return None


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, without those that were damaged since."""
    found: list[dict[str, Any]] = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        with suppress(ValueError, RecursionError):
            if isinstance(logged := json.loads(line), dict) and "step" in logged:
                found.append(logged)
    return found
