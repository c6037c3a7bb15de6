"""The units of a stage in this process, one after the other: for work beside other work."""

from __future__ import annotations

from stages.runner.contract import Job, Stage, UnitRecord
from stages.runner.keys import unit_keys
from stages.runner.worker import PoolWorker


def run_here(stage: type[Stage], job: Job) -> dict[str, list[UnitRecord]]:
    """The units of a stage in this process, one after the other, without a dataset in the end.

    Raises:
        StageError: a unit failed.
    """
    records: dict[str, list[UnitRecord]] = {}
    for phase in stage.phases:
        worker, units = PoolWorker(job, phase), list(phase.plan(job, records))
        key_of = unit_keys(stage, phase, job, 0)
        keys = [unit.shared or key_of(unit) for unit in units]
        done = job.units_done(keys)
        records[phase.name] = [done.get(key) or worker.run(unit, key) for unit, key in zip(units, keys, strict=True)]
    return records
