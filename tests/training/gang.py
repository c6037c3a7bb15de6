"""Runs training jobs one after the other in this process, which is one of a gang: `gang.py RANK WORLD RENDEZVOUS JOBS`."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from training.job import TrainJob

ROOT = Path(__file__).parents[2]


def run_gang(folder: Path, jobs: Sequence[TrainJob], workers: int = 2, timeout: float = 300) -> list[int]:
    """Run jobs with gloo on `workers` processes; gives their exit statuses, and stops what hangs on a dead one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs").write_bytes(pickle.dumps(list(jobs)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.gang", str(rank), str(workers), str(folder)],
            env={**environment, "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(workers)},
            cwd=ROOT,
        )
        for rank in range(workers)
    ]
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    import torch
    import torch.distributed as dist

    from training.loop import run

    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    for job in pickle.loads((folder / "jobs").read_bytes()):
        run(job, torch.device("cpu"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
