"""Pins: datasets that somebody wants to keep whatever the recipes say, each a small file of the store."""

from __future__ import annotations

from datetime import UTC, datetime

from infra.dataset import InputRef
from infra.store import Store


def pin(store: Store, reference: InputRef) -> None:
    """Keep a dataset until it is unpinned."""
    store.write_json(_path(reference), {"since": datetime.now(UTC).isoformat(timespec="seconds")})


def unpin(store: Store, reference: InputRef) -> bool:
    """No longer keep it for its own sake; returns whether it was pinned."""
    path = _path(reference)
    there = store.exists(path)
    store.remove(path)
    return there


def pinned(store: Store) -> list[InputRef]:
    """What is pinned, also where the dataset itself is gone."""
    names = [name.removesuffix(".json").rpartition("-") for name in store.list("pins") if name.endswith(".json")]
    return [InputRef(stage=stage, fingerprint=fingerprint) for stage, _, fingerprint in names]


def _path(reference: InputRef) -> str:
    return f"pins/{reference.stage}-{reference.fingerprint}.json"
