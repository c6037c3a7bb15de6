"""Runs the toy stage and kills with SIGKILL whoever is about to make the n-th file appear.

``killed.py ray STORE N`` runs it once on a real Ray; a worker that is killed takes the driver with it, as when a machine
loses power. ``killed.py every FOLDER`` does it for every n there is, each in a process of its own without Ray's start-up.
"""

import fcntl
import os
import signal
import sys
from pathlib import Path

from infra.ray_cluster import start_ray_here
from infra.store import Store
from stages.runner import pool
from stages.runner.contract import scratch_output
from stages.runner.run import run_stage
from tests.stages.toy import Squares, planned


def kill_at(root: str, number: int, driver: int):
    """Count what every process writes in one file; kill at the n-th, just before it gets its name."""
    rename = Store._rename

    def counting(part, target, once=False):
        Path(root).mkdir(parents=True, exist_ok=True)
        with open(Path(root, "writes"), "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            count = int(file.read() or 0) + 1
            file.truncate(0)
            file.write(str(count))
            file.flush()
            if count == number:
                os.kill(driver, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
        return rename(part, target, once)

    Store._rename = staticmethod(counting)


def in_process(job, phase, pending, units, done):
    worker = phase.worker(job)
    for unit, key in pending:
        with scratch_output(job.store) as out:
            worker.run(unit, out)
            done(unit, out.publish(job, key, unit.name, 0.0))


def forked(root: str, number: int) -> int:
    """The stage in a child process, killed at a write (0: not at all); returns how the child ended."""
    child = os.fork()
    if child == 0:
        kill_at(root, number, os.getpid())
        run_stage(planned(Squares), Store(root), Squares)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def every(folder: str) -> None:
    pool.run_pool = in_process
    assert forked(f"{folder}/whole", 0) == 0
    for number in range(1, int(Path(folder, "whole", "writes").read_text()) + 1):
        assert forked(f"{folder}/{number}", number) == -signal.SIGKILL
        assert forked(f"{folder}/{number}", 0) == 0


def on_ray(root: str, number: int) -> None:
    driver = os.getpid()
    hook = {"worker_process_setup_hook": lambda: kill_at(root, number, driver)}
    start_ray_here(num_cpus=2, log_to_driver=False, runtime_env=hook)
    kill_at(root, number, driver)
    run_stage(planned(Squares), Store(root), Squares)


if __name__ == "__main__":
    if sys.argv[1] == "every":
        every(sys.argv[2])
    else:
        on_ray(sys.argv[2], int(sys.argv[3]))
