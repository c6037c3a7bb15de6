"""One side of `benchmarks.filter`: `filter_side.py ROOT STORE SHARDS`, with the code of ROOT.

Runs the phases of the filter that look for near duplicates, on scores that lie in STORE, in this process and without Ray. Prints
one line of JSON: seconds, peak memory, bytes that the phases left on disk, and rows that go.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def main(root: str, folder: str, shards: int) -> dict[str, Any]:
    sys.path.insert(0, root)

    import pyarrow.parquet as pq

    from infra.dataset import FileEntry, Stats
    from infra.store import Store, sha256_of
    from stages.filter import duplicates
    from stages.filter.stage import Filter
    from stages.runner.contract import Job, UnitRecord, digest_of, scratch_output

    store = Store(folder)
    job = Job(store, "filter", "benchmark-filter", Filter.Config(clip_scores=False), {}, {}, {})
    scores = []
    for path in sorted(Path(folder, "scores").glob("*.parquet"))[:shards]:
        rows = pq.read_metadata(path).num_rows
        entry = FileEntry(f"scores/{path.name}", rows, path.stat().st_size, sha256_of(path), "scores")
        scores.append(UnitRecord(path.stem, path.stem, [entry], Stats()))
    records: dict[str, list[UnitRecord]] = {"score": scores}
    seconds: dict[str, float] = {}
    for phase in duplicates.PHASES:
        assert phase.worker is not None
        start, records[phase.name], worker = time.perf_counter(), [], phase.worker(job)
        for unit in phase.plan(job, records):
            key = digest_of([phase.name, unit.name, unit.digests])
            if (record := job.unit_done(key)) is None:
                with scratch_output(store) as out:
                    worker.run(unit, out)
                    record = out.publish(job, key, unit.name, 0.0)
            records[phase.name].append(record)
        seconds[phase.name] = time.perf_counter() - start
    left = sum(path.stat().st_size for path in Path(folder, "filter").rglob("*") if path.is_file())
    places = [entry for record in records[duplicates.PHASES[-1].name] for entry in record.files]
    return {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
        "disk_mib": round(left / 2**20, 2),
        "gone": sum(entry.rows for entry in places),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
