"""Who gets into the embedded Prefect server: its owner's clients and browser, and no page of another origin."""

from __future__ import annotations

import base64
import os
import shlex
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from infra import prefect_server
from infra.prefect_server import credential, start_prefect
from infra.processes import Server, ServerError, free_port, record, running, spawn, stop, wait_until_ready
from pipelines.servers import machine
from pipelines.servers.servers import KEPT
from tests.pipelines.conftest import CHROMIUM, Kept, ask, see_dashboard, survivors

FOREIGN = "http://foreign.example"


def basic(pair: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def status(address: str, path: str, headers: dict[str, str], data: bytes | None = None) -> int:
    request = urllib.request.Request(f"{address}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_only_the_owners_clients_get_in(kept: Kept) -> None:
    inside, json = basic(credential(kept.store / ".state")), {"Content-Type": "application/json"}
    csrf = {"Prefect-Csrf-Client": "tests", "Prefect-Csrf-Token": ask(kept.store, "GET", "csrf-token?client=tests")["token"]}
    read, count = partial(status, kept.address, "/api/admin/version"), partial(status, kept.address, "/api/flow_runs/count")
    assert read(inside) == 200 and read({}) == read(basic("unidiffuser:guess")) == 401
    whole = {**inside, **csrf, **json}
    assert count(whole, b"{}") == count({**whole, "Origin": kept.address}, b"{}") == 200
    assert count({**csrf, **json}, b"{}") == 401 and count({**inside, **json}, b"{}") == 403
    assert count({**whole, "Origin": FOREIGN}, b"{}") == count({**whole, "Origin": "null"}, b"{}") == 403
    # A name that its owner points at this machine makes a foreign page one of the same origin.
    rebound = {"Host": "foreign.example", "Origin": FOREIGN}
    assert count({**whole, **rebound}, b"{}") == read({**inside, **rebound}) == 400
    assert status(kept.address, "/v2", rebound) == status(kept.address, "/api/health", rebound) == 400


@pytest.mark.parametrize("path", ["events/in", "events/out", "logs/out", "task_runs/subscriptions/scheduled"])
def test_websockets_ask_for_the_same(kept: Kept, path: str) -> None:
    address, token = f"{kept.address.replace('http', 'ws')}/api/{path}", credential(kept.store / ".state")

    def greeting(token: str | None, origin: str | None = None) -> str | bytes:
        with connect(address, subprotocols=[Subprotocol("prefect")], origin=Origin(origin) if origin else None) as socket:
            socket.send(f'{{"type": "auth", "token": "{token or ""}"}}')
            return socket.recv(timeout=20)

    assert greeting(token) == '{"type":"auth_success"}'
    for wrong in (None, "guess"):
        with pytest.raises(ConnectionClosed):
            greeting(wrong)
    with pytest.raises(InvalidStatus, match="403"):
        greeting(token, FOREIGN)
    with pytest.raises(InvalidStatus), connect(address):
        pass


def test_the_credential_is_nowhere_that_others_can_read(kept: Kept) -> None:
    state = kept.store / ".state"
    token = credential(state)
    processes = survivors(kept.store)
    assert len(token) > 40 and processes and "".join(kept.command.lines).count("unidiffuser ui") == 1
    assert token not in "".join(kept.command.lines) and not any(token in " ".join(process.cmdline()) for process in processes)
    assert (state / "prefect").stat().st_mode & 0o077 == (state / "prefect" / "credential").stat().st_mode & 0o077 == 0
    holders = [path for path in state.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert state / "prefect.json" in holders
    for path in holders:
        assert path.stat().st_mode & 0o077 == 0 or state / "prefect" in path.parents, path
    # Nor does what looks at data from outside need it.
    assert not any(token in process.environ().values() for process in processes if "ray" in process.name())


def test_commands_that_begin_at_once_have_the_same_credential(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: credential(tmp_path), range(8)))
    assert len(set(found)) == 1 and found[0] == credential(tmp_path)
    assert {path.name for path in (tmp_path / "prefect").iterdir()} == {"credential", "credential.lock"}


@pytest.fixture(scope="module")
def signed_in(kept: Kept, page: Any) -> Any:
    """The browser, after the command has opened what it opens where there is a display."""
    opened: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISPLAY", ":0")
        patch.setattr(machine.webbrowser, "open", opened.append)
        machine.open_ui(kept.store / ".state", Console())
    (address,) = opened
    # The command line of a browser is for everybody to see.
    assert address.startswith("file://") and credential(kept.store / ".state") not in address
    assert Path(address.removeprefix("file://")).stat().st_mode & 0o077 == 0
    page.goto(address)
    see_dashboard(page)
    return page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_ui_is_signed_in_and_a_wrong_link_does_not_sign_it_out(kept: Kept, signed_in: Any) -> None:
    signed_in.goto(f"{kept.address}/sign-in#unidiffuser:guess")
    signed_in.get_by_text("run `unidiffuser ui` again").wait_for()
    assert "guess" not in signed_in.url
    signed_in.goto(f"{kept.address}/v2/runs")
    (run,) = ask(kept.store, "POST", "flow_runs/filter", kept.of_it)
    signed_in.locator(f"main a[href$='/runs/flow-run/{run['id']}']").first.wait_for(timeout=20_000)


def test_the_link_signs_in_whoever_has_named_the_embedded_server_too(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(configured: str) -> list[str]:
        monkeypatch.setenv("PREFECT_API_URL", configured)
        machine.open_ui(kept.store / ".state", Console(width=300))
        return capsys.readouterr().out.splitlines()

    # A display, and no browser on it.
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(machine.webbrowser, "open", lambda _: False)
    link, words = printed(f"{kept.address}/api")
    port = kept.address.rpartition(":")[2]
    assert link == f"{kept.address}/sign-in#{credential(kept.store / '.state')}" and f"ssh -L {port}:127.0.0.1:{port} " in words
    assert printed("http://prefect.example:4200/api/") == ["http://prefect.example:4200"]


def test_the_command_that_signs_in_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "my store" / ".state"
    state.mkdir(parents=True)
    created = psutil.Process().create_time()
    record(Server(name="prefect", pid=os.getpid(), created=created, address="http://127.0.0.1:1"), state)
    machine.say_sign_in(state, "http://127.0.0.1:1", Console(width=300))
    command = capsys.readouterr().out.partition(": ")[2]
    assert shlex.split(command) == ["unidiffuser", "ui", "--store", str(state.parent)]


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# What the script of a page can do with another server: read, write blindly, open a socket, and put it into a frame.
ATTEMPTS = """async address => {
  const said = promise => promise.then(() => "done", error => error.name);
  const body = JSON.stringify({name: "foreign", value: 1});
  const socket = new WebSocket(address.replace("http", "ws") + "/api/events/out", ["prefect"]);
  const frame = document.body.appendChild(document.createElement("iframe"));
  frame.src = address + "/v2";
  return Promise.all([
    said(fetch(address + "/api/health")),
    said(fetch(address + "/api/variables/", {method: "POST", body, headers: {"Content-Type": "application/json"}})),
    said(fetch(address + "/api/variables/", {method: "POST", body, mode: "no-cors"})),
    new Promise(done => { socket.onopen = () => done("open"); socket.onerror = () => done("refused"); }),
    new Promise(done => { frame.onload = () => done("loaded"); }),
  ]);
}"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_page_of_another_origin_reads_and_starts_nothing(kept: Kept, signed_in: Any, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<!doctype html><title>foreign</title><body>")
    with serving(tmp_path) as foreign:
        signed_in.goto(foreign)
        # A blind request is sent, and its answer kept from the page.
        assert signed_in.evaluate(ATTEMPTS, kept.address) == ["TypeError", "TypeError", "done", "refused", "loaded"]
        assert [frame.url for frame in signed_in.frames[1:]] == ["chrome-error://chromewebdata/"]
    assert ask(kept.store, "POST", "variables/count", {}) == 0


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_ui_asks_its_own_server_alone(kept: Kept, signed_in: Any, tmp_path: Path) -> None:
    asks = "address => fetch(address, {mode: 'no-cors'}).then(() => 'done', error => error.name)"
    signed_in.goto(f"{kept.address}/v2/dashboard")
    see_dashboard(signed_in)
    with serving(tmp_path) as foreign:
        assert signed_in.evaluate(asks, f"{kept.address}/api/health") == "done"
        assert signed_in.evaluate(asks, foreign) == "TypeError"


# Healthy, and open to everybody, as the server of an older release.
OLDER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


def test_a_server_of_an_older_release_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    older = spawn(
        "prefect", [sys.executable, "-c", OLDER, str(port)], dict(os.environ), tmp_path, address=f"http://127.0.0.1:{port}"
    )
    wait_until_ready(older, lambda: prefect_server.answers(older.address), tmp_path, 20)
    record(older.model_copy(update={"name": "worker"}), tmp_path)
    (tmp_path / KEPT).write_text("{}")
    with pytest.raises(ServerError, match="the Prefect server that .* is of an older release; run `unidiffuser up` again"):
        machine.find_machine(tmp_path)
    with pytest.raises(ServerError, match="no Prefect server is up .*`unidiffuser up`"):
        machine.open_ui(tmp_path, Console())
    begun: list[str] = []
    monkeypatch.setattr(prefect_server, "spawn", lambda name, *_, **details: begun.append(f"{name} {details['token']}"))
    start_prefect(tmp_path)
    assert not older.alive() and begun == [f"prefect {credential(tmp_path)}"]
    assert running("worker", tmp_path) is None
    stop(older, tmp_path)
