"""Rows of many files under 64-bit keys, written so that a range of keys can be read from all of them without the rest.

A file of keys holds (key, row) pairs in runs of a bounded length. A run is sorted by its keys' leading bits and cut into small
row groups, whose smallest and greatest key Parquet notes down: the pairs of a range are a few row groups of every run. So the
equal keys of a whole set meet, range by range, in workers that hold one range each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from stages.runner.contract import Job
from stages.shards.tables import open_table

Keys = NDArray[np.uint64]
Rows = NDArray[np.int64]

PAIRS = pa.schema([("key", pa.uint64()), ("row", pa.int64())])
RUN = 2_000_000
GROUP = 16_384
# Row groups read at once: bounds the memory of a reader.
CHUNK = 64
# Keys of a range, about: a worker that holds them takes some 60 bytes each, 250 MB.
RANGE_KEYS = 4_000_000
SPACE = 2**64


def text_keys(column: pa.Array | pa.ChunkedArray) -> Keys:
    """XXH3 digests of texts without nulls, shape (rows,). Of 2.3 billion texts two share one with a chance of 1 in 7."""
    digest = xxhash.xxh3_64_intdigest
    return np.array([digest(text) for text in column.cast(pa.binary()).to_numpy(zero_copy_only=False)], dtype=np.uint64)


def mixed(values: np.ndarray) -> Keys:
    """64-bit integers scattered evenly, one to one (the finalizer of splitmix64), so that ranges are equally full."""
    keys = np.array(values).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def by_leading_bits(keys: Keys) -> np.ndarray:
    """Order for keys that are spread over the whole space, earlier rows first: 16 bits tell a row group, and sort fastest."""
    return np.argsort((keys >> np.uint64(48)).astype(np.uint16), kind="stable")


def by_value(keys: Keys) -> np.ndarray:
    return np.argsort(keys, kind="stable")


def repeated(keys: Keys) -> np.ndarray:
    """Mask of the keys that have an earlier equal, shape (rows,)."""
    again = np.zeros(len(keys), dtype=bool)
    if len(keys):
        order = np.argsort(keys)
        ordered = keys[order]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        again[:] = True
        again[np.minimum.reduceat(order, starts)] = False
    return again


class KeyWriter:
    """Writes (key, row) pairs; holds at most a run of them."""

    def __init__(self, path: Path, order: Callable[[Keys], np.ndarray] = by_leading_bits):
        self.order = order
        self.count = 0
        self.waiting: list[tuple[Keys, Rows]] = []
        self.held = 0
        self.writer = pq.ParquetWriter(
            path, PAIRS, compression="none", use_dictionary=False, write_page_checksum=True,
            column_encoding={"key": "PLAIN", "row": "DELTA_BINARY_PACKED"},
        )  # fmt: skip

    def add(self, keys: Keys, rows: Rows) -> None:
        self.count += len(keys)
        for start in range(0, len(keys), RUN):
            self.waiting.append((keys[start : start + RUN], rows[start : start + RUN]))
            self.held += len(self.waiting[-1][0])
            if self.held >= RUN:
                self._end_run()

    def _end_run(self) -> None:
        if self.held:
            keys, rows = (np.concatenate(parts) for parts in zip(*self.waiting, strict=True))
            order = self.order(keys)
            self.writer.write_table(pa.table([keys[order], rows[order]], schema=PAIRS), row_group_size=GROUP)
        self.waiting, self.held = [], 0

    def __enter__(self) -> KeyWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._end_run()
        self.writer.close()


def read_keys(job: Job, path: str, low: int = 0, high: int = SPACE) -> Iterator[tuple[Keys, Rows]]:
    """The pairs with ``low <= key < high`` of a stored file of keys, a bounded number at a time.

    Pairs of one key come in the order in which they were added.

    Raises:
        StageError: the file is damaged.
    """
    with open_table(job, path) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        groups = []
        for number in range(parquet.num_row_groups):
            told = parquet.metadata.row_group(number).column(0).statistics
            if told.max >= low and told.min < high:
                groups.append(number)
        for start in range(0, len(groups), CHUNK):
            table = parquet.read_row_groups(groups[start : start + CHUNK], use_threads=False)
            keys, rows = table["key"].to_numpy(), table["row"].to_numpy()
            if low > 0 or high < SPACE:
                inside = (keys >= np.uint64(low)) & (keys <= np.uint64(high - 1))
                keys, rows = keys[inside], rows[inside]
            yield keys, rows


def ranges(count: int) -> list[tuple[int, int]]:
    """The key space cut into equal ranges of about `RANGE_KEYS` keys, given how many keys there are, as (low, high)."""
    pieces = max(1, -(-count // RANGE_KEYS))
    edges = [SPACE * piece // pieces for piece in range(pieces + 1)]
    return list(zip(edges, edges[1:], strict=False))


class RowSets:
    """Sets of rows of many files, found range by range: writes them under the file's number, and keeps a digest of each.

    The digest is a sum over the rows, so that it does not depend on how the key space was cut: digests of the ranges add up
    to the file's.
    """

    def __init__(self, path: Path, files: int):
        self.writer = KeyWriter(path, by_value)
        self.digests = np.zeros(files, dtype=np.uint64)

    def add(self, file: int, rows: Rows) -> None:
        if len(rows):
            self.writer.add(np.full(len(rows), file, dtype=np.uint64), rows)
            self.digests[file : file + 1] += mixed(rows).sum(dtype=np.uint64)

    def __enter__(self) -> RowSets:
        return self

    def __exit__(self, *error: Any) -> None:
        self.writer.__exit__(*error)

    def note(self) -> str:
        """The files' digests as one string of hex digits, 16 a file."""
        return self.digests.astype(">u8").tobytes().hex()


def add_notes(notes: Iterable[str], files: int) -> list[str]:
    """A digest per file, of all its rows in all ranges."""
    total = np.zeros(files, dtype=np.uint64)
    for note in notes:
        total += np.frombuffer(bytes.fromhex(note), dtype=">u8").astype(np.uint64)
    return [f"{digest:016x}" for digest in total.tolist()]
