"""One side of `benchmarks.encode`: `encode_side.py ROOT FOLDER SIZE FILE`, with the encode stage of ROOT.

Encodes the pictures of FOLDER with one worker in this process, whose networks compute in one thread, and writes what it measured
to FILE. The first shard is a warm-up and does not count.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

BATCH = 16
STANDIN_SECONDS = 0.008
RECIPE = """
name: encode-clock
subsets:
  many:
    folder: {{images: ['many/**/*'], shard_rows: 64}}
    filter: {{clip_scores: false, duplicate_tolerance: null}}
    encode: {{size: {size}, workers: 1}}
text-codec: {{captions: many, latent_width: 32, steps: 1, batch: 8, validation_captions: 2}}
"""


def spent() -> float:
    """Seconds of CPU of this process and its children."""
    import psutil

    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children(recursive=True)))


class Clock:
    """Stands for the runner's pool, and measures the units of the encode stage."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def run_pool(
        self, job: Any, phase: Any, pending: Iterable[Any], units: int, done: Callable[..., None], executor: Any = None
    ) -> None:
        from stages.runner.contract import scratch_output

        worker, pending = phase.worker(job), list(pending)
        if phase.name == "encode":
            self.measure(worker, job, [unit for unit, _ in pending])
        for unit, key in pending:
            with scratch_output(job.store) as out:
                worker.run(unit, out)
                done(unit, out.publish(job, key, unit.name, 0.0))

    def measure(self, worker: Any, job: Any, units: list[Any]) -> None:
        with pretended(worker):
            self.found["standin"] = self.timed(worker, job, units)
        self.found["stage"] = self.timed(worker, job, units)

    def timed(self, worker: Any, job: Any, units: list[Any]) -> dict[str, float]:
        from stages.runner.contract import scratch_output

        rows = 0
        for number, unit in enumerate(units):
            if number == 1:
                start, before = time.perf_counter(), spent()
            with scratch_output(job.store) as out:
                worker.run(unit, out)
                rows += out.stats.rows_out if number else 0
        return {"rows": rows, "seconds": time.perf_counter() - start, "cpu": spent() - before}


@contextmanager
def pretended(worker: Any) -> Iterator[None]:
    """Networks that wait in place of computing, as for a GPU: what makes their input ready stays."""
    import torch

    from unidiffuser.clip_preprocess import Preprocess

    channels, height, width = worker.vae.latent_shape(worker.job.config.size)

    def moments(images: Any) -> Any:
        time.sleep(STANDIN_SECONDS * len(images))
        return torch.zeros(len(images), 2 * channels, height, width)

    def text(ids: Any) -> Any:
        return torch.zeros(len(ids), worker.text.embed_dim), torch.zeros(*ids.shape, worker.text.text_width)

    with (
        patch.object(worker.vae, "moments", moments),
        patch.object(worker.clip.model, "encode_image", lambda pixels: torch.zeros(len(pixels), worker.clip.embed_dim)),
        patch.object(worker.text.model.text, "forward", text),
        patch.object(Preprocess, "normalised", lambda self, pixels: pixels),
    ):
        yield


def main() -> None:
    root, folder, size, file = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    sys.path.insert(0, str(root))
    import torch

    import stages.__main__ as entry
    from infra.store import Store
    from stages.runner import pool
    from stages.runner.recipe import load_recipe

    # The pool of an earlier commit asks by itself what the cluster has.
    cluster = importlib.import_module("stages.runner.cluster" if (root / "stages/runner/cluster.py").exists() else pool.__name__)

    torch.set_num_threads(1)
    clock = Clock()
    # One worker in this process in place of Ray's.
    pool.run_pool = clock.run_pool  # type: ignore[assignment]
    cluster.gpus_each, entry.connect_ray = lambda *machines: 0.0, lambda: None  # type: ignore[attr-defined]
    (folder / "recipe.yaml").write_text(RECIPE.format(size=size), encoding="utf-8")
    recipe, store = load_recipe(folder / "recipe.yaml", []), Store(str(file.with_suffix("")))
    made = {node: entry.run_node(recipe, node, store) for node in ("many-folder", "many-filter", "text-codec", "many-encode")}
    addresses = {node: [dataset.url(entry) for entry in dataset.files] for node, dataset in made.items()}
    tars = [address for address in addresses["many-filter"] if address.endswith(".tar")]
    file.write_text(json.dumps({**clock.found, "tars": tars, "latents": addresses["many-encode"]}))


if __name__ == "__main__":
    main()
