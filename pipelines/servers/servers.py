"""The servers that a command uses: the user's own where they are configured, else embedded ones that end with the command."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from infra.loopback import ask_loopback_directly
from infra.prefect_server import check_api, configured_api, prefect_environment, start_prefect, wait_for_prefect
from infra.processes import SERVERS, Server, ServerError, kill, locked, nobody_else, recorded, share, stop, strays
from infra.ray_cluster import configured_ray, start_ray
from infra.ray_jobs import RayJobs, user_token

# How long a server may take to end in order. Ray has nothing to save once its jobs are stopped; Prefect closes its database.
GRACE = {"ray": 3.0, "prefect": 8.0, "worker": 8.0}

# While this file is there, the servers stay up whatever command ends: `unidiffuser up` writes it, `down` removes it.
KEPT = "up.json"


class Servers:
    """Prefect and Ray of one command; both come up in the background while the command goes on.

    `alone` says that no other command uses the embedded servers, so that a job found running on them has lost its own if it
    began before `since`.
    """

    def __init__(self, state: Path, cpus: int | None = None, alone: bool = False):
        self.state = state
        self.cpus = cpus
        self.alone = alone
        self.since = time.time()
        self.embedded_ray = configured_ray() is None
        self.embedded_prefect = configured_api() is None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="servers")
        self._prefect: Server | None = None
        self._ray: Future[RayJobs] | None = None

    def begin_prefect(self, port: int | None = None) -> str:
        """The address of the Prefect UI, whose server may still be on its way; this process's client will talk to it.

        Must come before the first import of Prefect, which reads its settings then.

        Raises:
            ServerError: the configured server cannot be used, or the embedded one cannot have this port.
        """
        if (address := configured_api()) is not None:
            if port is not None:
                raise ServerError(
                    f"--port is for a server of `up`, but PREFECT_API_URL={address} names another; unset one of them"
                )
            check_api(address)
            return address.rstrip("/").removesuffix("/api")
        self._prefect = start_prefect(self.state, port)
        os.environ.update(prefect_environment(self.state, self._prefect.address))
        return self._prefect.address

    def wait_for_prefect(self) -> None:
        """Wait until the Prefect server answers.

        Raises:
            ServerError: the embedded server does not come up.
        """
        if self._prefect is not None:
            wait_for_prefect(self._prefect, self.state)

    def begin_ray(self, tidy: Callable[[RayJobs], None]) -> None:
        """Bring Ray up in the background; not called when every node is a hit, as these need none.

        `tidy` is called once it answers, of an embedded one if this command alone uses it: it may find jobs there whose command
        was killed.

        Raises:
            ServerError: the configured cluster cannot be used.
        """

        def start() -> RayJobs:
            server = start_ray(self.state, self.cpus)
            jobs = RayJobs(server.address, server.token)
            if self.alone:
                tidy(jobs)
            return jobs

        if self.embedded_ray:
            self._ray = self._threads.submit(start)
        else:
            self.ray().check()
            tidy(self.ray())

    def ray(self) -> RayJobs:
        """The Jobs API of the cluster.

        Raises:
            ServerError: the embedded Ray does not come up.
        """
        return RayJobs(str(configured_ray()), user_token()) if self._ray is None else self._ray.result()

    def find_ray(self) -> RayJobs | None:
        """The Jobs API of the cluster if it is there already."""
        if not self.embedded_ray:
            return self.ray()
        found = recorded("ray", self.state)
        return RayJobs(found.address, found.token) if found else None

    def close(self) -> None:
        """Stop the embedded servers; a start that is still under way then fails, and what it left is stopped too."""
        self._stop()
        self._threads.shutdown(wait=True)
        self._stop()

    def _stop(self) -> None:
        running = [server for name in SERVERS if (server := recorded(name, self.state))]
        stopping = [threading.Thread(target=stop, args=(server, self.state, GRACE[server.name])) for server in running]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()


@contextmanager
def use_servers(state: Path, cpus: int | None = None) -> Iterator[Servers]:
    """The servers for one command. The last command that uses the embedded ones stops them, whatever way it ends, unless
    `unidiffuser up` keeps them.

    A command that was killed could not: its servers are found by their records and used again, and what it left without a
    record is killed here.
    """
    ask_loopback_directly()
    entry, usage = state / "servers.entry", state / "servers.users"
    with ExitStack() as held:
        with locked(entry):
            users = held.enter_context(locked(usage, shared=True))
            if alone := nobody_else(users):
                kill(strays(state))
            share(users)
        servers = Servers(state, cpus, alone)
        try:
            yield servers
        finally:
            with _uninterrupted(), locked(entry):
                if nobody_else(users) and not (state / KEPT).exists():
                    servers.close()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Impatient signals must not leave half of the servers running."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
