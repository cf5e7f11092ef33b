"""Checkpoints of a run: the folders `checkpoints/checkpoint-STEP`, each whole once it has a manifest.

A manifest holds the size and the hash of every file, so damage is found before anything is loaded. Imports no torch.
"""

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qalign.config.atomic import sync_folder, sync_tree, write_whole
from qalign.errors import UserError

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"  # the run's, as it was at the checkpoint
KEPT = 2  # checkpoints of a run, so that one is always whole


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    tokens_seen: int  # by the whole run until then
    wall_seconds: float  # of the whole run until then
    files: dict[str, dict[str, Any]]  # by path inside the checkpoint: its `bytes` and its `sha256`


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
    write_whole(checkpoint / METRICS, metrics.read_bytes() if metrics.is_file() else b"")
    sync_tree(checkpoint)
    kept = asdict(Manifest(tokens_seen, wall_seconds, sizes_and_hashes(checkpoint)))
    write_whole(checkpoint / MANIFEST, json.dumps(kept | {"sha256": _own_hash(kept)}, indent=1) + "\n")
    sync_folder(checkpoint.parent)
    marked = sorted((file.parent for file in checkpoint.parent.glob(f"checkpoint-*/{MANIFEST}")), key=step_of)
    for old in marked[:-KEPT]:
        if old.name != keep:
            discard(old)


def sizes_and_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """`bytes` and `sha256` of every file in a folder, by its path in it; a manifest doesn't count."""
    inside = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in inside
    }


def discard(checkpoint: Path) -> None:
    """Deletes a checkpoint, its manifest first: one that is deleted in part doesn't count as whole."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises a ValueError, in words, if it is missing or damaged; an OSError if the disk can't read it."""
    file = checkpoint / MANIFEST
    if not file.is_file():
        raise ValueError(f"it has no {MANIFEST}: it was not written to its end")
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        own = kept.pop("sha256")
        manifest = Manifest(**kept)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        own, kept, manifest = None, {}, None
    if manifest is None or own != _own_hash(kept):
        raise ValueError(f"{MANIFEST} was changed")
    return manifest


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is as it was written."""
    try:
        manifest = read_manifest(checkpoint)
        for name, wanted in manifest.files.items():
            file, size = checkpoint / name, wanted["bytes"]
            if not file.is_file():
                return f"{name} is missing"
            if (found := file.stat().st_size) != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            if _sha256(file) != wanted["sha256"]:
                return f"{name} was changed"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    return None


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint in `checkpoints/` that is undamaged, after a line about each newer one that isn't. None if
    there is none, nor a damaged one: a folder without a manifest was only cut short as it was written.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
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


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _own_hash(kept: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
