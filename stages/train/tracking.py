"""The rows of a training in the trackers that the recipe names, each row once, whatever became of the run before.

The history of the checkpoint that a run goes on from tells what a tracker may have missed, and each tracker how far it is. A
tracker that fails is left alone with a warning, and gets what it missed when the run goes on.
"""

from __future__ import annotations

import json
import logging

from stages.runner.chain import Chain
from stages.runner.contract import UnitRecord, result_fields
from stages.train.trackers import TRACKERS, Name, Place, Tracker
from training.begin import counts_on
from training.history import Row

log = logging.getLogger("stages")

FOLDER = ".state/tracking"
# What of a row is no figure.
PLACE = ("kind", "step")


class Tracking:
    """The trackers of one training run.

    Args:
        chain: the run.
        begun: the record of the checkpoint that it goes on from, if there is one.
    """

    def __init__(self, chain: Chain, begun: UnitRecord | None) -> None:
        job = chain.job
        self.node, self.trackers = job.node, dict[Name, Tracker]()
        self.reached: dict[tuple[Name, str], int] = {}
        place = Place(job.store, FOLDER, job.recipe or job.stage, job.node, chain.key, result_fields(job.config))
        for name in job.config.track:
            try:
                self.trackers[name] = TRACKERS[name](place)
            except Exception as error:
                self._failed(name, error)
        for row in _before(chain, begun) if self.trackers else []:
            self.add(row)

    def add(self, row: Row) -> None:
        """A row, later than all before, or one that the trackers may hold already; one of words is left out."""
        kind, step = row["kind"], row["step"]
        if "said" in row:
            return
        values = {name: float(value) for name, value in row.items() if name not in PLACE}
        for name, tracker in list(self.trackers.items()):
            try:
                if (name, kind) not in self.reached:
                    self.reached[name, kind] = tracker.reached(kind)
                if step > self.reached[name, kind]:
                    tracker.write(kind, step, values)
                    self.reached[name, kind] = step
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


def _before(chain: Chain, begun: UnitRecord | None) -> list[Row]:
    """The rows before the run: of its own checkpoint, or of that of another training whose count goes on."""
    parent = chain.parent
    if begun is None and parent is not None and parent.chain and counts_on(parent.keep):  # type: ignore[arg-type]
        begun = chain.job.unit_done(parent.unit)
    if begun is None:
        return []
    return [json.loads(line) for line in chain.job.store.read(begun.file("history.jsonl").path).decode().splitlines()]
