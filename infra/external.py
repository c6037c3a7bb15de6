"""Files from outside the store: resolved lists and digests, so that a fingerprint sees a changed file and not a changed path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsspec.archive import AbstractArchiveFileSystem
from fsspec.implementations.local import LocalFileSystem

from infra.contents import remote_digests
from infra.digests import local_digests
from infra.listing import Files, Listing, OutsideError, readable
from infra.queries import file_name, place, without_query
from infra.room import check_room
from infra.sources import SHA256, Sources
from infra.store import Store, sha256_of, stays_below
from infra.tree import release


def state_folder(store: Store) -> Path:
    """Where this machine keeps what is not data (server state, digests, logs): `<store>/.state`, or `./runs/.state`."""
    folder = _state(store)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _state(store: Store) -> Path:
    return Path(store.root if store.local else os.environ.get("UNIDIFFUSER_STATE", "runs")) / ".state"


def resolve(patterns: list[str], store: Store) -> Mapping[str, str]:
    """Expand paths, globs and fsspec URLs into address -> digest, sorted by address.

    What exists under just this name is no glob. Below a glob, the ending matches in capitals too; folders, hidden files, markers
    and what cannot be read as a file are passed over, counted and logged, and so are images of other endings.

    A file counts by the sha256 of its content, wherever it lies. That is remembered: of a local one by its size and the times of
    its last change, of a remote one by its size and what its file system tells of its content or its last change. Addresses are
    without their queries; `infra.queries.opened` opens them.

    Raises:
        FileNotFoundError: a pattern matches nothing; the message names it.
        OutsideError: a pattern is a folder, or cannot be looked at, or a file of it cannot be read.
    """
    here, remote = _listed(patterns, store)
    release()
    return Sources.of(local_digests(here, _state(store) / "digests"), remote)


def _listed(patterns: list[str], store: Store) -> tuple[dict[str, Files], dict[str, str]]:
    """The local files of each pattern that means such, and the address and digest of all others.

    What it has seen is as large as what was found, and gone when it returns.
    """
    remote: dict[str, str] = {}
    here: dict[str, Files] = {}
    listing = Listing()
    for pattern in map(without_query, patterns):
        files = listing.files(pattern)
        if isinstance(files.fs, LocalFileSystem):
            here[pattern] = files
            continue
        with readable(pattern):
            remote |= remote_digests(files.fs, {_address(files.fs, path, pattern): path for path in files.paths()}, store)
    listing.say_left_out()
    return here, remote


def member(address: str) -> str:
    """An address without the archive that it lies in: ``zip://a.jpg`` of ``zip://a.jpg::https://host/pictures.zip``."""
    return address.partition("::")[0]


def local_or_url(fs: Any, path: str) -> str:
    """How `resolve` calls a file of a file system: its path, or its URL where it is not here."""
    return path if isinstance(fs, LocalFileSystem) else without_query(str(fs.unstrip_protocol(path)))


def fetch_outside(files: Mapping[str, str], root: str, store: Store, folder: Path) -> Path:
    """What lies at `root` in a local folder: the file itself, or a folder with those of its files that are named.

    Args:
        files: address -> digest, as `resolve` gave them for files at or below `root`; local ones are linked, not copied.

    Raises:
        NoRoom: this machine's disk is too small for them.
        OutsideError: a file is gone, or has or brings other content than it had, or its name leads out of the folder.
    """
    if resolve(list(files), store) != dict(files):
        raise OutsideError(root, "has changed since the run was planned; run again")
    fs, top = place(root)
    top, target = top.rstrip("/"), folder / file_name(root.rstrip("/"))
    paths = {address: place(address)[1] for address in files}
    if not isinstance(fs, LocalFileSystem):
        with readable(root):
            # Some web servers do not say how large a file is.
            sizes = [fs.size(path) or 0 for path in paths.values()]
        check_room(folder, sum(sizes), root)
    for address, path in paths.items():
        if path != top and not stays_below(path[len(top) + 1 :]):
            raise OutsideError(root, f"lists {path!r}, which leads out of its folder; take it from a place that you trust")
        copy = target / path[len(top) + 1 :] if path != top else target
        copy.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(fs, LocalFileSystem):
            copy.symlink_to(path)
        else:
            with readable(address):
                fs.get_file(path, str(copy))
            # A member of a ZIP has another digest, and its checksum is compared as it is read.
            if len(files[address]) == 2 * SHA256.byte_width and sha256_of(copy) != files[address]:
                raise OutsideError(address, "came with other bytes than it has; run again")
    return target


def _address(fs: Any, path: str, pattern: str) -> str:
    """What `opened` takes; a member of an archive needs the archive's address behind its own."""
    if not isinstance(fs, AbstractArchiveFileSystem):
        return without_query(str(fs.unstrip_protocol(path)))
    protocol = pattern.partition("://")[0]
    return f"{protocol}://{path}::{pattern.partition('::')[2]}"
