"""What a dataset of latents tells of its shards: columns of its `files.parquet`, written when it is committed.

    groups    rows of each row group of the file, a list
    listed    how many of these rows have a hash of their key below 1/32, a list likewise
    hashes    those hashes, uint32, row group by row group

With `facts`, which its schema's metadata holds, a training without `where` that holds out 1/32 of the rows or less knows its
order without opening a shard. At 2.3 billion rows in 230,000 shards the hashes are 290 MB; all hashes would be 9 GB. A training
that wants more, or has conditions, reads keys and scores out of the shards.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infra.ranges import RangeFile
from training.heldout import BITS, listed

FACTS = b"unidiffuser"
Counts = NDArray[np.int32]


class Told(NamedTuple):
    """Address of a `files.parquet`, and of the store that its paths are relative to."""

    address: str
    root: str


@dataclass
class ShardNotes:
    """What is told of one shard, collected while it is written; `facts` are those of its schema."""

    facts: dict[str, Any] = field(default_factory=dict)
    groups: list[int] = field(default_factory=list)
    listed: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)

    def add(self, keys: Sequence[str]) -> None:
        """A row group with the rows of these keys."""
        found = listed(keys)
        self.groups.append(len(keys))
        self.listed.append(len(found))
        self.hashes.append(found.astype("<u4").tobytes())

    def notes(self) -> dict[str, Any]:
        """As JSON, for the record of the unit."""
        hashes = base64.b64encode(b"".join(self.hashes)).decode()
        return {"facts": self.facts, "groups": self.groups, "listed": self.listed, "hashes": hashes}


def columns_of(notes: Sequence[dict[str, Any]]) -> pa.Table:
    """The columns that tell of shards, from what `ShardNotes` collected of each, in the order of the files."""
    counts = pa.list_(pa.int32())
    table = pa.table({
        "groups": pa.array([told["groups"] for told in notes], counts),
        "listed": pa.array([told["listed"] for told in notes], counts),
        "hashes": pa.array([base64.b64decode(told["hashes"]) for told in notes], pa.binary()),
    })  # fmt: skip
    return table.replace_schema_metadata({FACTS: json.dumps(notes[0]["facts"], sort_keys=True)} if notes else {})


@dataclass(frozen=True)
class Piece:
    """Of some files: address, bytes and number of row groups of each; of their row groups, one after the other, the rows that
    train and those that are held out."""

    addresses: list[str]
    sizes: list[int]
    groups: Counts
    train: Counts
    held: Counts


class ToldFile:
    """A `files.parquet` that is open; only its footer is read yet.

    Raises:
        OSError, pa.ArrowInvalid: it cannot be read.
        KeyError: it does not tell of shards.
    """

    def __init__(self, told: Told) -> None:
        self.root = told.root
        system, path = fsspec.core.url_to_fs(told.address)
        self._file = pq.ParquetFile(RangeFile(system, path), pre_buffer=True, page_checksum_verification=True)
        self.facts: dict[str, Any] = json.loads(self._file.schema_arrow.metadata[FACTS])
        self.pieces = self._file.num_row_groups

    def read(self, piece: int, fraction: float) -> Piece:
        """What is told of the files of one row group; hashes are read where a fraction, 1/32 at most, is held out."""
        columns = ["path", "bytes", "groups", *(("listed", "hashes") if fraction else ())]
        table = self._file.read_row_group(piece, columns=columns).combine_chunks()
        per_file = table["groups"].combine_chunks()
        rows = _numbers(per_file.flatten(), np.int32)
        held = np.zeros(len(rows), np.int32)
        if fraction:
            counts = _numbers(table["listed"].combine_chunks().flatten(), np.int32)
            hashes = _joined(table["hashes"])
            group = np.repeat(np.arange(len(rows)), counts)
            held = np.bincount(group[hashes < fraction * 2**BITS], minlength=len(rows)).astype(np.int32)
        return Piece(
            addresses=[f"{self.root}/{path}" for path in table["path"].to_pylist()],
            sizes=table["bytes"].to_pylist(),
            groups=_numbers(per_file.value_lengths(), np.int32),
            train=rows - held,
            held=held,
        )


def _numbers(column: pa.Array, kind: Any) -> NDArray[Any]:
    return column.to_numpy(zero_copy_only=False).astype(kind)


def _joined(column: pa.ChunkedArray) -> NDArray[np.uint32]:
    """The numbers of all cells, one after the other."""
    cells: Iterator[bytes] = (cell.as_buffer() for chunk in column.chunks for cell in chunk)
    return np.concatenate([np.frombuffer(cell, "<u4") for cell in cells] or [np.zeros(0, np.uint32)])
