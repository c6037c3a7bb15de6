"""Where the checkpoints of a training lie: units of its chain, written by all workers together and counted by one record.

A worker writes its files into the folder of the attempt that the run is; the record, written once by rank 0, names them. What an
attempt leaves that was killed counts for nothing. A checkpoint that proves damaged is set aside, so that another can be made.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from infra.dataset import VERIFY, FileEntry, Stats, datasets_of, fetch_files
from infra.queries import opened, place
from infra.room import NoRoom, check_room
from infra.store import Store, StoreError, Writing, sha256_of
from stages.runner.chain import Chain
from stages.runner.contract import UnitRecord, write_record
from stages.train.order import ORDER_FILE, order_told
from training.config import TrainConfig
from training.job import Written

log = logging.getLogger("stages")

# Name of the record of a checkpoint that a stop left between two planned ones.
STOPPED = "stopped"
# What an attempt at the same step has left goes when it is so old that nobody can be writing it.
STALE = timedelta(hours=1)


def kept_at_most(config: TrainConfig) -> int:
    """Checkpoints that lie in the store at most, while one more is written than stays."""
    planned = [*range(config.checkpoint_every, config.steps, config.checkpoint_every), config.steps]
    # The last moment is the fullest: what stays only grows.
    return min(len(planned), len(config.keep.of(planned)) + 1)


@dataclass(frozen=True)
class Publisher:
    """Puts the checkpoints of a run into the store as units; see `training.job.Keeper`.

    Attributes:
        started: when the run began, in seconds.
        shards: that it reads, by digest.
        attempt: sets this run's files apart from another's at the same step.
    """

    chain: Chain
    started: float
    shards: tuple[str, ...]
    attempt: str

    def _folder(self, step: int) -> str:
        return self.chain.job.unit_folder(self.chain.key_of(step))

    def writing(self, step: int, name: str) -> AbstractContextManager[Writing]:
        return self.chain.job.store.writing(f"{self._folder(step)}/@{self.attempt}/{name}")

    def commit(self, step: int, files: Sequence[Written], rows: int, metrics: dict[str, Any]) -> None:
        # Another run of the chain may have been here first: what is done stays as it is.
        if self.chain.record(step) is None:
            self._commit(step, files, rows, metrics)
        self.give_way(step)

    def _commit(self, step: int, files: Sequence[Written], rows: int, metrics: dict[str, Any]) -> None:
        job, key = self.chain.job, self.chain.key_of(step)
        with self.writing(step, ORDER_FILE) as order:
            order.write(order_text(job.config, self.shards))
        every = [*files, Written(ORDER_FILE, order.size, order.sha256)]
        rows_in = sum(d.manifest.stats.rows_out for name, d in job.inputs.items() if name.startswith("data."))
        stats = Stats(rows_in, rows)
        stats.drop("validation_or_where" if job.config.data.where else "validation", rows_in - rows)
        notes: dict[str, Any] = {"step": step, "metrics": metrics}
        if self.chain.parent is not None:
            notes["began"] = self.chain.parent.model_dump(mode="json")
        planned = step == self.chain.end or step % job.config.checkpoint_every == 0
        write_record(
            job,
            UnitRecord(
                key=key,
                name=f"step-{step:08d}" if planned else STOPPED,
                files=[
                    FileEntry(f"{self._folder(step)}/@{self.attempt}/{file.name}", 0, file.bytes, file.sha256, key)
                    for file in sorted(every, key=lambda file: file.name)
                ],
                stats=stats,
                notes=notes,
                seconds=time.time() - self.started,
            ),
        )
        self._clear(step)

    def _clear(self, step: int) -> None:
        """Remove what attempts at this step have left that were killed."""
        store, before = self.chain.job.store, datetime.now(UTC) - STALE
        record = self.chain.record(step)
        named = {entry.path for entry in record.files} if record is not None else set()
        for path, _, written in list(store.walk(self._folder(step))):
            if "/@" in path and path not in named and written < before:
                store.remove(path)

    def give_way(self, step: int) -> None:
        """Remove the checkpoints before this one that `keep` does not keep, and what stops left: a year of checkpoints would
        fill any disk."""
        earlier = {at: record for at, record in self.chain.done().items() if at < step}
        stay = self.chain.job.config.keep.of([step, *(at for at, record in earlier.items() if record.name != STOPPED)])
        for at in earlier.keys() - stay:
            self.chain.remove(at)

    def steps(self) -> list[int]:
        return list(self.chain.done())

    def fetch(self, step: int, folder: str) -> str:
        record = self.chain.record(step)
        if record is None:
            raise StoreError(f"{self.chain.job.node}: the checkpoint of step {step} has gone; run again")
        return str(fetch_files(self.chain.job.store, record.files, Path(folder)))

    def set_aside(self, step: int) -> None:
        set_aside(self.chain, step)


def order_text(config: Any, shards: Sequence[str]) -> bytes:
    return (json.dumps(order_told(config, list(shards))) + "\n").encode()


def set_aside(chain: Chain, step: int) -> None:
    """Let a checkpoint count no longer, unless it is a committed dataset, which stays as it is. Its files stay beside its record
    under another name."""
    store, key = chain.job.store, chain.key_of(step)
    if any(entry.unit == key for dataset in datasets_of(store, chain.job.stage) for entry in dataset.files):
        return
    folder = chain.job.unit_folder(key)
    if (record := store.read_json(f"{folder}/unit.json")) is not None:
        store.write_json(f"{folder}/set-aside.json", record)
        store.remove(f"{folder}/unit.json")


@dataclass(frozen=True)
class Newest:
    """Fetches the newest checkpoint of a chain that is whole, on each machine that trains.

    Attributes:
        steps: those to choose from, ascending.
        folder: a local folder to fetch it to.
        begun_from: whether there is a step of another chain to begin from again.
    """

    chain: Chain
    steps: tuple[int, ...]
    folder: str
    begun_from: bool

    def __call__(self) -> str | None:
        """None when none is whole, and the chain can begin again where it began. Raises StoreError when it cannot."""
        node, damaged, error = self.chain.job.node, [], StoreError(f"{self.chain.job.node}: its checkpoints have gone")
        for step in reversed(self.steps):
            if (record := self.chain.record(step)) is None:
                continue
            try:
                folder = fetch_files(self.chain.job.store, record.files, Path(self.folder), "it cannot be gone on from")
            except NoRoom:
                raise
            except StoreError as found:
                shutil.rmtree(self.folder)
                damaged.append(step)
                error = found
                continue
            self._set_aside(damaged, error)
            return str(folder)
        if self.begun_from:
            self._set_aside(damaged, error)
            return None
        raise StoreError(f"{error}, and no older checkpoint is whole: begin anew with --force {node}")

    def _set_aside(self, damaged: list[int], error: StoreError) -> None:
        for step in damaged:
            log.warning("%s: step %d is damaged, and set aside: %s", self.chain.job.node, step, error)
            set_aside(self.chain, step)


@dataclass(frozen=True)
class Fetched:
    """Fetches a checkpoint of another run to begin from, likewise."""

    store: Store
    files: list[FileEntry]
    folder: str

    def __call__(self) -> str:
        return str(fetch_files(self.store, self.files, Path(self.folder), VERIFY))


@dataclass(frozen=True)
class Outside:
    """Fetches a checkpoint from outside the store, likewise; `files` are address -> digest."""

    files: dict[str, str]
    folder: str

    def __call__(self) -> str:
        folder = Path(self.folder)
        sizes = [fs.size(path) or 0 for fs, path in map(place, self.files)]
        check_room(folder, sum(sizes), next(iter(self.files)).rsplit("/", 1)[0])
        folder.mkdir(parents=True)
        for address, digest in self.files.items():
            target = folder / address.rsplit("/", 1)[-1]
            with opened(address) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            if sha256_of(target) != digest:
                raise StoreError(f"{address}: has changed since the run was planned; run again")
        return self.folder
