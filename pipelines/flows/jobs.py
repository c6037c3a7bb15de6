"""A node as a Ray job: submit or re-attach, follow its log and progress, stop it when the run is to stop."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from infra.code import code_digest, is_sent, package
from infra.commit import VARIABLE as COMMIT
from infra.commit import git_commit
from infra.processes import NoAnswer, ServerError
from infra.queries import QUERIES
from infra.ray_cluster import PATIENT
from infra.ray_jobs import TERMINAL, RayJobs
from infra.ray_log import AWAY
from pipelines.flows import job_logs
from pipelines.flows.job_logs import PROGRESS, plain
from pipelines.flows.run import Run, pinned, snapshot
from stages.runner.graph import Planned

Say = Callable[[int, str], None]
Report = Callable[[dict[str, Any]], None]

# What the job writes: "INFO text", and Ray's own "2026-01-01 00:00:00,000<tab>INFO file.py:1 -- text"; workers' lines come with
# "(PoolWorker pid=1) " in front.
_LEVEL = re.compile(
    r"^(?:\([^)]*pid=[^)]*\)\s*)?(?:\d{4}-\d\d-\d\d [\d:,.]+\s+)?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b:?\s*(.*)$", re.S
)
# How often a node gets another job in the place of one that the cluster has lost.
LOSSES = 2
# How long a stopped job may take to write its checkpoint before the run no longer waits for it.
STOP_SECONDS = 45.0
# What a job's metadata on Ray says: the flow run that has submitted it.
FLOW_RUN = "flow_run"
SUBMITTED = "submitted the Ray job {}"
ATTACHED = "re-attached to the job {}, which is still running"


class NodeFailed(Exception):
    """A node's job failed; the message is the one line that the job ended with."""


class NodeStopped(Exception):
    """The run was stopped while the node was at work or waiting for its turn."""


def job_environment() -> dict[str, str]:
    """What a job needs besides the cluster's own environment."""
    fixed = {"PYTHONUNBUFFERED": "1", "NO_ALBUMENTATIONS_UPDATE": "1", **PATIENT}
    # Code that is sent has no history.
    if is_sent() and (commit := git_commit()):
        fixed[COMMIT] = commit
    return fixed | {name: value for name, value in os.environ.items() if name == QUERIES}


def make_as_job(run: Run, planned: Planned, say: Say, report: Report, attached: Callable[[str], None]) -> float:
    """Make one node's dataset by a Ray job; returns its seconds.

    `attached` is told the id of a job that was running already, before its log is passed on from its start.

    Raises:
        NodeFailed: the job failed, or Ray cannot be reached.
        NodeStopped: the run was stopped; so is the job.
    """
    run.view.started(planned.name)
    start = time.perf_counter()
    try:
        ray = run.servers.ray()
        losses = 0
        while True:
            job = run.job_ids[planned.name] = submit_or_attach(ray, run, planned, say, attached)
            why = _why_not_made(ray, run, job, say, report, last=losses == LOSSES)
            if why is None:
                return time.perf_counter() - start
            losses += 1
            say(logging.WARNING, f"{why}; another goes on from what is done")
            _wait_for_head(ray, run)
    except ServerError as error:
        raise NodeFailed(str(error)) from error


def _why_not_made(ray: RayJobs, run: Run, job: str, say: Say, report: Report, last: bool) -> str | None:
    """Follow a job to its end. None when it has done its work, and why it has not when Ray has lost it, unless it is the `last`.

    Raises:
        NodeFailed: it failed.
        NodeStopped: the run was stopped, and so is the job.
    """
    try:
        try:
            last_error, last_line = _follow(ray, job, run.stopping, say, report)
            if run.stopping.is_set():
                stop_job(ray, job)
                raise NodeStopped(job)
        finally:
            # A log that cannot be kept fails no node.
            with suppress(ServerError, OSError):
                job_logs.keep(ray, run.store, run.recipe.name, job)
        if ray.status(job) == "SUCCEEDED":
            return None
    except NoAnswer:
        raise
    except ServerError as error:
        if last or not ray.lost(job):
            raise
        return f"the cluster has lost the job {job} ({error})"
    if last_error or last or not ray.lost(job):
        raise NodeFailed(last_error or _explain(ray, job, last_line))
    return f"the cluster has lost the job {job} ({ray.explanation(job)})"


def _wait_for_head(ray: RayJobs, run: Run) -> None:
    until = time.monotonic() + AWAY
    while not ray.ready() and time.monotonic() < until and not run.stopping.wait(1.0):
        pass


@contextmanager
def own_turn(run: Run) -> Iterator[None]:
    """Hold one of the run's job slots; waits for it no longer than the run goes on.

    Raises:
        NodeStopped: the run was stopped while the node waited.
    """
    while not run.turn.acquire(timeout=0.2):
        if run.stopping.is_set():
            raise NodeStopped
    try:
        if run.stopping.is_set():
            raise NodeStopped
        yield
    finally:
        run.turn.release()


def submit_or_attach(ray: RayJobs, run: Run, planned: Planned, say: Say, attached: Callable[[str], None]) -> str:
    """The id of the node's job: one that is running already, else a new attempt.

    Of two commands that submit the same attempt at once, the slower one attaches to the other's job.
    """
    prefix = f"{planned.name}-{planned.fingerprint}-"
    attempts = {int(job.removeprefix(prefix)): status for job, status in ray.statuses().items() if job.startswith(prefix)}
    last = max(attempts, default=0)
    if last and attempts[last] not in TERMINAL and not ray.lost(f"{prefix}{last}"):
        return _attach(f"{prefix}{last}", say, attached)
    job = f"{prefix}{last + 1}"
    # A cluster has a Python of its own, this machine's Ray takes the one that runs here.
    python = sys.executable if run.servers.embedded_ray else "python"
    command = [python, "-m", "stages", snapshot(run.recipe, run.store), planned.name, "--store", run.store.root]
    command += ["--outside", pinned(run), "--expect", planned.fingerprint, "--code", code_digest()]
    command += ["--debug"] if run.debug else []
    folder = ray.upload(*package()) if is_sent() and not run.servers.embedded_ray else None
    try:
        ray.submit(job, shlex.join(command), job_environment(), {FLOW_RUN: run.flow_run} if run.flow_run else None, folder)
    except ServerError:
        # It is there all the same when another command was quicker, or when only the answer was lost.
        if job not in ray.statuses():
            raise
        return _attach(job, say, attached)
    say(logging.INFO, SUBMITTED.format(job))
    return job


def _attach(job: str, say: Say, attached: Callable[[str], None]) -> str:
    say(logging.INFO, ATTACHED.format(job))
    attached(job)
    return job


def stop_job(ray: RayJobs, job: str) -> None:
    """Stop a job and wait until it has ended, so that its last checkpoint is whole."""
    ray.stop(job)
    deadline = time.monotonic() + STOP_SECONDS
    while ray.status(job) not in TERMINAL and time.monotonic() < deadline:
        time.sleep(0.2)


def stop_orphans(
    ray: RayJobs, planned: Mapping[str, Planned], before: float, say: Say, goes_on: Callable[[str], bool] = lambda flow_run: False
) -> None:
    """Stop jobs that a killed command left running and that this run will not re-attach to; `before` is when this one began.

    `goes_on` says of another flow run whether it will come back to its job; one of a command that was killed will not.
    """
    wanted = {f"{p.name}-{p.fingerprint}" for p in planned.values()}
    for job, metadata in ray.running(before).items():
        owner = metadata.get(FLOW_RUN)
        if job.rsplit("-", 1)[0] not in wanted and not (owner and goes_on(owner)):
            say(logging.WARNING, f"stopped the job {job}, which an earlier command left running")
            stop_job(ray, job)


def tidy(ray: RayJobs, run: Run, say: Say, goes_on: Callable[[str], bool] = lambda flow_run: False) -> None:
    """What an earlier command left running: stopped on a Ray of our own, see `stop_orphans`, and named on a cluster."""
    if run.servers.embedded_ray:
        stop_orphans(ray, run.planned, run.servers.since, say, goes_on)
    else:
        name_orphans(ray, run, say)


def name_orphans(ray: RayJobs, run: Run, say: Say) -> None:
    """Name the jobs on a cluster of the user's own that work at this recipe in this store, and at nothing that this run is about:
    a command that was killed left them running, and the recipe was changed since. They may be somebody's, so they go on.

    Raises:
        ServerError: Ray does not answer.
    """
    wanted = {f"{p.name}-{p.fingerprint}" for p in run.planned.values()}
    for job, command in ray.commands().items():
        if job_logs.is_of_recipe(command, run.recipe.name, run.store) and job.rsplit("-", 1)[0] not in wanted:
            stop = f"ray job stop --address {ray.address} {job}"
            say(logging.WARNING, f"the job {job} of an earlier run of this recipe is still at work; if nobody follows it: {stop}")


def stop_jobs_of(ray: RayJobs, flow_run: str) -> list[str]:
    """Stop whatever jobs a flow run has submitted that are still running; returns their ids."""
    jobs = [job for job, metadata in ray.running().items() if metadata.get(FLOW_RUN) == flow_run]
    for job in jobs:
        stop_job(ray, job)
    return jobs


def _follow(ray: RayJobs, job: str, stopping: threading.Event, say: Say, report: Report) -> tuple[str, str]:
    """Pass the job's lines on until it ends or the run is to stop; returns its last error line and last line of all."""
    error = last = ""
    for line in ray.follow(job):
        if stopping.is_set():
            break
        if isinstance(line, ServerError):
            say(logging.WARNING, str(line))
            continue
        if line is None or not (line := plain(line)):
            continue
        if line.startswith(PROGRESS):
            # A line cut by a dying process is no JSON; the next one is.
            with suppress(ValueError):
                report(json.loads(line.removeprefix(PROGRESS)))
            continue
        level, text = parse_line(line)
        if line.startswith("error: "):
            error = text
        last = text
        say(level, text)
    return error, last


def parse_line(line: str) -> tuple[int, str]:
    """The level and text of a line of a job's log; a line that names no level counts as information.

    Example:
        >>> parse_line("WARNING filter: 3 units again")
        (30, 'filter: 3 units again')
    """
    if line.startswith("error: "):
        return logging.ERROR, line.removeprefix("error: ")
    match = _LEVEL.match(line)
    if match is None:
        return logging.INFO, line
    return logging.getLevelNamesMapping()[match[1]], match[2]


def _explain(ray: RayJobs, job: str, last: str) -> str:
    """Without an error line of its own (killed, out of memory) the job's last words and Ray's verdict must do."""
    verdict = ray.explanation(job).strip().splitlines()
    return f"the job {job} died: {last or (verdict[0] if verdict else 'it said nothing')}"
