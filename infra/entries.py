"""What a store holds, from the manifests as they lie there: a listing and small files, read together, and no list of files.

Datasets as such are read by `infra.dataset`, which checks them and knows their files; that takes a second for some dozens.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from infra.store import NotThere, Store

# Folders at the root of a store that hold no datasets; and what a person is told at most of what comes nearest.
NO_STAGES = frozenset({"nodes", "pins", "chains"})
NEAREST = 3


@dataclass(frozen=True)
class Entry:
    """One committed dataset; `bytes` are its files', None where only its list of files, in a file of its own, tells."""

    stage: str
    node: str
    fingerprint: str
    rows: int
    bytes: int | None
    created: str


def stages_in(store: Store) -> list[str]:
    """The stages that a store may hold datasets of, sorted."""
    return [name for name in store.list("") if not name.startswith(".") and name not in NO_STAGES]


def entries(store: Store, *stages: str) -> list[Entry]:
    """The committed datasets of these stages, by default of all, by stage and fingerprint."""
    places = [(stage, name) for stage in stages or stages_in(store) for name in store.list(stage) if name != "units"]
    found = store.read_many([f"{stage}/{name}/manifest.json" for stage, name in places])
    return [_entry(data) for data in found if data is not None]


def _entry(data: bytes) -> Entry:
    document = json.loads(data)
    files = document["files"]
    size = document.get("files_bytes") if files is None else sum(entry["bytes"] for entry in files)
    rows = document["stats"]["rows_out"]
    return Entry(document["stage"], document["node"], document["fingerprint"], rows, size, document["created"])


def fingerprint_of(store: Store, text: str) -> tuple[str, str]:
    """Stage and fingerprint of what a person means by a fingerprint, its first characters, `stage/fingerprint` or a path to it.

    Raises:
        NotThere: there is no store, or no dataset or several datasets match.
    """
    store.check_there()
    wanted = text.rstrip("/").removesuffix("/manifest.json").rsplit("/", 1)[-1]
    matches = list(_begins_with(store, wanted))
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise NotThere(f"{text}: no dataset in {store.root} has this fingerprint; {_nearest(store, wanted)}")
    names = ", ".join(f"{stage}/{name}" for stage, name in matches[:4])
    raise NotThere(f"{text}: {len(matches)} datasets match ({names}); give more characters")


def _begins_with(store: Store, wanted: str) -> Iterator[tuple[str, str]]:
    for stage in stages_in(store):
        for name in store.list(stage):
            if name != "units" and name.startswith(wanted) and store.exists(f"{stage}/{name}/manifest.json"):
                yield stage, name


def _nearest(store: Store, wanted: str) -> str:
    """The datasets whose fingerprint begins much like this, or whose node is called so."""

    def likeness(entry: Entry) -> float:
        names = (entry.fingerprint[: len(wanted)], entry.node, entry.stage)
        return max(difflib.SequenceMatcher(None, wanted, name).ratio() for name in names)

    there = entries(store)
    if not there:
        return "it holds none"
    # The newest first among those that are as near.
    newest = sorted(there, key=lambda entry: entry.created, reverse=True)
    nearest = sorted(newest, key=likeness, reverse=True)[:NEAREST]
    return "nearest are " + ", ".join(f"{entry.node} {entry.stage}/{entry.fingerprint[:12]}" for entry in nearest)
