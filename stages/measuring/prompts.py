"""Held-out data from outside: captions, and where there are any the real pictures that belong to them.

Parquet files have them in `caption` (or LAION's TEXT), `image`, which is a picture's bytes, or Hugging Face's bytes and path, and
`captions`, a list of all that people have written of it; without `caption` the first of these is the prompt. Any other file is
text with a prompt a line. They are few and chosen, so that one without a caption or a picture is a mistake that is named, and not
left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.runner.contract import StageError
from stages.shards.outside import cast, check_column, first, is_parquet, is_text, open_parquet, plain, readable, text_lines
from training.names import column_of
from unidiffuser.images import PictureError, open_picture, peek

# Rows that are held at once while all of them are looked at.
AT_ONCE = 64


class Prompts:
    """The first `count` rows of some files, in the order of their addresses.

    Attributes:
        count: rows there are, at most as many as asked for.
        pictures: whether each has a picture.

    Raises:
        StageError: a file cannot be read, or there are fewer than two rows.
    """

    def __init__(self, sources: Mapping[str, str], count: int) -> None:
        self.sources = dict(sources)
        self.rows: dict[str, int] = {}
        self.count = 0
        for address in self.sources:
            self.rows[address] = min(_rows(address), count - self.count)
            self.count += self.rows[address]
            if self.count == count:
                break
        if self.count < 2:
            raise StageError(f"{next(iter(sources))}: has {self.count} rows; at least 2 prompts are needed to compare")

    @cached_property
    def pictures(self) -> bool:
        found = {_has_pictures(address) for address in self.rows}
        if len(found) > 1:
            lacks = next(address for address in self.rows if not _has_pictures(address))
            raise StageError(f"{lacks}: has no column image, and others have; give all, or leave image out of all")
        return found.pop()

    def check(self) -> None:
        """Look at all rows.

        Raises:
            StageError: one has no caption, or a picture that cannot be read.
        """
        for start in range(0, self.count, AT_ONCE):
            for address, row, table in self._tables(start, min(start + AT_ONCE, self.count), self.pictures):
                _check_rows(address, row, table)

    def digests(self, start: int, stop: int) -> tuple[str, ...]:
        """What decides a stretch of rows: the digests of its files."""
        return tuple(self.sources[address] for address, _, _ in self._stretches(start, stop))

    def captions(self, start: int, stop: int) -> list[str]:
        return [caption for _, _, table in self._tables(start, stop, False) for caption in table["caption"].to_pylist()]

    def references(self, start: int, stop: int) -> list[list[str]]:
        """All captions of each picture."""
        return [
            [text for text in row["captions"] or () if text] if row.get("captions") else [row["caption"]]
            for _, _, table in self._tables(start, stop, False)
            for row in table.to_pylist()
        ]

    def images(self, start: int, stop: int) -> list[Any]:
        """The pictures, as people see them.

        Raises:
            StageError: one of them cannot be read.
        """
        found = []
        for address, row, table in self._tables(start, stop, True):
            for number, value in enumerate(table["image"].to_pylist(), row):
                try:
                    found.append(open_picture(value or b""))
                except PictureError as reason:
                    raise StageError(
                        f"{address}: row {number}, column image: {reason}; put a picture there or leave the row out"
                    ) from None
        return found

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """(address, first row, end) in each file of the rows `start` to `stop` - 1 of all."""
        before = 0
        for address, rows in self.rows.items():
            if start < before + rows and stop > before:
                yield address, max(start - before, 0), min(stop - before, rows)
            before += rows

    def _tables(self, start: int, stop: int, pictures: bool) -> Iterator[tuple[str, int, pa.Table]]:
        for address, first_row, end in self._stretches(start, stop):
            read = _from_parquet if is_parquet(address) else _from_text
            yield address, first_row, read(address, first_row, end, pictures)


def _rows(address: str) -> int:
    if not is_parquet(address):
        return sum(1 for _ in _prompts(address))
    with open_parquet(address) as parquet:
        return int(parquet.metadata.num_rows)


def _prompts(address: str) -> Iterator[str]:
    return (line.strip() for line in text_lines(address) if line.strip())


def _from_text(address: str, start: int, stop: int, _: bool) -> pa.Table:
    return pa.table({"caption": pa.array(list(islice(_prompts(address), start, stop)), pa.string())})


def _has_pictures(address: str) -> bool:
    if not is_parquet(address):
        return False
    with open_parquet(address) as parquet:
        return "image" in parquet.schema_arrow.names


def _from_parquet(address: str, start: int, stop: int, pictures: bool) -> pa.Table:
    """Rows `start` to `stop` - 1 of a file, reading no other row groups."""
    with open_parquet(address) as parquet:
        columns = _columns(address, parquet.schema_arrow, pictures)
        groups, skipped, before = [], 0, 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if before + rows <= start:
                skipped += rows
            elif before < stop:
                groups.append(group)
            before += rows
        with readable(address):
            table = _read(parquet, groups, list(columns.values())).slice(start - skipped, stop - start)
    return _named(table, columns)


def _read(parquet: pq.ParquetFile, groups: list[int], columns: list[str]) -> pa.Table:
    # Batch by batch: Arrow cannot make one piece of what lies in nested columns of several row groups.
    batches = list(parquet.iter_batches(row_groups=groups, columns=columns))
    return pa.Table.from_batches(batches, batches[0].schema if batches else None)


def _columns(address: str, schema: pa.Schema, pictures: bool) -> dict[str, str]:
    """Our name -> the file's, of the columns that are there and wanted."""
    caption, listed = column_of("caption", schema.names), "captions" in schema.names
    if caption is None and not listed:
        raise StageError(f"{address}: columns found: {', '.join(schema.names)}; needed: caption, and image if there are any")
    columns = {}
    if caption is not None:
        check_column(address, schema, caption, pa.string())
        columns["caption"] = caption
    if listed:
        kind = schema.field("captions").type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not is_text(kind.value_type):
            raise StageError(f"{address}: column captions is {kind}, expected lists of text; mend it, or leave it out")
        columns["captions"] = "captions"
    if pictures:
        _check_pictures(address, schema)
        columns["image"] = "image"
    return columns


def _named(table: pa.Table, columns: Mapping[str, str]) -> pa.Table:
    """The columns under our names and in our types; without `caption`, the first of each list is it."""
    table = table.combine_chunks()
    found: dict[str, Any] = {}
    if "captions" in columns:
        found["captions"] = [[text for text in row or () if text and text.strip()] for row in table["captions"].to_pylist()]
        found["caption"] = pa.array([row[0] if row else None for row in found["captions"]], pa.string())
    if "caption" in columns:
        found["caption"] = cast(_chunk(table[columns["caption"]]), pa.string()).values
    if "image" in columns:
        pictures = _chunk(table["image"])
        if pa.types.is_struct(pictures.type):
            pictures = pc.struct_field(pictures, "bytes")
        found["image"] = plain(pictures).cast(pa.binary())
    return pa.table(found)


def _chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _check_pictures(address: str, schema: pa.Schema) -> None:
    if schema.names.count("image") > 1:
        raise StageError(f"{address}: has {schema.names.count('image')} columns image; leave one, or rename the others")
    kind = schema.field("image").type
    if not _is_bytes(kind) and not (
        pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    ):
        raise StageError(
            f"{address}: column image is {kind}, expected the bytes of pictures, or bytes with path; "
            "put the pictures into the file, or leave the column out"
        )


def _is_bytes(kind: pa.DataType) -> bool:
    of = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_null)
    return any(is_kind(plain(pa.array([], kind)).type) for is_kind in of)


def _check_rows(address: str, start: int, table: pa.Table) -> None:
    """Raises StageError when a row of a part of the file is not whole; `start` is the row of the first."""
    captions = _chunk(table["caption"])
    if (bad := first(pc.equal(pc.fill_null(pc.binary_length(captions), 0), 0))) is not None:
        raise StageError(f"{address}, row {start + bad}: has no caption; every prompt needs one")
    if "image" not in table.column_names:
        return
    pictures = _chunk(table["image"])
    if (bad := first(pc.equal(pc.fill_null(pc.binary_length(pictures), 0), 0))) is not None:
        raise StageError(f"{address}, row {start + bad}: its picture is not in the file; give all, or leave image out")
    for row, picture in enumerate(pictures.to_pylist(), start):
        try:
            peek(picture)
        except PictureError as reason:
            raise StageError(f"{address}, row {row}: its picture cannot be read ({reason}); replace or remove the row") from None
