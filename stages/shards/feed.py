"""Pictures made ready ahead of the device that works on them, so that it does not wait for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Semaphore
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

# What a worker with a GPU takes where nobody says otherwise.
CPUS_OF_A_GPU = 8


def ahead(items: Iterable[T], work: Callable[[T], R], threads: int, room: int) -> Iterator[tuple[T, R]]:
    """(item, work(item)) in order, read and worked on by threads ahead of who takes them.

    Args:
        work: called by several threads at a time; it should leave the interpreter to others while it computes.
        room: items that are read and not yet taken, at most.

    Raises:
        Exception: what reading or working raised, when its turn comes.
    """
    free, coming = Semaphore(room), SimpleQueue[tuple[T, Future[R]] | Exception | None]()
    ended = False

    def read() -> None:
        try:
            for item in items:
                free.acquire()
                if ended:
                    return
                coming.put((item, pool.submit(work, item)))
            coming.put(None)
        except Exception as error:
            coming.put(error)

    pool = ThreadPoolExecutor(threads + 1, "feed")
    pool.submit(read)
    try:
        while (found := coming.get()) is not None:
            if isinstance(found, Exception):
                raise found
            item, made = found
            yield item, made.result()
            free.release()
    finally:
        ended = True
        free.release()
        pool.shutdown(cancel_futures=True)


def on_device(pictures: Sequence[np.ndarray], device: str) -> Tensor:
    """(H, W, 3) uint8 arrays as (B, 3, H, W) on a device; a GPU copies them from pinned memory while the CPU goes on."""
    import torch

    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return pixels.pin_memory().to(device, non_blocking=True) if device == "cuda" else pixels


def cpus_each(given: int | None, gpus: float, machines: str | None = None) -> float:
    """CPUs of a worker with so many GPUs: as given, else its share of those that go with GPUs, or one."""
    from infra.ray_nodes import may_come, total

    if given is not None or not gpus:
        return given or 1
    # Where none is there yet, those that may come.
    count = total if total("GPU", machines) else may_come
    return max(1, min(CPUS_OF_A_GPU, count("CPU", machines) * gpus // count("GPU", machines)))


def feeders() -> int:
    """Threads that make pictures ready in this process: one for each CPU that Ray gave it, or one."""
    import ray

    given = {}
    if ray.is_initialized() and (context := ray.get_runtime_context()).worker.mode == ray.WORKER_MODE:
        given = context.get_assigned_resources()
    return max(1, int(given.get("CPU", 1)))
