"""Raw rows out of files, folders and hub data sets, each with its place (file and line, or row number)."""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeGuard

from qalign.config.paths import DATA_SUFFIXES, check_fetched, expanded, looks_local
from qalign.config.stages import Source
from qalign.data.hub import data_set
from qalign.errors import UserError, short

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
SPLITS = re.compile(r"train(ing)?|test|val(id(ation)?)?|dev|eval(uation)?|(train|test)_\w+", re.IGNORECASE)
# An object with a text or turns under such a key is a row, whatever lists it holds beside.
OF_A_ROW = ("prompt", "question", "query", "instruction", "input", "text", "chosen", "completion", "output", "messages")
MORE = "fields without a name"
TOO_LONG = "has more fields than the first line has names; put a text with commas in quotes"


class BadRow(Exception):
    """Why one row can't be used."""


class NoPair(BadRow):
    """Why a row holds no chosen and rejected answer, as the row itself says; nothing is wrong with it."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise BadRow(f"has the key {short(twice)} twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)


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
    check_fetched([path])
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    try:
        if kind == "parquet":
            yield from _parquet(path)
        elif kind in ("csv", "tsv"):
            yield from _csv(path, "\t,;|" if kind == "tsv" else ",;\t|")
        elif path.name.endswith(DATA_SUFFIXES):
            yield from ((place, _of_viewer(row)) for place, row in _json(path, split))
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


class _Unfinished(BadRow):
    """Why a line can't be parsed where the value may go on below it."""


def _json(path: Path, split: str) -> Placed:
    with _text(path) as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        number, first = next(lines, (0, ""))
        values = _values(first)
        broken = bool(values) and isinstance(values[-1], BadRow)
        if broken and (first.lstrip().startswith("[") or isinstance(values[-1], _Unfinished)):
            rest = "".join(file)
            try:
                yield from _document(path, split, "\n" * (number - 1) + first + rest)
                return
            except UserError:  # JSON lines, if the next line is whole
                below = rest.split("\n")
                if any(isinstance(value, BadRow) for value in _values(below[0]) or [BadRow("")]):
                    raise
            lines = ((place, line) for place, line in enumerate(below, start=number + 1) if line.strip())
        second = next(lines, None)
        if second is None and len(values) == 1 and not broken:
            yield from _whole(path, split, values[0], number)
            return
        for place, line in chain([(number, first)], [second] if second else [], lines):
            yield from ((f"{path}:{place}", value) for value in _values(line))


def _values(line: str) -> list[Any]:
    """The JSON values on a line, one after another; a `BadRow` in place of what can't be parsed."""
    values, line = list[Any](), line.rstrip()
    try:
        for _, value in _decoded(line):
            values.append(value)
    except BadRow as error:
        values.append(error)
    except json.JSONDecodeError as error:
        kind = BadRow if error.pos < len(line) else _Unfinished
        values.append(kind(f"not valid JSON: {error.msg} at column {error.colno}"))
    except (RecursionError, ValueError):  # Python's own limits, of depth and of an integer's digits
        values.append(BadRow("not readable JSON: nested too deeply, or a number too long"))
    return values


def _document(path: Path, split: str, text: str) -> Placed:
    """JSON values that go over several lines each: usually one, an array."""
    found, line, at = list[tuple[int, Any]](), 1, 0
    try:
        for begin, value in _decoded(text):
            line, at = line + text.count("\n", at, begin), begin
            found.append((line, value))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except BadRow as error:
        raise UserError(f"{path}: below line {line}: {error}") from None
    if len(found) == 1:
        return _whole(path, split, found[0][1], found[0][0])
    return ((f"{path}:{number}", value) for number, value in found)


def _decoded(text: str) -> Iterator[tuple[int, Any]]:
    """(position, value) of JSON values one after another. Commas between them are no part of JSON lines, but plain."""
    start, end = 0, len(text)
    while (start := next((at for at in range(start, end) if text[at] not in " \t\r\n,"), end)) < end:
        begin = start
        value, start = DECODER.raw_decode(text, begin)
        yield begin, value


def _whole(path: Path, split: str, value: Any, line: int) -> Placed:
    """The rows of a file with one JSON value: an array, an object that holds one, or a row."""
    if (rows := _rows_in(path, split, value)) is not None:
        return _numbered(str(path), rows)
    if is_object(value):
        return iter([(f"{path}:{line}", value)])
    raise UserError(f"{path}: expected rows, found one {type(value).__name__}")


def _rows_in(path: Path, split: str, value: Any) -> list[Any] | None:
    """The rows in a JSON value: a list; the list under the key `split`, a usual name, or the only one; or columns.
    None if it is a row itself. A `UserError` if several lists could be meant."""
    value = _unnumbered(value)
    if not is_object(value):
        return value if is_list(value) else None
    keys = {name: _unnumbered(part) for name, part in value.items()}
    if is_list(keys.get("columns")) and is_list(keys.get("data")) and all(map(is_list, keys["data"])):  # orient='split'
        return [dict(zip(keys["columns"], cells, strict=False)) for cells in keys["data"]]
    for name in (split, *WRAPPERS):
        if (rows := _rows_in(path, split, keys.get(name))) is not None:
            return rows
    if _is_turn(keys) or any(isinstance(part, str) or _is_turn(part) for part in map(keys.get, OF_A_ROW)):
        return None
    if splits := [name for name in keys if SPLITS.fullmatch(name) and (is_list(keys[name]) or is_object(keys[name]))]:
        raise UserError(f"{path}: has no '{split}', but {', '.join(splits)}; name one of them as `split`")
    lists = {name: part for name, part in keys.items() if is_list(part)}
    objects = [name for name, part in lists.items() if part and all(map(is_object, part))]
    if len(objects) < len(lists) == len(keys) and len(set(map(len, lists.values()))) == 1:
        return [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]
    if any(_is_turn(lists[name]) for name in objects):
        return None
    inside = {name: _rows_in(path, split, part) for name, part in keys.items() if is_object(part) or name in objects}
    inside = {name: rows for name, rows in inside.items() if rows is not None}
    if len(inside) > 1:
        raise UserError(f"{path}: holds several lists of rows: {', '.join(inside)}; name one of them as `split`")
    if lists and not inside and len(lists) == len(keys):
        sizes = ", ".join(f"{name} {len(part)}" for name, part in lists.items())
        raise UserError(f"{path}: holds columns of different lengths ({sizes}); expected rows")
    return next(iter(inside.values()), None)


def is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, (list, tuple))  # pyarrow gives the items of a map as tuples


def _unnumbered(value: Any) -> Any:
    """A list that is written as an object with numbers as keys, as pandas does; any other value as it is."""
    return list(value.values()) if is_object(value) and value and all(map(str.isdigit, value)) else value


def _is_turn(value: Any) -> bool:
    """Whether a value is a turn of a dialogue, or begins with one."""
    value = value[0] if is_list(value) and value else value
    return is_object(value) and bool({"role", "from"} & {*value} and {"content", "value", "parts"} & {*value})


def _of_viewer(row: Any) -> Any:
    """The row itself, where the hub's viewer wrapped it."""
    if not (is_object(row) and "row_idx" in row and is_object(row.get("row"))):
        return row
    cut = row.get("truncated_cells")
    return BadRow(f"the hub's viewer cut {cut}; download the data set itself") if cut else row["row"]


def _csv(path: Path, delimiters: str) -> Placed:
    """Fields between the mark that the first line has most of, as spreadsheets differ in it; a line before it such as
    `sep=;` names another."""
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is shorter than a long dialogue
    with _text(path) as file:
        lines = ((number, line) for number, line in enumerate(file) if line.strip(f'{delimiters}"\r\n '))
        before, names = next(lines, (0, ""))
        if said := re.fullmatch(r'"?sep=(.)"?\s*', names):
            before, names = next(lines, (0, ""))
        delimiter = said[1] if said else max(delimiters, key=re.sub('"[^"]*"', "", names).count)
        reader = csv.DictReader(
            chain([names], file),
            delimiter=delimiter,
            strict=True,
            restkey=MORE,
            skipinitialspace=f"{delimiter} " in names,
        )
        try:
            columns = [name.strip() or f"column {n}" for n, name in enumerate(reader.fieldnames or (), start=1)]
            if twice := next((name for name in columns if columns.count(name) > 1), None):
                raise UserError(f"{path}:{before + 1}: has the column {short(twice)} twice; rename one")
            reader.fieldnames = columns
            for row in reader:
                inside = sum(str(field).count("\n") for field in row.values())  # a field may hold several lines
                if any(row.values()):
                    yield f"{path}:{before + reader.line_num - inside}", BadRow(TOO_LONG) if MORE in row else row
        except csv.Error as error:  # such as a quote that is never closed: all rows after it would be one field
            line = before + reader.line_num + 1
            raise UserError(f"{path}:{line}: not valid CSV: {error}; check the quotes of this row") from None


def _parquet(path: Path) -> Placed:
    pyarrow: Any = import_module("pyarrow")  # it has no types
    try:
        with import_module("pyarrow.parquet").ParquetFile(path) as file:
            yield from _numbered(str(path), chain.from_iterable(b.to_pylist() for b in file.iter_batches(1024)))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: can't be read: {error}") from None
