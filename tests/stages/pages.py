"""Selections of pages of the hostile web, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.dataset import Dataset
from infra.store import Store
from stages.select.stage import Select
from stages.shards.tar import Sample, read_samples
from tests.stages.hostile_web import HOST


def selector(folder: Path, make: Callable[..., Dataset]) -> Callable[..., Dataset]:
    """(store, page names or URLs) -> the select dataset of these pages; `columns` are further ones of the metadata."""

    def select(
        store: Store,
        names: Sequence[str],
        file: str = "pages",
        shard_rows: int = 1000,
        columns: dict[str, Any] | None = None,
        captions: Sequence[str] = (),
    ) -> Dataset:
        table = {
            "URL": [f"http://{HOST}/{name}" if "://" not in name else name for name in names],
            "TEXT": [f"caption of {name}" for name in names],
            "WIDTH": [1] * len(names),
            "similarity": [0.3] * len(names),
            **(columns or {}),
        }
        pq.write_table(pa.table(table), folder / f"{file}.parquet")
        return make(Select, store, metadata=[str(folder / "pages*.parquet")], shard_rows=shard_rows, captions=captions)

    return select


def samples_of(dataset: Dataset) -> list[Sample]:
    found: list[Sample] = []
    for entry in dataset.files:
        if entry.name.endswith(".tar"):
            with dataset.open(entry) as file:
                samples = list(read_samples(file))
            assert len(samples) == entry.rows
            found += samples
    return found


def table_of(dataset: Dataset) -> pa.Table:
    return pa.concat_tables([pq.read_table(dataset.url(entry)) for entry in dataset.files if entry.name.endswith(".parquet")])


def name_of(url: str) -> str:
    """The last part of a URL."""
    return url.rsplit("/", 1)[-1]
