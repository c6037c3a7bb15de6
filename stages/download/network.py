"""Connections to the public web: names looked up in bounded time, addresses judged before they are dialled, waits that end.

The address that is judged is the one that is dialled, and every redirect comes through here again: a name that leads to
another place the second time it is asked (DNS rebinding) gains nothing. A proxy looks names up itself: there, numbers, names
that only a private network has, and what this machine's own look-up tells are all that can be judged.
"""

from __future__ import annotations

import ipaddress
import math
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from stages.download.proxy import NONE, Proxies, Proxy, ProxyFailed
from stages.runner.contract import StageError

# What Python's `is_global` lets pass: protocol assignments (Oracle's metadata service among them), dead 6to4 relays, and the
# address at which every machine in Azure finds its host.
NOT_THE_WEB = tuple(ipaddress.ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32"))
# All other IPv6 addresses are reserved, local or translated; 3fff::/20 is for documentation.
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
DOCUMENTATION = ipaddress.IPv6Network("3fff::/20")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
LOOKUPS = 64
# Seconds for which an answer counts, as resolvers keep most of theirs, and names of which it is kept; some 30 MB.
KEPT, KEPT_NAMES = 300.0, 50_000
# Last parts of names that no public network has.
PRIVATE_NAMES = frozenset({"localhost", "local", "internal", "lan", "intranet", "corp", "home", "private", "arpa"})
# Behind a proxy this machine may have no look-up of its own: seconds that one may take, and failures in a row that are enough.
LOOKUP_SECONDS = 1.0
LOOKUP_FAILURES = 8


class ForbiddenAddress(Exception):
    """The address is not on the public web."""


class Wait:
    """How long one URL may still take.

    Attributes:
        patience: seconds without a byte.
        end: moment (`time.monotonic`) at which everything must be over.
        latest: the moment at which the shard must be over: `end` cannot be put off beyond.
    """

    def __init__(self, patience: float, end: float, latest: float = math.inf):
        self.patience = patience
        self.end = min(end, latest)
        self.latest = latest

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.end

    def seconds(self) -> float:
        """The longest wait for the next bytes.

        Raises:
            TimeoutError: the end has come.
        """
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(self.patience, left)


# getaddrinfo's answer for (host, port): (family, kind, protocol, canonical name, socket address) each.
Resolve = Callable[[str, int, Wait], list[tuple[Any, ...]]]
# (family, socket address, wait) -> a connected socket.
Dial = Callable[[int, Any, Wait], "PlainSocket"]


class Names:
    """Looks names up in threads of its own, since the system's resolver takes no deadline; each name once in a while.

    That there is no such name is an answer too, and kept; that nobody answered is none.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(LOOKUPS, thread_name_prefix="names")
        self._asked: OrderedDict[str, tuple[float, Future[list[tuple[Any, ...]]]]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, host: str, port: int, wait: Wait) -> list[tuple[Any, ...]]:
        """Raises socket.gaierror: no such name, or no answer in time."""
        try:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            answer = self._ask(host)
        try:
            found = answer.result(wait.seconds())
        except TimeoutError:
            # Not cancelled: others may wait for it.
            raise socket.gaierror(socket.EAI_AGAIN, "no answer in time") from None
        except socket.gaierror as error:
            if error.errno != socket.EAI_NONAME:
                self._forget(host, answer)
            raise
        return [(*kind, (address[0], port, *address[2:])) for *kind, address in found]

    def forget(self) -> None:
        """Ask anew for every name: what was told may have been this machine's own trouble."""
        with self._lock:
            self._asked.clear()

    def _ask(self, host: str) -> Future[list[tuple[Any, ...]]]:
        """The answer that is kept, or on its way; else the question is put."""
        with self._lock:
            now = time.monotonic()
            while self._asked and (len(self._asked) > KEPT_NAMES or next(iter(self._asked.values()))[0] < now - KEPT):
                self._asked.popitem(last=False)
            if host not in self._asked:
                self._asked[host] = now, self.pool.submit(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
            return self._asked[host][1]

    def _forget(self, host: str, answer: Future[list[tuple[Any, ...]]]) -> None:
        with self._lock:
            if host in self._asked and self._asked[host][1] is answer:
                del self._asked[host]


class PlainSocket(socket.socket):
    """Waits for bytes as long as `wait` allows, also while headers trickle in."""

    wait: Wait

    def recv_into(self, *arguments: Any, **named: Any) -> int:
        self.settimeout(self.wait.seconds())
        return super().recv_into(*arguments, **named)


class TlsSocket(ssl.SSLSocket):
    wait: Wait

    def recv_into(self, *arguments: Any, **named: Any) -> int:
        self.settimeout(self.wait.seconds())
        return super().recv_into(*arguments, **named)


def dial(family: int, address: Any, wait: Wait) -> PlainSocket:
    """Raises OSError: nobody answers there."""
    plain = PlainSocket(family, socket.SOCK_STREAM)
    try:
        plain.wait = wait
        plain.settimeout(wait.seconds())
        plain.connect(address)
    except BaseException:
        plain.close()
        raise
    return plain


class Guard:
    """Connects to hosts of the public web and to no others.

    Args:
        hosts: host name -> ``host[:port]`` to connect to in its place; such a host may be anywhere, since a person named it.
        allow_private: whether addresses that are not public (private, loopback, link-local, cloud metadata) may be dialled.
        resolve, dial: how names are looked up and addresses are connected to.
        proxies: which proxy a host is reached through; hosts of `hosts` never are.
    """

    def __init__(
        self,
        hosts: Mapping[str, str] | None = None,
        allow_private: bool = False,
        resolve: Resolve | None = None,
        dial: Dial = dial,
        proxies: Proxies | None = None,
    ):
        self.hosts = {name.lower(): _host_and_port(place) for name, place in (hosts or {}).items()}
        self.allow_private = allow_private
        self.names = Names()
        self.resolve = resolve or self.names
        self.dial = dial
        self.proxies = proxies or Proxies(NONE)
        self.lookup_failures = 0
        self.tls = ssl.create_default_context()
        # Set through the attribute that exists for it, so that reads over TLS end at the deadline too.
        self.tls.sslsocket_class = TlsSocket

    def proxy_for(self, scheme: str, host: str, port: int) -> Proxy | None:
        return None if host.lower() in self.hosts else self.proxies(scheme, host, port)

    def connect(self, scheme: str, host: str, port: int, wait: Wait) -> socket.socket:
        """A connected socket, over TLS for https; every address is judged just before it is dialled.

        Where the host has a proxy, an http socket is connected to that.

        Raises:
            ForbiddenAddress: the host is not on the public web.
            ProxyFailed: nobody answers where the proxy should be, or it refuses.
            OSError: nobody answers there in time (socket.gaierror: no such name; ssl.SSLError: no trustworthy TLS).
        """
        if proxy := self.proxy_for(scheme, host, port):
            self._judge(host, port, wait)
            plain = self._to_proxy(proxy, wait)
        else:
            place, place_port = self.hosts.get(host.lower(), (host, None))
            plain = self._dial_first(place, place_port or port, wait, self.allow_private or host.lower() in self.hosts)
        if scheme == "http":
            return plain
        try:
            plain.settimeout(wait.seconds())
            if proxy:
                proxy.tunnel(plain, host, port)
            return self._over_tls(plain, host, wait)
        except BaseException:
            plain.close()
            raise

    def _dial_first(self, place: str, port: int, wait: Wait, anywhere: bool) -> PlainSocket:
        """A socket to the first of a host's addresses at which somebody answers."""
        error: OSError = ConnectionError()
        for family, _, _, _, address in self.resolve(place, port, wait):
            if not anywhere and not is_public(str(address[0])):
                raise ForbiddenAddress(address[0])
            try:
                return self.dial(family, address, wait)
            except OSError as problem:
                error = problem
        raise error

    def _to_proxy(self, proxy: Proxy, wait: Wait) -> PlainSocket:
        try:
            return self._dial_first(proxy.host, proxy.port, wait, anywhere=True)
        except OSError:
            if wait.over:
                raise TimeoutError from None
            raise ProxyFailed from None

    def _judge(self, host: str, port: int, wait: Wait) -> None:
        """Refuse what can be told to be private before a proxy looks it up.

        Raises:
            ForbiddenAddress: the host is not on the public web.
        """
        if self.allow_private:
            return
        labels = host.rstrip(".").lower().split(".")
        # As browsers tell them: a name's last part begins with no digit. Numbers need no look-up.
        if ":" not in host and not labels[-1][:1].isdecimal():
            if len(labels) == 1 or labels[-1] in PRIVATE_NAMES:
                raise ForbiddenAddress(host)
            if self.lookup_failures >= LOOKUP_FAILURES:
                return
        try:
            found = self.resolve(host, port, Wait(min(LOOKUP_SECONDS, wait.patience), wait.end))
        except socket.gaierror as error:
            self.lookup_failures = self.lookup_failures + 1 if error.errno == socket.EAI_AGAIN else 0
            return
        self.lookup_failures = 0
        for *_, address in found:
            if not is_public(str(address[0])):
                raise ForbiddenAddress(address[0])

    def _over_tls(self, plain: PlainSocket, host: str, wait: Wait) -> socket.socket:
        secure: Any = self.tls.wrap_socket(plain, server_hostname=host)
        secure.wait = wait
        return secure


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public web (an IPv4 address inside an IPv6 one counts as itself)."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None)
        if inner is None:
            return ip in GLOBAL_UNICAST and ip.is_global and ip not in DOCUMENTATION
        ip = inner
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in NOT_THE_WEB)


def _host_and_port(place: str) -> tuple[str, int | None]:
    """``host`` or ``host:port`` of `download.hosts`.

    Raises:
        StageError: neither.
    """
    host, _, port = place.partition(":")
    if not host or (port and not port.isdigit()):
        raise StageError(f"hosts: {place!r} is no place to connect to; expected host or host:port")
    return host, int(port) if port else None
