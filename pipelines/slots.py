"""GPU slots: a node that uses GPUs waits for its share of the server's limit `gpu`, as a lease that a dead holder loses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from pipelines.jobs import NodeStopped
from stages.graph import Planned

LIMIT = "gpu"
# How long the slots of a holder that died stay taken, and how often a waiting node looks whether its run is to stop, in seconds.
LEASE = 60.0
GLANCE = 20.0
GPU_STAGES = frozenset({"filter", "text-codec", "encode", "train", "evaluate"})


@contextmanager
def gpu_slots(planned: Planned, stopping: threading.Event, waiting: Callable[[int], None]) -> Iterator[None]:
    """Hold the slots that a node takes, if the server has such a limit; `waiting` is told how many when they are not free.

    Raises:
        NodeStopped: the run was stopped while the node waited.
    """
    slots, free = _slots(planned)
    if not slots:
        yield
        return
    if slots > free:
        waiting(slots)
    while True:
        # A lease that cannot be renewed, because the server is starting again, is no reason to stop a training run.
        held = concurrency(
            LIMIT, slots, timeout_seconds=GLANCE, lease_duration=LEASE, strict=True, raise_on_lease_renewal_failure=False
        )
        try:
            held.__enter__()
        except TimeoutError:
            if stopping.is_set():
                raise NodeStopped from None
            continue
        break
    try:
        yield
    finally:
        held.__exit__(None, None, None)


def _slots(planned: Planned) -> tuple[int, int]:
    """How many slots a node takes, and how many are free: a slot a worker, or all of them if it takes what the cluster has."""
    if planned.stage not in GPU_STAGES:
        return 0, 0
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            return 0, 0
    workers = getattr(planned.config, "workers", 1)
    return min(limit.limit, limit.limit if workers is None else workers), limit.limit - limit.active_slots
