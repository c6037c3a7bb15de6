"""GPU slots: a node that uses GPUs waits for its share of the server's limit `gpu`, as a lease that a dead holder loses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prefect.client.orchestration import get_client
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from pipelines.flows.jobs import NodeStopped
from stages.runner.graph import Planned

LIMIT = "gpu"
# How long the slots of a holder that died stay taken, and how often a waiting node looks whether its run is to stop, in seconds.
LEASE = 60.0
GLANCE = 20.0
GPU_STAGES = frozenset({"filter", "text-codec", "encode", "world", "train", "evaluate"})


@contextmanager
def gpu_slots(planned: Planned, stopping: threading.Event, waiting: Callable[[int], None]) -> Iterator[None]:
    """Hold the slots that a node takes, if the server has such a limit; `waiting` is told how many when they are not free.

    Raises:
        NodeStopped: the run was stopped while the node waited.
    """
    told = False
    # Somebody may change the limit while the node waits.
    while (limit := _limit(planned)) is not None:
        slots = _slots(planned, limit.limit)
        if slots > limit.limit - limit.active_slots and not told:
            waiting(slots)
            told = True
        if stopping.is_set():
            raise NodeStopped
        if not limit.limit:
            # Nobody may have any for now; the server refuses to be asked for more than there can be.
            stopping.wait(GLANCE)
            continue
        # A lease that cannot be renewed, because the server is starting again, is no reason to stop a training run.
        held = concurrency(
            LIMIT, slots, timeout_seconds=GLANCE, lease_duration=LEASE, strict=True, raise_on_lease_renewal_failure=False
        )
        try:
            held.__enter__()
        except TimeoutError:
            continue
        try:
            yield
        finally:
            held.__exit__(None, None, None)
        return
    yield


def _limit(planned: Planned) -> GlobalConcurrencyLimitResponse | None:
    """The server's limit, if it has one and the node uses GPUs."""
    if planned.stage not in GPU_STAGES:
        return None
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            return None
    return limit if limit.active else None


def _slots(planned: Planned, limit: int) -> int:
    """A slot a worker, or all of them if the node takes what the cluster has."""
    workers = getattr(planned.config, "most_workers", getattr(planned.config, "workers", 1))
    return max(1, limit if workers is None else min(limit, workers))
