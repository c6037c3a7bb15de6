"""Fetching one URL: within a deadline, a size and the web's public addresses, retried when the failure can heal.

img2dataset fetches through the opener that a process has installed in `urllib.request`. Its own calls have no total
deadline (an endless stream holds a thread for ever), retry what cannot heal, and follow redirects anywhere; `WebOpener`
takes that place and says why a fetch failed in a small, stable vocabulary.
"""

from __future__ import annotations

import email.utils
import http.client
import io
import random
import re
import socket
import ssl
import string
import time
import urllib.request
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from types import TracebackType
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from stages.download.network import ForbiddenAddress, Guard, Wait
from stages.download.politeness import FetchError, Hosts
from stages.download.proxy import ProxyFailed

DEFAULT_PORTS = {"http": 80, "https": 443}
WHOLE = (200, 203)
ALL_BYTES = re.compile(r"bytes 0-(\d+)/(\d+)", re.IGNORECASE)
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 10
FIRST_PAUSE = 0.5
PIECE = 65_536
GZIP = b"\x1f\x8b"

# X-Robots-Tag directives by which a site keeps its images out of training data (`none` is noindex and nofollow), those that
# have a value of their own, and robots' names: the half of a date behind its comma, "25-Jun-30 15:00:00 GMT", is none.
NO_AI = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
ROBOT = re.compile(r"[\w.*/-]+")

# Reasons that a later try may not meet again. Everything else is final: a page that is gone stays gone.
HEALABLE = frozenset(
    {"timeout", "deadline", "shard_deadline", "host_down", "connection", "dns", "proxy", "truncated", "bad_response",
     "http_408", "http_425", "http_429"}
)  # fmt: skip
# Of these, the ones that mean that enough has been tried for now.
ENOUGH = frozenset({"deadline", "shard_deadline", "host_down"})


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
        max_bytes: of the body, unpacked.
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
    """An opener for `urllib.request.install_opener`, for all shards that a worker has at once."""

    def __init__(self, limits: Limits, guard: Guard, hosts: Hosts):
        super().__init__()
        self.limits, self.guard, self.hosts = limits, guard, hosts

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        """Fetch a `urllib.request.Request`.

        Args:
            timeout: the moment (`time.monotonic`) at which the shard must be over: the engine hands through what it was given,
                and nothing else that tells one shard from another.

        Raises:
            FetchError: the reason.
        """
        wait = Wait(self.limits.timeout, time.monotonic() + self.limits.deadline, latest=timeout)
        for attempt in range(self.limits.retries + 1):
            try:
                return self._follow(fullurl.full_url, dict(fullurl.header_items()), wait)
            except FetchError as error:
                reason = str(error)
                # Jitter, so that the threads that one broken server holds do not come back all at once.
                pause = max(FIRST_PAUSE * 2**attempt * random.uniform(0.75, 1.25), error.pause or 0.0)
                last = attempt == self.limits.retries or time.monotonic() + pause >= wait.end
                if last or reason in ENOUGH or not can_heal(reason):
                    raise
                time.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _follow(self, url: str, headers: dict[str, str], wait: Wait) -> Fetched:
        """Fetch a URL through its redirects; each of them is checked like the first address."""
        for _ in range(MAX_REDIRECTS + 1):
            if time.monotonic() >= wait.latest:
                raise FetchError("shard_deadline")
            place = _parse(url)
            with self.hosts.turn(place[1], wait):
                found = self._try(place, headers, wait)
            if isinstance(found, Fetched):
                return found
            url = urljoin(url, found)
        raise FetchError("too_many_redirects")

    def _try(self, place: tuple[str, str, int, str], headers: dict[str, str], wait: Wait) -> Fetched | str:
        """One request, whatever goes wrong put into a word."""
        try:
            return self._get(*place, headers, wait)
        except FetchError:
            raise
        except ForbiddenAddress:
            raise FetchError("forbidden_address") from None
        except ProxyFailed:
            raise FetchError("proxy") from None
        except (socket.gaierror, UnicodeError):
            raise FetchError("dns") from None
        except TimeoutError:
            ended = "shard_deadline" if time.monotonic() >= wait.latest else "deadline"
            raise FetchError(ended if wait.over else "timeout") from None
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            # Cut off in the handshake: that says nothing of the certificate.
            raise FetchError("connection") from None
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

    def _get(self, scheme: str, host: str, port: int, target: str, headers: dict[str, str], wait: Wait) -> Fetched | str:
        """The response, or the address that it redirects to."""
        connection = http.client.HTTPConnection(host, port)
        connection.default_port = DEFAULT_PORTS[scheme]
        connection.sock = self.guard.connect(scheme, host, port, wait)
        proxy = self.guard.proxy_for(scheme, host, port) if scheme == "http" else None
        if proxy:
            target, headers = f"http://{_netloc(host, port)}{target}", headers | proxy.headers
        try:
            connection.request("GET", target, headers=headers | {"Accept-Encoding": "identity", "Connection": "close"})
            response = connection.getresponse()
            location = response.headers.get("Location") if response.status in REDIRECTS else None
            if proxy and response.status == 407:
                raise FetchError("proxy")
            if not location and response.status not in WHOLE and not _all_bytes(response):
                asked = response.headers.get("Retry-After") if response.status in (429, 503) else None
                raise FetchError(f"http_{response.status}", _retry_after(asked))
            # Also of a redirect: who owns the address may forbid what another serves for it.
            if self.limits.respect_noai and forbids_training(response.headers, self.limits.robot):
                raise FetchError("disallowed")
            if location:
                # Headers are read as Latin-1; what is no ASCII there goes back as the bytes that it was.
                return quote(location.strip(), safe=string.punctuation, encoding="iso-8859-1")
            return Fetched(response.headers, self._body(response))
        finally:
            connection.close()

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        """The body, read in pieces so that one that is too large is noticed at the limit and not when memory is gone."""
        expected = _all_bytes(response) or response.length
        if expected is not None and expected > self.limits.max_bytes:
            raise FetchError("too_large")
        body = io.BytesIO()
        while piece := response.read1(PIECE):
            body.write(piece)
            if body.tell() > self.limits.max_bytes:
                raise FetchError("too_large")
        if expected is not None and body.tell() < expected:
            raise FetchError("truncated")
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        return unpacked(body.getvalue(), encoding, self.limits.max_bytes)


def _all_bytes(response: http.client.HTTPResponse) -> int | None:
    """Bytes of a body that is called a part (206) and holds all of them, which nobody asked for; else None."""
    found = ALL_BYTES.fullmatch(response.headers.get("Content-Range", "").strip()) if response.status == 206 else None
    return int(found[2]) if found and int(found[1]) + 1 == int(found[2]) else None


def unpacked(data: bytes, encoding: str, limit: int) -> bytes:
    """A body without its Content-Encoding: some servers compress what they were asked to leave alone, others only say so.

    A gzip body may have several members; bytes behind the last are left out.

    Raises:
        FetchError: `too_large` beyond `limit` bytes, or `truncated`.
    """
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return data
    found, end = io.BytesIO(), 0
    while end == 0 or data.startswith(GZIP, end):
        unpack = zlib.decompressobj(zlib.MAX_WBITS | 32)
        while not unpack.eof:
            # In pieces, since what a member leaves over is copied.
            if not (piece := data[end : end + PIECE]):
                raise FetchError("truncated")
            try:
                found.write(unpack.decompress(piece, limit + 1 - found.tell()))
            except zlib.error:
                return data
            if found.tell() > limit:
                raise FetchError("too_large")
            end += len(piece) - len(unpack.unused_data)
    return found.getvalue()


def _netloc(host: str, port: int) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port == DEFAULT_PORTS["http"] else f"{name}:{port}"


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None when there is none that can be read."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def forbids_training(headers: Message, robot: str | None) -> bool:
    """Whether X-Robots-Tag keeps an image out of training data: ``[ROBOT:] DIRECTIVE[: VALUE], DIRECTIVE ...``.

    What can be read in two ways is read as the site's wish to be left alone.
    """
    for header in headers.get_all("X-Robots-Tag", []):
        addressed = True
        for part in header.lower().split(","):
            name, colon, value = (piece.strip() for piece in part.partition(":"))
            if name in WITH_VALUE:
                continue
            if colon and ROBOT.fullmatch(name) and name not in NO_AI:
                addressed = name in ("*", (robot or "").lower())
            if addressed and not NO_AI.isdisjoint((name, value)):
                return True
    return False


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
