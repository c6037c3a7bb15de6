"""`unidiffuser up` and `down`: the servers of one machine that stay while commands come and go."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
import webbrowser
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from infra.loopback import ask_loopback_directly
from infra.prefect_server import (
    SIGN_IN,
    WORKER,
    answers,
    check_api,
    configured_api,
    prefect_environment,
    start_worker,
    usual_port,
)
from infra.processes import SERVERS, Server, ServerError, locked, marked, nobody_else, recorded, running, stop, wait_until_ready
from infra.ray_cluster import configured_ray
from pipelines.commands.terminal import ReportTable
from pipelines.servers.servers import GRACE, KEPT, use_servers
from pipelines.servers.shells import exports
from stages.runner.deployment import Pool

# How long the runs that `down` interrupts may take to stop their jobs, and a worker to come up, in seconds.
STOP_SECONDS = 60.0
START_SECONDS = 120.0


def bring_up(state: Path, pool: str, port: int | None, console: Console) -> dict[str, Any]:
    """Start what is not running of Prefect server, Ray and worker of a pool, leave it running, and return where it is, as JSON.

    Raises:
        ServerError: one of them does not come up, or another program has the Prefect server's port; what was started for it is
            stopped again, unless it was up before.
    """
    before = {name: server.pid for name in SERVERS if (server := running(name, state))}
    with use_servers(state) as servers:
        address = servers.begin_prefect(port)
        servers.begin_ray(lambda _: None)
        servers.wait_for_prefect()
        _bring_up_worker(state, address, Pool(name=pool))
        servers.ray()
        (state / KEPT).write_text(json.dumps({"pool": pool}))
        lines = exports(state, address)
    console.print(_table(state, before, address))
    say_address(state, address, console)
    console.print("For other shells:")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    up = {name: running(name, state) for name in SERVERS}
    told = {n: {"address": s.address, "pid": s.pid, "started": before.get(n) != s.pid} for n, s in up.items() if s}
    return {"ui": address, "servers": told, "exports": lines}


def _bring_up_worker(state: Path, address: str, pool: Pool) -> None:
    from prefect.client.orchestration import get_client

    from pipelines.servers.deployments import ensure_pool

    with get_client(sync_client=True) as client:
        ensure_pool(client, pool)
        worker, fresh = start_worker(state, address, pool.name)

        def ready() -> bool:
            seen = [w.last_heartbeat_time for w in client.read_workers_for_work_pool(pool.name) if w.name == WORKER]
            return any(moment is not None and moment.timestamp() > worker.created for moment in seen)

        if fresh:
            wait_until_ready(worker, ready, state, START_SECONDS)


def _table(state: Path, before: dict[str, int], address: str) -> Table:
    table = ReportTable()
    for head in ("server", "", "address"):
        table.add_column(head, no_wrap=True)
    for head in ("pid", "since"):
        table.add_column(head, no_wrap=True, justify="right")
    for name in SERVERS:
        server = running(name, state)
        if server is None:
            table.add_row(name, "the configured one", configured_ray() if name == "ray" else address)
            continue
        word = "was running" if before.get(name) == server.pid else "[green]started[/]"
        since = f"{datetime.fromtimestamp(server.created):%Y-%m-%d %H:%M}"
        # A worker's address is its pool's, at the server's.
        place = f"pool {server.address.rsplit('/', 1)[-1]}" if name == "worker" else server.address
        table.add_row(name, word, place, str(server.pid), since)
    return table


def bring_down(state: Path, say: Callable[[str], None]) -> None:
    """Stop what `bring_up` has started, runs on the worker first; a server that another command uses ends with that command."""
    worker = running("worker", state)
    _end_runs(state, worker, say)
    if worker is not None:
        stop(worker, state, GRACE["worker"])
        say("stopped the worker")
    with locked(state / "servers.entry"), locked(state / "servers.users", shared=True) as users:
        (state / KEPT).unlink(missing_ok=True)
        left = [server for name in ("ray", "prefect") if (server := recorded(name, state))]
        if not left and worker is None:
            say("nothing was up")
        elif not nobody_else(users):
            say("another command is using the servers; they end with it")
        else:
            for server in left:
                stop(server, state, GRACE[server.name])
                say(f"stopped {server.name}")


def _end_runs(state: Path, worker: Server | None, say: Callable[[str], None]) -> None:
    """Interrupt the flows of the worker, so that each stops its job and ends as Cancelled before the servers go."""

    def interrupt() -> None:
        flows = [process for process in marked(state) if _is_flow(process)]
        for flow in flows:
            say(f"interrupting a run (pid {flow.pid})")
            with contextlib.suppress(psutil.Error):
                flow.terminate()
        psutil.wait_procs(flows, timeout=STOP_SECONDS)

    # Before the worker, which kills its flows when it ends, and again for what it has begun meanwhile.
    interrupt()
    if worker is not None:
        with contextlib.suppress(psutil.Error):
            psutil.Process(worker.pid).terminate()
        interrupt()


def _is_flow(process: psutil.Process) -> bool:
    try:
        return "prefect.engine" in process.cmdline()
    except psutil.Error:
        return False


def find_machine(state: Path) -> str | None:
    """The address of the Prefect UI that `unidiffuser up` keeps for this store, or None; this process's client will talk to it.

    Must come before the first import of Prefect, which reads its settings then.

    Raises:
        ServerError: it is up, but its worker or its server is dead, or the configured server cannot be used.
    """
    ask_loopback_directly()
    if not (state / KEPT).exists():
        return None
    worker, server = running("worker", state), running("prefect", state)
    if (address := configured_api()) is not None:
        check_api(address)
        address = address.rstrip("/").removesuffix("/api")
    elif server is not None and server.token and answers(server.address):
        address = server.address
        os.environ.update(prefect_environment(state, address))
    if address is None or worker is None:
        dead = "Prefect server" if address is None else "worker"
        how = "dead" if address is not None or server is None or server.token else "of an older release"
        raise ServerError(f"the {dead} that `unidiffuser up` started is {how}; run `unidiffuser up` again, or `unidiffuser down`")
    return address


def find_api(state: Path) -> str:
    """As `find_machine`, or the configured Prefect server.

    Raises:
        ServerError: there is none, or the configured one cannot be used.
    """
    if (address := find_machine(state)) is not None:
        return address
    if (configured := configured_api()) is not None:
        check_api(configured)
        return configured.rstrip("/").removesuffix("/api")
    raise ServerError("no Prefect server to deploy to; `unidiffuser up` starts one for this store, or set PREFECT_API_URL")


def find_server(state: Path) -> str | None:
    """As `find_api`, or the server that a run of this store keeps up at the moment; None where there is none.

    Raises:
        ServerError: the configured one cannot be used.
    """
    if (state / KEPT).exists() or configured_api() is not None:
        return find_api(state)
    ask_loopback_directly()
    server = running("prefect", state)
    if server is None or not server.token or not answers(server.address):
        return None
    os.environ.update(prefect_environment(state, server.address))
    return server.address


def say_address(state: Path, address: str, console: Console) -> None:
    """Say where the UI is and how the browser gets in, and why its address is not the usual one if it is not."""
    console.print(f"Prefect UI: {address}", soft_wrap=True)
    say_sign_in(state, address, console)
    usual, server = usual_port(state), running("prefect", state)
    if server is not None and server.address == address and usual is not None and not address.endswith(f":{usual}"):
        console.print(
            f"Its usual port {usual} is taken by another program: bookmarks lead there until that ends.", soft_wrap=True
        )


def say_sign_in(state: Path, address: str, console: Console) -> None:
    """Say under an address of the UI how the browser gets in, if the server is the embedded one."""
    if (server := running("prefect", state)) is not None and server.address == address:
        console.print(f"To sign the browser in: {command_for('ui', state)}", soft_wrap=True)


def command_for(command: str, state: Path) -> str:
    """``unidiffuser ui --store /data/runs``; without the store where it is the one that the command takes by itself."""
    usual = Path(os.environ.get("UNIDIFFUSER_STORE", "runs"), state.name)
    store = [] if usual.resolve() == state.resolve() else ["--store", str(state.parent)]
    return shlex.join(["unidiffuser", command, *store])


def open_ui(state: Path, console: Console) -> None:
    """Print the link that signs a browser in to the embedded server's UI, and open it where there is a display.

    With another server configured it is that one's own address.

    Raises:
        ServerError: no server is up.
    """
    server = running("prefect", state)
    address, words = (configured_api() or "").rstrip("/").removesuffix("/api"), ""
    if address and (server is None or server.address != address):
        link = opened = address
    elif server is None or not server.token or not answers(server.address):
        raise ServerError(
            "no Prefect server is up for this store; `unidiffuser up`, or `unidiffuser run RECIPE --keep`, starts one"
        )
    else:
        link = f"{server.address}{SIGN_IN}#{server.token}"
        opened = _private_page(state, link)
        host = server.address.removeprefix("http://")
        tunnel = f"ssh -L {host.rpartition(':')[2]}:{host} {socket.gethostname()}"
        words = (
            f"Open it in a browser on this machine, or on another one while `{tunnel}` runs there. "
            "It lets in whoever has it: do not pass it on."
        )
    print(link)
    display = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not (display and webbrowser.open(opened)) and words:
        console.print(words, soft_wrap=True)


def _private_page(state: Path, link: str) -> str:
    """A page that leads to the link: what a browser is started with, everybody on the machine can see."""
    page = state / "prefect" / "sign-in.html"
    page.unlink(missing_ok=True)
    descriptor = os.open(page, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={link}">\n')
    return page.resolve().as_uri()
