"""The memory that one worker takes at its greatest, in a process of its own: `python -m tests.training.peak JOB`, a pickled job.

Prints, in bytes, the most that was resident until its last row, less what the imports and a training of a tiny model have left: a
checkpoint comes after that row. Every tensor has pages of its own, which the system has again when it is freed. A trainer keeps
freed memory instead, in pieces whose number depends on chance.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tests.training.gang import ROOT
from tests.training.synthetic import config
from training.job import TrainJob


def peak_of(job: TrainJob, folder: Path) -> int:
    """Bytes that a job takes, with one thread."""
    (folder / "job").write_bytes(pickle.dumps(job))
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.training.peak", str(folder / "job")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    return int(done.stdout.splitlines()[-1])


def _most_resident() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    import torch
    import torch.distributed as dist

    import training.engine
    from training.loop import run

    training.engine.keep_freed_memory = lambda: None
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    job = pickle.loads(Path(sys.argv[1]).read_bytes())
    tiny = config(steps=2, validation={"fraction": 0.0}, zero_stage=job.config.zero_stage)
    run(replace(job, config=tiny, work_folder=f"{job.work_folder}/tiny"), torch.device("cpu"))
    # What is most from here on begins with what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before, found = _most_resident(), [0]
    run(job, torch.device("cpu"), on_row=lambda row: found.append(_most_resident()))
    print(found[-1] - before)


if __name__ == "__main__":
    main()
