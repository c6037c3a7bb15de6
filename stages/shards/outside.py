"""Tables from outside: one way to open their files, and one to read their cells, in whatever type a file holds them.

    text      any of Parquet's and Arrow's kinds of text and bytes; trimmed
    numbers   of any kind, also as text ("512", "0.31"); NaN and infinity are no value
    hashes    64-bit integers, with or without a sign, also as text, decimals or floats

Dictionaries, runs and views are only ways to store these. An empty text is no number but no mistake either.
"""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.utils import infer_compression

from infra.queries import file_name, opened, said
from infra.text import TextError, lines
from stages.runner.contract import StageError

MAGIC = b"PAR1"
# What unpacking raises, archives too. (gzip's own and bz2's are OSError.)
UNPACKING = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
NUMBER = r"^(?i)([+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?|nan)$"
INTEGER = r"^[+-]?\d{1,20}(\.0*)?$"


def unreadable(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What reading raises: Arrow, file systems, web servers that break off. Asked for when something was raised."""
    from aiohttp import ClientError

    return pa.ArrowInvalid, OSError, ClientError, *more


@contextmanager
def readable(address: str) -> Iterator[None]:
    """Turns what a reader says about a broken file into one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise StageError(f"{address}: no such file (any more)") from None
    except unreadable() as error:
        raise StageError(
            f"{address}: not a complete Parquet file ({one_line(error)}); fetch it again or take it out of the list"
        ) from None


@contextmanager
def open_parquet(address: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file by local path or fsspec URL, to be read in the block, batches of it within `readable`.

    Raises:
        StageError: not Parquet, or half-written.
    """
    with ExitStack() as stack:
        with readable(address):
            parquet = pq.ParquetFile(stack.enter_context(opened(address)))
        # Outside of `readable`: what goes wrong in the caller's block is not the file's fault.
        yield parquet


def is_parquet(address: str) -> bool:
    """Whether a file calls itself Parquet, by its name or by its first bytes; else it is text. Raises as `text_lines`."""
    if file_name(address).endswith(".parquet"):
        return True
    with _unpacked(address) as file:
        return file.read(len(MAGIC)) == MAGIC


def text_lines(address: str) -> Iterator[str]:
    """The lines of a file of text, which is unpacked as its name says.

    Raises:
        StageError: it is not there, or is not packed as its name says, or a line is no text.
    """
    with _unpacked(address) as file:
        yield from lines(file)


@contextmanager
def _unpacked(address: str) -> Iterator[Any]:
    try:
        with opened(address, compression=infer_compression(file_name(address))) as file:
            yield file
    except TextError as error:
        raise StageError(f"{address}: {error}") from None
    except FileNotFoundError:
        raise StageError(f"{address}: no such file (any more)") from None
    except unreadable(*UNPACKING) as error:
        raise StageError(f"{address}: cannot be unpacked or read ({one_line(error)}); fetch or pack it again") from None


def check_column(address: str, schema: pa.Schema, name: str, wanted: pa.DataType) -> None:
    """Raises StageError: a column is there twice, or has a type of which no value can be read as the wanted one."""
    if schema.names.count(name) > 1:
        raise StageError(f"{address}: has {schema.names.count(name)} columns {name}; leave one, or rename the others")
    kind = schema.field(name).type
    if not castable(kind, wanted):
        raise StageError(f"{address}: column {name} is {kind}, expected {wanted}")


def castable(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether `cast` reads any value of a type."""
    try:
        cast(pa.array([], kind), wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return False
    return True


class Cells(NamedTuple):
    """Values of the wanted type, null where there is none; `unread` is a mask of those that were there and mean nothing."""

    values: pa.Array
    unread: pa.Array


def cast(column: pa.Array, wanted: pa.DataType) -> Cells:
    """A column's cells as text (string), hashes (int64), sizes (int32: whole and positive, or null) or numbers (floating).

    Numbers asked for as float64 stay float32 where the file has these.

    Raises:
        pa.ArrowTypeError: a type of which no value can be read so.
    """
    column = plain(column)
    if pa.types.is_null(column.type):
        return Cells(pa.nulls(len(column), wanted), pa.repeat(False, len(column)))
    if pa.types.is_string(wanted):
        return _text(column)
    if pa.types.is_int64(wanted):
        return _hashes(column)
    values, unread = _numbers(column)
    if pa.types.is_floating(wanted):
        values = values if pa.types.is_float32(values.type) else values.cast(wanted)
        return Cells(pc.if_else(pc.is_finite(values), values, None), unread)
    sane = pc.and_kleene(pc.greater(values, 0.0), pc.less(values, 2.0**31))
    return Cells(pc.round(pc.if_else(sane, values, None)).cast(wanted), unread)


def plain(column: pa.Array) -> pa.Array:
    """The same values as they are when they are stored one after the other."""
    if isinstance(column, pa.ExtensionArray):
        return plain(column.storage)
    if isinstance(column, pa.DictionaryArray):
        return pa.DictionaryArray.from_arrays(column.indices, plain(column.dictionary)).dictionary_decode()
    if isinstance(column, pa.RunEndEncodedArray):
        return plain(pc.run_end_decode(column))
    if pa.types.is_string_view(column.type):
        return column.cast(pa.string())
    if pa.types.is_binary_view(column.type):
        return column.cast(pa.binary())
    return column


def is_text(kind: pa.DataType) -> bool:
    """Whether a plain column's type is text or bytes."""
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(of(kind) for of in (*kinds, pa.types.is_fixed_size_binary))


def _text(column: pa.Array) -> Cells:
    if pa.types.is_boolean(column.type):
        return Cells(column.cast(pa.string()), pa.repeat(False, len(column)))
    if not is_text(column.type):
        raise pa.ArrowTypeError("not text")
    try:
        # Through binary: a reader takes a file's word for it that its text is UTF-8, a cast looks.
        values = column.cast(pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        values = pa.array([_decoded(value) for value in column.cast(pa.binary()).to_pylist()], pa.string())
    return Cells(pc.utf8_trim_whitespace(values), pc.and_(pc.is_null(values), pc.is_valid(column)))


def _decoded(value: bytes | None) -> str | None:
    try:
        return value.decode() if value is not None else None
    except UnicodeDecodeError:
        return None


def _numbers(column: pa.Array) -> Cells:
    """As float64, or as float32 where these are all that there is."""
    kind = column.type
    if is_text(kind):
        return _parsed(column, NUMBER, lambda written: written.cast(pa.float64()))
    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        return Cells(column.cast(pa.float32()), pa.repeat(False, len(column)))
    if not any(of(kind) for of in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)):
        raise pa.ArrowTypeError("not numbers")
    return Cells(column.cast(pa.float64(), safe=False), pa.repeat(False, len(column)))


def _hashes(column: pa.Array) -> Cells:
    """A float column (null drift) has lost its low bits in the file and keeps the rest."""
    kind = column.type
    if is_text(kind):
        return _parsed(column, INTEGER, _whole)
    if pa.types.is_decimal(kind) and kind.scale == 0:
        return _parsed(column.cast(pa.string()), INTEGER, _whole)
    if pa.types.is_uint64(kind):
        values = column.view(pa.int64())
    elif pa.types.is_integer(kind):
        values = column.cast(pa.int64())
    elif pa.types.is_floating(kind):
        floats = column.cast(pa.float64())
        values = pc.if_else(pc.less(pc.abs(floats), 2.0**63), floats, None).cast(pa.int64(), safe=False)
    else:
        raise pa.ArrowTypeError("hashes are integers")
    return Cells(values, pa.repeat(False, len(column)))


def _whole(written: pa.Array) -> pa.Array:
    """Digits as 64 bits, null for more; those of an unsigned hash are read as the signed one that has the same."""
    numbers = (None if digits is None else int(digits.split(".")[0]) for digits in written.to_pylist())
    fitting = [None if number is None or not -(2**63) <= number < 2**64 else number % 2**64 for number in numbers]
    return pa.array(fitting, pa.uint64()).view(pa.int64())


def _parsed(column: pa.Array, form: str, parse: Any) -> Cells:
    """What text of a form means; text that means nothing is unread, and empty text no value."""
    written, broken = _text(column)
    fits = pc.fill_null(pc.match_substring_regex(written, form), False)
    there = pc.fill_null(pc.greater(pc.binary_length(written), 0), False)
    values = parse(pc.if_else(fits, written, None))
    return Cells(values, pc.or_(broken, pc.and_(there, pc.is_null(values))))


def first(mask: pa.Array) -> int | None:
    """The row of the first true value."""
    row = pc.index(mask, True).as_py()
    return row if row >= 0 else None


def one_line(error: BaseException) -> str:
    return " ".join(said(str(error) or type(error).__name__).split())[:200]
