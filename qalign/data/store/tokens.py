"""Token ids in a file of the cache, in Arrow's format, mapped into memory: a step reads its own rows from it.

The folder's name is a hash of everything that decides what the ids are. It appears whole or not at all, one process at
a time writes it, and it is verified each time it is used: a damaged one is written again.
"""

import hashlib
import importlib.metadata
import json
import os
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, TypeVar, get_origin, get_type_hints

import numpy as np
from tqdm.auto import tqdm

from qalign.config import cache
from qalign.config.atomic import write_whole
from qalign.data.readers import BadRow
from qalign.data.rows import Refused, rows_hash
from qalign.data.store.rows import OnDemand, RowFile
from qalign.data.store.sequences import IGNORED
from qalign.data.templates import DIRECTIVES, ChatTemplate, Tokenizer
from qalign.errors import UserError

Encoded = TypeVar("Encoded")
Encode = Callable[[ChatTemplate, Any, int], list[Encoded]]  # the token sequences of a row, each of at most so many

FILE, FACTS = "tokens.arrow", "facts.json"  # of a folder of the cache
ROW = "row"  # column: the number of the row that a sequence is from
AT_ONCE = 128  # rows that a thread encodes before the next thread gets some
WAIT = 86_400  # seconds to wait for another process that encodes the same rows


class TokenFile(OnDemand[Encoded], Generic[Encoded]):
    """Token sequences in a file, as objects of the dataclass `kind` with their ids as lists.

    Supervised labels are the ids themselves, so of labels the file holds the spans `[start, end, start, end …]`.
    """

    def __init__(self, file: Path, kind: type[Encoded], order: Sequence[int] | None = None):
        arrow: Any = import_module("pyarrow")  # it has no types
        self._file, self._kind, self._table = file, kind, arrow.ipc.open_stream(arrow.memory_map(str(file))).read_all()
        self._order: Sequence[int] = range(self._table.num_rows) if order is None else order
        self._batches: list[Any] = self._table.to_batches()
        self._starts = [0, *accumulate(batch.num_rows for batch in self._batches)]
        self._tuples = [name for name, hint in get_type_hints(kind).items() if get_origin(hint) is tuple]
        super().__init__(len(self._order), self._at)

    @property
    def row_numbers(self) -> list[int]:
        """Of each sequence, the number of the row that it is from."""
        return np.asarray(self._table.column(ROW).to_numpy())[self._order].tolist()

    def reordered(self, order: Sequence[int]) -> "TokenFile[Encoded]":
        return TokenFile(self._file, self._kind, [self._order[number] for number in order])

    def outlines(self) -> Iterator[Encoded]:
        """The sequences with ranges in the place of their ids: their lengths are right, and no id is read."""
        length = import_module("pyarrow.compute").list_value_length
        columns = {
            name: [*map(range, length(column).to_pylist())] if _is_list(column) else column.to_pylist()
            for name, column in self._columns(self._table)
        }
        if "labels" in columns:
            columns["labels"] = columns["ids"]
        for number in self._order:
            yield self._kind(**{name: column[number] for name, column in columns.items()})

    def supervised(self) -> int:
        """The number of tokens with a label."""
        spans = [chunk.flatten().to_numpy() for chunk in self._table.column("labels").chunks]
        return int(sum((part[1::2] - part[::2]).sum(dtype=np.int64) for part in spans))

    def _at(self, number: int) -> Encoded:
        place = self._order[number]
        batch = bisect_right(self._starts, place) - 1
        found: dict[str, Any] = {}
        for name, column in self._columns(self._batches[batch]):
            value = column[place - self._starts[batch]]
            found[name] = value.values.to_numpy().tolist() if _is_list(column) else value.as_py()
        if "labels" in found:
            found["labels"] = _labels(found["ids"], found["labels"])
        found |= {name: tuple(found[name]) for name in self._tuples}
        return self._kind(**found)

    def _columns(self, table: Any) -> Iterator[tuple[str, Any]]:
        return ((name, table.column(name)) for name in table.schema.names if name != ROW)


def outlines(rows: Sequence[Encoded]) -> Iterable[Encoded]:
    """Rows for what asks for everything but their ids: on disk they have ranges of the same length there."""
    return rows.outlines() if isinstance(rows, TokenFile) else rows


def supervised_tokens(rows: Sequence[Any]) -> int:
    """The number of tokens of dialogues that have a label."""
    if isinstance(rows, TokenFile):
        return rows.supervised()
    return sum(label != IGNORED for row in rows for label in row.labels)


def encoded_on_disk(
    template: ChatTemplate, rows: RowFile[Any], encode: "Encode[Encoded]", kind: type[Encoded], max_length: int
) -> tuple[TokenFile[Encoded], list[Refused]] | None:
    """The token sequences of rows and the refused rows, from the cache where the same rows were encoded in the same way
    before; None if the cache can't be written, which it says.

    Threads encode: most of the time goes into the tokenizer's own code, which runs without Python's lock.
    """
    with suppress(UserError):  # there is no place for a cache
        folder = cache.cache_folder() / "tokens" / cache_key(template, rows, encode, max_length) / "ids"
        write = partial(_write, template, rows, encode, kind, max_length)
        if cache.is_whole(folder):
            print(f"token ids: from the cache, {folder.parent}", flush=True)
        elif not cache.keep(folder, write, wait=WAIT):
            return None
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        template.left_out.update(facts["left_out"])
        return TokenFile(folder / FILE, kind), [Refused(*row) for row in facts["refused"]]
    return None


def cache_key(template: ChatTemplate, rows: Sequence[Any], encode: "Encode[Any]", max_length: int) -> str:
    """A hash of what the ids depend on: the rows with their places, the tokenizer, the chat template with its settings
    and the dates that it writes, the longest sequence, and the code."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    dates = [template.now.strftime(f"%{mark}") for mark in _directives(template.source)] if template.is_dated else []
    parts = [
        rows_hash(rows, places=True),
        _identity(template.tokenizer),
        [template.source, template.system_turn, template.words, dates],
        [encode.__name__, max_length, code.hexdigest()],
        [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2", "pyarrow")],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _directives(source: str) -> list[str]:
    """The directives of `strftime` that a template may use."""
    return sorted({*re.findall(f"%(-?[{DIRECTIVES}])", source)})


def _identity(tokenizer: Tokenizer) -> list[Any]:
    """What a tokenizer makes of a text depends on these. (A tokenizer of Python code has no `backend_tokenizer`.)"""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    own = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    options = json.dumps(tokenizer.init_kwargs, sort_keys=True, default=lambda _: "")
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [type(tokenizer).__qualname__, hashlib.sha256(own.encode()).hexdigest(), options, special]


def _write(
    template: ChatTemplate, rows: RowFile[Any], encode: "Encode[Any]", kind: type, max_length: int, folder: Path
) -> None:
    arrow: Any = import_module("pyarrow")
    schema, refused = _schema(kind), list[tuple[str, str]]()
    template = replace(template, left_out=set[str]())  # of these rows alone
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    starts = range(0, len(rows), AT_ONCE)
    template.ids("a")  # transformers resets truncation in the first call, which must not be two at once

    def work(start: int, some: list[Any]) -> tuple[Any, list[tuple[str, str]], int]:
        return *_encoded(template, encode, schema, max_length, start, some), len(some)

    with (
        arrow.OSFile(str(folder / FILE), "wb") as sink,
        arrow.ipc.new_stream(sink, schema) as writer,
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(rows), desc="tokenizing", unit="row") as bar,
    ):
        chunks = ((start, rows[start : start + AT_ONCE]) for start in starts)
        for batch, unfit, count in _in_order(pool, work, chunks, 2 * threads):
            writer.write_batch(batch)
            refused += unfit
            bar.update(count)
    facts = {"refused": refused, "left_out": sorted(template.left_out)}
    write_whole(folder / FACTS, json.dumps(facts) + "\n")


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[..., Any], chunks: Iterable[tuple[Any, ...]], ahead: int
) -> Iterator[Any]:
    """What `work` makes of each chunk, in their order. At most `ahead` of them wait to be taken."""
    waiting: deque[Future[Any]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(work, *chunk))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _encoded(
    template: ChatTemplate, encode: "Encode[Any]", schema: Any, max_length: int, start: int, rows: list[Any]
) -> tuple[Any, list[tuple[str, str]]]:
    """Rows as a batch of Arrow, and the places of refused rows with the reasons; the first has the number `start`."""
    found, refused = list[dict[str, Any]](), list[tuple[str, str]]()
    for number, row in enumerate(rows, start):
        try:
            found += [{ROW: number, **vars(sequence)} for sequence in encode(template, row, max_length)]
        except BadRow as reason:
            refused.append((row.where, str(reason)))
    for sequence in found:
        if "labels" in sequence:
            sequence["labels"] = _spans(sequence["labels"])
    return import_module("pyarrow").RecordBatch.from_pylist(found, schema=schema), refused


def _spans(labels: list[int]) -> list[int]:
    """The start and the end of each run of labels that count, one after the other."""
    edges = np.diff(np.array([IGNORED, *labels, IGNORED]) != IGNORED)
    return np.flatnonzero(edges).tolist()


def _labels(ids: list[int], spans: list[int]) -> list[int]:
    labels = [IGNORED] * len(ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return labels


def _schema(kind: type) -> Any:
    """Arrow's types of the fields of a dataclass."""
    arrow: Any = import_module("pyarrow")
    ids = arrow.list_(arrow.int32())
    types = {
        list[int]: ids, tuple[int, ...]: ids, str: arrow.string(), int: arrow.int64(), bool: arrow.bool_(),
        float: arrow.float64(), float | None: arrow.float64(),
    }  # fmt: skip
    return arrow.schema([(ROW, arrow.int64()), *((name, types[hint]) for name, hint in get_type_hints(kind).items())])


def _is_list(column: Any) -> bool:
    return import_module("pyarrow").types.is_list(column.type)
