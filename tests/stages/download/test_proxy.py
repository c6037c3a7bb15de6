"""Downloads behind a proxy, which is one of the tests' own on loopback: what it is asked for, and what it is never asked for."""

from __future__ import annotations

import http.client
import select as sockets
import socket
from functools import partial
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

import pytest

from stages.download.fetch import can_heal
from stages.download.network import LOOKUP_FAILURES, ForbiddenAddress, Guard, Wait, dial
from stages.download.proxy import Proxies, Proxy, ProxyFailed
from stages.download.stage import Download
from stages.runner.recipe import RecipeError, parse_recipe
from tests.stages.hostile_tls import tls_web
from tests.stages.hostile_web import HOST, Server, hostile_web, served
from tests.stages.pages import selector, table_of

SECRET = "s3cr:t"
AUTHORIZATION = "Basic dXNlcjpzM2NyOnQ="  # base64 of user:s3cr:t
FAST = {"timeout": 2.0, "deadline": 4.0, "retries": 0, "min_image_size": 64}


class Relay(BaseHTTPRequestHandler):
    """A proxy that finds the hostile web behind every name but those that begin with ``nobody``."""

    asked: list[tuple[str, str]] = []
    authorizations: set[str | None] = set()
    web = secure = ""
    refuses = False

    def log_message(self, *_: object) -> None:
        pass

    def admitted(self, host: str | None) -> bool:
        self.asked.append((self.command, self.path))
        self.authorizations.add(self.headers["Proxy-Authorization"])
        status = 407 if self.refuses else 503 if str(host).startswith("nobody") else 0
        if status:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
        return not status

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if not self.admitted(url.hostname):
            return
        assert self.headers["Host"] == url.netloc
        connection = http.client.HTTPConnection(self.web)
        connection.request("GET", url.path, headers={"Host": url.netloc})
        response = connection.getresponse()
        self.wfile.write(f"HTTP/1.1 {response.status} X\r\n{response.headers}".encode("latin-1") + response.read())
        connection.close()

    def do_CONNECT(self) -> None:
        if not self.admitted(self.path.split(":")[0]):
            return
        host, _, port = self.secure.partition(":")
        with socket.create_connection((host, int(port))) as behind:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            ends = {self.connection: behind, behind: self.connection}
            while True:
                for end in sockets.select(list(ends), [], [], 5)[0] or [behind]:
                    if not (data := end.recv(65_536)):
                        return
                    ends[end].sendall(data)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    with hostile_web() as web, tls_web(folder) as secure, served(Server(("127.0.0.1", 0), Relay)) as place:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSL_CERT_FILE", str(folder / "authority.pem"))
            Relay.web, Relay.secure = web, secure
            yield place


@pytest.fixture
def proxy(place, monkeypatch):
    """``host:port`` of the proxy, which forgets what it was asked; the machine's own look-up knows two names."""
    Relay.asked.clear()
    Relay.authorizations.clear()
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    known = {"inside.example": "10.0.0.1", "both.example": "127.0.0.1"}

    def resolve(host, port, wait):
        return socket.getaddrinfo(known.get(host, host), port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)

    def listening(family, address, wait):
        assert address[0] == "127.0.0.1", address
        return dial(family, address, wait)

    monkeypatch.setattr("stages.download.network.Guard", partial(Guard, resolve=resolve, dial=listening))
    return place


@pytest.fixture
def statuses(tmp_path, store, make, in_process):
    """(URLs, download's fields) -> URL -> status."""

    def statuses(urls, **config):
        dataset = make(Download, store, {"rows": selector(tmp_path, make)(store, urls)}, **FAST, **config)
        table = table_of(dataset)
        return dict(zip(table["url"].to_pylist(), table["status"].to_pylist(), strict=True))

    return statuses


ASKED = {
    f"http://{HOST}/jpeg": "success",
    f"http://{HOST}:8080/png": "success",
    f"http://{HOST}/redirect": "success",
    f"http://{HOST}/status-404": "http_404",
    "http://nobody.example/jpeg": "http_503",
    "https://trusted.example/jpeg": "success",
    "https://self-signed.example/jpeg": "tls",
    "https://nobody.example/jpeg": "connection",
    f"http://{HOST}/redirect-to-metadata": "forbidden_address",
    f"http://{HOST}/redirect-to-loopback": "forbidden_address",
}
# What can be told to be private before the proxy is asked.
REFUSED = [
    "http://127.0.0.1/jpeg", "http://169.254.169.254/latest", "http://2130706433/jpeg", "http://0x7f.0.0.0x1/jpeg",
    "http://[::1]/jpeg", "https://10.0.0.1/jpeg", "http://localhost/jpeg", "http://intranet/jpeg",
    "http://metadata.google.internal/jpeg", "http://printer.local./jpeg", "https://inside.example/jpeg",
]  # fmt: skip


@pytest.mark.parametrize("given", ["recipe", "environment"])
def test_a_proxy_is_asked_for_all_but_what_is_private(proxy, statuses, monkeypatch, caplog, given):
    address = f"http://user:s3cr%3At@{proxy}"
    if given == "environment":
        monkeypatch.setenv("http_proxy", address)
        monkeypatch.setenv("HTTPS_PROXY", address.removeprefix("http://"))
    config = {"proxy": f"http://{proxy}"} if given == "recipe" else {}
    wanted = ASKED | dict.fromkeys(REFUSED, "forbidden_address")
    assert statuses(list(wanted), **config) == wanted
    expected = [("CONNECT", f"{url.split('/')[2]}:443") for url in ASKED if url.startswith("https")]
    expected += [("GET", url) for url in [*ASKED, f"http://{HOST}/jpeg"] if not url.startswith("https")]
    assert sorted(Relay.asked) == sorted(expected)
    assert Relay.authorizations == {AUTHORIZATION if given == "environment" else None}
    (line,) = [message for message in caplog.messages if "proxy" in message]
    assert f"downloads go through the proxy http://{proxy}, which looks names up itself" in line
    assert "s3cr" not in caplog.text and "user" not in line


def test_hosts_that_are_named_and_no_proxy_go_without(proxy, statuses, monkeypatch):
    monkeypatch.setenv("all_proxy", f"http://{proxy}")
    monkeypatch.setenv("no_proxy", "elsewhere.example,.example:99")
    urls = {f"http://{HOST}/jpeg": "success", "http://elsewhere.example/jpeg": "dns", "http://x.example/png": "success"}
    assert statuses(list(urls), hosts={HOST: Relay.web}) == urls
    assert Relay.asked == [("GET", "http://x.example/png")]
    assert statuses([f"http://{HOST}/png", "http://x.example/png"], hosts={HOST: Relay.web}, proxy="none") == {
        f"http://{HOST}/png": "success",
        "http://x.example/png": "dns",
    }
    assert len(Relay.asked) == 1


def test_where_the_proxy_is_at_fault_the_rows_say_so(proxy, statuses, monkeypatch):
    fine = {f"http://{HOST}/jpeg": "success"}
    urls = ["http://a.example/jpeg", "https://a.example/jpeg"]
    monkeypatch.setattr(Relay, "refuses", True)
    expected = fine | dict.fromkeys(urls, "proxy")
    assert statuses([*fine, *urls], hosts={HOST: Relay.web}, proxy=f"http://{proxy}") == expected
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{nobody.getsockname()[1]}"
        assert statuses([*fine, *urls[:1]], hosts={HOST: Relay.web}, proxy=closed) == fine | {urls[0]: "proxy"}
    assert can_heal("proxy")


def test_a_proxy_of_another_kind_is_not_used_and_said(proxy, statuses, monkeypatch, caplog):
    monkeypatch.setenv("all_proxy", "socks5://user:secret@127.0.0.1:1080")
    urls = {f"http://{HOST}/jpeg": "success", "http://x.example/png": "dns"}
    assert statuses(list(urls), hosts={HOST: Relay.web}) == urls
    (line,) = [message for message in caplog.messages if "proxy" in message]
    assert "the environment's all_proxy is not used for downloads: it is no HTTP proxy; name one in the recipe" in line
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    "address", ["socks5://u:secret@h:1080", "https://u:secret@h", "http://u:secret@", "http://u:se/cret@h:x", ""]
)
def test_a_proxy_that_is_none_is_a_mistake_in_the_recipe_and_its_password_stays_secret(tmp_path, address):
    subset = {"select": {"metadata": ["x.parquet"]}, "download": {"proxy": address}}
    with pytest.raises(
        RecipeError, match="^subsets.a.download.proxy: expected the address of an HTTP proxy, http://host"
    ) as raised:
        parse_recipe({"name": "x", "subsets": {"a": subset}}, tmp_path)
    assert "secret" not in str(raised.value) and "cret" not in str(raised.value)


def test_a_proxy_with_a_password_is_no_part_of_a_recipe(tmp_path):
    subset = {"select": {"metadata": ["x.parquet"]}, "download": {"proxy": "http://u:secret@h:3128"}}
    refused = "^subsets.a.download.proxy: a password in a recipe is shown with it; set http_proxy where the workers run"
    with pytest.raises(RecipeError, match=refused) as raised:
        parse_recipe({"name": "x", "subsets": {"a": subset}}, tmp_path)
    assert "secret" not in str(raised.value)


def test_look_ups_that_never_answer_are_given_up(place):
    asked = []

    def resolve(host, port, wait):
        if host == "127.0.0.1":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]
        asked.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "no answer in time")

    guard = Guard(resolve=resolve, proxies=Proxies(place))
    for number in range(LOOKUP_FAILURES + 5):
        guard.connect("http", f"{number}.example", 80, Wait(2, float("inf"))).close()
    assert len(asked) == LOOKUP_FAILURES
    with pytest.raises(ForbiddenAddress):
        guard.connect("http", "127.0.0.1", 80, Wait(2, float("inf")))


def test_an_answer_to_connect_that_cannot_be_read_is_the_proxys_fault():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"I am no proxy\r\n\r\n")
        with pytest.raises(ProxyFailed):
            Proxy("proxy.example", 3128).tunnel(ours, "a.example", 443)
        assert theirs.recv(1000) == b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n"
