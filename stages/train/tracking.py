"""The rows of a training in the trackers that the recipe names, each row once, whatever became of the run before.

The history of the checkpoint that workers go on from tells what a tracker may have missed, as workers that are killed have rows
that nobody has heard of, and each tracker says how far it is. A tracker that fails is left alone with a warning, and gets what it
missed when the run goes on. A run that goes back to an earlier checkpoint takes steps again, on other samples: their rows are
written as well, and trackers that can forget do so with those before.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress

from infra.store import StoreError
from stages.runner.chain import Chain
from stages.runner.contract import result_fields
from stages.train.trackers import TRACKERS, Name, Place, Reached, Tracker
from training.begin import counts_on
from training.history import Row

log = logging.getLogger("stages")

FOLDER = ".state/tracking"
# What of a row is no figure, and the kinds of rows with figures.
PLACE = ("kind", "step")
KINDS = ("train", "validation")


class Tracking:
    """The trackers of one training run.

    Args:
        chain: the run.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain, job = chain, chain.job
        self.node, self.trackers = job.node, dict[Name, Tracker]()
        self.reached: dict[tuple[Name, str], Reached] = {}
        # By tracker, the rollbacks that it knows of.
        self.backs: dict[Name, int] = {}
        place = Place(job.store, FOLDER, job.recipe or job.stage, job.node, chain.key, result_fields(job.config))
        for name in job.config.track:
            try:
                self.trackers[name] = TRACKERS[name](place)
            except Exception as error:
                self._failed(name, error)

    def go_on(self) -> None:
        """Workers are about to begin: take the rows before."""
        for row in _before(self.chain) if self.trackers else []:
            self.add(row)

    def add(self, row: Row) -> None:
        """A row, later than all before, or one that the trackers may hold already; one of words is left out."""
        kind, step = row["kind"], row["step"]
        if "said" in row:
            return
        values = {name: float(value) for name, value in row.items() if name not in PLACE}
        place = Reached(int(row.get("rollbacks", 0)), step)
        for name, tracker in list(self.trackers.items()):
            try:
                if name not in self.backs:
                    self.reached |= {(name, each): tracker.reached(each) for each in KINDS}
                    self.backs[name] = max(self.reached[name, each].rollbacks for each in KINDS)
                if place > self.reached[name, kind]:
                    if place.rollbacks > self.backs[name]:
                        tracker.give_up(step)
                        self.backs[name] = place.rollbacks
                    tracker.write(kind, step, values)
                    self.reached[name, kind] = place
            # A service that does not answer must not stop a training.
            except Exception as error:
                self._failed(name, error)

    def close(self) -> None:
        """No row comes any more; waits until all are with the trackers."""
        for name, tracker in list(self.trackers.items()):
            try:
                tracker.close()
            except Exception as error:
                self._failed(name, error)

    def _failed(self, name: Name, error: Exception) -> None:
        self.trackers.pop(name, None)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("%s: %s is left out until the run goes on anew: %s", self.node, name, reason)


def _before(chain: Chain) -> list[Row]:
    """The rows before a start: of its newest checkpoint that can be read, or of another training whose count goes on."""
    done, parent = chain.done(), chain.parent
    records = [record for step, record in done.items() if step <= chain.start(done)]
    if not records and parent is not None and parent.chain and counts_on(parent.keep):  # type: ignore[arg-type]
        begun = chain.job.unit_done(parent.unit)
        records = [begun] if begun is not None else []
    for record in reversed(records):
        # One that is damaged is not gone on from.
        with suppress(StoreError, OSError, ValueError):
            return [json.loads(line) for line in chain.job.store.read(record.file("history.jsonl").path).decode().splitlines()]
    return []
