"""What a run begins from is fetched once on every machine, and removed there when it has been read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch.distributed as dist

from training.job import Source, TrainingError


def gathered(found: list) -> list[list]:
    """What every worker has found, in the order of the ranks."""
    everybody: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everybody, found)
    return everybody


def agreed(step: int) -> None:
    """Hold the step that this worker begins from against all others': each machine fetches for itself, and takes an older
    checkpoint in place of one that it finds damaged.

    Raises:
        TrainingError: they are not the same.
    """
    if len(steps := sorted({found for (found,) in gathered([step])})) > 1:
        told = " and ".join(map(str, steps))
        raise TrainingError(
            f"machines begin from the checkpoints of steps {told}, as one of them found the newer damaged; run again"
        )


class Fetching:
    """The folders of one run; all workers call the same methods in the same order.

    Args:
        work_folder: what lies below it was fetched and is removed; what lies elsewhere is somebody's own.
    """

    def __init__(self, work_folder: str) -> None:
        self.work_folder, self.folders = work_folder, list[str]()

    def __call__(self, source: Source) -> str | None:
        """The local folder of a source; a function is called by the first worker of every machine, the others wait for it."""
        if not callable(source):
            return source
        mine = [(self._node, source())] if self._first else []
        folder = dict(pair for pairs in gathered(mine) for pair in pairs)[self._node]
        if folder is not None and Path(folder).is_relative_to(self.work_folder):
            self.folders.append(folder)
        return folder

    @property
    def _first(self) -> bool:
        return int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0

    @property
    def _node(self) -> int:
        return int(os.environ.get("NODE_RANK", 0))

    def read(self) -> None:
        """All workers have read what was fetched: remove it."""
        if self.folders:
            dist.barrier()
        self.remove()

    def remove(self) -> None:
        """Remove what was fetched on this machine, whether others still want it or not."""
        for folder in self.folders if self._first else ():
            shutil.rmtree(folder, ignore_errors=True)
        self.folders = []
