"""Whether a store can be used, asked before anything relies on it, and what its file system says, in a line of our own."""

from __future__ import annotations

import logging
import os
import socket
import threading
from pathlib import Path

from infra.store import Store, StoreError

log = logging.getLogger("infra")

# Whose errors come from the network and from keys, and not from a fault of ours.
CLIENTS = ("botocore", "aiobotocore", "s3fs", "google", "gcsfs", "adlfs", "azure", "aiohttp")
KEYS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and its key",
}
KINDS = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}
# Seconds after which a machine that is to work says that the store has not answered yet, and for which it waits after that: the
# command has reached the store already, so it may be busy.
SECONDS, PATIENCE = 8.0, 60.0
REGION = ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException", "301")


def check_access(store: Store, write: bool) -> None:
    """Look for the store, and with `write` put a small file there.

    Raises:
        StoreError: it cannot be read or written; names the store and the fix.
    """
    if store.local:
        _check_folder(Path(store.root))
        return
    try:
        _look(store)
        if write:
            store.write(".state/checked", b"")
    except StoreError:
        raise
    # Every file system has errors of its own.
    except Exception as error:
        raise store_error(store.root, error) from error


def check_in_time(store: Store, write: bool, seconds: float, late: float = 0.0) -> None:
    """The same, without waiting longer for an answer than `seconds`, and than `late` after saying so.

    Raises:
        StoreError: as `check_access`, or there was none.
    """
    if store.local:
        check_access(store, write)
        return
    found: list[BaseException] = []

    def look() -> None:
        try:
            check_access(store, write)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive() and late:
        log.warning(
            "%s: no answer in %.0f s on the machine %s; waits up to %.0f s more, as it may be busy",
            store.root, seconds, socket.gethostname(), late,
        )  # fmt: skip
        thread.join(late)
    if thread.is_alive():
        raise StoreError(f"{store.root}: no answer in {seconds + late:.0f} s; check the address and the network")
    for error in found:
        raise error


def check_seen(store: Store) -> None:
    """Whether a machine that is to work sees the store of the command, which has written there already.

    Raises:
        StoreError: it does not; names the machine, the store and the fix.
    """
    machine = socket.gethostname()
    try:
        check_in_time(store, False, SECONDS, PATIENCE)
    except StoreError as error:
        raise StoreError(f"the machine {machine} does not reach the store: {error}") from error
    if store.local and not store.is_there():
        raise StoreError(
            f"the machine {machine} has no folder {store.root}; mount it there at the same path, or name a store that all "
            "machines reach, such as --store s3://BUCKET/runs"
        )


def is_clients(error: BaseException) -> bool:
    """Whether an error is one of those that clients of object stores raise."""
    return type(error).__module__.partition(".")[0] in CLIENTS


def store_error(root: str, error: BaseException) -> StoreError:
    """What a file system's error means, and what mends it."""
    kind = root.partition("://")[0]
    keys = KEYS.get(KINDS.get(kind, kind), "see the documentation of its fsspec file system")
    code = getattr(error.__cause__ or error, "response", {}).get("Error", {}).get("Code", "")
    words = " ".join(str(error).split()) or type(error).__name__
    if "Credential" in type(error).__name__:
        return StoreError(f"{root}: no credentials ({words}); {keys}")
    if code in REGION or type(error).__name__ == "NoRegionError":
        return StoreError(f"{root}: asked in the wrong region ({words}); set AWS_DEFAULT_REGION to the bucket's")
    if isinstance(error, PermissionError):
        return StoreError(f"{root}: access is refused ({words}); {keys}, of one who may read and write there")
    return StoreError(f"{root}: cannot be used ({words}); check the address and the network")


def _look(store: Store) -> None:
    try:
        store.fs.ls(store.root)
    except FileNotFoundError as error:
        bucket = store.fs._strip_protocol(store.root).split("/")[0]
        kind = store.root.partition("://")[0]
        # A prefix under which nothing lies yet is as good as any; a bucket must be there.
        if KINDS.get(kind, kind) in KEYS and not store.fs.exists(bucket):
            raise StoreError(f"{store.root}: there is no bucket {bucket}; create it, or name another --store") from error


def _check_folder(root: Path) -> None:
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    if not there.is_dir():
        raise StoreError(f"{root}: {there} is a file; name a folder with --store")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StoreError(f"{root}: {there} cannot be written; change its permissions, or name another --store")
