"""A filter on a Ray cluster of its own whose nodes come and go: ``python -m tests.stages.nodes STORE``; says what came of it.

The head has no CPUs. A node comes when the stage has begun. What it is given it never ends; then another comes, and when that
has done all else the first is killed, and none comes in its place.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from infra.dataset import Dataset, Manifest, all_datasets
from infra.store import Store
from stages.filter.stage import Filter, Score
from stages.runner.contract import digest_of
from stages.runner.graph import Planned
from stages.runner.run import run_stage

ROOT = Path(__file__).parent.parent.parent
HELD = "HELD_NODE"
CONFIG = {"clip_scores": False, "preset": "none"}


def hold() -> None:
    """In every worker: the first unit on the node that the file names is never done."""
    score = Score.run

    def run(self: Score, unit: Any, out: Any) -> None:
        import ray

        held = Path(os.environ[HELD])
        if held.exists() and held.read_text() == ray.get_runtime_context().get_node_id():
            held.with_suffix(".begun").touch()
            time.sleep(600)
        score(self, unit, out)

    Score.run = run  # type: ignore[method-assign]


def planned(rows: Manifest) -> Planned:
    config = Filter.Config.model_validate(CONFIG)
    return Planned(
        "nodes", "nodes-filter", "filter", config, {"rows": rows.reference()}, {"rows": "nodes-download"}, {}, {}, 0,
        digest_of("nodes"),
    )  # fmt: skip


def come_and_go(cluster: Any, store: Store, held: Path, units: int, running: Future[Dataset]) -> None:
    def wait_until(seen: Callable[[], bool]) -> None:
        while not seen() and not running.done():
            time.sleep(0.1)

    held.write_text(cluster.add_node(num_cpus=1).node_id)
    wait_until(held.with_suffix(".begun").exists)
    cluster.add_node(num_cpus=1)
    wait_until(lambda: len(list(Path(store.root, "filter").rglob("unit.json"))) == units - 1)
    lost = next(node for node in cluster.worker_nodes if node.node_id == held.read_text())
    cluster.remove_node(lost, allow_graceful=False)


def main(root: str) -> None:
    import ray
    from ray.cluster_utils import Cluster

    store, held = Store(root), Path(f"{root}.held")
    (rows,) = all_datasets(store)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    os.environ["RAY_worker_niceness"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    environment = {"PYTHONPATH": str(ROOT), HELD: str(held)}
    runtime = {"env_vars": environment, "worker_process_setup_hook": "tests.stages.nodes.hold"}
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=runtime)
    try:
        # Ray starts nodes from the main thread only.
        with ThreadPoolExecutor(1) as aside:
            running = aside.submit(run_stage, planned(rows.manifest), store, Filter)
            come_and_go(cluster, store, held, len(rows.files), running)
            dataset = running.result()
        print(json.dumps({entry.name: entry.sha256 for entry in dataset.files}))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
