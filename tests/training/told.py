"""Synthetic shards as a committed dataset that tells of them, as encode commits its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from infra.dataset import Dataset, FileEntry, Manifest, Stats, commit
from infra.store import Store
from training.told import FACTS, ShardNotes, Told, columns_of


def dataset_of(store: Store, shards: Sequence[str], fingerprint: str = "a" * 24) -> tuple[Dataset, Told]:
    """Shards of this machine as a dataset in a store, in their order."""
    entries, notes = [], []
    for path in shards:
        file = pq.ParquetFile(path)
        told = ShardNotes(json.loads(file.schema_arrow.metadata[FACTS]))
        for group in range(file.num_row_groups):
            told.add(file.read_row_group(group, ["key"])["key"].to_pylist())
        notes.append(told.notes())
        unit = f"{fingerprint[:8]}-{Path(path).stem}"
        where = f"encode/units/{unit}/{Path(path).name}"
        size, digest = store.publish(path, where)
        entries.append(FileEntry(where, file.metadata.num_rows, size, digest, unit))
    rows = sum(entry.rows for entry in entries)
    manifest = Manifest.model_validate({
        "stage": "encode", "node": "x-encode", "fingerprint": fingerprint, "generation": 0, "inputs": {}, "config": {},
        "sources": {}, "code": {}, "schema": {}, "stats": Stats(rows, rows), "summary": {}, "seconds": 0, "created": "",
        "files": entries,
    })  # fmt: skip
    dataset = commit(store, manifest, columns_of(notes))
    return dataset, Told(store.url(f"{dataset.folder}/files.parquet"), store.root)
