"""Held-out rows of the store: whatever the shards, a stretch is what the whole list has there, and the rest is not read."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from infra.store import Store
from stages.measuring.rows import Rows
from stages.runner.contract import StageError
from stages.shards.tar import Sample, ShardWriter
from tests.stages.committed import dataset_of
from tests.stages.packed import encoded


def test_stretches_of_shards_are_those_of_the_list(store: Store, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    captions = [f"number {n}" for n in range(7)]
    for shard, numbers in enumerate(([0, 1, 2], [3], [4, 5, 6])):
        with ShardWriter(tmp_path / "rows" / f"{shard:05d}.tar") as tar:
            for n in numbers:
                picture = encoded(Image.new("RGB", (4, 4), (20 * n, 0, 0)))
                tar.add(Sample(f"{n:05d}", picture, "png", captions[n], {"n": n}))
    (tmp_path / "rows" / "removed.parquet").write_bytes(b"none of the rows")
    dataset = dataset_of(store, "filter", tmp_path / "rows", {})
    for entry, rows in zip(dataset.files, (3, 1, 3, 0), strict=True):
        entry.rows = rows
    rows = Rows(dataset, 6)
    assert (rows.count, rows.pictures) == (6, True)
    for start in range(6):
        for stop in range(start + 1, 7):
            assert rows.captions(start, stop) == captions[start:stop]
    assert [picture.getpixel((0, 0)) for picture in rows.images(2, 5)] == [(20 * n, 0, 0) for n in (2, 3, 4)]
    assert rows.references(3, 5) == [["number 3"], ["number 4"]]
    assert rows.digests(0, 3) == (dataset.files[0].sha256,)
    assert rows.digests(2, 5) == tuple(entry.sha256 for entry in dataset.files[:3])
    with pytest.raises(StageError, match="^filter/[0-9a-f]{24}: has 1 rows with pictures; at least 2 are needed to compare"):
        Rows(dataset, 1)
