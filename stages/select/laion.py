"""LAION's metadata: which columns mean what in each of its sets, and how their types are brought to one schema.

The same column is ``WIDTH`` in laion2B-en and ``width`` in Re-LAION, int32 in one file and float64 in the next, and scores are
null where an outer join found nothing. Everything after this module sees `CANONICAL` only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.runner.contract import StageError
from stages.shards.scores import METADATA_SCORES

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
# Names that a column goes by where the set does not say.
NAMES: dict[str, tuple[str, ...]] = {
    "url": ("URL", "url"),
    "caption": ("TEXT", "caption", "text"),
    "width": ("WIDTH", "width", "original_width"),
    "height": ("HEIGHT", "height", "original_height"),
    "similarity": ("similarity", "SIMILARITY"),
    "punsafe": ("punsafe", "PUNSAFE"),
    "pwatermark": ("pwatermark", "PWATERMARK"),
    "aesthetic": ("AESTHETIC_SCORE", "aesthetic", "aesthetic_score"),
    "language": ("LANGUAGE", "language"),
    "hash": ("hash", "HASH"),
    # Of the image's bytes, as DataComp and LAION's md5 sets have them.
    "sha256": ("sha256", "SHA256"),
    "md5": ("md5", "MD5"),
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
    """An open metadata file: `columns` maps canonical names and labels to (the file's own name, type)."""

    address: str
    parquet: pq.ParquetFile
    schema: str
    columns: Mapping[str, tuple[str, pa.DataType]]

    @property
    def rows(self) -> int:
        return self.parquet.metadata.num_rows

    def batches(self, names: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """(number of the first row, the named columns), `BATCH` rows at a time. A column that the file lacks is null.

        Raises:
            StageError: a page of the file is damaged, or a value has a type that cannot be healed.
        """
        for start, batch in self._raw(names):
            yield start, self._healed(names, batch, np.arange(start, start + batch.num_rows))

    def kept(self, names: Sequence[str], keep: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """(numbers of the rows, the named columns) of the rows of a mask over the file's rows; raises as `batches`."""
        for start, batch in self._raw(names):
            numbers = np.flatnonzero(keep[start : start + batch.num_rows])
            if len(numbers):
                some = batch.filter(pa.array(keep[start : start + batch.num_rows]))
                yield numbers + start, self._healed(names, some, numbers + start)

    def _raw(self, names: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        own = sorted({self.columns[name][0] for name in names if name in self.columns})
        start = 0
        with readable(self.address):
            for batch in self.parquet.iter_batches(BATCH, columns=own):
                yield start, batch
                start += batch.num_rows

    def _healed(self, names: Sequence[str], batch: pa.RecordBatch, numbers: np.ndarray) -> pa.Table:
        """The named columns; `numbers` are the rows' places in the file."""
        columns = {}
        for name in names:
            if name not in self.columns:
                columns[name] = pa.nulls(batch.num_rows, CANONICAL.field(name).type)
                continue
            own, wanted = self.columns[name]
            column = batch.column(own)
            try:
                columns[name] = heal(column, wanted)
            except NOT_HEALED as error:
                row = _first_bad(column, wanted)
                place = f", row {numbers[row]}" if row is not None else ""
                raise StageError(
                    f"{self.address}{place}: column {own} is {column.type}, expected {wanted} ({_line(error)})"
                ) from None
        return pa.table(columns)


NOT_HEALED = (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError)


def _first_bad(column: pa.Array, wanted: pa.DataType) -> int | None:
    """The first row whose value alone cannot be healed."""
    for row in range(len(column)):
        try:
            heal(column.slice(row, 1), wanted)
        except NOT_HEALED:
            return row
    return None


@contextmanager
def open_metadata(address: str, reading: Reading) -> Iterator[Metadata]:
    """Open a metadata file (local path or fsspec URL) and find out which of its columns are which.

    Raises:
        StageError: not Parquet, half-written, without a needed column, or with one of a type that cannot be healed.
    """
    with ExitStack() as stack:
        with readable(address):
            parquet = pq.ParquetFile(stack.enter_context(fsspec.open(address, "rb")))
        # Outside of `readable`: what goes wrong in the caller's block is not the file's fault.
        arrow = parquet.schema_arrow
        schema, columns = detect(address, arrow.names, reading)
        for own, wanted in columns.values():
            _check_type(address, arrow.field(own), wanted)
        yield Metadata(address, parquet, schema, columns)


def check_metadata(addresses: Sequence[str], reading: Reading) -> None:
    """Look at every file's footer, so that what cannot be used is refused before the work starts; raises as `open_metadata`."""

    def check(address: str) -> None:
        with open_metadata(address, reading):
            pass

    with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
        for _ in pool.map(check, addresses):
            pass


def _check_type(address: str, column: pa.Field, wanted: pa.DataType) -> None:
    try:
        heal(pa.array([], column.type), wanted)
    except NOT_HEALED as error:
        raise StageError(f"{address}: column {column.name} is {column.type}, expected {wanted} ({_line(error)})") from None


@contextmanager
def readable(address: str) -> Iterator[None]:
    """Turns what a reader says about a broken file into one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise StageError(f"{address}: no such file (any more)") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise StageError(
            f"{address}: not a complete Parquet file ({_line(error)}); fetch it again or take it out of the list"
        ) from None


def detect(address: str, found: list[str], reading: Reading) -> tuple[str, dict[str, tuple[str, pa.DataType]]]:
    """The file's schema (the one of which it has all columns and most, else ``other``), and what its columns are.

    Raises:
        StageError: a needed column, or one of a schema that the configuration names, is missing.
    """
    fitting = [name for name, columns in SCHEMAS.items() if set(columns.values()) <= set(found)]
    if reading.schema not in ("auto", *fitting):
        lacking = [own for own in SCHEMAS[reading.schema].values() if own not in found]
        raise StageError(
            f"{address}: no column {', '.join(lacking)}, which {reading.schema} has; columns found: {', '.join(found)}; "
            "name another `laion_schema` or leave it to be detected"
        )
    best = max(fitting, key=lambda name: len(SCHEMAS[name]), default="other")
    columns = {}
    for name, known in NAMES.items():
        candidates = (reading.own_names[name],) if name in reading.own_names else known
        present = [candidate for candidate in candidates if candidate in found]
        if present:
            columns[name] = (present[0], CANONICAL.field(name).type)
    missing = [name for name in NAMES if name in {"url", "caption", *reading.needed} and name not in columns]
    wanted = [
        f"{name} ({' or '.join((reading.own_names[name],) if name in reading.own_names else NAMES[name])})" for name in missing
    ]
    wanted += [own for own, _ in reading.others.values() if own not in found]
    if wanted:
        raise StageError(
            f"{address}: columns found: {', '.join(found)}; columns needed: {'; '.join(wanted)}; "
            "name them in `columns` or leave the condition out"
        )
    return (best if reading.schema == "auto" else reading.schema), columns | dict(reading.others)


def heal(column: pa.Array, wanted: pa.DataType) -> pa.Array:
    """Cast a column to the wanted type: text is trimmed, and what is not UTF-8, NaN or an impossible size becomes null."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), wanted)
    if pa.types.is_string(wanted):
        return _text(column)
    if pa.types.is_int64(wanted):
        return _hashes(column)
    values = column.cast(pa.float64())
    if pa.types.is_floating(wanted):
        return pc.if_else(pc.is_finite(values), values, None).cast(wanted)
    sane = pc.and_kleene(pc.greater(values, 0.0), pc.less(values, 2.0**31))
    return pc.round(pc.if_else(sane, values, None)).cast(wanted)


def _text(column: pa.Array) -> pa.Array:
    if not any(kind(column.type) for kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)):
        raise pa.ArrowTypeError("not text")
    try:
        # Through binary: a reader takes a file's word for it that its text is UTF-8, a cast looks.
        return pc.utf8_trim_whitespace(column.cast(pa.binary()).cast(pa.string()))
    except pa.ArrowInvalid:
        decoded = (_decoded(value) for value in column.cast(pa.binary()).to_pylist())
        return pc.utf8_trim_whitespace(pa.array(decoded, pa.string()))


def _decoded(value: bytes | None) -> str | None:
    try:
        return value.decode() if value is not None else None
    except UnicodeDecodeError:
        return None


def _hashes(column: pa.Array) -> pa.Array:
    """64-bit hashes; a float column (null drift) has lost its low bits in the file and keeps the rest."""
    if pa.types.is_uint64(column.type):
        return column.view(pa.int64())
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    if pa.types.is_floating(column.type):
        values = column.cast(pa.float64())
        return pc.if_else(pc.less(pc.abs(values), 2.0**63), values, None).cast(pa.int64(), safe=False)
    raise pa.ArrowTypeError("hashes are integers; map `hash` to another column or drop it")


def _line(error: BaseException) -> str:
    text: Any = str(error) or type(error).__name__
    return " ".join(text.split())[:200]
