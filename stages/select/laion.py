"""LAION's metadata: which columns mean what in each of its sets, and how their types are brought to one schema.

The same column is ``WIDTH`` in laion2B-en and ``width`` in Re-LAION, int32 in one file and float64 in the next, and scores are
null where an outer join found nothing. Everything after this module sees `CANONICAL` only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.runner.contract import StageError
from stages.shards.conditions import unreadable
from stages.shards.outside import Cells, cast, castable, check_column, open_parquet, plain, readable
from stages.shards.scores import METADATA_SCORES
from training.names import NAMES

# Columns that a file of the set must have, by what they mean.
_PAIRS = {"url": "URL", "caption": "TEXT", "width": "WIDTH", "height": "HEIGHT", "similarity": "similarity"}
_JOINED = {**_PAIRS, "hash": "hash", "punsafe": "punsafe", "pwatermark": "pwatermark"}
SCHEMAS: dict[str, dict[str, str]] = {
    "laion2B-en": {**_PAIRS, "licence": "LICENSE", "nsfw": "NSFW"},
    "laion2B-en-joined": _JOINED,
    "laion-high-resolution": {**_JOINED, "language": "LANGUAGE"},
    "laion-aesthetics": {**_JOINED, "aesthetic": "AESTHETIC_SCORE"},
    "relaion": {"url": "url", "caption": "caption", "width": "width", "height": "height", "similarity": "similarity"},
}
CANONICAL = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        *((name, pa.float32()) for name in METADATA_SCORES),
        ("language", pa.string()),
        ("hash", pa.int64()),
        ("sha256", pa.string()),
        ("md5", pa.string()),
    ]
)
BATCH = 65_536
OPEN_AT_ONCE = 16


@dataclass(frozen=True)
class Reading:
    """How metadata files are to be read.

    Attributes:
        schema: a name in `SCHEMAS`, whose columns every file must then have, or ``auto``.
        own_names: canonical name -> the file's name, for corpora that are not LAION's.
        needed: canonical columns that conditions refer to, besides url and caption.
        others: further columns by a label, as (the file's own name, the type to read it as).
    """

    schema: str
    own_names: Mapping[str, str]
    needed: frozenset[str] = frozenset()
    others: Mapping[str, tuple[str, pa.DataType]] = field(default_factory=dict)


@dataclass(frozen=True)
class Metadata:
    """An open metadata file: `columns` maps canonical names and labels to (the file's own name, type).

    `unread` counts cells by column that `kept` could not read.
    """

    address: str
    parquet: pq.ParquetFile
    schema: str
    columns: Mapping[str, tuple[str, pa.DataType]]
    unread: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        return self.parquet.metadata.num_rows

    def batches(self, names: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """(number of the first row, the named columns), `BATCH` rows at a time. A column that the file lacks is null.

        Where cells of a column cannot be read, the table has a mask of them beside it, see `unreadable`.

        Raises:
            StageError: a page of the file is damaged.
        """
        for start, batch in self._raw(names):
            cells = self._cells(names, batch, None)
            masks = {unreadable(name): found.unread for name, found in cells.items() if pc.any(found.unread).as_py()}
            yield start, pa.table({name: found.values for name, found in cells.items()} | masks)

    def kept(self, names: Sequence[str], keep: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """(numbers of the rows, the named columns) of the rows of a mask over the file's rows; raises as `batches`.

        A cell that cannot be read is null, and counted in `unread`.
        """
        for start, batch in self._raw(names):
            numbers = np.flatnonzero(keep[start : start + batch.num_rows])
            if len(numbers):
                cells = self._cells(names, batch, pa.array(keep[start : start + batch.num_rows]))
                self.unread.update({name: found.unread.true_count for name, found in cells.items() if found.unread.true_count})
                yield numbers + start, pa.table({name: found.values for name, found in cells.items()})

    def _raw(self, names: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        own = sorted({self.columns[name][0] for name in names if name in self.columns})
        start = 0
        with readable(self.address):
            for batch in self.parquet.iter_batches(BATCH, columns=own):
                yield start, batch
                start += batch.num_rows

    def _cells(self, names: Sequence[str], batch: pa.RecordBatch, keep: pa.Array | None) -> dict[str, Cells]:
        """The named columns, of the rows of a mask."""
        cells = {}
        for name in names:
            if name in self.columns:
                own, wanted = self.columns[name]
                column = plain(batch.column(own))
            else:
                wanted = CANONICAL.field(name).type
                column = pa.nulls(batch.num_rows)
            cells[name] = cast(column if keep is None else column.filter(keep), wanted)
        return cells


@contextmanager
def open_metadata(address: str, reading: Reading) -> Iterator[Metadata]:
    """Open a metadata file (local path or fsspec URL) and find out which of its columns are which.

    Raises:
        StageError: not Parquet, half-written, without a needed column, or with one of a type that cannot be read.
    """
    with open_parquet(address) as parquet:
        schema, columns = detect(address, parquet.schema_arrow, reading)
        yield Metadata(address, parquet, schema, columns)


def check_metadata(addresses: Sequence[str], reading: Reading) -> None:
    """Look at every file's footer, so that what cannot be used is refused before the work starts; raises as `open_metadata`."""

    def check(address: str) -> None:
        with open_metadata(address, reading):
            pass

    with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
        for _ in pool.map(check, addresses):
            pass


def detect(address: str, arrow: pa.Schema, reading: Reading) -> tuple[str, dict[str, tuple[str, pa.DataType]]]:
    """The file's schema (the one of which it has all columns and most, else ``other``), and what its columns are.

    A column that no condition asks for and whose type cannot be read is none.

    Raises:
        StageError: a needed column, or one of a schema that the configuration names, is missing; a needed one cannot be read, or
            one is there twice.
    """
    found = arrow.names
    fitting = [name for name, columns in SCHEMAS.items() if set(columns.values()) <= set(found)]
    if reading.schema not in ("auto", *fitting):
        lacking = [own for own in SCHEMAS[reading.schema].values() if own not in found]
        raise StageError(
            f"{address}: no column {', '.join(lacking)}, which {reading.schema} has; columns found: {', '.join(found)}; "
            "name another `laion_schema` or leave it to be detected"
        )
    best = max(fitting, key=lambda name: len(SCHEMAS[name]), default="other")
    needed = {"url", "caption", *reading.needed}
    columns = {}
    for name, known in NAMES.items():
        candidates = (reading.own_names[name],) if name in reading.own_names else known
        present = [candidate for candidate in candidates if candidate in found]
        kind = CANONICAL.field(name).type
        if present and (name in needed or castable(arrow.field(found.index(present[0])).type, kind)):
            check_column(address, arrow, present[0], kind)
            columns[name] = (present[0], kind)
    missing = [name for name in NAMES if name in needed and name not in columns]
    wanted = [
        f"{name} ({' or '.join((reading.own_names[name],) if name in reading.own_names else NAMES[name])})" for name in missing
    ]
    wanted += [own for own, _ in reading.others.values() if own not in found]
    if wanted:
        raise StageError(
            f"{address}: columns found: {', '.join(found)}; columns needed: {'; '.join(wanted)}; "
            "name them in `columns` or leave the condition or the caption out"
        )
    for own, kind in reading.others.values():
        check_column(address, arrow, own, kind)
    return (best if reading.schema == "auto" else reading.schema), columns | dict(reading.others)
