"""What an object store is asked for, counted at the server: an amplification must not come back."""

from __future__ import annotations

import pytest

from benchmarks import s3_bytes_side as measured

pytestmark = pytest.mark.usefixtures("bucket")


def test_who_reads_a_part_of_many_files_reads_little_else(s3):
    assert measured.select(s3, files=2, rows=250_000, ranges=6) < 2
    assert measured.compare(s3, files=2, rows=100_000, ranges=4) < 2
    assert measured.index(s3, units=100) < 2
