"""The download stage on a Ray of its own, for `benchmarks.download`: says `ready` when Ray is up, and what came of it as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from infra.ray_cluster import start_ray_here
from infra.store import Store
from stages.download.stage import Download
from stages.runner.graph import plan
from stages.runner.recipe import parse_recipe
from stages.runner.run import run_stage
from stages.select.stage import Select


def main(metadata: str, folder: str, settings: str) -> None:
    store = Store(str(Path(folder, "store")))
    select = {"metadata": [metadata], "shard_rows": 1000}
    download = {**json.loads(settings), "allow_private": True}
    recipe = parse_recipe({"name": "bench", "subsets": {"web": {"select": select, "download": download}}}, Path("/"))
    start_ray_here(num_cpus=1, log_to_driver=False)
    run_stage(plan(recipe, store)["web-select"], store, Select)
    print("ready", flush=True)
    start = time.perf_counter()
    made = run_stage(plan(recipe, store)["web-download"], store, Download)
    print(json.dumps({"wall": time.perf_counter() - start, "images": made.manifest.stats.rows_out}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
