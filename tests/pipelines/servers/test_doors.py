"""What a run on the embedded servers leaves open: no listener for other machines, no folder, no secret in what it writes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil
import pytest

from infra.processes import ServerError, family, recorded
from infra.ray_jobs import RayJobs
from tests.infra.listening import beyond_loopback
from tests.pipelines.conftest import PLANTED, Kept, ask


def test_nothing_listens_for_other_machines(kept: Kept) -> None:
    servers = [recorded(name, kept.store / ".state") for name in ("prefect", "ray")]
    # Ray's agents write their names over their environment, by which survivors are found.
    processes = [process for server in servers if server is not None for process in family(server)]
    others, count = beyond_loopback([psutil.Process(kept.command.process.pid), *processes])
    # Prefect's server, and of Ray: head, dashboard and its numbers, two of the node and five of its agents.
    assert others == [] and count >= 10


def test_others_on_the_machine_do_not_get_into_rays_folder(kept: Kept) -> None:
    ray = recorded("ray", kept.store / ".state")
    assert ray is not None and ray.folder is not None and Path(ray.folder).stat().st_mode & 0o777 == 0o700
    assert Path(ray.folder, "ray", "session_latest").exists()


def test_secrets_of_the_environment_stand_in_nothing_that_is_written(kept: Kept) -> None:
    ray = recorded("ray", kept.store / ".state")
    assert ray is not None and ray.folder is not None
    # Its logs outlive no command; still they are what a person sends to another who is asked for help.
    found = subprocess.run(["grep", "-rlaF", PLANTED, kept.store, ray.folder], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "")
    assert PLANTED not in "".join(kept.command.lines)
    for kind in ("flow_runs", "task_runs", "logs", "artifacts", "deployments"):
        assert PLANTED not in str(ask(kept.store, "POST", f"{kind}/filter", {}))


def test_rays_own_answers_are_understood(kept: Kept) -> None:
    ray = recorded("ray", kept.store / ".state")
    assert ray is not None
    RayJobs(ray.address, ray.token).check()
    cpus, gpus = RayJobs(ray.address, ray.token).processors()
    assert cpus == os.cpu_count() and gpus >= 0
    # As Ray spells them in recipes; other answers of it say objectStoreMemory.
    assert RayJobs(ray.address, ray.token).resources()["object_store_memory"] > 0
    for token, said in ((None, "asks for a token, and there is none here"), ("another", "refuses the token")):
        with pytest.raises(ServerError, match=f"{said}; set RAY_AUTH_TOKEN to the cluster's"):
            RayJobs(ray.address, token).check()
