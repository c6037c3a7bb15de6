"""Pins: datasets that somebody wants to keep whatever the recipes say, each a small file of the store."""

from __future__ import annotations

from datetime import UTC, datetime

from infra.store import Store


def pin(store: Store, stage: str, fingerprint: str) -> None:
    """Keep a dataset until it is unpinned."""
    store.write_json(_path(stage, fingerprint), {"since": datetime.now(UTC).isoformat(timespec="seconds")})


def unpin(store: Store, stage: str, fingerprint: str) -> bool:
    """No longer keep it for its own sake; returns whether it was pinned."""
    path = _path(stage, fingerprint)
    there = store.exists(path)
    store.remove(path)
    return there


def pinned(store: Store) -> set[tuple[str, str]]:
    """Stage and fingerprint of what is pinned, also where the dataset itself is gone."""
    names = [name.removesuffix(".json").rpartition("-") for name in store.list("pins") if name.endswith(".json")]
    return {(stage, fingerprint) for stage, _, fingerprint in names}


def _path(stage: str, fingerprint: str) -> str:
    return f"pins/{stage}-{fingerprint}.json"
