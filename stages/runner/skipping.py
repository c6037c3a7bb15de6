"""Shards that a recipe skips: those that cannot be worked on, when the rest is to go on without them.

They are taken out of a node's inputs, so that no phase sees them, and their rows are counted as dropped. The other units are
decided by their own shards, as ever, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field

from infra.dataset import Dataset
from infra.nearest import nearest
from stages.runner.contract import SKIP, Job, Stage, StageError, Unit

REASON = "skipped"


def skipped_shards() -> Any:
    """The config field that holds the names of a node's skipped shards; it is to be called `skip`."""
    return Field((), description="shards to leave out, by the names that errors give them; their rows count as dropped (skipped)")


def without_skipped(job: Job) -> Job:
    """The job without the shards that its configuration skips."""
    names = getattr(job.config, SKIP, ())
    return replace(job, inputs=_without(job.inputs, names)) if names else job


def skipped_rows(stage: type[Stage], whole: Job) -> int:
    """The rows of the shards that are skipped.

    Args:
        whole: the job with all its inputs.

    Raises:
        StageError: there is no such shard.
    """
    if not (names := getattr(whole.config, SKIP, ())):
        return 0
    rows = {unit.name: unit.rows for unit in stage.phases[0].plan(whole, {})}
    if unknown := [name for name in names if name not in rows]:
        raise StageError(f"{whole.node}: {SKIP}: no shard {unknown[0]} goes into it{nearest(unknown[0], rows)}")
    return sum(rows[name] for name in set(names))


def that_can_be_skipped(job: Job, units: Iterable[Unit]) -> list[str]:
    """The names of those units that the recipe may skip what they work on."""
    if SKIP not in type(job.config).model_fields:
        return []
    shards = {entry.stem for dataset in job.inputs.values() for entry in dataset.files}
    return [unit.name for unit in units if unit.name in shards]


def _without(inputs: Mapping[str, Dataset], names: Collection[str]) -> dict[str, Dataset]:
    return {name: Dataset(dataset.store, dataset.manifest, frozenset(names)) for name, dataset in inputs.items()}
