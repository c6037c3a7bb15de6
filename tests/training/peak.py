"""The memory that one worker takes at its greatest, in a process of its own: `python -m tests.training.peak JOB`, a pickled job.

Prints what the rows of its history say of memory at most, less what the imports and a training of a tiny model have left, in
bytes. glibc gives nothing back while training, so that is its greatest until then: a checkpoint comes after the last row.
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
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "tests.training.peak", str(folder / "job")]
    said = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return int(said.splitlines()[-1])


def main() -> None:
    import torch
    import torch.distributed as dist

    from training.loop import run
    from training.speed import memory_gib

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    job = pickle.loads(Path(sys.argv[1]).read_bytes())
    tiny = config(steps=2, validation={"fraction": 0.0}, zero_stage=job.config.zero_stage)
    run(replace(job, config=tiny, work_folder=f"{job.work_folder}/tiny"), torch.device("cpu"))
    before, found = memory_gib(torch.device("cpu")), [0.0]
    run(job, torch.device("cpu"), on_row=lambda row: found.append(row["memory"]))
    print(round((max(found) - before) * 2**30))


if __name__ == "__main__":
    main()
