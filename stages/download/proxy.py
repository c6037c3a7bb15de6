"""The HTTP proxy that downloads go through: which one it is, and how a host is reached over it."""

from __future__ import annotations

import base64
import http.client
import socket
import urllib.request
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

# Values of the recipe's field that are no address.
ENVIRONMENT, NONE = "environment", "none"


class ProxyFailed(Exception):
    """The proxy itself, and not the host behind it, is why there is no answer."""


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy. Its text leaves out the credentials (``user:password``)."""

    host: str
    port: int
    credentials: str = field(default="", repr=False)

    @classmethod
    def named(cls, address: str) -> Proxy:
        """The proxy of ``[http://][user:password@]host[:port]``.

        Raises:
            ValueError: no such address, which the message does not repeat: it may hold a password.
        """
        try:
            parts = urlsplit(address if "://" in address else f"http://{address}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or parts.scheme.lower() != "http":
            raise ValueError(f"expected the address of an HTTP proxy, http://host:port, or {ENVIRONMENT} or {NONE}")
        given = parts.username is not None
        return cls(host, port or 80, f"{unquote(parts.username or '')}:{unquote(parts.password or '')}" if given else "")

    def __str__(self) -> str:
        return f"http://{_bracketed(self.host)}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """What the proxy wants to see of a request, beside what the host does."""
        if not self.credentials:
            return {}
        return {"Proxy-Authorization": f"Basic {base64.b64encode(self.credentials.encode()).decode()}"}

    def tunnel(self, plain: socket.socket, host: str, port: int) -> None:
        """Have the proxy connect an open connection to it through to a host (CONNECT).

        Raises:
            ProxyFailed: it will not, or its answer cannot be read.
            ConnectionError: it found nobody there.
        """
        place = f"{_bracketed(host)}:{port}"
        lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}", *(f"{name}: {value}" for name, value in self.headers.items())]
        plain.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
        response = http.client.HTTPResponse(plain, method="CONNECT")
        try:
            response.begin()
        except http.client.HTTPException:
            raise ProxyFailed from None
        finally:
            # The response's own handle of the socket; the socket itself stays open.
            response.close()
        if response.status >= 500:
            raise ConnectionError
        if not 200 <= response.status < 300:
            raise ProxyFailed


class Proxies:
    """Which proxy a host is reached through, as the recipe says; by default as the environment does.

    Args:
        setting: a proxy's address, `ENVIRONMENT` (`http_proxy`, `https_proxy`, `all_proxy` and `no_proxy`) or `NONE`.

    Raises:
        ValueError: as `Proxy.named`.
    """

    def __init__(self, setting: str):
        self.by_scheme: dict[str, Proxy] = {}
        self.without: dict[str, str] = {}
        self.unusable: list[str] = []
        if setting == NONE:
            return
        if setting != ENVIRONMENT:
            self.by_scheme = dict.fromkeys(("http", "https"), Proxy.named(setting))
            return
        found = urllib.request.getproxies_environment()
        self.without = {"no": found.get("no", "")}
        for scheme in ("http", "https"):
            name = scheme if scheme in found else "all"
            try:
                if name in found:
                    self.by_scheme[scheme] = Proxy.named(found[name])
            except ValueError:
                self.unusable.append(f"{name}_proxy")

    def __call__(self, scheme: str, host: str, port: int) -> Proxy | None:
        if self.without and urllib.request.proxy_bypass_environment(f"{host}:{port}", self.without):  # type: ignore[attr-defined]
            return None
        return self.by_scheme.get(scheme)

    def notes(self) -> list[str]:
        """Lines that tell a person what goes through which proxy, and what the guard of private addresses cannot see then."""
        lines = []
        if self.by_scheme:
            places = " and ".join(dict.fromkeys(map(str, self.by_scheme.values())))
            lines.append(
                f"downloads go through the proxy {places}, which looks names up itself: a name that leads to a private address "
                f"is refused only where this machine's own look-up tells so (download's `proxy: {NONE}` goes without)"
            )
        for name in dict.fromkeys(self.unusable):
            lines.append(
                f"the environment's {name} is not used for downloads: it is no HTTP proxy; name one in the recipe, as download's "
                "`proxy: http://host:port`"
            )
        return lines


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
