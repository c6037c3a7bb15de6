"""Servers on this machine are asked directly, whatever proxy the environment names: that one has a loopback of its own."""

from __future__ import annotations

import logging
import os
import urllib.request
from collections.abc import Mapping
from functools import cache
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

HOSTS = ("127.0.0.1", "localhost", "::1")
log = logging.getLogger("infra")

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine itself.

    Example:
        >>> is_loopback("http://127.0.0.1:8265"), is_loopback("http://head:8265")
        (True, False)
    """
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@cache
def warn_of_clear_text(url: str, what: str) -> None:
    """Say, once in a process, that a secret goes over a network as everybody there can read it."""
    if url.lower().startswith("http://") and not is_loopback(url):
        log.warning("%s travels in clear to %s: name it with https://, or let nobody else into its network", what, url)


def open_url(request: urllib.request.Request, timeout: float) -> Any:
    """As `urllib.request.urlopen`, without a proxy to this machine itself."""
    if is_loopback(request.full_url):
        return _DIRECT.open(request, timeout=timeout)
    return urllib.request.urlopen(request, timeout=timeout)


def without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that keep other clients (httpx, gRPC, curl) from asking a proxy for loopback; the user's exceptions stay.

    Example:
        >>> without_proxy({"NO_PROXY": "head"})["no_proxy"]
        'head,127.0.0.1,localhost,::1'
    """
    lower, upper = environment.get("no_proxy"), environment.get("NO_PROXY")
    told = {"no_proxy": lower or upper or "", "NO_PROXY": upper or lower or ""}
    return {name: _with_loopback(hosts) for name, hosts in told.items()}


def _with_loopback(hosts: str) -> str:
    known = [host for part in hosts.split(",") if (host := part.strip())]
    # A star says it for every host, and to some clients only when it stands alone.
    return "*" if "*" in known else ",".join([*known, *(host for host in HOSTS if host not in known)])


def ask_loopback_directly() -> None:
    """Let every client in this process, and in those that it starts, ask this machine's servers directly."""
    os.environ.update(without_proxy(os.environ))
