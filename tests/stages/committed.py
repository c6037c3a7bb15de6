"""Datasets made by hand, for what needs one of a stage that it does not run; and damage to what lies in a store."""

from __future__ import annotations

from pathlib import Path

from infra.dataset import Dataset, FileEntry, InputRef, Manifest, Stats, commit
from infra.store import Store, sha256_of


def dataset_of(
    store: Store, stage: str, folder: Path, inputs: dict[str, InputRef], sources: dict[str, str] | None = None
) -> Dataset:
    """A committed dataset that holds the files of a folder."""
    fingerprint = (stage.encode().hex() * 4)[:24]
    entries = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = f"{stage}/units/{fingerprint}/{file.relative_to(folder)}"
        store.publish(file, path)
        entries.append(FileEntry(path=path, rows=1, bytes=file.stat().st_size, sha256=sha256_of(file), unit=fingerprint))
    manifest = Manifest(
        stage=stage, node=f"x-{stage}", fingerprint=fingerprint, generation=0, inputs=inputs, config={}, sources=sources or {},
        code={"stage_version": 1, "package": "0"}, columns={}, stats=Stats(rows_in=1, rows_out=1), summary={}, seconds=1.0,
        created="2026-01-01T00:00:00+00:00", files=entries,
    )  # fmt: skip
    return commit(store, manifest)


def flip(path: str | Path, where: bytes | int) -> None:
    """Change one bit of a file: at a place, or in the middle of the first occurrence of some bytes."""
    data = bytearray(Path(path).read_bytes())
    place = where if isinstance(where, int) else data.index(where) + len(where) // 2
    data[place] ^= 1
    Path(path).write_bytes(data)
