"""Tables of files against Python's own sets and sorting."""

from __future__ import annotations

import pyarrow as pa
import pytest

from infra.sources import once

PARTS = [
    [["a", "b"], ["c"], [], ["d", "e"]],
    [["a", "c"], ["b", "d"]],
    [["a", "b"], ["b", "c"]],
    [["b", "b", "a"]],
    [[]],
]


@pytest.mark.parametrize("parts", PARTS)
def test_rows_of_all_parts_are_sorted_and_one_of_each_value(parts: list[list[str]]) -> None:
    text = pa.large_string()
    tables = [pa.table({"address": pa.array(part, text), "digest": pa.array(map(str.upper, part), text)}) for part in parts]
    found = once(tables, "address")
    expected = sorted({value for part in parts for value in part})
    assert not tables
    assert found["address"].to_pylist() == expected and found["digest"].to_pylist() == [value.upper() for value in expected]
