"""Where processes listen for TCP connections, as the kernel tells it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import psutil

LISTEN = "0A"


def beyond_loopback(processes: Iterable[psutil.Process]) -> tuple[list[str], int]:
    """``NAME ADDRESS:PORT`` of each socket that is not in 127.0.0.0/8 nor ::1, and how many sockets listen in all."""
    places = _places()
    found = {(places[inode], name) for name, inode in _sockets(processes) if inode in places}
    return sorted(f"{name} {host}:{port}" for (host, port), name in found if not _is_loopback(host)), len(found)


def family(root: psutil.Process) -> list[psutil.Process]:
    return [root, *root.children(recursive=True)]


def _is_loopback(host: IPv4Address | IPv6Address) -> bool:
    inner = getattr(host, "ipv4_mapped", None)
    return (inner or host).is_loopback


def _places() -> dict[str, tuple[IPv4Address | IPv6Address, int]]:
    """Inode -> address and port of every socket of this machine that listens."""
    found: dict[str, tuple[IPv4Address | IPv6Address, int]] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, own, _, state, *_, inode = line.split()[:10]
            if state == LISTEN:
                host, port = own.split(":")
                # Words of 32 bits, each in the order of this machine.
                words = b"".join(bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8))
                found[inode] = (IPv4Address(words) if len(words) == 4 else IPv6Address(words), int(port, 16))
    return found


def _sockets(processes: Iterable[psutil.Process]) -> Iterable[tuple[str, str]]:
    for process in processes:
        with suppress(OSError, psutil.Error):
            for entry in os.scandir(f"/proc/{process.pid}/fd"):
                with suppress(OSError):
                    target = os.readlink(entry.path)
                    if target.startswith("socket:["):
                        yield process.name(), target[8:-1]
