"""Small nodes of every kind, on inputs that are there: what `tests.stages.chaos` disturbs."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from infra.dataset import Dataset
from infra.store import Store
from stages.download.stage import Download
from stages.encode.stage import Encode
from stages.filter.stage import Filter
from stages.runner.contract import Stage
from stages.runner.graph import Planned
from stages.runner.run import run_stage
from stages.select.stage import Select
from stages.train.stage import Train
from tests.stages.encode.test_encode import SIZE, codec_in
from tests.stages.hostile_files import FILES
from tests.stages.hostile_web import HOST, hostile_web
from tests.stages.packed import blots, download, encoded, sample
from tests.stages.pages import selector
from tests.stages.planning import planned_of
from tests.stages.select.test_select import laion_rows
from tests.stages.train.trainings import SHARE, Trainings

UNITS = 8
STEPS = 40


@dataclass(frozen=True)
class Scene:
    """A node, and the store with its inputs.

    `wanted` is the sha256 of each of its files that is to be the same, from a run in one process; empty where the first run on
    the machines is to tell.
    """

    stage: type[Stage]
    planned: Planned
    store: Store
    inputs: list[str]
    wanted: dict[str, str]


def found(dataset: Dataset) -> dict[str, str]:
    """File -> sha256; of a checkpoint, the weights and what goes with them."""
    files = [entry for entry in dataset.files if dataset.manifest.stage != "train" or entry.name == SHARE]
    return {entry.name: entry.sha256 for entry in files}


class Scenes:
    """Makes them: metadata lies at `outside`, and pages are served at `address`, for as long as `stack` is open."""

    def __init__(self, folder: Path, outside: Store, address: str, stack: ExitStack) -> None:
        self.folder, self.outside, self.address, self.stack = folder, outside, address, stack
        self.chance = random.Random(0)

    def __call__(self, name: str) -> Scene:
        (self.folder / name).mkdir(parents=True)
        make: Callable[[Path], Scene] = getattr(self, name)
        return make(self.folder / name)

    def made(self, stage: type[Stage], store: Store, inputs: dict[str, Dataset], **config: object) -> Scene:
        return self.of(stage, planned_of(stage, store, inputs, config), store)

    def of(self, stage: type[Stage], planned: Planned, store: Store) -> Scene:
        there = [path for path, *_ in store.walk("") if not path.startswith(".")]
        return Scene(stage, planned, store, there, found(run_stage(planned, store, stage)))

    def select(self, folder: Path) -> Scene:
        for number in range(UNITS):
            rows, buffer = laion_rows(200, seed=number), io.BytesIO()
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            pq.write_table(pa.table(columns), buffer)
            self.outside.write(f"metadata/part-{number}.parquet", buffer.getvalue())
        metadata = [self.outside.url("metadata/part-*.parquet")]
        return self.made(Select, Store(str(folder / "store")), {}, metadata=metadata, min_side=256, shard_rows=64)

    def download(self, folder: Path) -> Scene:
        web, store = self.stack.enter_context(hostile_web(self.address)), Store(str(folder / "store"))
        names = [name for name, (_, status) in FILES.items() if status == "success"][: 2 * UNITS]

        def make(stage: type[Stage], store: Store, **config: object) -> Dataset:
            return run_stage(planned_of(stage, store, {}, config), store, stage)

        rows = selector(folder, make)(store, names, shard_rows=2)
        return self.made(Download, store, {"rows": rows}, hosts={HOST: web}, image_size=64, threads=4)

    def pictures(self, store: Store) -> Dataset:
        return download(store, [[sample(2 * n + k, encoded(blots(self.chance))) for k in range(2)] for n in range(UNITS)])

    def filter(self, folder: Path) -> Scene:
        store = Store(str(folder / "store"))
        return self.made(Filter, store, {"rows": self.pictures(store)}, clip_scores=False, preset="none")

    def encode(self, folder: Path) -> Scene:
        store = Store(str(folder / "store"))
        rows = run_stage(planned_of(Filter, store, {"rows": self.pictures(store)}, {"min_side": None}), store, Filter)
        inputs = {"rows": rows, "codec": codec_in(store, folder / "codec")}
        return self.made(Encode, store, inputs, size=SIZE)

    def train(self, folder: Path) -> Scene:
        trainings = Trainings(folder)
        planned = trainings.planned(steps=STEPS, workers=1)
        there = [path for path, *_ in trainings.store.walk("") if not path.startswith(".")]
        # Another process has other arithmetic: the truth is the undisturbed run on the same machines.
        return Scene(Train, planned, trainings.store, there, {})
