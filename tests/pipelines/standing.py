"""A standing cluster as a company has it, for `tests.pipelines.cluster`: Ray behind a token, an S3 server, Prefect behind a key.

Every machine is a set of namespaces, see `tests.stages.machines`: the head, which takes no work, and nodes of one CPU. What the
head knows lies in Redis, so that another one goes on in its place. The command runs outside of them, with the S3 server, the
little web, Prefect's server and Redis; the S3 server is all that it has in common with the machines.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

from benchmarks.counted import KEYS
from infra.prefect_server import answers
from infra.processes import ServerError
from infra.ray_jobs import RayJobs
from tests.stages.machines import HEAD as OUTSIDE
from tests.stages.machines import JOIN, NETWORK, Machine

HEAD, GCS, JOBS = f"{NETWORK}.250", 6379, 8265
NODES = 3
# As the embedded Ray does it: without a server for remote drivers, which takes long to begin.
WHOLE = "import ray.scripts.scripts as ray; ray.get_ray_client_dependency_error = lambda: 1; ray.main()"
LEAD = (
    f"{{python}} -c '{WHOLE}' start --head --num-cpus=0 --node-ip-address={{address}} --port={GCS} --dashboard-host={{address}} "
    f"--dashboard-port={JOBS} --include-dashboard=true --no-monitor --object-store-memory=100000000 --include-log-monitor=False "
    "--redis-password=$REDIS_PASSWORD --block"
)
# A busy machine is late, and not dead.
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_worker_niceness": "0",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    "RAY_JOB_STOP_WAIT_TIME_S": "30",
}
PATIENCE = 240.0


def wait(seen: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not seen():
        if time.monotonic() > deadline:
            raise SystemExit(f"error: {what} in {seconds:.0f} s")
        time.sleep(0.2)


def free_port(address: str) -> int:
    with socket.create_server((address, 0)) as server:
        return int(server.getsockname()[1])


class Standing:
    """The cluster; `environment` is what the command needs to use it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        if shutil.which("redis-server") is None:
            raise SystemExit("error: no redis-server here; install Debian's: apt-get install redis-server")
        self.folder, self.stack = folder, stack
        (folder / "logs").mkdir(parents=True)
        self.token = secrets.token_hex(16)
        stack.enter_context(patch.dict(os.environ, {**RAY, "RAY_AUTH_TOKEN": self.token, "OMP_NUM_THREADS": "1"}))
        # Where a job finds `python`.
        stack.enter_context(patch.dict(os.environ, {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}))
        self.redis = self._redis()
        self.api, self.key = self._prefect()
        self.ray = RayJobs(f"http://{HEAD}:{JOBS}", self.token)
        self.head: Machine | None = None
        self.nodes: list[Machine] = []
        stack.callback(lambda: [each.kill() for each in (self.head, *self.nodes) if each is not None])

    @property
    def environment(self) -> dict[str, str]:
        return {
            "RAY_ADDRESS": self.ray.address,
            "PREFECT_API_URL": self.api,
            "PREFECT_API_AUTH_STRING": self.key,
            "PREFECT_HOME": str(self.folder / "prefect"),
        }

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def lead(self) -> None:
        """A head, the first or one in the place of the last."""
        self.head = Machine("", LEAD, HEAD, {**self._own(), **self.redis}, self.log("head"))
        wait(self.ray.ready, "Ray's head does not come up")

    def join(self, nodes: int) -> None:
        """More nodes, which Ray knows."""
        before = self.ray.processors()[0]
        for _ in range(nodes):
            self.nodes.append(Machine(f"{HEAD}:{GCS}", JOIN, None, self._own(), self.log(f"node-{len(self.nodes)}")))
        wait(lambda: self._cpus() >= before + nodes, "nodes do not join")

    def lose(self, node: Machine) -> str:
        self.nodes.remove(node)
        node.kill()
        return node.address

    def lose_head(self) -> None:
        assert self.head is not None
        self.head.kill()

    def _cpus(self) -> int:
        try:
            return self.ray.processors()[0]
        except ServerError:
            return 0

    def _own(self) -> dict[str, str]:
        # The store's keys are the machine's own, as a cloud's identity is.
        return {"HOME": "/tmp/home", "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"], **KEYS}

    def _begun(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        with self.log(name).open("w") as said:
            process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=said, stderr=said)
        self.stack.callback(process.wait)
        self.stack.callback(process.terminate)

    def _redis(self) -> dict[str, str]:
        port, password = free_port(OUTSIDE), secrets.token_hex(16)
        settings = self.folder / "redis.conf"
        settings.write_text(f"bind {OUTSIDE}\nport {port}\nrequirepass {password}\ndir {self.folder}\nappendonly no\nsave ''\n")
        self._begun("redis", ["redis-server", str(settings)], {})
        return {"RAY_REDIS_ADDRESS": f"{OUTSIDE}:{port}", "REDIS_PASSWORD": password}

    def _prefect(self) -> tuple[str, str]:
        port, key = free_port("127.0.0.1"), f"cluster:{secrets.token_hex(16)}"
        environment = {
            "PREFECT_HOME": str(self.folder / "prefect-server"),
            "PREFECT_SERVER_API_AUTH_STRING": key,
            "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(self.folder / "prefect-ui"),
            "DO_NOT_TRACK": "1",
        }
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        self._begun("prefect", command, environment)
        address = f"http://127.0.0.1:{port}"
        wait(lambda: answers(address), "Prefect's server does not answer")
        return f"{address}/api", key


@contextmanager
def standing(folder: Path) -> Iterator[Standing]:
    with ExitStack() as stack:
        yield Standing(folder, stack)
