"""Real trainings of the stage, in the tests' own process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from infra.dataset import Dataset, FileEntry, Stats, commit
from infra.external import resolve
from infra.store import Store, sha256_of
from stages.runner.chain import Chain
from stages.runner.contract import digest_of, result_fields
from stages.runner.graph import Planned
from stages.runner.ledger import chain_of
from stages.runner.run import make_job, run_stage
from stages.train.stage import Train, TrainStageConfig
from tests.stages.committed import dataset_of
from tests.training.synthetic import write_shards
from training.loop import run

# The numbers of a training by one worker.
SHARE = "share-00000-of-00001.safetensors"


class Trainings:
    """Real trainings in this process, in place of Ray's gang; `began` are the steps of their first rows, and `advice` is what
    a person is told to write if the loss of the last one is not finite."""

    def __init__(self, root: Path, store: str | None = None) -> None:
        self.began: list[int] = []
        self.advice = ""
        self.stop_at: int | None = None
        self.store = Store(store or str(root / "store"))
        write_shards(root / "latents")
        data = dataset_of(self.store, "encode", root / "latents", {})
        data.manifest.stats = Stats(rows_in=80, rows_out=80)
        self.data = commit(self.store, data.manifest)
        self.inputs = {"data.x": self.data.manifest.reference()}
        self.generation, self.recipe = 0, "r"

    def grow(self, folder: Path, files: int, fingerprint: str = "9" * 24) -> None:
        """Other shards as the data, in a dataset of their own; those of before are among them, behind the new ones."""
        write_shards(folder, files=files)
        entries = []
        for file in sorted(folder.iterdir(), reverse=True):
            path = f"encode/units/{sha256_of(file)[:24]}/{file.name}"
            size, digest = self.store.publish(file, path)
            entries.append(FileEntry(path=path, rows=40, bytes=size, sha256=digest, unit=digest[:24]))
        rows = Stats(rows_in=40 * files, rows_out=40 * files)
        manifest = self.data.manifest.model_copy(update={"fingerprint": fingerprint, "files": entries, "stats": rows})
        self.inputs = {"data.x": commit(self.store, manifest).manifest.reference()}

    def train(self, plan: Any, on_row: Callable[[Any], None] = lambda row: None, stop: Any = None) -> Any:
        job = plan()
        self.advice = job.fork
        rows: list[int] = []
        steps: list[int] = []

        def stopping() -> bool:
            steps.append(1)
            return rows[0] + len(steps) == self.stop_at

        def seen(row: dict[str, Any]) -> None:
            # The first row of a training is the validation of step 0, what it says of damage, or that of the step after the one
            # that it goes on from.
            rows.append(row["step"] if row["kind"] != "train" and not rows else row["step"] - 1)
            on_row(row)

        outcome = run(job, torch.device("cpu"), lambda step: bool(rows) and stopping(), seen)
        self.began.append(rows[0])
        return outcome

    def planned(self, **changes: Any) -> Planned:
        fields = {
            "global_batch": 8, "precision": "fp32", "log_every": 1, "checkpoint_every": 5, "keep": {"last": 100},
            "schedule": {"warmup_steps": 2},
            "model": {"width": 16, "depth": 2, "heads": 2}, "validation": {"fraction": 0.2, "every": 100, "samples": 4},
            **changes,
        }  # fmt: skip
        config = TrainStageConfig.model_validate(fields)
        inputs = self.inputs | Train.datasets(config, self.store)
        sources = resolve(Train.sources(config), self.store)
        lists = {part: resolve(patterns, self.store) for part, patterns in Train.lists(config).items()}
        told = digest_of([result_fields(config), {n: i.fingerprint for n, i in inputs.items()}, self.generation, self.recipe])
        return Planned(self.recipe, "train-256", "train", config, inputs, {}, sources, {}, self.generation, told, lists=lists)

    def __call__(self, **changes: Any) -> Dataset:
        return run_stage(self.planned(**changes), self.store, Train)

    def chain(self, **changes: Any) -> Chain:
        planned, (phase,) = self.planned(**changes), Train.phases
        assert phase.gang is not None
        return chain_of(Train, phase, phase.gang, make_job(planned, self.store), planned)


def same_tensors(one: Dataset, other: Dataset) -> bool:
    digests = [dataset.file(SHARE).sha256 for dataset in (one, other)]
    return digests[0] == digests[1]
