"""Fetching one URL: within a deadline, a size and the web's public addresses, retried when the failure can heal.

img2dataset fetches through the opener that a process has installed in `urllib.request`. Its own calls have no total
deadline (an endless stream holds a thread for ever), retry what cannot heal, and follow redirects anywhere; `WebOpener`
takes that place and says why a fetch failed in a small, stable vocabulary.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import random
import socket
import ssl
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from types import TracebackType
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from stages.contract import StageError

DEFAULT_PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 10
FIRST_PAUSE = 0.5

# X-Robots-Tag directives by which a site keeps its images out of training data, and those that have a value of their own.
NO_AI = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})

# Reasons that another try may not meet again. Everything else is final: a page that is gone stays gone.
HEALABLE = frozenset({"timeout", "connection", "dns", "truncated", "bad_response", "http_408", "http_425", "http_429"})


class FetchError(Exception):
    """Why a fetch failed; its text is the reason and nothing else, since it becomes a column and a counter."""


def can_heal(reason: str) -> bool:
    """Whether fetching again may end better: server errors, rate limits, timeouts, broken connections, name lookups."""
    return reason in HEALABLE or reason.startswith("http_5")


@dataclass(frozen=True)
class Limits:
    """What one URL may cost, and whether its site may forbid its use.

    Attributes:
        timeout: seconds without a byte.
        deadline: seconds for everything, retries and pauses included.
        retries: further tries after a failure that can heal.
        max_bytes: of the body.
        respect_noai: whether X-Robots-Tag is obeyed.
        robot: the name that a site may address there.
    """

    timeout: float
    deadline: float
    retries: int
    max_bytes: int
    respect_noai: bool = True
    robot: str | None = None


class Fetched:
    """A response that has been read: what img2dataset asks of urllib's."""

    def __init__(self, headers: Message, body: bytes):
        self.headers = headers
        self.body = body

    def read(self) -> bytes:
        return self.body

    def __enter__(self) -> Fetched:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


class WebOpener(urllib.request.OpenerDirector):
    """An opener for `urllib.request.install_opener`.

    Args:
        limits: see `Limits`.
        hosts: host name -> ``host[:port]`` to connect to in its place; such a host may be anywhere, since a person named it.
        allow_private: whether addresses that are not public (private, loopback, link-local, cloud metadata) may be dialled.
    """

    def __init__(self, limits: Limits, hosts: Mapping[str, str] | None = None, allow_private: bool = False):
        super().__init__()
        self.limits = limits
        self.hosts = {name.lower(): _host_and_port(place) for name, place in (hosts or {}).items()}
        self.allow_private = allow_private
        self.tls = ssl.create_default_context()
        # Set through the attribute that exists for it, so that reads over TLS end at the deadline too.
        self.tls.sslsocket_class = _TlsSocket

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        """Fetch a `urllib.request.Request`.

        Raises:
            FetchError: the reason.
        """
        end = time.monotonic() + self.limits.deadline
        for attempt in range(self.limits.retries + 1):
            try:
                return self._follow(fullurl.full_url, dict(fullurl.header_items()), end)
            except FetchError as error:
                # Jitter, so that the threads that one broken server holds do not come back all at once.
                pause = FIRST_PAUSE * 2**attempt * random.uniform(0.75, 1.25)
                if not can_heal(str(error)) or attempt == self.limits.retries or time.monotonic() + pause >= end:
                    raise
                time.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _follow(self, url: str, headers: dict[str, str], end: float) -> Fetched:
        """Fetch a URL through its redirects; each of them is checked like the first address."""
        for _ in range(MAX_REDIRECTS + 1):
            try:
                found = self._get(url, headers, end)
            except socket.gaierror:
                raise FetchError("dns") from None
            except TimeoutError:
                raise FetchError("deadline" if time.monotonic() >= end else "timeout") from None
            except ssl.SSLError:
                raise FetchError("tls") from None
            except http.client.IncompleteRead:
                raise FetchError("truncated") from None
            except http.client.RemoteDisconnected:
                raise FetchError("connection") from None
            except http.client.InvalidURL:
                raise FetchError("bad_url") from None
            except (http.client.HTTPException, ValueError):
                raise FetchError("bad_response") from None
            except OSError:
                raise FetchError("connection") from None
            if isinstance(found, Fetched):
                return found
            url = found
        raise FetchError("too_many_redirects")

    def _get(self, url: str, headers: dict[str, str], end: float) -> Fetched | str:
        """One request: the response, or the address that it redirects to."""
        scheme, host, port, target = _parse(url)
        connection = http.client.HTTPConnection(host, port)
        connection.default_port = DEFAULT_PORTS[scheme]
        connection.sock = self._connect(scheme, host, port, end)
        try:
            connection.request("GET", target, headers=headers | {"Accept-Encoding": "identity", "Connection": "close"})
            response = connection.getresponse()
            if response.status in REDIRECTS and (location := response.headers.get("Location")):
                return urljoin(url, location.strip())
            if response.status != 200:
                raise FetchError(f"http_{response.status}")
            if self.limits.respect_noai and forbids_training(response.headers, self.limits.robot):
                raise FetchError("disallowed")
            return Fetched(response.headers, self._body(response))
        finally:
            connection.close()

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        """The body, read in pieces so that one that is too large is noticed at the limit and not when memory is gone."""
        expected = response.length
        if expected is not None and expected > self.limits.max_bytes:
            raise FetchError("too_large")
        body = io.BytesIO()
        while piece := response.read1(65_536):
            body.write(piece)
            if body.tell() > self.limits.max_bytes:
                raise FetchError("too_large")
        if expected is not None and body.tell() < expected:
            raise FetchError("truncated")
        return body.getvalue()

    def _connect(self, scheme: str, host: str, port: int, end: float) -> socket.socket:
        """A connected socket that stops at the deadline; every address is judged before it is dialled."""
        place, place_port = self.hosts.get(host.lower(), (host, None))
        named = host.lower() in self.hosts
        addresses = socket.getaddrinfo(place, place_port or port, type=socket.SOCK_STREAM)
        error: OSError = ConnectionError()
        for family, kind, protocol, _, address in addresses:
            if not named and not self.allow_private and not is_public(str(address[0])):
                raise FetchError("forbidden_address")
            plain = _PlainSocket(family, kind, protocol)
            plain.end, plain.patience = end, self.limits.timeout
            try:
                plain.settimeout(_patience(plain))
                plain.connect(address)
                return self._over_tls(plain, host) if scheme == "https" else plain
            except OSError as problem:
                plain.close()
                error = problem
        raise error

    def _over_tls(self, plain: _PlainSocket, host: str) -> socket.socket:
        plain.settimeout(_patience(plain))
        secure: Any = self.tls.wrap_socket(plain, server_hostname=host)
        secure.end, secure.patience = plain.end, plain.patience
        return secure


class _PlainSocket(socket.socket):
    """Every wait for bytes is `patience` seconds at most, and never beyond `end`, also while headers trickle in."""

    end: float = float("inf")
    patience: float = 60.0

    def recv_into(self, *arguments: Any, **named: Any) -> int:
        self.settimeout(_patience(self))
        return super().recv_into(*arguments, **named)


class _TlsSocket(ssl.SSLSocket):
    end: float = float("inf")
    patience: float = 60.0

    def recv_into(self, *arguments: Any, **named: Any) -> int:
        self.settimeout(_patience(self))
        return super().recv_into(*arguments, **named)


def _patience(waiting: _PlainSocket | _TlsSocket) -> float:
    left = waiting.end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return min(waiting.patience, left)


def forbids_training(headers: Message, robot: str | None) -> bool:
    """Whether X-Robots-Tag keeps an image out of training data: ``[ROBOT:] DIRECTIVE[: VALUE], DIRECTIVE ...``."""
    for header in headers.get_all("X-Robots-Tag", []):
        addressed = True
        for part in header.lower().split(","):
            name, colon, value = (piece.strip() for piece in part.partition(":"))
            if colon and name not in WITH_VALUE:
                addressed = name == (robot or "").lower()
                name = value
            if addressed and name in NO_AI:
                return True
    return False


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public web (an IPv4 address inside an IPv6 one counts as itself)."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    return ip.is_global and not ip.is_multicast


def _parse(url: str) -> tuple[str, str, int, str]:
    """(scheme, host, port, request target), with what people put into URLs percent-encoded.

    Raises:
        FetchError: not an http or https URL with a host.
    """
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
        if scheme not in DEFAULT_PORTS or not host:
            raise ValueError(url)
        host = host.encode("idna").decode("ascii")
    except ValueError:
        raise FetchError("bad_url") from None
    target = quote(parts.path or "/", safe="%/:=&?~+!$,;'@()*[]") + (
        "?" + quote(parts.query, safe="%/:=&?~+!$,;'@()*[]") if parts.query else ""
    )
    return scheme, host, port or DEFAULT_PORTS[scheme], target


def _host_and_port(place: str) -> tuple[str, int | None]:
    """``host`` or ``host:port`` of `download.hosts`.

    Raises:
        StageError: neither.
    """
    host, _, port = place.partition(":")
    if not host or (port and not port.isdigit()):
        raise StageError(f"hosts: {place!r} is no place to connect to; expected host or host:port")
    return host, int(port) if port else None
