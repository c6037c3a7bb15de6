"""Child servers, and the client of Ray's Jobs API against a small stand-in that misbehaves on purpose."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

from infra import prefect_server, ray_cluster, ray_jobs
from infra.loopback import warn_of_clear_text
from infra.prefect_server import answers, check_api
from infra.processes import (
    ServerError,
    free_port,
    free_ports,
    locked,
    log_of,
    nobody_else,
    recorded,
    share,
    spawn,
    stop,
    strays,
    wait_until_ready,
)
from infra.ray_cluster import configured_ray
from infra.ray_jobs import RayJobs

# A server with a child that ignores SIGTERM and a grandchild in a session of its own.
STUBBORN = """
import signal, subprocess, sys, time
child = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);" \\
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
print("up", flush=True)
time.sleep(600)
"""


def all_of(pid: int, count: int) -> list[psutil.Process]:
    """The process and its descendants, once there are `count` of them."""
    for _ in range(300):
        found = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        if len(found) == count:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{found} instead of {count} processes")


def test_stopping_a_server_ends_what_it_started_also_what_resists(tmp_path: Path) -> None:
    server = spawn("stubborn", [sys.executable, "-c", STUBBORN], dict(os.environ), tmp_path, address="http://nowhere")
    family = all_of(server.pid, 3)
    assert recorded("stubborn", tmp_path) == server
    stop(server, tmp_path, grace=2.0)
    assert not any(process.is_running() for process in family)
    assert recorded("stubborn", tmp_path) is None and not (tmp_path / "stubborn.json").exists()


def test_what_a_killed_server_leaves_is_found_by_its_mark(tmp_path: Path) -> None:
    server = spawn("stubborn", [sys.executable, "-c", STUBBORN], dict(os.environ), tmp_path, address="http://nowhere")
    family = all_of(server.pid, 3)
    (tmp_path / "stubborn.json").unlink()
    psutil.Process(server.pid).kill()
    psutil.wait_procs(family[:1], timeout=10)
    assert {process.pid for process in strays(tmp_path)} == {process.pid for process in family[1:]}
    assert strays(tmp_path.parent) == []
    for process in family[1:]:
        process.kill()


def test_another_process_with_the_same_pid_is_not_the_server(tmp_path: Path) -> None:
    server = spawn("short", [sys.executable, "-c", "import time; time.sleep(600)"], dict(os.environ), tmp_path, address="x")
    assert server.alive()
    assert not server.model_copy(update={"created": server.created - 60}).alive()
    stop(server, tmp_path)


def test_a_server_that_ends_while_starting_says_its_last_line_and_leaves_no_record_and_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    command = [sys.executable, "-c", "raise SystemExit('no room left')"]
    server = spawn("broken", command, dict(os.environ), tmp_path, address="x", folder=str(folder))
    with pytest.raises(ServerError, match=r"the embedded broken server ended while starting: no room left"):
        wait_until_ready(server, lambda: False, tmp_path, 20)
    assert recorded("broken", tmp_path) is None and not folder.exists()
    assert log_of("broken", tmp_path).read_text().strip() == "no room left"


@pytest.mark.parametrize("failures", [1, 2])
def test_a_ray_that_ends_while_starting_is_started_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failures: int
) -> None:
    commands = ["raise SystemExit('timed out')"] * failures + ["import time; time.sleep(600)"]
    started: list[str] = []

    def command(*_: Any) -> list[str]:
        started.append(commands[len(started)])
        return [sys.executable, "-c", started[-1]]

    monkeypatch.setattr(ray_cluster, "_command", command)
    monkeypatch.setattr(ray_jobs.RayJobs, "ready", lambda self: started[-1] == commands[-1])
    if failures == 2:
        with pytest.raises(ServerError, match="the embedded ray server ended while starting: timed out"):
            ray_cluster.start_ray(tmp_path)
        assert len(started) == 2 and recorded("ray", tmp_path) is None
        return
    server = ray_cluster.start_ray(tmp_path)
    assert server.alive() and recorded("ray", tmp_path) == server
    assert "the embedded ray server ended while starting: timed out" in caplog.text and "once more" in caplog.text
    stop(server, tmp_path)


def test_the_record_is_for_its_owner_only(tmp_path: Path) -> None:
    server = spawn("secret", [sys.executable, "-c", ""], dict(os.environ), tmp_path, address="x", token="t")
    assert (tmp_path / "secret.json").stat().st_mode & 0o077 == 0
    stop(server, tmp_path)


def test_a_port_in_use_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = free_ports("127.0.0.1", "127.0.0.1")
    monkeypatch.setattr("infra.processes.PORTS", [one, other])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", one))
        taken.listen()
        assert {free_port() for _ in range(20)} == {other}
        monkeypatch.setattr("infra.processes.PORTS", [one])
        with pytest.raises(ServerError, match=f"^no free port from {one} to {one}; stop what listens there$"):
            free_port()


@pytest.mark.skipif(sys.platform != "linux", reason="where the range can be read")
def test_no_connection_of_this_system_takes_the_port_of_a_server_that_is_about_to_start() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(free_ports(*["127.0.0.1"] * 500)) < first


def test_a_program_that_speaks_another_language_at_the_address_is_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def speak() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"\0\0\x12\4\0\0\0\0\0")

        thread = threading.Thread(target=speak)
        thread.start()
        assert not answers(f"http://127.0.0.1:{other.getsockname()[1]}")
        thread.join()


def test_ports_of_one_server_differ_also_on_different_addresses() -> None:
    # Drawn one by one, some of so many would be alike.
    ports = free_ports(*["127.0.0.1", "127.0.0.2"] * 400)
    assert len(set(ports)) == 800


def test_the_last_user_of_a_lock_knows_it(tmp_path: Path) -> None:
    with locked(tmp_path / "users", shared=True) as first:
        with locked(tmp_path / "users", shared=True) as second:
            assert not nobody_else(first)
        assert second.closed
        assert nobody_else(first)
        share(first)


def test_an_address_that_is_not_of_the_jobs_api_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ServerError, match="RAY_ADDRESS=10.0.0.1:6379: expected the Jobs API, such as http://head:8265"):
        configured_ray()


class Stand:
    """Answers as the Jobs API does; the log stream breaks off after `breaks` until all of it has been asked for twice."""

    log = "first\nsecond line\nthird\nlast, without an end"

    def __init__(self) -> None:
        self.version, self.python, self.mode = "0.0.0", "3.8.1", "token"
        self.connections = 0
        self.address = ""
        self.hiccups = 0
        self.asked: list[str] = []

    def answer(self, connection: ServerConnection, request: Request) -> Response | None:
        public = request.path == "/api/authentication_mode"
        if not public and request.headers.get("Authorization") != "Bearer secret":
            return connection.respond(401, "Unauthorized")
        if request.path.endswith("/tail"):
            return None
        self.asked.append(request.path)
        if self.hiccups and not public:
            self.hiccups -= 1
            return connection.respond(502, "Bad Gateway")
        ended = self.connections >= 2
        body = {
            "/api/authentication_mode": {"authentication_mode": self.mode},
            "/api/version": {"ray_version": self.version},
            "/api/v0/cluster_metadata": {"data": {"pythonVersion": self.python}},
            "/api/admin/version": self.version,
            "/api/jobs/one": {"status": "SUCCEEDED" if ended else "RUNNING"},
            "/api/jobs/one/logs": {"logs": self.log},
            "/api/jobs/": [{"submission_id": "one", "status": "RUNNING"}, {"submission_id": None, "status": "FAILED"}],
        }.get(request.path)
        if body is None:
            return connection.respond(404, f"Traceback\nJob {request.path} does not exist")
        data = json.dumps(body).encode()
        return Response(200, "OK", Headers([("Content-Length", str(len(data))), ("Connection", "close")]), data)

    def stream(self, socket: ServerConnection) -> None:
        self.connections += 1
        # The first connection breaks in the middle of a line, the second ends before the log does.
        for chunk in [["first\nsec"], ["first\nsecond ", "line\nthi"]][min(self.connections, 2) - 1]:
            socket.send(chunk)


@contextmanager
def standing() -> Iterator[Stand]:
    stand = Stand()
    with serve(stand.stream, "127.0.0.1", 0, process_request=stand.answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stand.address = f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        yield stand
        server.shutdown()


def test_following_gives_each_line_once_over_broken_streams() -> None:
    with standing() as stand:
        lines = [line for line in RayJobs(stand.address, "secret").follow("one", tick=0.05) if line is not None]
        assert stand.connections == 2
    assert lines == stand.log.split("\n")


def test_following_outlives_a_proxy_without_answers_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "PAUSE", 0.01)
    with standing() as stand:
        jobs = RayJobs(stand.address, "secret")
        stand.hiccups = 3
        assert [line for line in jobs.follow("one", tick=0.05) if line is not None] == stand.log.split("\n")
        assert stand.hiccups == 0
        monkeypatch.setattr(ray_jobs, "PATIENCE", 0.1)
        stand.hiccups = 1000
        with pytest.raises(ServerError, match="GET /api/jobs/one: Bad Gateway"):
            jobs.status("one")
        stand.hiccups, stand.asked = 1000, []
        with pytest.raises(ServerError):
            jobs.check()
        assert not jobs.ready()
        assert stand.asked == ["/api/authentication_mode", "/api/version", "/api/version"], "a command that begins asks once"


def test_a_job_is_submitted_once_whatever_answer_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    came = []

    def urlopen(request: urllib.request.Request, timeout: float) -> None:
        came.append(request.get_method())
        raise TimeoutError

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(ServerError, match="no Ray Jobs API answers"):
        RayJobs("http://ray.example:8265").submit("one", "true")
    assert came == ["POST"]


def test_jobs_without_a_submission_are_nobodys() -> None:
    with standing() as stand:
        assert RayJobs(stand.address, "secret").statuses() == {"one": "RUNNING"}


@pytest.mark.parametrize(
    ("token", "path", "said"),
    [
        (None, "one", "asks for a token, and there is none here; set RAY_AUTH_TOKEN"),
        ("expired", "one", "refuses the token; set RAY_AUTH_TOKEN"),
        ("secret", "two", "Job /api/jobs/two does not exist"),
    ],
)
def test_a_refusal_is_one_line(token: str | None, path: str, said: str) -> None:
    with standing() as stand, pytest.raises(ServerError, match=said) as refusal:
        RayJobs(stand.address, token).status(path)
    assert "\n" not in str(refusal.value)


def test_a_cluster_with_another_ray_or_python_is_refused_and_one_with_another_patch_is_not() -> None:
    with standing() as stand:
        jobs = RayJobs(stand.address, "secret")
        with pytest.raises(ServerError, match=r"is 0\.0\.0, here it is .*; install on the cluster what requirements.lock names"):
            jobs.check()
        with pytest.raises(ServerError, match="refuses the token; set RAY_AUTH_TOKEN"):
            RayJobs(stand.address, "expired").check()
        with pytest.raises(ServerError, match="asks for a token, and there is none here; set RAY_AUTH_TOKEN"):
            RayJobs(stand.address).check()
        stand.version = ".".join([*version("ray").split(".")[:2], "99"])
        with pytest.raises(ServerError, match=r"Python at .* is 3\.8\.1, here it is .*; use the same on both"):
            jobs.check()
        stand.python = ".".join([*platform.python_version_tuple()[:2], "99"])
        jobs.check()


def test_a_cluster_that_asks_for_no_token_is_refused_unless_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    with standing() as stand:
        stand.mode, stand.version, stand.python = "disabled", version("ray"), platform.python_version()
        with pytest.raises(ServerError, match=r"asks for no token, so .*RAY_AUTH_MODE=token, or set UNIDIFFUSER_OPEN_RAY=1 if"):
            RayJobs(stand.address, "secret").check()
        monkeypatch.setenv(ray_jobs.OPEN, "1")
        RayJobs(stand.address, "secret").check()


def test_a_secret_that_would_travel_in_clear_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    for quiet in ("http://127.0.0.1:8265", "https://head:8265"):
        warn_of_clear_text(quiet, "the token")
    assert caplog.messages == []
    for _ in range(2):
        warn_of_clear_text("http://head:8265", "the token")
    assert caplog.messages == [
        "the token travels in clear to http://head:8265: name it with https://, or let nobody else into its network"
    ]


def test_addresses_of_servers_hold_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "https://me:pl4nted@head:8265")
    monkeypatch.setenv("PREFECT_API_URL", "https://me:pl4nted@prefect.example/api")
    for ask, fix in ((configured_ray, "RAY_AUTH_TOKEN"), (prefect_server.configured_api, "PREFECT_API_AUTH_STRING")):
        with pytest.raises(ServerError, match=f"holds a password, which would be shown; set {fix}") as refusal:
            ask()
        assert "pl4nted" not in str(refusal.value)


def test_a_prefect_server_that_cannot_be_used_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)
    with standing() as stand:
        monkeypatch.setenv("PREFECT_API_KEY", "expired")
        with pytest.raises(ServerError, match="refuses the key; set PREFECT_API_KEY"):
            check_api(f"{stand.address}/api")
        monkeypatch.delenv("PREFECT_API_KEY")
        with pytest.raises(ServerError, match="asks for a key, and there is none here; set PREFECT_API_KEY"):
            check_api(f"{stand.address}/api")
        monkeypatch.setenv("PREFECT_API_KEY", "secret")
        major, minor, *_ = map(int, version("prefect").split("."))
        stand.version = f"{major}.{minor - 1}.99"
        with pytest.raises(ServerError, match=r"is .*\.99, here it is .*; a server must not be older than its clients"):
            check_api(f"{stand.address}/api")
        stand.version = f"{major}.{minor + 1}.0"
        check_api(f"{stand.address}/api")
        # Prefect's own client would refuse it, with a traceback.
        stand.version = "99.0.0"
        with pytest.raises(ServerError, match=rf"is 99\.0\.0, here it is .*; name a server of version {major} in"):
            check_api(f"{stand.address}/api")
    with pytest.raises(ServerError, match=r"no Prefect server answers at .* \(.*refused\); start it, or unset PREFECT_API_URL"):
        check_api(f"{stand.address}/api")


def test_a_prefect_server_is_asked_with_what_prefects_own_client_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def open_url(request: urllib.request.Request, timeout: float) -> None:
        sent.append(request.get_header("Authorization"))
        raise TimeoutError

    monkeypatch.setattr(prefect_server, "open_url", open_url)
    monkeypatch.setenv("PREFECT_API_KEY", "of another server")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "somebody:secret")
    with pytest.raises(ServerError, match="no Prefect server answers"):
        check_api("http://prefect.example/api")
    theirs = SyncPrefectClient("http://prefect.example/api", auth_string="somebody:secret", api_key="of another server")
    assert sent == [theirs._client.headers["Authorization"]]


def test_no_ray_at_all_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = RayJobs(f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not jobs.ready()
    # The embedded one would be waited for in vain.
    begun = time.monotonic()
    with pytest.raises(ServerError, match="no Ray Jobs API answers at .*; the same command again starts Ray anew"):
        jobs.statuses()
    assert time.monotonic() - begun < ray_jobs.PATIENCE / 2
    monkeypatch.setattr(ray_jobs, "PATIENCE", 0.0)
    monkeypatch.setenv("RAY_ADDRESS", jobs.address)
    with pytest.raises(ServerError, match="no Ray Jobs API answers at .*; start the cluster, or unset RAY_ADDRESS"):
        jobs.statuses()


def test_a_machine_that_has_just_come_is_waited_for_until_it_tells_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = {"raylet": {"state": "ALIVE", "resourcesTotal": {"CPU": 2.0}}}
    told, jobs = [silent, silent | {"mem": [2**30, 0, 0, 0]}], RayJobs("http://127.0.0.1:1", "secret")
    monkeypatch.setattr(jobs, "_call", lambda *_, **__: {"data": {"summary": [told.pop(0) if told else silent]}})
    assert jobs.memory() == ([2**30], [])
    monkeypatch.setattr(ray_jobs, "SHORT_TIMEOUT", 0.1)
    with pytest.raises(ServerError, match="has no machine yet"):
        jobs.memory()
