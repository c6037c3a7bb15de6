"""LAION's metadata: which columns mean what in each of its sets, and how their types are brought to one schema.

The same column is ``WIDTH`` in laion2B-en and ``width`` in Re-LAION, int32 in one file and float64 in the next, and scores are
null where an outer join found nothing. Everything after this module sees `CANONICAL` only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.contract import StageError

# laion2B-en, its joined form, laion-high-resolution and laion-aesthetics v2 write capitals, Re-LAION small letters.
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
}
SCORES = ("similarity", "punsafe", "pwatermark", "aesthetic")
CANONICAL = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        *((name, pa.float32()) for name in SCORES),
        ("language", pa.string()),
        ("hash", pa.int64()),
    ]
)
BATCH = 65_536


@dataclass(frozen=True)
class Metadata:
    """An open metadata file: `columns` maps canonical names to the file's own."""

    address: str
    parquet: pq.ParquetFile
    columns: Mapping[str, str]

    def batches(self) -> Iterator[tuple[int, pa.Table]]:
        """(number of the first row, rows in the canonical schema without `key`), a bounded number of rows at a time.

        Raises:
            StageError: a page of the file is damaged, or a column has a type that cannot be healed.
        """
        start = 0
        with readable(self.address):
            for batch in self.parquet.iter_batches(BATCH, columns=sorted(set(self.columns.values()))):
                yield start, self._canonical(batch)
                start += batch.num_rows

    def _canonical(self, batch: pa.RecordBatch) -> pa.Table:
        columns = {}
        for field in CANONICAL:
            if field.name == "key":
                continue
            own = self.columns.get(field.name)
            if own is None:
                columns[field.name] = pa.nulls(batch.num_rows, field.type)
                continue
            try:
                columns[field.name] = heal(batch.column(own), field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
                raise StageError(
                    f"{self.address}: column {own} is {batch.schema.field(own).type}, expected {field.type} ({_line(error)})"
                ) from None
        return pa.table(columns)


@contextmanager
def open_metadata(address: str, own_names: Mapping[str, str], needed: set[str]) -> Iterator[Metadata]:
    """Open a metadata file and find out which of its columns are which.

    Args:
        address: local path or fsspec URL.
        own_names: canonical name -> the file's name, for corpora that are not LAION's.
        needed: canonical names that conditions refer to, besides url and caption.

    Raises:
        StageError: not Parquet, half-written, or without a needed column.
    """
    with ExitStack() as stack:
        with readable(address):
            parquet = pq.ParquetFile(stack.enter_context(fsspec.open(address, "rb")))
        # Outside of `readable`: what goes wrong in the caller's block is not the file's fault.
        yield Metadata(address, parquet, detect(address, parquet.schema_arrow.names, own_names, needed))


@contextmanager
def readable(address: str) -> Iterator[None]:
    """Turns what a reader says about a broken file into one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise StageError(f"{address}: no such file (any more)") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise StageError(
            f"{address}: not a complete Parquet file ({_line(error)}); fetch it again or take it out of `metadata`"
        ) from None


def detect(address: str, found: list[str], own_names: Mapping[str, str], needed: set[str]) -> dict[str, str]:
    """Canonical name -> the file's column name.

    Raises:
        StageError: a needed column is missing; the message lists the columns found and needed.
    """
    columns = {}
    for name, known in NAMES.items():
        candidates = (own_names[name],) if name in own_names else known
        present = [candidate for candidate in candidates if candidate in found]
        if present:
            columns[name] = present[0]
    missing = [name for name in NAMES if name in {"url", "caption", *needed} and name not in columns]
    if missing:
        accepted = {name: (own_names[name],) if name in own_names else NAMES[name] for name in missing}
        wanted = "; ".join(f"{name} ({' or '.join(names)})" for name, names in accepted.items())
        raise StageError(
            f"{address}: columns found: {', '.join(found)}; columns needed: {wanted}; "
            "name them in `columns` or leave the condition out"
        )
    return columns


def heal(column: pa.Array, wanted: pa.DataType) -> pa.Array:
    """Cast a column to the canonical type: text is trimmed, NaN and impossible sizes become null."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), wanted)
    if pa.types.is_string(wanted):
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_binary(column.type)):
            raise pa.ArrowTypeError("not text")
        return pc.utf8_trim_whitespace(column.cast(pa.string()))
    if pa.types.is_int64(wanted):
        return _hashes(column)
    values = column.cast(pa.float64())
    if pa.types.is_floating(wanted):
        return pc.if_else(pc.is_finite(values), values, None).cast(wanted)
    sane = pc.and_kleene(pc.greater(values, 0.0), pc.less(values, 2.0**31))
    return pc.round(pc.if_else(sane, values, None)).cast(wanted)


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


def text_digests(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """64-bit digests of strings, shape (rows,), uint64; the same in every process and release (SipHash with a fixed key)."""
    from pandas.util import hash_array

    return hash_array(np.asarray(column.to_numpy(zero_copy_only=False), dtype=object), categorize=False)


def _line(error: BaseException) -> str:
    text: Any = str(error) or type(error).__name__
    return " ".join(text.split())[:200]
