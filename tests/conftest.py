"""One real local Ray for all tests that run units or workers from the test process; and what a test run says at its end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from benchmarks.counted import Counted


# In the background of a shell Ctrl-C is ignored, also by all that is started there; tests send it to commands.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line of a run, behind pytest's own, says that the browser tests did not run, and what they need."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if count := sum("no Chromium" in str(report.longrepr) for report in skipped):
        reporter.write_line(f"{count} browser tests were skipped, for want of a browser: `apt-get install chromium` brings it")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with 2 CPUs."""
    import ray

    from infra.ray_cluster import start_ray_here

    environment = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    start_ray_here(num_cpus=2, log_to_driver=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def s3() -> Iterator[Counted]:
    """An S3 server in this process, and what was asked of it."""
    from benchmarks.counted import counted_s3

    with counted_s3() as counted:
        yield counted


@pytest.fixture(scope="module")
def bucket(s3: Counted) -> str:
    """The address of a store on the S3 server."""
    return "s3://data/store"


@pytest.fixture(autouse=True)
def same_linear_layers() -> Iterator[None]:
    """DeepSpeed's ZeRO 3 replaces torch's linear function for as long as the process lives, and its own rounds otherwise: what is
    the same to the last bit would depend on the tests before."""
    functional = sys.modules.get("torch.nn.functional")
    before = getattr(functional, "linear", None)
    yield
    if functional is not None:
        functional.linear = before


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A gloo group of one, so that the training loop can run in the tests' own process."""
    import torch
    import torch.distributed as dist

    before = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR")}
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
