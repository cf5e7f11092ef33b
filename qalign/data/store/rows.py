"""Rows of which as many are in memory as are small, and all others in a file."""

import pickle
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any, Generic, TypeVar, overload

from qalign.config.cache import cache_folder
from qalign.data.readers import BadRow
from qalign.errors import UserError, one_line

Row = TypeVar("Row")

SMALL = 2**24  # bytes of rows that are held in memory; a token takes 40 bytes in Python's lists, and a character one


class OnDemand(Sequence[Row]):
    """`count` rows, each made by `make(number)` when it is asked for. A slice of it is a list."""

    def __init__(self, count: int, make: Callable[[int], Row]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        numbers = range(self._count)[index]
        return self._make(numbers) if isinstance(numbers, int) else [*map(self._make, numbers)]


class RowFile(OnDemand[Row]):
    """Rows in a file: `starts` says where each begins in it, and the last one ends; `order` which rows these are."""

    def __init__(self, file: IO[bytes], starts: Sequence[int], order: Sequence[int]):
        self._file, self._starts, self._order = file, starts, order
        super().__init__(len(order), self._read)

    def _read(self, number: int) -> Row:
        start, end = self._starts[self._order[number]], self._starts[self._order[number] + 1]
        self._file.seek(start)
        return pickle.loads(self._file.read(end - start))

    def selected(self, numbers: Iterable[int]) -> "RowFile[Row]":
        """The rows with these numbers, from the same file."""
        return RowFile(self._file, self._starts, array("Q", (self._order[number] for number in numbers)))


class RowPool(Generic[Row]):
    """Rows as they are read. From `SMALL` bytes on they go into a file without a name, which the system deletes when
    the process ends, however it ends."""

    def __init__(self) -> None:
        self._kept: list[Row] = []
        self._starts = array("Q", [0])
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._starts) - 1

    def append(self, row: Row) -> None:
        """Keeps a row; a `BadRow` if it holds something that no file can hold, such as an open one."""
        try:
            content = pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise BadRow(f"holds something that can't be kept: {one_line(error, 120)}") from None
        self._starts.append(self._starts[-1] + len(content))
        if self._file is None and self._starts[-1] > SMALL:
            self._file = file = _unnamed_file()
            weakref.finalize(self._starts, file.close)
            file.writelines(pickle.dumps(kept, pickle.HIGHEST_PROTOCOL) for kept in self._kept)
            self._kept.clear()
        if self._file is None:
            self._kept.append(row)
        else:
            self._file.write(content)

    def rows(self, order: Sequence[int]) -> Sequence[Row]:
        """The rows with the numbers `order`: a list, or a `RowFile` if there are too many."""
        if self._file is None:
            return [self._kept[number] for number in order]
        self._file.flush()
        return RowFile(self._file, self._starts, array("Q", order))


def selected(rows: Sequence[Row], numbers: Iterable[int]) -> Sequence[Row]:
    """The rows with these numbers, on disk if `rows` are."""
    return rows.selected(numbers) if isinstance(rows, RowFile) else [rows[number] for number in numbers]


def _unnamed_file() -> Any:
    """A temporary file in the cache: /tmp may lie in memory."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    except (OSError, UserError):
        return tempfile.TemporaryFile()
