"""Digests of many bytes by the cluster that a person has named, in Ray tasks: they need not pass through the command.

``python -m infra.hashing STORE QUESTION`` is the job. QUESTION is a file of the store with the addresses; the digests lie beside
it when the job has ended, and both go when they were read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from uuid import uuid4

from infra.listing import OutsideError
from infra.queries import QUERIES, opened
from infra.ray_jobs import RayJobs, user_token
from infra.store import Store

log = logging.getLogger("infra")

FOLDER = ".state/contents"
ANSWER = ".digests"
LOOK_SECONDS = 1.0
# Seconds until a line says that a job is not done, and between two such lines.
QUIET, QUIET_AGAIN = 60.0, 600.0
# A file a task, until there are so many.
TASKS = 1000


def cluster() -> str | None:
    """The Jobs API of the cluster that the environment names; within a job Ray names its own head, which is none."""
    address = os.environ.get("RAY_ADDRESS", "")
    return address.rstrip("/") if address.startswith(("http://", "https://")) else None


def digests_by(address: str, names: Sequence[str], store: Store) -> list[str]:
    """sha256 of files, in their order, by a job on a cluster.

    Raises:
        OutsideError: the job ended without them.
        ServerError: Ray does not answer.
    """
    ray, job = RayJobs(address, user_token()), f"contents-{uuid4().hex[:12]}"
    ray.check()
    question = f"{FOLDER}/{job}"
    store.write_json(question, list(names))
    try:
        entrypoint = shlex.join(["python", "-m", "infra.hashing", store.root, question])
        ray.submit(job, entrypoint, {name: value for name, value in os.environ.items() if name == QUERIES})
        try:
            next_line = time.monotonic() + QUIET
            while not ray.ended(job):
                if time.monotonic() >= next_line:
                    log.warning(
                        "%s: job %s on %s is not done reading %d files, or waits for a CPU there; `ray job logs %s` says more",
                        names[0], job, address, len(names), job,
                    )  # fmt: skip
                    next_line += QUIET_AGAIN
                time.sleep(LOOK_SECONDS)
        except BaseException:
            ray.stop(job)
            raise
        if (found := store.read_json(question + ANSWER)) is None:
            raise OutsideError(names[0], f"the cluster could not read it, or one of those beside it: {ray.explanation(job)}")
        return list(found)
    finally:
        for path in (question, question + ANSWER):
            store.discard(path)


def sha256_of_each(names: Sequence[str]) -> list[str]:
    """Of the content of files by their names."""
    digests = []
    for name in names:
        with opened(name) as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests


def main(arguments: list[str]) -> None:
    import ray

    root, question = arguments
    if not ray.is_initialized():
        ray.init()
    store, task = Store(root), ray.remote(num_cpus=1, max_retries=3)(sha256_of_each)
    names = store.read_json(question)
    some = -(-len(names) // TASKS)
    parts = ray.get([task.remote(names[start : start + some]) for start in range(0, len(names), some)])
    store.write_json(question + ANSWER, [digest for part in parts for digest in part])


if __name__ == "__main__":
    main(sys.argv[1:])
