"""Child servers of a command: recorded so that a later command finds them again, and stopped with all that they started."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil
from pydantic import BaseModel, ValidationError

from infra.loopback import without_proxy

# Every process below a server inherits this variable, whatever becomes of its parent: that is how survivors are recognised.
MARK = "UNIDIFFUSER_SERVERS"
SERVERS = ("prefect", "ray", "worker")
# Below those that a system gives to connections and to whoever asks for any: one of these would take the port of a server in the
# seconds before it listens, or in the days between two of its starts.
PORTS = range(20_000, 32_768)


class ServerError(Exception):
    """A server that cannot be started or reached; one line that names it and the fix."""


class NoAnswer(ServerError):
    """A server cannot be reached, or answers 5xx: it may in a moment."""


class Server(BaseModel):
    """A running server; `<state>/NAME.json` holds one of these.

    `created` is the start time of the process, which tells it from another one that got the same pid. `folder` is removed
    when the server stops; `token` is what clients must send.
    """

    name: str
    pid: int
    created: float
    address: str
    folder: str | None = None
    token: str | None = None

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def free_port(wanted: int = 0) -> int:
    """A TCP port on loopback that nobody listens on at this moment; `wanted` if it is one of these."""
    with socket.socket() as sock:
        if wanted:
            # As servers do it: what is left of closed connections does not make a port taken.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", wanted))
                return wanted
    return free_ports("127.0.0.1")[0]


def free_ports(*hosts: str) -> list[int]:
    """As many free TCP ports as hosts, each another number: asked for one by one, two could be the same.

    Raises:
        ServerError: all are taken.
    """
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        for port in random.sample(PORTS, len(PORTS)):
            sock = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                sock.bind((hosts[len(ports)], port))
                ports.append(port)
            if len(ports) == len(hosts):
                return ports
    raise ServerError(f"no free port from {PORTS[0]} to {PORTS[-1]}; stop what listens there")


def spawn(name: str, command: list[str], environment: dict[str, str], state: Path, **details: str | None) -> Server:
    """Start a server and record it; `details` are further fields of the record.

    It gets a session of its own, so that Ctrl-C reaches the command alone and the command stops the server in order.
    """
    log = log_of(name, state)
    log.parent.mkdir(parents=True, exist_ok=True)
    marked = {**environment, **without_proxy(environment), MARK: str(state.resolve())}
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, env=marked, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    created = psutil.Process(process.pid).create_time()
    server = Server.model_validate({"name": name, "pid": process.pid, "created": created, **details})
    record(server, state)
    return server


def log_of(name: str, state: Path) -> Path:
    return state / "logs" / f"{name}.log"


def record(server: Server, state: Path) -> None:
    path = state / f"{server.name}.json"
    part = path.with_suffix(".part")
    # The record may hold a token: nobody else reads it.
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(server.model_dump_json(indent=1))
    os.replace(part, path)


def running(name: str, state: Path) -> Server | None:
    """The server that an earlier command left, if it is alive; what a dead one has left is not touched."""
    try:
        server = Server.model_validate_json((state / f"{name}.json").read_text())
    except (FileNotFoundError, ValidationError):
        return None
    return server if server.alive() else None


def recorded(name: str, state: Path) -> Server | None:
    """The server that an earlier command left running, or None; what a dead one left behind is removed."""
    if (server := running(name, state)) is None:
        with contextlib.suppress(FileNotFoundError, ValidationError):
            stop(Server.model_validate_json((state / f"{name}.json").read_text()), state)
    return server


def wait_until_ready(server: Server, ready: Callable[[], bool], state: Path, seconds: float) -> None:
    """Poll `ready()` until it is true; a server that does not get there is stopped.

    Raises:
        ServerError: the server ended, or the time is over; the message holds the last line of its log.
    """
    deadline, log = time.monotonic() + seconds, log_of(server.name, state)
    while not ready():
        ended = not server.alive()
        if ended or time.monotonic() > deadline:
            what = "ended while starting" if ended else f"did not answer within {seconds:.0f} s"
            message = f"the embedded {server.name} server {what}: {last_line(log)} (log: {log})"
            stop(server, state)
            raise ServerError(message)
        time.sleep(0.1)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].strip() if lines else "no output"


def family(server: Server) -> list[psutil.Process]:
    """The server's process and everything below it, also what moved to another parent but stayed in its session."""
    members: dict[int, psutil.Process] = {}
    if server.alive():
        root = psutil.Process(server.pid)
        members[root.pid] = root
        for child in root.children(recursive=True):
            members[child.pid] = child
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == server.pid and process.create_time() >= server.created - 1:
                members[process.pid] = process
    return list(members.values())


def stop(server: Server, state: Path, grace: float = 8.0) -> None:
    """End a server and all its descendants: the server is asked first, what is left after `grace` seconds is killed."""
    members = family(server)
    for process in members:
        if process.pid == server.pid:
            with contextlib.suppress(psutil.Error):
                process.terminate()
    _, left = psutil.wait_procs([p for p in members if p.pid == server.pid], timeout=grace)
    # Workers notice within a moment that their server is gone; most need no signal.
    _, left = psutil.wait_procs(members, timeout=1.0)
    kill(left)
    if server.folder:
        subprocess.run(["rm", "-rf", server.folder], check=False)
    (state / f"{server.name}.json").unlink(missing_ok=True)


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL processes and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=5.0)


def marked(state: Path) -> list[psutil.Process]:
    """Every process that a server of this state folder started, whatever became of that server; this one is none of them."""
    ours, found = str(state.resolve()), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == ours:
                found.append(process)
    return found


def strays(state: Path) -> list[psutil.Process]:
    """Processes that a server of this state folder started and that belong to no recorded server any more."""
    known = {p.pid for name in SERVERS if (s := recorded(name, state)) for p in family(s)}
    return [process for process in marked(state) if process.pid not in known]


@contextlib.contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[IO[str]]:
    """Hold a file lock; the kernel lets go of it when the process dies, however it dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield file


def nobody_else(file: IO[str]) -> bool:
    """Whether a shared lock that we hold can be made exclusive: no other command is using the servers."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def share(file: IO[str]) -> None:
    """Make an exclusive lock shared again."""
    fcntl.flock(file, fcntl.LOCK_SH)
