"""Cells of tables from outside, against what Python makes of the same values."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from aiohttp import ClientPayloadError

from stages.runner.contract import StageError
from stages.shards.outside import cast, castable, check_column, is_parquet, open_parquet, readable, text_lines

WRITTEN = ["512", " 0.31 ", "", None, "wide", "1e3", "+5", "nan", "-inf", "1,024", ".5", "7."]
NUMBERS = [512, 0.31, None, None, None, 1000, 5, None, None, None, 0.5, 7]
UNREAD = [4, 9]


@pytest.mark.parametrize(
    "stored",
    [
        pa.array(WRITTEN),
        pa.array(WRITTEN, pa.large_string()),
        pa.array(WRITTEN, pa.string_view()),
        pa.array([text and text.encode() for text in WRITTEN], pa.binary_view()),
        pa.array(WRITTEN).dictionary_encode(),
        pa.DictionaryArray.from_arrays(pa.array(range(12), pa.int8()), pa.array(WRITTEN, pa.string_view())),
        pc.run_end_encode(pa.array(WRITTEN)),
    ],
    ids=lambda stored: str(stored.type)[:40],
)
def test_numbers_that_are_stored_as_text(stored):
    values, unread = cast(stored, pa.float64())
    assert values.to_pylist() == NUMBERS and np.flatnonzero(unread).tolist() == UNREAD


@pytest.mark.parametrize(
    ("stored", "wanted", "values"),
    [
        (pa.array(np.array([1.5, np.nan], np.float16)), pa.float32(), [1.5, None]),
        (pa.array([decimal.Decimal("0.25"), None]), pa.float32(), [0.25, None]),
        (pa.array([True, False, None]), pa.float64(), [1.0, 0.0, None]),
        (pa.array([True, False, None]), pa.string(), ["true", "false", None]),
        (pa.array([b"abc", b"  d"], pa.binary(3)), pa.string(), ["abc", "d"]),
        (pa.array([512.4, 0.0, -1.0, 3e9, float("inf"), None]), pa.int32(), [512, None, None, None, None, None]),
        (pa.array([2**62, 7]), pa.int32(), [None, 7]),
        (pa.array([1e300, 1.0]), pa.float32(), [None, 1.0]),
        (pa.array([2**64 - 1, 5], pa.uint64()), pa.int64(), [-1, 5]),
        (pa.array([decimal.Decimal(2**64 - 1), None]), pa.int64(), [-1, None]),
        (pa.array(["18446744073709551615", "-7", "12.0", ""]), pa.int64(), [-1, -7, 12, None]),
        (pa.nulls(2), pa.string(), [None, None]),
    ],
)
def test_what_can_be_cast_is_accepted(stored, wanted, values):
    found, unread = cast(stored, wanted)
    assert found.to_pylist() == values and found.type == wanted and not pc.any(unread).as_py()


def test_what_is_there_and_cannot_be_read_is_told_from_what_is_not_there():
    texts, unread = cast(pa.array([b"fine", b"\xff\xfe", None]), pa.string())
    assert (texts.to_pylist(), unread.to_pylist()) == (["fine", None, None], [False, True, False])
    hashes, unread = cast(pa.array(["0af3", "12", None, str(2**64 - 1), str(2**64), str(-(2**63) - 1)]), pa.int64())
    assert hashes.to_pylist() == [None, 12, None, -1, None, None]
    assert unread.to_pylist() == [True, False, False, False, True, True]
    assert cast(pa.array([0.7], pa.float32()), pa.float64()).values.type == pa.float32(), "the precision in which it was stored"


def test_types_that_mean_nothing_are_told_by_the_schema():
    for kind in (pa.list_(pa.int8()), pa.struct([("a", pa.int8())]), pa.timestamp("s"), pa.date32()):
        assert not any(castable(kind, wanted) for wanted in (pa.string(), pa.int32(), pa.int64(), pa.float64()))
    schema = pa.schema([("day", pa.date32()), ("name", pa.string()), ("name", pa.string())])
    with pytest.raises(StageError, match=r"x.parquet: column day is date32\[day\], expected string"):
        check_column("x.parquet", schema, "day", pa.string())
    with pytest.raises(StageError, match="x.parquet: has 2 columns name; leave one, or rename the others"):
        check_column("x.parquet", schema, "name", pa.string())


def test_a_mistake_of_the_reader_is_not_blamed_on_the_file(tmp_path):
    pq.write_table(pa.table({"day": [datetime.date(2026, 1, 1)]}), tmp_path / "a.parquet")
    with pytest.raises(pa.ArrowInvalid, match="mine"), open_parquet(str(tmp_path / "a.parquet")):
        raise pa.ArrowInvalid("mine")
    with pytest.raises(StageError, match="b.parquet: no such file"), readable(str(tmp_path / "b.parquet")):
        open(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.gz", b"plain"), ("a.bz2", b"plain"), ("a.xz", b"plain"), ("a.zip", b"plain"),
        *((f"a.{ending}", pack(bytes(range(200)))[:-20]) for ending, pack in (("gz", gzip.compress), ("bz2", bz2.compress))),
        ("a.xz", lzma.compress(bytes(range(200)))[:-20]), ("a.gz", gzip.compress(b"plain")[:12] + bytes([255] * 40)),
    ],
)  # fmt: skip
def test_a_list_that_is_not_packed_as_its_name_says_is_one_line(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(StageError, match=f"{name}: cannot be unpacked or read .*; fetch or pack it again$"):
        is_parquet(str(tmp_path / name))
        list(text_lines(str(tmp_path / name)))
    (tmp_path / name).unlink()
    with pytest.raises(StageError, match=f"{name}: no such file"):
        list(text_lines(str(tmp_path / name)))


def test_a_web_server_that_breaks_off_is_one_line():
    with pytest.raises(StageError, match="http://x/a: not a complete Parquet file .*not enough"), readable("http://x/a"):
        raise ClientPayloadError("not enough")
