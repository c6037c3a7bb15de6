"""Reading latent shards: which rows count, and the bytes of a row group.

A shard is a Parquet file of small row groups with the columns `key`, `moments`, `clip` and `text` (the last three
fixed-size fp16 binaries) and numeric score columns; its schema metadata says the shapes. Without `clip`, there and as a column,
an image is its latent alone.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import fsspec.core
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from training.names import column_of
from training.where import Comparison

PARTS = ("moments", "clip", "text")
OPTIONAL = "clip"
# By name, fp16 of `PARTS` and int64 of `data_type`.
Parts = dict[str, NDArray[Any]]
OPEN_FILES = 32
LOCAL_READ = 2**18
VERIFY = "`unidiffuser verify DATASET` names what is damaged"


class ShardError(ValueError):
    """A shard that cannot be trained on; the message names the file and what is wrong."""


@dataclass
class _Shard:
    """A shard that is open. A `ParquetFile` would keep the bytes of what it last read: only its footer is kept."""

    file: pa.NativeFile | IO[bytes]
    local: bool
    footer: pq.FileMetaData | None = None

    @classmethod
    def open(cls, url: str) -> _Shard:
        """A file of this machine is opened by Arrow itself, others without fsspec's cache, which reads more than is asked for."""
        system, path = fsspec.core.url_to_fs(url)
        local = isinstance(system, LocalFileSystem)
        return cls(pa.OSFile(path) if local else system.open(path, "rb", cache_type="none"), local)

    def parquet(self) -> pq.ParquetFile:
        """Read in small steps here, and elsewhere a row group in one request."""
        parquet = pq.ParquetFile(
            self.file, metadata=self.footer, buffer_size=LOCAL_READ if self.local else 0, pre_buffer=not self.local,
            page_checksum_verification=True,
        )  # fmt: skip
        self.footer = parquet.metadata
        return parquet


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


@dataclass(frozen=True)
class LatentSpec:
    """Shapes of a row: moments (2C, h, w), clip (D,) or None, text (L, d), and the autoencoder's scaling factor."""

    moments: tuple[int, int, int]
    clip: tuple[int] | None
    text: tuple[int, int]
    scaling_factor: float

    @property
    def latent(self) -> tuple[int, int, int]:
        """Shape of a sampled latent, (C, h, w)."""
        return self.moments[0] // 2, self.moments[1], self.moments[2]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By part, in the order of the columns."""
        return {part: shape for part in PARTS if (shape := getattr(self, part)) is not None}

    @classmethod
    def of(cls, schema: pa.Schema, name: str) -> LatentSpec:
        """From the schema's metadata. Raises ShardError when it is not there or does not fit the columns."""
        told = json.loads((schema.metadata or {}).get(b"unidiffuser", b"{}"))
        parts = [part for part in PARTS if part != OPTIONAL or part in told or part in schema.names]
        missing = [column for column in ("key", *parts) if column not in schema.names]
        if missing:
            raise ShardError(f"{name}: no column {', '.join(missing)}; a latent shard has key, {', '.join(PARTS)}")
        lacking = [field for field in (*parts, "scaling_factor") if field not in told]
        if lacking:
            raise ShardError(f"{name}: the schema metadata lacks {', '.join(lacking)}; write it with the encode stage")
        for part in parts:
            width = 2 * int(np.prod(told[part]))
            if schema.field(part).type != pa.binary(width):
                raise ShardError(f"{name}: {part} is {schema.field(part).type}, expected fixed_size_binary[{width}]")
        shapes = {part: tuple(told[part]) for part in parts}
        return cls(shapes["moments"], shapes.get(OPTIONAL), shapes["text"], float(told["scaling_factor"]))


def held_out(key: str, fraction: float) -> bool:
    """Whether a key belongs to the validation rows: a hash, so that every stage and every run agree."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") < fraction * 2**64


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
        keys = table["key"].to_pylist()
        held = np.array([held_out(key, self.fraction) for key in keys], dtype=bool).reshape(len(keys))
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

    keys: list[str]
    parts: Parts
    train: NDArray[np.int64]
    held: NDArray[np.int64]


@dataclass(frozen=True)
class ShardIndex:
    """The row groups of all shards, in the given order: file, number in the file, training and held-out rows, (G,) each."""

    spec: LatentSpec
    file: NDArray[np.int64]
    group: NDArray[np.int64]
    train: NDArray[np.int64]
    held: NDArray[np.int64]


class LatentReader:
    """Row groups of latent shards, on any fsspec file system; keeps some files open. Threads may share it."""

    def __init__(self, shards: Sequence[str], selection: Selection) -> None:
        if not shards:
            raise ShardError("no latent shard was given to train on")
        self.shards, self.selection = list(shards), selection
        self._files: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def _opened(self, file: int) -> Iterator[pq.ParquetFile]:
        """A file for this thread alone: one that lies open and that nobody uses, or a new one."""
        with self._lock:
            shard = self._files.pop(file, None)
        try:
            shard = shard or _Shard.open(self.shards[file])
            parquet = shard.parquet()
        except (OSError, pa.ArrowInvalid) as error:
            raise ShardError(f"{self.shards[file]}: cannot be read as Parquet: {_line(error)}; {VERIFY}") from error
        yield parquet
        with self._lock:
            unused = self._files.pop(file, None)
            self._files[file] = shard
            if unused is None and len(self._files) > OPEN_FILES:
                unused = self._files.popitem(last=False)[1]
        if unused is not None:
            unused.file.close()

    def index(self, rank: int = 0, world: int = 1, gather: Callable[[list], list[list]] | None = None) -> ShardIndex:
        """Count the rows of every row group, reading keys and scores only.

        Args:
            rank, world: this worker scans every `world`-th file from `rank`.
            gather: gives everybody what every worker found, in the order of the ranks; needed when `world` > 1.

        Raises:
            ShardError: a file is damaged, has other shapes than the first, or lacks a column.
        """
        found = [self._scan(file) for file in range(rank, len(self.shards), world)]
        everybody = gather(found) if gather is not None else [found]
        by_file = sorted((scan for one in everybody for scan in one), key=lambda scan: scan[0])
        spec = by_file[0][1]
        for file, other, _ in by_file:
            if other != spec:
                raise ShardError(f"{self.shards[file]}: rows are {other}, but {self.shards[0]} has {spec}")
        table = np.array(
            [(file, group, *counts) for file, _, groups in by_file for group, counts in enumerate(groups)],
            dtype=np.int64,
        ).reshape(-1, 4)
        return ShardIndex(spec, *(np.ascontiguousarray(column) for column in table.T))

    def _scan(self, file: int) -> tuple[int, LatentSpec, list[tuple[int, int]]]:
        with self._opened(file) as parquet:
            spec = LatentSpec.of(parquet.schema_arrow, self.shards[file])
            columns = self.selection.columns(parquet.schema_arrow, self.shards[file])
            counts = []
            for group in range(parquet.num_row_groups):
                train, held = self.selection.split(self._table(parquet, file, group, ["key", *columns]), columns)
                counts.append((len(train), len(held)))
        return file, spec, counts

    def _table(self, parquet: pq.ParquetFile, file: int, group: int, columns: list[str]) -> pa.Table:
        try:
            return parquet.read_row_group(group, columns=list(dict.fromkeys(columns)), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise ShardError(f"{self.shards[file]}: row group {group} cannot be read: {_line(error)}; {VERIFY}") from error

    def read(self, file: int, group: int) -> RowGroup:
        """A row group; its parts are Arrow's own memory and are not to be written to.

        Raises:
            ShardError: it is damaged, or a row lacks a part.
        """
        with self._opened(file) as parquet:
            spec = LatentSpec.of(parquet.schema_arrow, self.shards[file])
            columns = self.selection.columns(parquet.schema_arrow, self.shards[file])
            table = self._table(parquet, file, group, ["key", *columns, *spec.shapes])
        parts: Parts = {part: self._numbers(table, part, shape, file, group) for part, shape in spec.shapes.items()}
        parts["data_type"] = self.selection.types(table, columns)
        return RowGroup(table["key"].to_pylist(), parts, *self.selection.split(table, columns))

    def _numbers(self, table: pa.Table, part: str, shape: tuple[int, ...], file: int, group: int) -> NDArray[np.float16]:
        column = table[part].combine_chunks()
        if column.null_count:
            raise ShardError(f"{self.shards[file]}: row group {group}: {column.null_count} rows have no {part}")
        width = int(np.prod(shape))
        flat = np.frombuffer(column.buffers()[1], dtype=np.float16, count=len(column) * width, offset=2 * width * column.offset)
        return flat.reshape(len(column), *shape)
