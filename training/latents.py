"""Reading latent shards: which rows count, and the bytes of a row group.

A shard is a Parquet file of small row groups with the columns `key`, `moments`, `clip` and `text` (the last three
fixed-size fp16 binaries) and numeric score columns; its schema metadata says the shapes. Without `clip`, there and as a column,
an image is its latent alone. Further captions are columns `text.NAME` like `text`, see `training.captions`.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import fsspec.core
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from infra.ranges import RangeFile
from training.captions import PREFIX, column_of_caption
from training.heldout import held_out
from training.names import column_of
from training.told import FACTS
from training.where import Comparison

PARTS = ("moments", "clip", "text")
OPTIONAL = "clip"
# By name, fp16 of `PARTS` and of further captions, and int64 of `data_type`.
Parts = dict[str, NDArray[Any]]
# Footers that are kept; one of a shard of 10,000 rows is 100 kB.
FOOTERS = 128
LOCAL_READ = 2**18
VERIFY = "`unidiffuser verify DATASET` names what is damaged"


class ShardError(ValueError):
    """A shard that cannot be trained on; the message names the file and what is wrong."""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


@dataclass(frozen=True)
class LatentSpec:
    """Shapes of a row: moments (2C, h, w), clip (D,) or None, text (L, d), and the autoencoder's scaling factor; names of further
    captions, each (L, d)."""

    moments: tuple[int, int, int]
    clip: tuple[int] | None
    text: tuple[int, int]
    scaling_factor: float
    captions: tuple[str, ...] = ()

    @property
    def latent(self) -> tuple[int, int, int]:
        """Shape of a sampled latent, (C, h, w)."""
        return self.moments[0] // 2, self.moments[1], self.moments[2]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By part, in the order of the columns."""
        own = {part: shape for part in PARTS if (shape := getattr(self, part)) is not None}
        return own | {column_of_caption(name): self.text for name in self.captions}

    @classmethod
    def of(cls, schema: pa.Schema, name: str) -> LatentSpec:
        """From the schema's metadata. Raises ShardError when it is not there or does not fit the columns."""
        facts = json.loads((schema.metadata or {}).get(FACTS, b"{}"))
        needed = ("key", *_parts(facts, schema.names), *map(column_of_caption, facts.get("captions", ())))
        missing = [column for column in needed if column not in schema.names]
        if missing:
            raise ShardError(f"{name}: no column {', '.join(missing)}; a latent shard has key, {', '.join(PARTS)}")
        spec = cls.told(facts, name, schema.names)
        for part, shape in spec.shapes.items():
            width = 2 * int(np.prod(shape))
            if schema.field(part).type != pa.binary(width):
                raise ShardError(f"{name}: {part} is {schema.field(part).type}, expected fixed_size_binary[{width}]")
        return spec

    @classmethod
    def told(cls, facts: dict[str, Any], name: str, columns: Collection[str] = ()) -> LatentSpec:
        """From what the metadata says, and the columns that are known. Raises ShardError when something lacks."""
        parts = _parts(facts, columns)
        lacking = [field for field in (*parts, "scaling_factor") if field not in facts]
        if lacking:
            raise ShardError(f"{name}: the schema metadata lacks {', '.join(lacking)}; write it with the encode stage")
        shapes = {part: tuple(facts[part]) for part in parts}
        named = {column.removeprefix(PREFIX) for column in columns if column.startswith(PREFIX)} | {*facts.get("captions", ())}
        return cls(shapes["moments"], shapes.get(OPTIONAL), shapes["text"], float(facts["scaling_factor"]), tuple(sorted(named)))


def _parts(facts: dict[str, Any], columns: Collection[str]) -> list[str]:
    return [part for part in PARTS if part != OPTIONAL or part in facts or part in columns]


@dataclass(frozen=True)
class Selection:
    """Which rows count, which of them are held out, and of which type they are: all of one, or those of 1 meet a condition."""

    where: tuple[Comparison, ...]
    fraction: float
    data_type: int | Comparison | None = None

    def columns(self, schema: pa.Schema, name: str) -> list[str]:
        """Columns that the conditions read, by name in the file, that of the data type last; a condition may give LAION's name,
        in upper or lower case.

        Raises:
            ShardError: there is no such column of numbers.
        """
        numeric = [f.name for f in schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
        found = []
        conditions = [("where", condition) for condition in self.where]
        if isinstance(self.data_type, Comparison):
            conditions.append(("data_type", self.data_type))
        for field, condition in conditions:
            column = column_of(condition.column, numeric)
            if column is None:
                raise ShardError(
                    f"{name}: data.{field} names {condition.column}, numeric columns are {', '.join(numeric) or 'none'}"
                )
            found.append(column)
        return found

    def split(self, table: pa.Table, columns: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of the training rows and of the held-out rows of a row group."""
        accepted = np.ones(len(table), dtype=bool)
        for condition, column in zip(self.where, columns, strict=False):
            accepted &= _meets(condition, table[column])
        held = np.zeros(len(table), dtype=bool)
        if self.fraction:
            held[:] = [held_out(key, self.fraction) for key in table["key"].to_pylist()]
        return np.flatnonzero(accepted & ~held), np.flatnonzero(accepted & held)

    def types(self, table: pa.Table, columns: Sequence[str]) -> NDArray[np.int64]:
        """The data type of every row, (rows,); 0 where there are none, and where the column is null."""
        if isinstance(self.data_type, Comparison):
            return _meets(self.data_type, table[columns[-1]]).astype(np.int64)
        return np.full(len(table), self.data_type or 0, dtype=np.int64)


def _meets(condition: Comparison, column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Which rows meet a condition; neither a null nor a NaN meets any."""
    known = pc.if_else(pc.is_nan(column), None, column)
    return pc.fill_null(condition.passes(known), False).to_numpy()


@dataclass(frozen=True)
class RowGroup:
    """All rows of a row group, as they lie in the file: keys, each part (rows, *shape) and `data_type` (rows,), and which rows
    train or are held out."""

    keys: pa.ChunkedArray
    parts: Parts
    train: NDArray[np.int64]
    held: NDArray[np.int64]


class LatentReader:
    """Row groups of latent shards, on any fsspec file system; keeps some footers. Threads may share it.

    Args:
        shards: paths or fsspec URLs.
        selection: which rows count.
        captions: names of the further captions that are read.
    """

    def __init__(self, shards: Sequence[str], selection: Selection, captions: Sequence[str] = ()) -> None:
        if not shards:
            raise ShardError("no latent shard was given to train on")
        self.shards, self.selection, self.captions = list(shards), selection, tuple(captions)
        self.sizes: dict[int, int] = {}
        self._footers: OrderedDict[int, Future[pq.FileMetaData]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def local(self) -> bool:
        """Whether the shards lie on this machine, as far as the first one tells."""
        return isinstance(fsspec.core.url_to_fs(self.shards[0])[0], LocalFileSystem)

    def _parquet(self, file: int, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
        """A file for this thread alone. Arrow itself opens one of this machine, and reads it in small steps; of others it asks
        for the ranges of a row group, and reads what lies together in one request."""
        system, path = fsspec.core.url_to_fs(self.shards[file])
        local = isinstance(system, LocalFileSystem)
        try:
            return pq.ParquetFile(
                pa.OSFile(path) if local else RangeFile(system, path, self.sizes.get(file)), metadata=footer,
                buffer_size=LOCAL_READ if local else 0, pre_buffer=not local, page_checksum_verification=True,
            )  # fmt: skip
        except (OSError, pa.ArrowInvalid) as error:
            raise ShardError(f"{self.shards[file]}: cannot be read as Parquet: {_line(error)}; {VERIFY}") from error

    @contextmanager
    def _opened(self, file: int) -> Iterator[pq.ParquetFile]:
        """A file for this thread alone, whose footer is read once, by whoever comes first. A `ParquetFile` would keep the bytes
        of what it last read: only its footer is kept."""
        with self._lock:
            waited = self._footers.pop(file, None)
            footer = self._footers[file] = waited or Future()
            if len(self._footers) > FOOTERS:
                self._footers.popitem(last=False)
        if waited is None:
            try:
                footer.set_result(self._parquet(file).metadata)
            except BaseException as error:
                with self._lock:
                    self._footers.pop(file, None)
                footer.set_exception(error)
        parquet = self._parquet(file, footer.result())
        try:
            yield parquet
        finally:
            parquet.close(force=True)

    def scan(self, file: int) -> tuple[LatentSpec, list[tuple[int, int]]]:
        """Shapes of a shard's rows, and the training and held-out rows of each row group; of columns, keys and scores are read.

        Raises:
            ShardError: it is damaged, or lacks a column.
        """
        with self._opened(file) as parquet:
            spec = LatentSpec.of(parquet.schema_arrow, self.shards[file])
            columns = self.selection.columns(parquet.schema_arrow, self.shards[file])
            counts = []
            for group in range(parquet.num_row_groups):
                train, held = self.selection.split(self._table(parquet, file, group, ["key", *columns]), columns)
                counts.append((len(train), len(held)))
        return spec, counts

    def _table(self, parquet: pq.ParquetFile, file: int, group: int, columns: list[str]) -> pa.Table:
        try:
            return parquet.read_row_group(group, columns=list(dict.fromkeys(columns)), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise ShardError(f"{self.shards[file]}: row group {group} cannot be read: {_line(error)}; {VERIFY}") from error

    def read(self, file: int, group: int, rows: tuple[int, int] | None = None) -> RowGroup:
        """A row group; its parts are Arrow's own memory and are not to be written to.

        Args:
            file, group: numbers of the shard, and of the row group in it.
            rows: how many rows it has to train on and held out, where that is known.

        Raises:
            ShardError: it is damaged, has other rows than are known, or a row lacks a part.
        """
        with self._opened(file) as parquet:
            found = LatentSpec.of(parquet.schema_arrow, self.shards[file])
            spec = replace(found, captions=tuple(name for name in self.captions if name in found.captions))
            columns = self.selection.columns(parquet.schema_arrow, self.shards[file])
            table = self._table(parquet, file, group, ["key", *columns, *spec.shapes])
        parts: Parts = {part: self._numbers(table, part, shape, file, group) for part, shape in spec.shapes.items()}
        for column in map(column_of_caption, self.captions):
            parts[column] = _or_own(table[column], parts[column], parts["text"]) if column in parts else parts["text"]
        parts["data_type"] = self.selection.types(table, columns)
        train, held = self.selection.split(table, columns)
        if rows not in (None, (len(train), len(held))):
            raise ShardError(
                f"{self.shards[file]}: row group {group} has {len(train)} rows to train on and {len(held)} held out; its dataset "
                f"tells of {rows[0]} and {rows[1]}; {VERIFY}"
            )
        return RowGroup(table["key"], parts, train, held)

    def _numbers(self, table: pa.Table, part: str, shape: tuple[int, ...], file: int, group: int) -> NDArray[np.float16]:
        column = table[part].combine_chunks()
        if column.null_count and not part.startswith(PREFIX):
            raise ShardError(f"{self.shards[file]}: row group {group}: {column.null_count} rows have no {part}")
        width = int(np.prod(shape))
        flat = np.frombuffer(column.buffers()[1], dtype=np.float16, count=len(column) * width, offset=2 * width * column.offset)
        return flat.reshape(len(column), *shape)


def _or_own(column: pa.ChunkedArray, further: NDArray[np.float16], own: NDArray[np.float16]) -> NDArray[np.float16]:
    """The text latents of a further caption, and of the row's own where there is a null."""
    if not column.null_count:
        return further
    return np.where(column.is_valid().to_numpy()[:, None, None], further, own)
