"""Servers on this machine are asked directly, whatever proxy the environment names and in whatever spelling."""

from __future__ import annotations

import os
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest

from infra.loopback import HOSTS, ask_loopback_directly, is_loopback, without_proxy
from infra.prefect_server import answers, check_api
from infra.processes import ServerError, log_of, spawn
from infra.ray_jobs import RayJobs


class Asked(BaseHTTPRequestHandler):
    """A company's proxy, which knows nothing of this machine's loopback, and a server that nobody is to ask through it."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_error(404 if self.path.startswith("/") else 502)

    do_CONNECT = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def servers() -> Iterator[tuple[ThreadingHTTPServer, ThreadingHTTPServer]]:
    both = ThreadingHTTPServer(("127.0.0.1", 0), Asked), ThreadingHTTPServer(("127.0.0.1", 0), Asked)
    for server in both:
        server.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield both
    for server in both:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_no_client_asks_a_proxy_for_a_server_of_this_machine(
    variable: str, servers: tuple[ThreadingHTTPServer, ThreadingHTTPServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, proxy = servers
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        for spelling in (name, name.upper()):
            monkeypatch.delenv(spelling, raising=False)
    monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setattr(urllib.request, "_opener", None)
    address = f"http://127.0.0.1:{own.server_port}"
    assert not RayJobs(address, "secret").ready()
    with pytest.raises(ServerError):
        [*RayJobs(address, "secret").follow("one", tick=0.01)]
    assert not answers(address)
    check_api(f"{address}/api")
    # Prefect's client is httpx, which goes by the environment.
    ask_loopback_directly()
    assert httpx.get(f"{address}/health").status_code == 404
    assert own.asked[::5] == ["/api/version", "/health"] and not proxy.asked  # type: ignore[attr-defined]
    assert httpx.get("http://ray.example:8265/api/version").status_code == 502
    assert proxy.asked  # type: ignore[attr-defined]


def test_a_socks_proxy_of_the_environment_stops_nobody(
    servers: tuple[ThreadingHTTPServer, ThreadingHTTPServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    # `ask_loopback_directly` sets these for good.
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    ask_loopback_directly()
    assert httpx.get(f"http://127.0.0.1:{servers[0].server_port}/health").status_code == 404


def test_children_ask_loopback_directly_too(tmp_path: Path) -> None:
    environment = {**os.environ, "http_proxy": "http://proxy.example:3128", "NO_PROXY": "head"}
    environment.pop("no_proxy", None)
    server = spawn(
        "child", [sys.executable, "-c", "import os; print(os.environ['no_proxy'])"], environment, tmp_path, address="x"
    )
    with suppress(psutil.NoSuchProcess):  # it may have ended by now
        psutil.Process(server.pid).wait(20)
    assert log_of("child", tmp_path).read_text().strip().split(",") == ["head", *HOSTS]


def test_the_exceptions_of_the_user_stay() -> None:
    ours = ",".join(HOSTS)
    assert without_proxy({}) == {"no_proxy": ours, "NO_PROXY": ours}
    assert without_proxy({"no_proxy": " a, .b ", "NO_PROXY": "c"}) == {"no_proxy": f"a,.b,{ours}", "NO_PROXY": f"c,{ours}"}
    assert without_proxy({"no_proxy": "*"}) == {"no_proxy": "*", "NO_PROXY": "*"}
    again = without_proxy({"no_proxy": "a"})
    assert without_proxy(again) == again


@pytest.mark.parametrize(
    ("url", "own"),
    [
        ("http://127.0.0.1:8265", True),
        ("http://127.9.9.9", True),
        ("http://localhost:4200/api", True),
        ("http://[::1]:8265", True),
        ("http://127.0.0.1.example", False),
        ("http://head:8265", False),
        ("http://10.0.0.1:8265", False),
    ],
)
def test_which_hosts_are_this_machine(url: str, own: bool) -> None:
    assert is_loopback(url) is own
