"""One real local Ray for all tests that run units or workers from the test process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with 2 CPUs."""
    import ray

    # Workers run at niceness 15 otherwise: on a busy machine a test would wait minutes for one to start.
    os.environ["RAY_worker_niceness"] = "0"
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()
