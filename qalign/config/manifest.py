"""Manifests: the size and the hash of every file in a folder, so that damage is found before anything is loaded.

A manifest is written last, so a folder without one was not written to its end.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from qalign.config.atomic import write_whole

MANIFEST = "manifest.json"
PIECE = 2**24  # bytes that are hashed at once: the pieces of a file are hashed on all cores


def write(folder: Path, **facts: Any) -> None:
    """Writes a folder's manifest, with `facts` about it."""
    kept = {**facts, "files": files(folder)}
    write_whole(folder / MANIFEST, json.dumps(kept | {"hash": _own_hash(kept)}, indent=1) + "\n")


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """`bytes` and `hash` of every file in a folder, by its path in it; the manifest doesn't count."""
    return {name: {"bytes": (folder / name).stat().st_size, "hash": file_hash(folder / name)} for name in names(folder)}


def names(folder: Path) -> list[str]:
    """The files that a manifest lists, by their paths in the folder."""
    inside = (file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    return sorted(file.relative_to(folder).as_posix() for file in inside)


def read(folder: Path) -> dict[str, Any]:
    """Raises a ValueError, in words, if it is missing or damaged; an OSError if the disk can't read it."""
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"it has no {MANIFEST}: it was not written to its end")
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept.pop("hash") == _own_hash(kept):
            return kept
    raise ValueError(f"{MANIFEST} was changed")


def damage(folder: Path, *, weights: bool = True) -> str | None:
    """What is wrong with the files of a folder, in words; None if they are as they were written. Without `weights`,
    only the size of safetensors files is looked at."""
    try:
        for name, wanted in read(folder)["files"].items():
            file, size = folder / name, wanted["bytes"]
            if not file.is_file():
                return f"{name} is missing"
            if (found := file.stat().st_size) != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            if (weights or file.suffix != ".safetensors") and file_hash(file) != wanted["hash"]:
                return f"{name} was changed"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    return None


def file_hash(file: Path) -> str:
    """A hash of a file's content: BLAKE2b of the hashes of its pieces."""

    def hashed(start: int) -> bytes:
        with file.open("rb") as opened:
            opened.seek(start)
            return hashlib.blake2b(opened.read(PIECE), digest_size=32).digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pieces = pool.map(hashed, range(0, file.stat().st_size, PIECE))
        return hashlib.blake2b(b"".join(pieces), digest_size=32).hexdigest()


def _own_hash(kept: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=32).hexdigest()
