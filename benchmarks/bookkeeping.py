"""What the runner costs beside the work: plan, resume and commit of as many shards as laion2B-en has, all empty.

The peer is a plain loop that reads the same unit records, parses them, and writes the parsed list into one file: what any
bookkeeping that keeps a record a unit has to do at least.

Beside it: what each worker holds of a job whose input has a file a shard; the plan of a folder of pairs that have not changed;
and what a plan asks of an S3 server, in this process, when all units are done. With `--before REV` that commit's own benchmark
measures the same first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer

from benchmarks.before import commit_of, worktree
from benchmarks.watch import Watch
from infra.dataset import Dataset, FileEntry, InputRef, Manifest, Stats, commit, find
from infra.store import Store
from stages.runner import pool
from stages.runner.actors import for_workers
from stages.runner.contract import RECORD, Job, NodeConfig, Output, Phase, Stage, Unit, UnitRecord
from stages.runner.graph import Planned, plan
from stages.runner.keys import unit_keys
from stages.runner.recipe import parse_recipe
from stages.runner.run import make_job, run_stage

SHARD_ROWS = 10_000


class Empty(Stage):
    """A unit per shard that gives a tar and a table, as download does."""

    name = "empty"
    version = 1
    Config = NodeConfig
    phases = (Phase("work", lambda job, earlier: units_of(job), worker=lambda job: Nothing()),)

    @classmethod
    def bytes_needed(cls, job: Job) -> int:
        return 0


class Nothing:
    def run(self, unit: Unit, out: Output) -> None: ...


def units_of(job: Job) -> Iterable[Unit]:
    for entry in job.inputs["rows"].files:
        yield Unit(entry.name.removesuffix(".parquet"), (entry.sha256,), {"path": entry.path}, entry.rows)


def record_of(job: Job, unit: Unit, key: str) -> UnitRecord:
    """What a worker would have left behind."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    files = [
        FileEntry(
            path=f"{job.unit_folder(key)}/{unit.name}.{kind}", rows=SHARD_ROWS - 3, bytes=500_000_000, sha256=digest, unit=key
        )
        for kind in ("parquet", "tar")
    ]
    dropped = {"http_404": 1, "timeout": 1, "not_an_image": 1}
    stats = Stats(rows_in=SHARD_ROWS, rows_out=SHARD_ROWS - 3, dropped=dropped)
    return UnitRecord(key=key, name=unit.name, files=files, stats=stats, seconds=1.0)


def make_input(store: Store, shards: int, fingerprint: str = "input") -> Dataset:
    """A committed dataset of that many files, as select would have made it."""
    files = []
    for number in range(shards):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        key = digest[:24]
        path = f"select/units/{key[:2]}/{key}/part-{number // 2000:05d}-{number % 2000:05d}.parquet"
        files.append(FileEntry(path=path, rows=SHARD_ROWS, bytes=2_000_000, sha256=digest, unit=key))
    rows = shards * SHARD_ROWS
    return commit(
        store,
        Manifest(
            stage="select", node="laion-select", fingerprint=fingerprint, generation=0, inputs={}, config={}, sources={}, code={},
            columns={}, stats=Stats(rows_in=rows, rows_out=rows), summary={}, seconds=0.0, created="", files=files,
        ),
    )  # fmt: skip


def planned(fingerprint: str) -> Planned:
    rows = InputRef(stage="select", fingerprint="input")
    return Planned(
        "benchmark", "laion-empty", "empty", NodeConfig(), {"rows": rows}, {"rows": "laion-select"}, {}, {}, 0, fingerprint
    )


def write_records(store: Store, keys: list[tuple[Unit, str]], job: Job) -> None:
    for unit, key in keys:
        path = Path(store.root, job.unit_folder(key), "unit.json")
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(RECORD.dump_python(record_of(job, unit, key), mode="json"), indent=1, sort_keys=True))


def first(store: Store) -> dict[str, float]:
    """No record is there; every unit is done the moment that it is handed out."""

    def at_once(
        job: Job, phase: Phase, pending: Iterable[tuple[Unit, str]], units: int, done: Callable[[Unit, UnitRecord], None]
    ) -> None:
        for unit, key in pending:
            done(unit, record_of(job, unit, key))

    start = time.perf_counter()
    with patch.object(pool, "run_pool", at_once):
        run_stage(planned("first"), store, Empty)
    return {"plan_and_commit": time.perf_counter() - start}


def resume(store: Store) -> dict[str, float]:
    """All records are there, the manifest is not; then once more, when it is."""
    start = time.perf_counter()
    run_stage(planned("second"), store, Empty)
    resumed = time.perf_counter()
    assert find(store, "empty", "second") is not None
    return {"resume_and_commit": resumed - start, "hit": time.perf_counter() - resumed}


def plain(store: Store) -> dict[str, float]:
    start = time.perf_counter()
    records = [json.loads(path.read_bytes()) for path in Path(store.root, "empty", "units").glob("*/*/unit.json")]
    Path(store.root, "records.json").write_text(json.dumps(records))
    return {"plain": time.perf_counter() - start}


def worker(store: Store) -> dict[str, float]:
    """What a worker holds of its job."""
    sent = pickle.dumps(for_workers(make_job(planned("second"), store), Empty.phases[0]))
    tracemalloc.start()
    job = pickle.loads(sent)
    held = tracemalloc.get_traced_memory()[0]
    assert job.inputs
    return {"worker_mb": round(max(held, len(sent)) / 1e6, 3)}


def folder(store: Store) -> dict[str, float]:
    """The plan of the pairs beside the store; called a second time, of pairs of which none has changed."""
    own = parse_recipe({"name": "own", "subsets": {"own": {"folder": {"images": [f"{store.root}-pairs/**/*.jpg"]}}}}, Path())
    start = time.perf_counter()
    node = plan(own, store)["own-folder"]
    seconds = time.perf_counter() - start
    if node.state != "hit":
        rows = len(node.sources) // 2
        commit(
            store,
            Manifest(
                stage="folder", node="own-folder", fingerprint=node.fingerprint, generation=0, inputs={}, config={},
                sources=node.sources, code={}, columns={}, stats=Stats(rows_in=rows, rows_out=rows), summary={}, seconds=0.0,
                created="", files=[],
            ),
        )  # fmt: skip
    return {"folder_plan": seconds}


def s3(_: Store, units: int) -> dict[str, float]:
    """Requests of a plan of units that are all done, bytes of the answers, and files that were read."""
    from benchmarks.counted import counted_s3
    from benchmarks.s3_bytes_side import plan

    with counted_s3() as counted:
        return {"requests": plan(counted, units), "bytes": counted.bytes, "files": len(counted.paths)}


def make_pairs(place: Path, pairs: int) -> None:
    """Images and captions of a few bytes, ten thousand in a folder."""
    for number in range(pairs):
        if number % 10_000 == 0:
            (below := place / f"part-{number // 10_000:05d}").mkdir(parents=True)
        for ending in ("jpg", "txt"):
            (below / f"picture-{number:08d}.{ending}").write_bytes(b"%d %s" % (number, ending.encode()))


SIDES = {"first": first, "resume": resume, "plain": plain, "worker": worker, "folder": folder}


def main(
    shards: Annotated[int, typer.Option(help="Shards; 230,000 of 10,000 rows are laion2B-en.")] = 230_000,
    pairs: Annotated[int, typer.Option(help="Images with captions in the folder that is planned.")] = 1_000_000,
    s3_units: Annotated[int, typer.Option(help="Units of the plan against an S3 server.")] = 23_000,
    folder: Annotated[Path | None, typer.Option(help="Where the store is made; a temporary folder by default.")] = None,
    side: Annotated[str, typer.Option(hidden=True)] = "",
    before: Annotated[str, typer.Option(help="Measure this commit too, by its own benchmark.", metavar="REV")] = "",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Measure plan, resume and commit with empty units, and plans of unchanged files."""
    if side:
        logging.disable()
        found = s3(Store(str(folder)), s3_units) if side == "s3" else SIDES[side](Store(str(folder)))
        print(json.dumps(found))
        return
    # Not above: the sides must not pay for importing torch.
    import torch

    from benchmarks.frame import Result, machine

    words = machine(torch.device("cpu"))
    earlier = _earlier(before, shards) if before else {}
    seconds: dict[str, float] = {}
    memory: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=folder and folder.resolve()) as place:
        root = f"{place}/store"
        store = Store(root)
        make_input(store, shards)
        for name in ("first", "resume", "plain"):
            if name == "resume":
                _lay_down_records(store)
            found, memory[name] = _measured(name, root)
            seconds |= found
        held, _ = _measured("worker", root)
        Path(root, ".state").mkdir()
        make_pairs(Path(f"{root}-pairs"), pairs)
        new, _ = _measured("folder", root)
        unchanged, memory["folder"] = _measured("folder", root)
        asked, _ = _measured("s3", root, "--s3-units", str(s3_units))
    figures: dict[str, Any] = {f"{name}_s": round(value, 1) for name, value in seconds.items() if name != "plain"}
    figures |= {"peer_s": round(seconds["plain"], 1), "memory_mib": max(memory["first"], memory["resume"]), "shards": shards}
    figures |= {**held, "folder_new_s": round(new["folder_plan"], 1), "folder_plan_s": round(unchanged["folder_plan"], 1)}
    figures |= {"folder_plan_mib": memory["folder"], "pairs": pairs, "s3_units": s3_units}
    figures |= {f"s3_{name}": value for name, value in asked.items()}
    figures |= {f"before_{name}": value for name, value in earlier.items()}
    ratio = round(seconds["plain"] / seconds["resume_and_commit"], 3)
    commits = {"commit": commit_of()} | ({"before": commit_of(before)} if before else {})
    Result("bookkeeping", ratio, "plain_loop", figures, words, {**commits, "seconds": seconds, "peak_mib": memory}).finish(file)


def _earlier(revision: str, shards: int) -> dict[str, Any]:
    """The figures of another commit's benchmark, of as many shards."""
    with tempfile.TemporaryDirectory() as folder, worktree(revision) as root:
        result = Path(folder, "before.json")
        command = [sys.executable, "-m", "benchmarks.bookkeeping", "--shards", str(shards), "--json", str(result)]
        Watch(lambda process: "all").run(command, root)
        figures: dict[str, Any] = json.loads(result.read_text())["figures"]
    print(f"{revision}: {figures}", file=sys.stderr, flush=True)
    return figures


def _measured(side: str, root: str, *options: str) -> tuple[dict[str, float], int]:
    """What a side says, and its peak memory in MiB."""
    watch = Watch(lambda process: "driver")
    printed = watch.run([sys.executable, "-m", "benchmarks.bookkeeping", "--side", side, "--folder", root, *options])
    found: dict[str, float] = json.loads(printed.strip().splitlines()[-1])
    peak = round(watch.peak.get("driver", 0))
    print(f"{side}: {found}, {peak} MiB", file=sys.stderr, flush=True)
    return found, peak


def _lay_down_records(store: Store) -> None:
    """What workers would have written, by several processes."""
    job = make_job(planned("second"), store)
    key_of = unit_keys(Empty, Empty.phases[0], job, 0)
    keys = [(unit, key_of(unit)) for unit in units_of(job)]
    small = Job(store, "empty", "laion-empty", NodeConfig(), {}, {}, {})
    parts = [keys[start : start + 5000] for start in range(0, len(keys), 5000)]
    with ProcessPoolExecutor(2) as processes:
        list(processes.map(partial(write_records, store, job=small), parts))


if __name__ == "__main__":
    typer.run(main)
