"""The one runner of all stages: reuse, resume, Ray scheduling, retries, checking, commit and row counts.

    fingerprint known -> manifest there? hit.
    else, phase by phase: plan units -> those with a record are done -> run the rest -> their records
    then: add up the rows, write the manifest.

A kill at any moment leaves units that are done (their record is written last) and scratch files that no reader accepts.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from infra.commit import git_commit
from infra.cycles import seldom_collected
from infra.dataset import Dataset, InputRef, Manifest, Stats, all_datasets, commit, find
from infra.room import DISK_RESERVE
from infra.sources import Sources
from infra.store import Store
from stages.runner.chain import Chain, Gang
from stages.runner.contract import (
    RECORD,
    Job,
    Phase,
    Records,
    Stage,
    StageError,
    Unit,
    UnitRecord,
    result_fields,
)
from stages.runner.graph import Planned
from stages.runner.keys import unit_keys
from stages.runner.ledger import chain_of, entered, where_it_begins
from stages.runner.packs import Packs
from stages.runner.skipping import REASON, skipped_rows, without_skipped

log = logging.getLogger("stages")

# Seconds between two lines of progress.
SAY_EVERY = 0.5


@seldom_collected()
def run_stage(planned: Planned, store: Store, stage: type[Stage]) -> Dataset:
    """Make the dataset of a planned node, or return it when it is committed already. Ray must be initialised on a miss.

    Raises:
        StageError: an input is missing, the disk is too small, a unit failed, or no row is left.
    """
    if (found := find(store, planned.stage, planned.fingerprint)) is not None:
        return found
    whole = _whole_job(planned, store, missing_ok=False)
    job, skipped = without_skipped(whole), skipped_rows(stage, whole)
    check_disk(stage, job)
    if store.local:
        # Workers look for it, since a folder that they do not see is one of another machine.
        Path(store.root).mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    records: dict[str, list[UnitRecord]] = {}
    for phase in stage.phases:
        records[phase.name] = run_phase(stage, phase, job, planned, records)
    stats = add_up(stage, records)
    stats.rows_in += skipped
    stats.drop(REASON, skipped)
    last = records[stage.phases[-1].name]
    if not stats.rows_out and not stage.may_be_empty:
        advice = "loosen the conditions"
        if stage.can_heal:
            _forget(last, job)
            advice = "run again, which tries all of them again, when what stood in the way is mended"
        raise StageError(f"{planned.name}: no row is left of {stats.rows_in}: {describe_drops(stats)}; {advice}")
    return commit(
        store,
        Manifest(
            stage=planned.stage,
            node=planned.name,
            fingerprint=planned.fingerprint,
            generation=planned.generation,
            inputs={name: InputRef(stage=d.manifest.stage, fingerprint=d.manifest.fingerprint) for name, d in job.inputs.items()},
            config=result_fields(planned.config),
            sources=Sources.of(planned.all_sources, planned.weights),
            code=code_identity(stage),
            columns=stage.schema(job, last),
            stats=stats,
            summary=stage.summary(job, records),
            seconds=round(time.perf_counter() - start, 3),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            files=[entry for record in last for entry in record.files],
        ),
        stage.file_columns(job, last),
    )


def _forget(records: list[UnitRecord], job: Job) -> None:
    """Undo units, so that the next run does them again; not those of committed datasets, whose files must stay as they are."""
    held = {entry.unit for dataset in all_datasets(job.store) for entry in dataset.files}
    for record in records:
        if record.key not in held:
            job.store.discard(job.record_path(record.key))


def make_job(planned: Planned, store: Store, missing_ok: bool = False) -> Job:
    """The job with its input datasets, less what it skips; with `missing_ok`, with those that are there.

    Raises:
        StageError: an input is not committed yet.
    """
    return without_skipped(_whole_job(planned, store, missing_ok))


def _whole_job(planned: Planned, store: Store, missing_ok: bool) -> Job:
    inputs = {}
    for name, reference in planned.inputs.items():
        dataset = find(store, reference.stage, reference.fingerprint)
        if dataset is None and missing_ok:
            continue
        if dataset is None:
            # A parent belongs to no node of its own: without it only a fresh start is left.
            way = f"--from {planned.input_nodes[name]}" if name in planned.input_nodes else f"--force {planned.name}"
            raise StageError(
                f"{planned.name}: its input {reference.stage}/{reference.fingerprint} is not in {store.root}; run with {way}"
            )
        inputs[name] = dataset
    return Job(
        store=store, stage=planned.stage, node=planned.name, config=planned.config, inputs=inputs,
        sources=planned.sources, weights=planned.weights, lists=planned.lists, recipe=planned.recipe,
    )  # fmt: skip


def keyed_units(stage: type[Stage], phase: Phase, job: Job, planned: Planned, earlier: Records) -> tuple[list[Unit], list[str]]:
    """The units of a phase in the order of the plan, and their keys."""
    units = list(phase.plan(job, earlier))
    key_of = unit_keys(stage, phase, job, planned.generation)
    return units, [unit.shared or key_of(unit) for unit in units]


@dataclass(frozen=True)
class PhaseState:
    """How far a phase of a node is: how many units or steps it has, how many are done, and the keys of the units that a run of
    the node would reuse."""

    name: str
    total: int
    done: int
    keys: frozenset[str]
    counted: str = "units"


def phase_states(planned: Planned, store: Store, stage: type[Stage]) -> Iterator[PhaseState]:
    """What is finished of a node, phase by phase, up to the first that is not; nothing when an input is not committed yet."""
    try:
        job = make_job(planned, store)
    except StageError:
        return
    records: dict[str, list[UnitRecord]] = {}
    for phase in stage.phases:
        if phase.gang is not None:
            state, records[phase.name] = _chain_state(stage, phase, phase.gang, job, planned)
        else:
            _, keys = keyed_units(stage, phase, job, planned, records)
            found = job.units_done(keys)
            state = PhaseState(phase.name, len(keys), len(found), frozenset(found))
            records[phase.name] = [found[key] for key in keys if key in found]
        yield state
        if state.done < state.total:
            return


def _chain_state(stage: type[Stage], phase: Phase, gang: Gang, job: Job, planned: Planned) -> tuple[PhaseState, list[UnitRecord]]:
    try:
        chain = chain_of(stage, phase, gang, job, planned)
    except StageError:
        # A run is refused, and says why.
        return PhaseState(phase.name, gang.end(job.config, None), 0, frozenset(), "steps"), []
    there = chain.done()
    start = chain.start(there)
    # A chain that is asked for fewer steps than it has may be asked for more again.
    stay = {start, max(there, default=start), *gang.keeps(job.config, there)}
    keys = {record.key for step, record in there.items() if step in stay}
    if not there and chain.parent is not None:
        keys.add(chain.parent.unit)
    records = [there[start]] if start in there else []
    return PhaseState(phase.name, chain.end, start, frozenset(keys), "steps"), records


def run_phase(stage: type[Stage], phase: Phase, job: Job, planned: Planned, earlier: Records) -> list[UnitRecord]:
    """Do what is not done of one phase; returns the records in the order of the plan."""
    if phase.gang is not None:
        return [_run_chain(phase, phase.gang, entered(stage, phase, phase.gang, job, planned), planned)]
    units, keys = keyed_units(stage, phase, job, planned, earlier)
    if not units:
        return []
    packs = Packs(job.store, job.stage)
    found = job.units_done(keys, packs)
    progress = Progress(job.node, phase.name, len(units), len(found))
    try:
        if len(found) < len(units):
            _run_pool(phase, job, units, keys, found, progress, packs)
    finally:
        # They only spare a later plan some requests.
        with suppress(OSError):
            packs.flush()
    if missing := [unit.name for unit, key in zip(units, keys, strict=True) if key not in found]:
        raise StageError(f"{job.node}: {phase.name} ended without {missing[0]} ({len(missing)} units missing)")
    return [found[key] for key in keys]


def _run_chain(phase: Phase, gang: Gang, chain: Chain, planned: Planned) -> UnitRecord:
    """The chain's unit at its end, which stands for all before it: they may have given way to it."""
    node, there = chain.job.node, chain.done()
    log.info("%s: %s", node, where_it_begins(chain, planned))
    emit_progress(node, phase.name, chain.start(there), chain.end, "steps")
    if chain.end not in there:
        gang.run(chain)
    record = chain.record(chain.end)
    if record is None:
        raise StageError(f"{node}: {phase.name} ended without step {chain.end}")
    return record


def _run_pool(
    phase: Phase, job: Job, units: list[Unit], keys: list[str], found: dict[str, UnitRecord], progress: Progress, packs: Packs
) -> None:
    # Imported here, not above: a hit must not pay for importing Ray.
    from stages.runner.pool import run_pool

    def pending() -> Iterator[tuple[Unit, str]]:
        return ((unit, key) for unit, key in zip(units, keys, strict=True) if key not in fixed)

    def done(unit: Unit, record: UnitRecord) -> None:
        found[record.key] = record
        if job.many(len(units)):
            packs.add(job.record_path(record.key), RECORD.dump_json(record))
        progress.advance(unit.rows)

    fixed = frozenset(found)
    run_pool(job, phase, pending(), len(units) - len(fixed), done)


class Progress:
    """Says how far a phase is, as lines that a program can read back: ``@progress {...}``."""

    def __init__(self, node: str, phase: str, total: int, done: int):
        self.node, self.phase, self.total, self.done, self.rows = node, phase, total, done, 0
        self.start = self.said = time.monotonic()
        self.before = done
        if done:
            log.info("%s: %s: %d of %d units were done already", node, phase, done, total)
        self.say()

    def advance(self, rows: int) -> None:
        self.done += 1
        self.rows += rows
        # A line a unit would be tens of megabytes of log.
        if self.done == self.total or time.monotonic() - self.said >= SAY_EVERY:
            self.say()

    def say(self) -> None:
        self.said = time.monotonic()
        seconds = max(time.monotonic() - self.start, 1e-3)
        left = time_left(self.total - self.done, (self.done - self.before) / seconds)
        more = {"rows": self.rows, "rows_per_s": round(self.rows / seconds, 1), **left}
        emit_progress(self.node, self.phase, self.done, self.total, "units", more)


def time_left(steps: int, per_s: float) -> dict[str, str]:
    """``{"left": "1:02:30"}``, the time that so many steps take as a field of progress; empty when that is unknown or over."""
    if steps <= 0 or per_s <= 0:
        return {}
    minutes, seconds = divmod(round(steps / per_s), 60)
    hours, minutes = divmod(minutes, 60)
    return {"left": f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"}


def emit_progress(node: str, phase: str, done: int, total: int, unit: str, more: dict[str, Any] | None = None) -> None:
    """Print one progress line; `more` holds rates, losses and the like, whose words have neither spaces nor commas."""
    fields = {"node": node, "phase": phase, "done": done, "total": total, "unit": unit, **(more or {})}
    print(f"@progress {json.dumps(fields)}", flush=True)


def add_up(stage: type[Stage], records: Records) -> Stats:
    """Rows in of the first phase, rows out of the last, drops of all."""
    stats = Stats(
        rows_in=sum(r.stats.rows_in for r in records[stage.phases[0].name]),
        rows_out=sum(r.stats.rows_out for r in records[stage.phases[-1].name]),
    )
    for phase in stage.phases:
        for record in records[phase.name]:
            for reason, rows in record.stats.dropped.items():
                stats.drop(reason, rows)
    return stats


def describe_drops(stats: Stats) -> str:
    """``412 too_small, 3 undecodable``, the largest first."""
    largest = sorted(stats.dropped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{rows} {reason}" for reason, rows in largest) or "nothing dropped"


def code_identity(stage: type[Stage]) -> dict[str, Any]:
    """Stage version, package version, git commit (with ``+`` when files differ from it) and Python version."""
    return {
        "stage_version": stage.version,
        "package": package_version("unidiffuser"),
        "git": git_commit(),
        "python": platform.python_version(),
    }


def check_disk(stage: type[Stage], job: Job) -> None:
    """Whether the store has room for what a node will take, as well as can be told.

    Raises:
        StageError: it has not.
        KeyError: the job lacks an input without which that cannot be told.
    """
    free = job.store.free_bytes()
    needed = stage.bytes_needed(job) + DISK_RESERVE
    if free is not None and free < needed:
        raise StageError(
            f"{job.node}: needs about {needed / 2**30:.1f} GiB, {job.store.root} has {free / 2**30:.1f} GiB free; "
            "free some space or point --store elsewhere"
        )
