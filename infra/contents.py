"""What remote files hold: their sha256, read once as long as the place tells the same size and tag.

The store remembers it, a file of JSON a folder of files, so that no machine that shares the store reads them again:

    .state/contents/FOLDER.json    address -> {"stamp": "SIZE:TAG", "sha256"}; FOLDER is a digest of the folder's address
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from fsspec.archive import AbstractArchiveFileSystem

from infra.hashing import FOLDER, cluster, digests_by
from infra.queries import unmarked
from infra.store import Store, StoreError

log = logging.getLogger("infra")

# What file systems call a tag that changes with the content, then what they call the moment of the last change; the first that is
# there counts. (Amazon and HTTP; Azure and Google; Hugging Face; GitHub; git; Dropbox; Google Drive; others.)
TAGS = (
    "ETag", "etag", "md5Hash", "LastModified", "Content-MD5", "Digest", "blob_id", "xet_hash", "sha", "hex", "content_hash",
    "md5Checksum", "md5", "checksum", "generation", "version_id", "VersionId",
    "Last-Modified", "last_modified", "mtime", "modificationTime", "updated", "modifiedTime",
)  # fmt: skip
# Files that are read beside each other; a connection seldom fills the line.
AT_ONCE = 16
# So many bytes take long enough to say so, and to have a cluster read them where there is one.
MANY = 2**30


def remote_digests(fs: Any, paths: Mapping[str, str], store: Store) -> dict[str, str]:
    """sha256 of the content of files, by address; members of a ZIP, whose list has checksums, count by size and checksum, unread.

    Args:
        fs: their file system, which is not the local one.
        paths: address -> path there.
        store: what remembers; a file of which the place tells nothing is read each time.
    """
    told = {address: fs.info(path) for address, path in paths.items()}
    stamps = {address: stamp(fs, info) for address, info in told.items()}
    if isinstance(fs, AbstractArchiveFileSystem) and all("CRC" in info for info in told.values()):
        return {address: str(tag) for address, tag in stamps.items()}
    # An ETag is one address's whatever signs it; a time may be that of all that a query chooses from.
    names = {address: unmarked(address) if info.get("ETag") else address for address, info in told.items()}
    memory = Memory(store, names.values())
    digests = {address: found for address, of in stamps.items() if (found := memory.find(names[address], of)) is not None}
    unknown = [address for address in paths if address not in digests]
    size = sum(told[address]["size"] or 0 for address in unknown)
    if size > MANY:
        log.warning("%s: reading %d files, %.1f GB, to know their content; once", unknown[0], len(unknown), size / 1e9)
    # What was read before a Ctrl-C need not be read again.
    try:
        for address, digest in zip(unknown, _read(fs, [paths[name] for name in unknown], unknown, size, store), strict=True):
            digests[address] = digest
            memory.put(names[address], stamps[address], digest)
    finally:
        memory.keep()
    return digests


def _read(fs: Any, paths: Sequence[str], names: Sequence[str], size: int, store: Store) -> Iterator[str]:
    """sha256 of files in their order, by whoever is nearest to them."""
    if size > MANY and (address := cluster()) is not None and not store.local:
        yield from digests_by(address, names, store)
        return
    # Members of one archive share its handle.
    with ThreadPoolExecutor(AT_ONCE if getattr(fs, "async_impl", False) else 1) as pool:
        yield from pool.map(lambda path: _sha256(fs, path), paths)


def stamp(fs: Any, info: Mapping[str, Any]) -> str | None:
    """What the place tells that changes with the content, as SIZE:TAG, or None."""
    tag = _tag(fs, info)
    return None if tag is None else f"{info['size']}:{tag}"


def _tag(fs: Any, info: Mapping[str, Any]) -> str | None:
    """What tells this content from another, or None.

    A weak ETag promises no more than a like meaning. Archives may hold made-up times: only a ZIP's checksum says something. The
    time that FTP's LIST gives loses its minutes with the years.
    """
    if isinstance(fs, AbstractArchiveFileSystem):
        return f"{info['CRC']:08x}" if "CRC" in info else None
    for name in TAGS:
        value = str(info[name]).strip('"') if info.get(name) else ""
        if value and not value.startswith("W/"):
            return value
    moment = str(info.get("modify", ""))
    return moment if moment.replace(".", "").isdecimal() else None


def _sha256(fs: Any, path: str) -> str:
    with fs.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Memory:
    """What the store remembers of the folders that some files lie in."""

    def __init__(self, store: Store, addresses: Iterable[str]):
        self.store = store
        places = sorted({_place(address) for address in addresses})
        self.known: dict[str, dict[str, Any]] = {place: {} for place in places}
        for place, data in zip(places, store.read_many(places), strict=True):
            # What is damaged is read again.
            with suppress(ValueError):
                self.known[place] = json.loads(data or b"{}")
        self.fresh: set[str] = set()

    def find(self, address: str, stamp: str | None) -> str | None:
        found = self.known[_place(address)].get(address, {})
        return found["sha256"] if stamp is not None and found.get("stamp") == stamp else None

    def put(self, address: str, stamp: str | None, digest: str) -> None:
        if stamp is not None:
            self.known[_place(address)][address] = {"stamp": stamp, "sha256": digest}
            self.fresh.add(_place(address))

    def keep(self) -> None:
        """Write what is new; what cannot be kept is read again. Whoever only asks makes no store."""
        if self.fresh and self.store.is_there():
            with suppress(OSError, StoreError):
                for place in self.fresh:
                    self.store.write_json(place, self.known[place])


def _place(address: str) -> str:
    own, colons, archive = address.partition("::")
    folder = own.rpartition("/")[0] + colons + archive
    return f"{FOLDER}/{hashlib.sha256(folder.encode()).hexdigest()[:24]}.json"
