"""A Ray cluster whose machines are namespaces of this one: each has a network address, processes and a /tmp of its own.

It wants root on Linux, and namespaces for itself, so that nothing is left of it and no network of this machine is touched: run it
by ``unshare --net --pid --fork --kill-child --mount-proc``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from unittest.mock import patch

import psutil
from ray.cluster_utils import Cluster

ALONE = "unshare --net --pid --fork --kill-child --mount-proc"
# The code, which every machine sees and none can write to, as an image would hold it.
ROOT = Path(__file__).parent.parent.parent
BRIDGE, NETWORK = "machines", "10.77.0"
HEAD = f"{NETWORK}.1"
ENTER = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# The wire comes from outside, a moment later.
START = """
mount -t tmpfs tmpfs /tmp && mount --bind {root} {root} && mount -o remount,bind,ro {root} && ip link set lo up || exit 1
until ip link set {wire} up 2>/dev/null; do sleep 0.1; done
ip address add {address}/24 dev {wire} || exit 1
until {ray}; do sleep 1; done
"""
JOIN = (
    "{python} -c '{light}' start --address={cluster} --node-ip-address={address} --num-cpus=1 "
    "--object-store-memory=100000000 --include-log-monitor=False --block"
)
# Ray waits fifteen seconds for its agent to begin, which imports a lot, unless there is nothing to import it for.
LIGHT = "ray._private.utils.get_dashboard_dependency_error"
STARTS = f"import ray.scripts.scripts as starts, ray._private.utils; {LIGHT} = lambda: 1; starts.main()"
# How processes of Ray call themselves that do nobody's work.
AT_REST = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
# Seconds that Ray may take to find that a machine is there, or is not: it asks one that does not answer for a minute.
PATIENCE = 240.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def namespace(process: int | str) -> str:
    return os.readlink(f"/proc/{process}/ns/net")


def wait_until(seen: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not seen():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def alive() -> set[str]:
    """The addresses of the machines that Ray takes to be there, the head's among them."""
    import ray

    return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


class Machine:
    """A node, which is there when it is made; Ray knows it some seconds later.

    Args:
        cluster: the address of the head.
        ray: what it runs, by default a node of one CPU that joins the cluster; with `{address}`, its own, and so on.
        address: its own; by default one that none had before.
        environment: variables of its own.
        log: where what it says goes.
    """

    numbers = count(2)

    def __init__(
        self,
        cluster: str,
        ray: str = JOIN,
        address: str | None = None,
        environment: Mapping[str, str] | None = None,
        log: Path = Path(os.devnull),
    ) -> None:
        number = next(self.numbers)
        self.address, self.outer, wire = address or f"{NETWORK}.{number}", f"outer{number}", f"wire{number}"
        ray = ray.format(address=self.address, cluster=cluster, python=sys.executable, light=STARTS)
        script = START.format(root=ROOT, wire=wire, address=self.address, ray=ray)
        with log.open("a") as said:
            self.process = subprocess.Popen(
                [*ENTER, "sh", "-c", script], stdout=said, stderr=said, env={**os.environ, **(environment or {})}
            )
        wait_until(lambda: namespace(self.process.pid) != namespace("self"), "no network namespace")
        ip("link", "add", self.outer, "type", "veth", "peer", "name", wire, "netns", str(self.process.pid))
        ip("link", "set", self.outer, "master", BRIDGE, "up")

    def known(self) -> Machine:
        """Wait until Ray knows it."""
        wait_until(lambda: self.address in alive(), f"{self.address} does not come: {self.process.poll()}")
        return self

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def works(self) -> bool:
        """Whether one of its workers is somebody's."""
        for process in self.processes():
            with suppress(psutil.Error):
                words = " ".join(process.cmdline())
                if words.startswith("ray::") and not words.startswith(AT_REST):
                    return True
        return False

    def kill(self) -> None:
        """All its processes and its network, at once and without a word to anyone."""
        self.process.kill()
        self.process.wait()

    def leave(self) -> None:
        """It says that it goes, and goes."""
        for process in self.processes():
            if process.name() == "raylet":
                process.terminate()
        self.gone()
        self.kill()

    def gone(self) -> None:
        """Wait until Ray has found that it is not there."""
        wait_until(lambda: self.address not in alive(), f"{self.address} does not go")

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """While nothing comes to it and nothing from it."""
        ip("link", "set", self.outer, "down")
        try:
            yield
        finally:
            ip("link", "set", self.outer, "up")


@contextmanager
def network() -> Iterator[None]:
    """What machines are wired to, with the address `HEAD` for this process."""
    if len(Path("/proc/self/net/route").read_text().splitlines()) > 1:
        raise SystemExit(f"it makes networks: run it as root, as `{ALONE} python -m ...`")
    ip("link", "set", "lo", "up")
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("address", "add", f"{HEAD}/24", "dev", BRIDGE)
    ip("link", "set", BRIDGE, "up")
    try:
        yield
    finally:
        ip("link", "delete", BRIDGE)


@contextmanager
def head() -> Iterator[str]:
    """Ray's head, without CPUs; gives its address."""
    cluster = _head(tries=5)
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


def _head(tries: int) -> Cluster:
    arguments = {
        "num_cpus": 0, "include_dashboard": False, "node_ip_address": HEAD, "include_log_monitor": False, "no_monitor": True,
    }  # fmt: skip
    try:
        with patch(LIGHT, lambda: 1):
            return Cluster(initialize_head=True, head_node_args=arguments)
    # Ray gives itself half a minute, which a busy machine may take for less.
    except Exception:
        if tries == 1:
            raise
    return _head(tries - 1)
