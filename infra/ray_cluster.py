"""The embedded Ray: one head with the Jobs API, small, on loopback alone, behind a token, for as long as a command runs."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from infra.processes import Server, ServerError, free_ports, recorded, spawn, stop, wait_until_ready
from infra.queries import without_user
from infra.ray_jobs import RayJobs

log = logging.getLogger("infra")

# Room for what passes between workers; datasets go through the store, so this stays small.
OBJECT_STORE_BYTES = 512 * 2**20
START_SECONDS = 300.0
# Where all its parts listen: to any other address of loopback Ray says the same, and listens on every interface.
NODE_ADDRESS = "127.0.0.1"
# For a job's environment. A worker closes a connection on which nothing is answered, by default after 20 s. Where the network is
# cut for so long, whoever waits for the worker is not told: Ray looks after the connection from that end every five minutes. A
# node that is away for longer than this counts as dead, which is told at once.
PATIENT = {"RAY_grpc_keepalive_timeout_ms": "120000"}


def configured_ray() -> str | None:
    """The Ray cluster that the user named (RAY_ADDRESS), as the address of its Jobs API, or None for the embedded one."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return None
    if not address.startswith(("http://", "https://")):
        raise ServerError(f"RAY_ADDRESS={without_user(address)}: expected the Jobs API, such as http://head:8265")
    if without_user(address) != address:
        raise ServerError("RAY_ADDRESS holds a password, which would be shown; set RAY_AUTH_TOKEN instead")
    return address.rstrip("/")


def start_ray(state: Path, cpus: int | None = None) -> Server:
    """The embedded Ray: the one that survived an earlier command if it answers, else a new one on free ports, ready for jobs.

    Raises:
        ServerError: it does not come up, nor does it a second time; the message holds the last line of its log.
    """
    found = recorded("ray", state)
    if found is not None:
        if RayJobs(found.address, found.token).ready():
            return found
        stop(found, state)
    try:
        return _start(state, cpus)
    except ServerError as error:
        # A busy machine takes more than the half minute that Ray allows itself, or another program takes a port just then.
        log.warning("%s; it is started once more", error)
        return _start(state, cpus)


def _start(state: Path, cpus: int | None) -> Server:
    """A new Ray on free ports. Raises ServerError: it does not come up."""
    token = secrets.token_hex(16)
    port, head, agent = free_ports(*[NODE_ADDRESS] * 3)
    folder = _folder()
    # Jobs look at data from outside and never talk to Prefect: they need not know what lets one in there.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = {**ours, **_environment(token)}
    address = f"http://{NODE_ADDRESS}:{port}"
    server = spawn(
        "ray", _command(port, head, agent, folder, cpus), environment, state, address=address, folder=folder, token=token
    )
    wait_until_ready(server, RayJobs(address, token).ready, state, START_SECONDS)
    return server


def start_ray_here(**settings: Any) -> None:
    """The same for this process and its workers alone, without the Jobs API, until the process ends; nothing where it has a Ray.

    Args:
        settings: further ones of `ray.init`.
    """
    import ray
    from ray._private import ray_constants
    from ray._raylet import Config  # type: ignore[attr-defined]

    if ray.is_initialized():
        return
    folder = _folder()
    os.environ.update(_environment(secrets.token_hex(16)))
    # Ray has read the environment, as it was, when it was imported.
    ray_constants.ENABLE_RAY_CLUSTER = False
    Config.initialize("")
    ray.init("local", _node_ip_address=NODE_ADDRESS, _temp_dir=_inner(folder), include_dashboard=False, **settings)

    def end() -> None:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)


def _folder() -> str:
    """A new folder that its owner alone can look into. Ray lets everybody write to its own, which lies in it.

    Sockets lie there, and their paths must stay below 107 bytes, which a store's path may exceed.
    """
    return tempfile.mkdtemp(prefix="unidiffuser-ray-", dir="/tmp")


def _inner(folder: str) -> str:
    return f"{folder}/ray"


# `ray start` always adds a server for remote drivers where it can. Nothing here connects that way, it takes 90 MB, and when it
# gives up on a slow machine Ray ends as a whole: so let Ray believe that its parts are missing.
_RAY = "import ray.scripts.scripts as ray; ray.get_ray_client_dependency_error = lambda: 'not wanted'; ray.main()"


def _command(port: int, head: int, agent: int, folder: str, cpus: int | None) -> list[str]:
    return [
        sys.executable, "-c", _RAY, "start", "--head", "--block", "--disable-usage-stats", "--no-monitor",
        f"--node-ip-address={NODE_ADDRESS}", f"--port={head}",
        "--include-dashboard=true", f"--dashboard-host={NODE_ADDRESS}", f"--dashboard-port={port}",
        f"--dashboard-agent-listen-port={agent}",
        # 0 means any free port; the default is a range that another Ray on this machine may hold.
        "--min-worker-port=0", "--max-worker-port=0",
        f"--temp-dir={_inner(folder)}", f"--object-store-memory={OBJECT_STORE_BYTES}", f"--num-cpus={cpus or os.cpu_count()}",
    ]  # fmt: skip


def _environment(token: str) -> dict[str, str]:
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        # A token of our own: without one Ray lets every user of the machine run code, or takes what ~/.ray happens to hold.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        # Ray takes 127.0.0.1 to mean "the machine's own address", unless no other machine is to join it.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_enable_worker_prestart": "0",
        # By default workers run at niceness 15 and starve beside other programs on a small machine.
        "RAY_worker_niceness": "0",
        # A machine that is busy with training answers late; its own head must not take that for a death.
        "RAY_agent_register_timeout_ms": "300000",
        "RAY_worker_register_timeout_seconds": "300",
        "RAY_health_check_timeout_ms": "60000",
        "RAY_health_check_failure_threshold": "10",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
        # Time for a stage to write its checkpoint when its job is stopped.
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
    }
