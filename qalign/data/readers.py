"""Raw rows out of files, folders and hub data sets, each with its place (file and line, or row number)."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from qalign.config.paths import looks_local
from qalign.config.stages import Source
from qalign.errors import UserError


class BadRow(Exception):
    """Why one row can't be used."""


class NoPair(BadRow):
    """Why a row holds no chosen and rejected answer, as the row itself says; nothing is wrong with it."""


def read(source: Source, split: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of a file, a folder or a hub data set; a row that can't be parsed comes as a `BadRow`."""
    path = Path(source.path).expanduser()
    if not looks_local(source.path) or path.is_dir():
        yield from _numbered(f"{source.path}[{split}]", _dataset(source.path, split))
        return
    readers = {
        ".jsonl": _json_lines,
        ".jsonl.gz": _json_lines,
        ".json": _json_array,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    reader = next((read for suffix, read in readers.items() if path.name.endswith(suffix)), None)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if reader is None:
        raise UserError(f"{path}: expected a file that ends in {', '.join(readers)}")
    try:
        yield from reader(path)
    except (OSError, EOFError, RecursionError, ValueError, zlib.error, csv.Error) as error:
        raise UserError(f"{path}: can't be read: {error}") from None


def _numbered(place: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{place}, row {number}", row) for number, row in enumerate(rows, start=1))


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError):  # Python's own limits, of depth and of an integer's digits
        return BadRow("not readable JSON: nested too deeply, or a number too long")


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows, found {type(rows).__name__}; one row a line is .jsonl")
    return _numbered(str(path), cast("list[Any]", rows))


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is shorter than a long dialogue
    with path.open(newline="", encoding="utf-8-sig") as file:
        for row in (reader := csv.DictReader(file)):
            inside = sum(str(field).count("\n") for field in row.values())  # a field may hold several lines
            yield f"{path}:{reader.line_num - inside}", row


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    pyarrow: Any = import_module("pyarrow")  # it has no types
    try:
        return _numbered(str(path), import_module("pyarrow.parquet").read_table(path).to_pylist())
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: can't be read: {error}") from None


def _dataset(name: str, split: str) -> Iterable[Any]:
    """The rows of a hub id or a local folder, through `datasets`."""
    datasets: Any = import_module("datasets")  # it has no types
    try:
        if not any((Path(name) / saved).is_file() for saved in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(name, split=split)
        data = datasets.load_from_disk(name)
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise ValueError(f"it has no such split; its splits: {', '.join(data)}")
            return data[split]
        return data
    except Exception as error:  # the hub, the network, the split, the files: its message says which
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name}: the data set can't be loaded (split '{split}'): {reason}") from None
