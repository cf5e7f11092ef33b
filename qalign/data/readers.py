"""Raw rows out of files, folders and hub data sets, each with its place (file and line, or row number)."""

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from qalign.config.paths import DATA_SUFFIXES, expanded, looks_local
from qalign.config.stages import Source
from qalign.data.hub import data_set
from qalign.errors import UserError

Placed = Iterator[tuple[str, Any]]
"""(place, row): a row that can't be parsed is a `BadRow`."""

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
WRAPPERS = ("data", "rows", "examples", "instances", "records", "items")  # keys under which one object holds all rows


MORE = "fields without a name"
TOO_LONG = "has more fields than the first line has names; put a text with commas in quotes"


class BadRow(Exception):
    """Why one row can't be used."""


class NoPair(BadRow):
    """Why a row holds no chosen and rejected answer, as the row itself says; nothing is wrong with it."""


def read(source: Source, split: str) -> Placed:
    """The rows of a file, a folder or a hub data set, one at a time. JSON lines, an array and an object that holds one
    are told apart by the content, because the suffix often says something else.

    Raises:
        UserError: it can't be read at all; one line says why, and what to do.
    """
    path = expanded(source.path)
    if path.is_dir() or not looks_local(source.path) or (":" in path.name and not path.is_file()):
        yield from _numbered(f"{source.path}[{split}]", data_set(source, split))
        return
    if source.revision or source.streaming:
        raise UserError(f"{path}: is a file; revision and streaming are for data sets of the hub, remove them")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    try:
        if kind == "parquet":
            yield from _parquet(path)
        elif kind in ("csv", "tsv"):
            yield from _csv(path)
        elif path.name.endswith(DATA_SUFFIXES):
            yield from _json(path, split)
        else:
            raise UserError(f"{path}: expected a file that ends in {', '.join(DATA_SUFFIXES)}")
    except UnicodeDecodeError as error:
        found = f"its text isn't {error.encoding.upper()} ({error.reason}: {error.object[error.start]:#04x})"
        raise UserError(f"{path}: {found}; save it as UTF-8, for instance with iconv -f LATIN1 -t UTF-8") from None
    except (OSError, EOFError, RecursionError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: can't be read: {error}") from None


def _numbered(place: str, rows: Iterable[Any]) -> Placed:
    return ((f"{place}, row {number}", row) for number, row in enumerate(rows, start=1))


@contextmanager
def _text(path: Path) -> Generator[IO[str]]:
    """A text file, unpacked, in the encoding that its byte order mark names; UTF-8 without one. Line ends stay."""
    unpacked: Any = gzip.open if path.suffix == ".gz" else open
    with unpacked(path, "rb") as file:
        start = file.read(4)
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")
    with unpacked(path, "rt", encoding=encoding, newline="") as file:
        yield file


def _json(path: Path, split: str) -> Placed:
    with _text(path) as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        number, first = next(lines, (0, ""))
        values = _values(first)
        broken = bool(values) and isinstance(values[0], BadRow)
        if broken and (first.lstrip().startswith("[") or first.rstrip().endswith(("{", "[", ","))):  # it goes on below
            yield from _document(path, split, "\n" * (number - 1) + first + "".join(file))
            return
        second = next(lines, None)
        if second is None and len(values) == 1 and not broken:
            yield from _whole(path, split, values[0], number)
            return
        for place, line in chain([(number, first)], [second] if second else [], lines):
            yield from ((f"{path}:{place}", value) for value in _values(line))


def _values(line: str) -> list[Any]:
    """The JSON values on a line, one after another; a `BadRow` in place of what can't be parsed."""
    values, start, line = list[Any](), 0, line.rstrip()
    while (start := _next(line, start)) < len(line):
        try:
            value, start = json.JSONDecoder().raw_decode(line, start)
        except json.JSONDecodeError as error:
            return [*values, BadRow(f"not valid JSON: {error.msg} at column {error.colno}")]
        except (RecursionError, ValueError):  # Python's own limits, of depth and of an integer's digits
            return [*values, BadRow("not readable JSON: nested too deeply, or a number too long")]
        values.append(value)
    return values


def _document(path: Path, split: str, text: str) -> Placed:
    """JSON values that go over several lines each: usually one, an array."""
    found, start, line = list[tuple[int, Any]](), 0, 1
    try:
        while (begin := _next(text, start)) < len(text):
            line += text.count("\n", start, begin)
            value, start = json.JSONDecoder().raw_decode(text, begin)
            found.append((line, value))
            line += text.count("\n", begin, start)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if len(found) == 1:
        return _whole(path, split, found[0][1], found[0][0])
    return ((f"{path}:{number}", value) for number, value in found)


def _next(text: str, start: int) -> int:
    """Where the next value begins: commas between values are no part of JSON lines, but plain."""
    while start < len(text) and text[start] in " \t\r\n,":
        start += 1
    return start


def _whole(path: Path, split: str, value: Any, line: int) -> Placed:
    """The rows of a file with one JSON value: an array, an object that holds one, or a row."""
    if isinstance(value, list):
        return _numbered(str(path), cast("list[Any]", value))
    if isinstance(value, dict):
        keys = cast("dict[str, Any]", value)
        inside = next((keys[key] for key in (split, *WRAPPERS) if isinstance(keys.get(key), list)), None)
        if inside is not None:
            return _numbered(str(path), inside)
        if keys and all(isinstance(part, dict) and "0" in part for part in keys.values()):
            raise UserError(f"{path}: holds columns, expected rows; pandas writes rows with orient='records'")
        return iter([(f"{path}:{line}", keys)])
    raise UserError(f"{path}: expected rows, found one {type(value).__name__}")


def _csv(path: Path) -> Placed:
    """Fields between commas; without one in the first line, between semicolons, as many spreadsheets write, or tabs."""
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is shorter than a long dialogue
    with _text(path) as file:
        names = file.readline()
        delimiter = next((mark for mark in ",;\t" if mark in names), ",")
        reader = csv.DictReader(chain([names], file), delimiter=delimiter, strict=True, restkey=MORE)
        try:
            columns = reader.fieldnames or []
            if twice := next((name for name in columns if columns.count(name) > 1), None):
                raise UserError(f"{path}:1: has the column {twice!r} twice; rename one")
            for row in reader:
                inside = sum(str(field).count("\n") for field in row.values())  # a field may hold several lines
                is_long = MORE in row
                yield f"{path}:{reader.line_num - inside}", BadRow(TOO_LONG) if is_long else row
        except csv.Error as error:  # such as a quote that is never closed: all rows after it would be one field
            raise UserError(
                f"{path}:{reader.line_num + 1}: not valid CSV: {error}; check the quotes of this row"
            ) from None


def _parquet(path: Path) -> Placed:
    pyarrow: Any = import_module("pyarrow")  # it has no types
    try:
        with import_module("pyarrow.parquet").ParquetFile(path) as file:
            yield from _numbered(str(path), chain.from_iterable(b.to_pylist() for b in file.iter_batches(1024)))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: can't be read: {error}") from None
