"""Files from outside the store: resolved lists and digests, so that a fingerprint sees a changed file and not a changed path."""

from __future__ import annotations

import json
import os
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from infra.store import Store, sha256_of


def state_folder(store: Store) -> Path:
    """Where this machine keeps what is not data (server state, digests, logs): `<store>/.state`, or `./runs/.state`."""
    folder = Path(store.root if store.local else os.environ.get("UNIDIFFUSER_STATE", "runs")) / ".state"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def resolve(patterns: list[str], store: Store) -> dict[str, str]:
    """Expand paths, globs and fsspec URLs into address -> digest, sorted by address.

    A local file counts by its sha256 (remembered by size and modification time), a remote one by size and etag.

    Raises:
        FileNotFoundError: a pattern matches nothing; the message names it.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        fs, path = fsspec.core.url_to_fs(pattern)
        matches = sorted(fs.glob(path)) if _is_glob(pattern) else [path] * fs.exists(path)
        if not matches:
            raise FileNotFoundError(pattern)
        if isinstance(fs, LocalFileSystem):
            found |= _local_digests(matches, state_folder(store) / "digests.json")
        else:
            for match in matches:
                info = fs.info(match)
                tag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("LastModified")
                found[fs.unstrip_protocol(match)] = f"{info['size']}:{str(tag).strip(chr(34))}"
    return dict(sorted(found.items()))


def _is_glob(pattern: str) -> bool:
    """In a web address ``?`` begins the query, where any character may stand for itself."""
    path = pattern.split("?")[0] if pattern.startswith(("http://", "https://")) else pattern
    return any(character in path for character in "*?[")


def _local_digests(paths: list[str], cache: Path) -> dict[str, str]:
    """sha256 of local files, each read once as long as its size and modification time stay."""
    known = json.loads(cache.read_text()) if cache.exists() else {}
    digests, fresh = {}, False
    for path in paths:
        status = os.stat(path)
        stamp = f"{status.st_size}:{status.st_mtime_ns}"
        if known.get(path, {}).get("stamp") != stamp:
            known[path] = {"stamp": stamp, "sha256": sha256_of(path)}
            fresh = True
        digests[path] = known[path]["sha256"]
    if fresh:
        Store(str(cache.parent)).write_json(cache.name, known)
    return digests
