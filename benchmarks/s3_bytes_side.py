"""The measure of `benchmarks.s3_bytes`, in a process of its own, by the code that lies around it."""

from __future__ import annotations

import io
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.bookkeeping import Empty, make_input, planned, record_of
from benchmarks.counted import Counted, counted_s3
from benchmarks.index import FINGERPRINT
from benchmarks.index import write as write_index
from infra.dataset import find
from infra.store import Store
from stages.filter import duplicates
from stages.filter.likeness import COLOUR_BYTES, HASH_BYTES
from stages.filter.stage import FilterConfig
from stages.runner import pool
from stages.runner.contract import RECORD, Job, Output, Phase, Unit, UnitRecord, digest_of, scratch_output
from stages.runner.run import phase_states, run_stage
from stages.select import keys
from stages.select.keys import KeyWriter
from stages.select.stage import Duplicates
from stages.shards.scores import SCORES
from stages.shards.tables import read_table, with_dictionary, write_table
from training.config import TrainConfig
from training.loader import Loader
from training.told import Told

STORE = "s3://data/store"


def columns_bytes(path: Path | io.BytesIO, names: list[str] | None = None) -> int:
    """Bytes of a Parquet file's pages, of some columns or of all."""
    footer = pq.ParquetFile(path).metadata
    chunks = (footer.row_group(g).column(c) for g in range(footer.num_row_groups) for c in range(footer.num_columns))
    return sum(chunk.total_compressed_size for chunk in chunks if names is None or chunk.path_in_schema.split(".")[0] in names)


def select(counted: Counted, files: int, rows: int, ranges: int) -> float:
    """Bytes read by the units of `duplicates`, for each byte of the pairs."""
    job, chance, paths, useful = Job(Store(STORE), "select", "x-select", None, {}, {}, {}), np.random.default_rng(0), [], 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(files):
            local = Path(folder, f"{number}.parquet")
            with KeyWriter(local) as writer:
                for start in range(0, rows, 250_000):
                    some = min(250_000, rows - start)
                    writer.add(chance.integers(0, 2**64, some, np.uint64), np.arange(start, start + some))
            useful += columns_bytes(local)
            paths.append(f"select/{local.name}")
            job.store.publish(local, paths[-1])
        counted.forget()
        worker = Duplicates(job)
        with patch.object(keys, "RANGE_KEYS", files * rows // ranges):
            for low, high in keys.ranges(files * rows):
                worker.run(Unit("", (), {"keys": paths, "range": (low, high)}), Output(Path(folder)))
    return counted.bytes / useful


def looks(chance: np.random.Generator, files: int, rows: int) -> Iterator[pa.Table]:
    """Scores of pictures of which about every second comes again."""
    known = chance.integers(0, 256, (files * rows // 2, HASH_BYTES + COLOUR_BYTES), np.uint8)
    for _ in range(files):
        seen = known[chance.integers(0, len(known), rows)]
        columns: dict[str, Any] = dict.fromkeys(SCORES, pa.nulls(rows, pa.float32()))
        columns |= {
            duplicates.FAULT: pa.nulls(rows, pa.string()),
            "width": np.full(rows, 512, np.int32),
            "height": np.full(rows, 512, np.int32),
            "caption": ["a picture"] * rows,
        }
        columns["phash"] = duplicates.fixed(np.ascontiguousarray(seen[:, :HASH_BYTES]))
        columns["colours"] = duplicates.fixed(np.ascontiguousarray(seen[:, HASH_BYTES:]))
        yield pa.table(columns)


def compare(counted: Counted, files: int, rows: int, ranges: int) -> float:
    """Bytes read by the units that find near duplicates, for each byte of what they ask for, each once a unit."""
    config = FilterConfig(preset="none", clip_scores=False, duplicate_tolerance=12)
    job, useful, asked = Job(Store(STORE), "filter", "x-filter", config, {}, {}, {}), 0, set[str]()

    def reading(job: Job, path: str, columns: list[str] | None = None, filters: Any = None) -> pa.Table:
        nonlocal useful
        table, whole = read_table(job, path, columns, filters), io.BytesIO()
        if (this := repr((path, columns, filters))) not in asked:
            asked.add(this)
            pq.write_table(table, whole, compression="zstd", use_dictionary=with_dictionary(table.schema))
            useful += columns_bytes(whole)
        return table

    records: dict[str, list[UnitRecord]] = {"score": []}
    for number, table in enumerate(looks(np.random.default_rng(0), files, rows)):
        with scratch_output(job.store) as out:
            write_table(table, out.path("scores.parquet", rows))
            records["score"].append(out.publish(job, f"{number:064d}", str(number), 0.0))
    # A worker's part is so small that there are as many.
    with patch.object(duplicates, "ROWS", files * rows // ranges), patch.object(duplicates, "read_table", reading):
        for phase in duplicates.PHASES:
            assert phase.worker is not None
            worker, records[phase.name] = phase.worker(job), []
            for unit in phase.plan(job, records):
                asked.clear()
                with scratch_output(job.store) as out:
                    worker.run(unit, out)
                    records[phase.name].append(out.publish(job, digest_of([phase.name, unit.name]), unit.name, 0.0))
            if phase.name == "survey":
                counted.forget()
                useful = 0
        return counted.bytes / useful


def index(counted: Counted, units: int) -> float:
    """Bytes that a training reads to know its order, for each byte of the columns that tell of the shards."""
    store, config = Store(STORE), TrainConfig.model_validate({"steps": 1, "global_batch": 128, "validation": {"fraction": 0.02}})
    write_index(store, units)
    with tempfile.TemporaryDirectory() as folder:
        told = store.fetch(f"encode/{FINGERPRINT}/files.parquet", Path(folder, "files.parquet"))
        useful = columns_bytes(told)
    counted.forget()
    dataset = find(store, "encode", FINGERPRINT)
    assert dataset is not None
    list_of = Told(store.url(f"{dataset.folder}/files.parquet"), store.root)
    loader = Loader(config, [dataset.url(entry) for entry in dataset.files], told=[list_of])
    loader.order.locate(loader.places(0))
    return counted.bytes / useful


def plan(counted: Counted, units: int) -> int:
    """Requests of a plan of units that are all done, by whoever comes after the run that did them."""
    store = Store(STORE)
    make_input(store, units)

    def at_once(job: Job, phase: Phase, pending: Iterable[tuple[Unit, str]], units: int, done: Callable[..., None]) -> None:
        finished = [(unit, record_of(job, unit, key)) for unit, key in pending]
        records = {store.url(f"{job.unit_folder(one.key)}/unit.json"): RECORD.dump_json(one) for _, one in finished}
        store.fs.pipe(records)
        # S3 tells when an object was written by the second.
        time.sleep(1.1)
        for unit, record in finished:
            done(unit, record)

    with patch.object(pool, "run_pool", at_once):
        run_stage(planned("first"), store, Empty)
    store.remove("empty/first")
    counted.forget()
    (state,) = phase_states(planned("first"), Store(STORE), Empty)
    assert state.done == state.total == units
    return counted.requests


def main(
    files: Annotated[int, typer.Option()],
    rows: Annotated[int, typer.Option()],
    ranges: Annotated[int, typer.Option()],
    units: Annotated[int, typer.Option()],
) -> None:
    logging.disable()
    with counted_s3() as counted:
        found: dict[str, Any] = {
            "select": round(select(counted, files, rows, ranges), 2),
            "compare": round(compare(counted, files, rows, ranges), 2),
            "index": round(index(counted, units), 2),
            "plan_requests": plan(counted, units),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
