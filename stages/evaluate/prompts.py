"""The prompts of an evaluation: captions, and where there are any the real pictures that belong to them.

A Parquet file has them in `caption` (or LAION's TEXT) and `image`: a picture's bytes, or Hugging Face's bytes and path.
Any other file is text with a prompt a line. They are few and chosen, so that one without a caption or a picture is a mistake that
is named, and not left out.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from stages.runner.contract import StageError
from stages.shards.outside import cast, check_column, first, is_parquet, open_parquet, plain, readable, text_lines
from training.names import column_of
from unidiffuser.images import PictureError, peek


def read_prompts(addresses: Iterable[str], count: int) -> pa.Table:
    """The first `count` prompts: `caption` (string), and `image` (binary) where there are real pictures.

    Raises:
        StageError: it is not one file, which can be read and has two prompts or more, each of them whole.
    """
    found = list(addresses)
    if len(found) != 1:
        raise StageError(f"prompts: {len(found)} files, {found[0]} and {found[1]} among them; name one")
    (address,) = found
    table = _from_parquet(address, count) if is_parquet(address) else _from_text(address, count)
    if len(table) < 2:
        raise StageError(f"{address}: has {len(table)} rows; at least 2 prompts are needed to compare")
    return table


def _from_text(address: str, count: int) -> pa.Table:
    captions = [line.strip() for line in text_lines(address) if line.strip()]
    return pa.table({"caption": pa.array(captions[:count], pa.string())})


def _from_parquet(address: str, count: int) -> pa.Table:
    with open_parquet(address) as parquet:
        schema = parquet.schema_arrow
        caption = column_of("caption", schema.names)
        if caption is None:
            raise StageError(f"{address}: columns found: {', '.join(schema.names)}; needed: caption, and image if there are any")
        check_column(address, schema, caption, pa.string())
        columns = [caption]
        if "image" in schema.names:
            columns.append("image")
            _check_pictures(address, schema)
        tables, rows = [], 0
        with readable(address):
            for batch in parquet.iter_batches(count, columns=columns):
                tables.append(_whole(address, rows, batch.slice(0, count - rows), caption))
                rows += len(tables[-1])
                if rows == count:
                    break
    return pa.concat_tables(tables) if tables else pa.table({"caption": pa.array([], pa.string())})


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


def _whole(address: str, start: int, batch: pa.RecordBatch, caption: str) -> pa.Table:
    """The prompts of a part of the file, the first of them in row `start`."""
    captions = cast(batch.column(caption), pa.string()).values
    columns = {"caption": captions}
    if (bad := first(pc.equal(pc.fill_null(pc.binary_length(captions), 0), 0))) is not None:
        raise StageError(f"{address}, row {start + bad}: has no caption; every prompt needs one")
    if "image" in batch.schema.names:
        pictures = batch.column("image")
        if pa.types.is_struct(pictures.type):
            pictures = pc.struct_field(pictures, "bytes")
        columns["image"] = plain(pictures).cast(pa.binary())
        if (bad := first(pc.equal(pc.fill_null(pc.binary_length(columns["image"]), 0), 0))) is not None:
            raise StageError(f"{address}, row {start + bad}: its picture is not in the file; give all, or leave image out")
        for row, picture in enumerate(columns["image"].to_pylist(), start):
            try:
                peek(picture)
            except PictureError as reason:
                raise StageError(
                    f"{address}, row {row}: its picture cannot be read ({reason}); replace or remove the row"
                ) from None
    return pa.table(columns)
