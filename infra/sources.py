"""Files from outside as columns: millions of them as Python objects would take gigabytes."""

from __future__ import annotations

import hashlib
import io
import json
from bisect import bisect_left
from collections.abc import ItemsView, Iterator, Mapping, Sequence, ValuesView
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.queries import MARK
from infra.store import Store, StoreError
from infra.tree import SOME

SHA256 = pa.binary(32)


class Sources(Mapping[str, str]):
    """Address -> digest, sorted by address.

    Args:
        table: `address` as large_string, and `digest` as 32 bytes of a sha256, which is given in hex, or as large_string.
    """

    def __init__(self, table: pa.Table):
        self.table = table

    @classmethod
    def of(cls, *parts: Mapping[str, str]) -> Mapping[str, str]:
        """All of several mappings; an address that two have is the same file."""
        full = [part for part in parts if part]
        if len(full) == 1:
            return full[0]
        tables = [as_table(part) for part in full]
        if len({table.schema.field("digest").type for table in tables}) > 1:
            tables = [_in_hex(table) for table in tables]
        return cls(once(tables, "address")) if tables else {}

    def __getitem__(self, address: str) -> str:
        addresses = self.table["address"]
        row = bisect_left(range(len(addresses)), address, key=lambda row: addresses[row].as_py())
        if row == len(addresses) or addresses[row].as_py() != address:
            raise KeyError(address)
        return _text(self.table["digest"][row].as_py())

    def __iter__(self) -> Iterator[str]:
        for batch in self.table.to_batches(SOME):
            yield from batch["address"].to_pylist()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def items(self) -> ItemsView[str, str]:
        return _Items(self)

    def values(self) -> ValuesView[str]:
        return _Values(self)


class _Values(ValuesView[str]):
    def __init__(self, sources: Sources):
        super().__init__(sources)
        self.table = sources.table

    def __iter__(self) -> Iterator[str]:
        for batch in self.table.to_batches(SOME):
            yield from map(_text, batch["digest"].to_pylist())


class _Items(ItemsView[str, str]):
    def __init__(self, sources: Sources):
        super().__init__(sources)
        self.table = sources.table

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for batch in self.table.to_batches(SOME):
            yield from zip(batch["address"].to_pylist(), map(_text, batch["digest"].to_pylist()), strict=True)


class StoredSources(Mapping[str, str]):
    """The sources of a committed dataset as a file of the store lists them, read when one is asked for."""

    def __init__(self, store: Store, path: str):
        self.store, self.path = store, path

    @cached_property
    def read(self) -> Sources:
        """Raises StoreError: the file is damaged."""
        try:
            with self.store.ranges(self.path) as file:
                return Sources(pq.read_table(file, page_checksum_verification=True))
        except (pa.ArrowInvalid, OSError) as error:
            raise StoreError(f"{self.store.url(self.path)}: damaged ({error}); delete the dataset and run again") from None

    def __getitem__(self, address: str) -> str:
        return self.read[address]

    def __iter__(self) -> Iterator[str]:
        return iter(self.read)

    def __len__(self) -> int:
        return len(self.read)

    def items(self) -> ItemsView[str, str]:
        return self.read.items()


def once(parts: list[pa.Table], column: str) -> pa.Table:
    """The rows of all parts, sorted by a column, one of each value. The parts are let go of as soon as they can be."""
    table = pa.concat_tables(parts)
    parts.clear()
    if _rising(table[column]):
        return table
    table = table.combine_chunks()
    table = table.take(pc.sort_indices(table[column]))
    values = table[column].combine_chunks()
    again = pc.equal(values[1:], values[:-1]).to_numpy(zero_copy_only=False)
    return table.filter(pa.array(np.concatenate([[True], ~again]))) if again.any() else table


def _rising(values: pa.ChunkedArray) -> bool:
    """Whether each value is greater than the one before it; a chunk at a time, since one of all would be a copy of them."""
    chunks = [chunk for chunk in values.chunks if len(chunk)]
    return all(pc.all(pc.greater(chunk[1:], chunk[:-1]), min_count=0).as_py() for chunk in chunks) and all(
        before[-1].as_py() < after[0].as_py() for before, after in pairwise(chunks)
    )


def as_table(sources: Mapping[str, str]) -> pa.Table:
    """`address` and `digest` as columns, sorted by address; see `Sources`."""
    if isinstance(sources, StoredSources):
        return sources.read.table
    if isinstance(sources, Sources):
        return sources.table
    addresses = sorted(sources)
    digests = [sources[address] for address in addresses]
    try:
        column = pa.array([bytes.fromhex(digest) for digest in digests], SHA256)
    except (ValueError, pa.ArrowInvalid):
        column = pa.array(digests, pa.large_string())
    return pa.table({"address": pa.array(addresses, pa.large_string()), "digest": column})


def written(sources: Mapping[str, str]) -> bytes:
    """A Parquet file for `StoredSources`."""
    return _parquet(as_table(sources))


def together(parts: Sequence[tuple[str, str | None, Mapping[str, str]]]) -> bytes:
    """Several sources in one file, each with two names; `apart` reads it."""
    tables = [as_table(sources) for _, _, sources in parts]
    told = [[*names, table.num_rows] for (*names, _), table in zip(parts, tables, strict=True)]
    return _parquet(pa.concat_tables(tables or [as_table({})]).replace_schema_metadata({"parts": json.dumps(told)}))


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True, use_dictionary=False)
    return buffer.getvalue()


def apart(data: bytes) -> Iterator[tuple[str, str | None, Mapping[str, str]]]:
    table, start = pq.read_table(io.BytesIO(data)), 0
    for one, other, rows in json.loads(table.schema.metadata[b"parts"]):
        yield one, other, Sources(table.slice(start, rows).replace_schema_metadata())
        start += rows


def content_of(sources: Mapping[str, str]) -> str:
    """One digest of all names without their folders, and all digests: a recipe gives the same datasets wherever its files lie."""
    table, start = as_table(sources), 0
    # Filled and sorted in its place: at millions of files each copy of it is tens of megabytes.
    rows = np.empty(table.num_rows, "S32")
    line_end = pa.scalar("\n", pa.large_string())
    for batch in table.to_batches(SOME):
        pairs = pc.binary_join_element_wise(_names(batch["address"]), _hex(batch["digest"]), line_end).cast(pa.large_binary())
        rows[start : start + len(batch)] = [hashlib.sha256(pair).digest() for pair in pairs.to_pylist()]
        start += len(batch)
    # In which folders they lie decides the order of addresses.
    rows.sort()
    return hashlib.sha256(rows.data.cast("B")).hexdigest()[:24]


def _names(addresses: Any) -> Any:
    """What `infra.queries.file_name` makes of addresses."""
    for unnamed in ("(?s)::.*", MARK.pattern, "(?s)^.*/"):
        addresses = pc.replace_substring_regex(addresses, unnamed, "")
    return addresses


def other(sources: Mapping[str, str], than: Mapping[str, str]) -> dict[str, str]:
    """Name -> digest of those whose name and digest no file has of those that they are compared with."""
    own, others = (_in_hex(as_table(each)) for each in (sources, than))
    slash = pa.scalar("/", pa.large_string())
    mine, known = (pc.binary_join_element_wise(each["digest"], _names(each["address"]), slash) for each in (own, others))
    left = own.filter(pc.invert(pc.is_in(mine, value_set=known)))
    return dict(zip(_names(left["address"]).to_pylist(), left["digest"].to_pylist(), strict=True))


def _in_hex(table: pa.Table) -> pa.Table:
    """The same with its digests as text."""
    place = table.schema.get_field_index("digest")
    if table.schema.field(place).type != SHA256:
        return table
    parts = [_hex(batch["digest"]) for batch in table.to_batches(SOME)]
    return table.set_column(place, "digest", pa.chunked_array(parts, pa.large_string()))


def _hex(digests: pa.Array) -> pa.Array:
    """Digests as text, all at once; text as it is."""
    if digests.type != SHA256:
        return digests
    width = 2 * SHA256.byte_width
    text, ends = bytes_of(digests).tobytes().hex().encode(), np.arange(0, width * len(digests) + 1, width)
    return pa.LargeStringArray.from_buffers(len(digests), pa.py_buffer(ends), pa.py_buffer(text))


def bytes_of(digests: pa.FixedSizeBinaryArray) -> np.ndarray:
    """Digests of type `SHA256` as (rows, 32) bytes."""
    whole = np.frombuffer(digests.buffers()[1], np.uint8).reshape(-1, SHA256.byte_width)
    return whole[digests.offset : digests.offset + len(digests)]


def _text(digest: Any) -> str:
    return digest.hex() if isinstance(digest, bytes) else str(digest)
