"""Datasets made by hand, for what needs one of a stage that it does not run; and damage to what lies in a store."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from infra.dataset import Dataset, FileEntry, InputRef, Manifest, Stats, commit
from infra.store import Store, sha256_of
from stages.catalog import stage_class
from stages.runner.chain import unit_key
from stages.runner.contract import scratch_output
from stages.runner.graph import Planned
from stages.runner.keys import chain_key
from stages.runner.ledger import Entry, grown_with, ledger_of
from stages.runner.run import make_job
from stages.train.order import ORDER_FILE, order_told
from stages.train.origin import begins


def dataset_of(
    store: Store, stage: str, folder: Path, inputs: dict[str, InputRef], sources: dict[str, str] | None = None
) -> Dataset:
    """A committed dataset that holds the files of a folder."""
    fingerprint = (stage.encode().hex() * 4)[:24]
    entries = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = f"{stage}/units/{fingerprint}/{file.relative_to(folder)}"
        store.publish(file, path)
        entries.append(FileEntry(path=path, rows=1, bytes=file.stat().st_size, sha256=sha256_of(file), unit=fingerprint))
    manifest = Manifest(
        stage=stage, node=f"x-{stage}", fingerprint=fingerprint, generation=0, inputs=inputs, config={}, sources=sources or {},
        code={"stage_version": 1, "package": "0"}, columns={}, stats=Stats(rows_in=1, rows_out=1), summary={}, seconds=1.0,
        created="2026-01-01T00:00:00+00:00", files=entries,
    )  # fmt: skip
    return commit(store, manifest)


def trained(store: Store, planned: Planned, *steps: int) -> str:
    """A chain of checkpoints without tensors, as if this training had reached these steps; gives its key."""
    stage = stage_class("train")
    (phase,) = stage.phases
    key, config = chain_key(stage, phase, planned), grown_with(phase, planned.config)
    job = make_job(planned, store, missing_ok=True)
    for step in steps:
        with scratch_output(store) as out:
            out.path(ORDER_FILE).write_text(json.dumps(order_told(planned.config, [])), encoding="utf-8")
            out.publish(job, unit_key(key, step), "step", 0.0)
    start = begins(stage, job, planned, ledger_of(store, planned))
    entry = Entry(
        base=key, key=key, root=start.root, version=stage.version, config=config, inputs=planned.inputs, created="2026-01-01",
        parent=None,
    )  # fmt: skip
    ledger_of(store, planned).enter(entry)
    return key


def flip(path: str | Path, where: bytes | int) -> None:
    """Change one bit of a file: at a place, or in the middle of the first occurrence of some bytes."""
    data = bytearray(Path(path).read_bytes())
    place = where if isinstance(where, int) else data.index(where) + len(where) // 2
    data[place] ^= 1
    Path(path).write_bytes(data)


def damage_moments(path: str, group: int) -> None:
    """Change a byte of the moments of a row group."""
    column = pq.ParquetFile(path).metadata.row_group(group).column(2)
    assert column.path_in_schema == "moments"
    flip(path, column.data_page_offset + column.total_compressed_size // 2)
