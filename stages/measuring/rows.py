"""Held-out data from the store: the rows of a dataset of pictures with captions, such as that of a filter."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any

from infra.dataset import Dataset, FileEntry
from stages.runner.contract import StageError
from stages.shards.tar import IMAGE_EXTENSIONS

HELD_OUT = "held-out"


class Rows:
    """The first `count` rows of a dataset's shards; see `stages.measuring.prompts.Prompts`.

    Raises:
        StageError: there are fewer than two.
    """

    pictures = True

    def __init__(self, dataset: Dataset, count: int) -> None:
        self.dataset = dataset
        self.shards = [entry for entry in dataset.files if entry.name.endswith(".tar")]
        self.count = min(count, sum(entry.rows for entry in self.shards))
        # What lies where in the shard that was read last: rows are asked for one stretch after the other.
        self.last: tuple[str, list[tuple[tarfile.TarInfo, tarfile.TarInfo]]] = "", []
        if self.count < 2:
            named = f"{dataset.manifest.stage}/{dataset.manifest.fingerprint}"
            raise StageError(f"{named}: has {self.count} rows with pictures; at least 2 are needed to compare")

    def digests(self, start: int, stop: int) -> tuple[str, ...]:
        return tuple(entry.sha256 for entry, _, _ in self._stretches(start, stop))

    def captions(self, start: int, stop: int) -> list[str]:
        return [text.decode() for text in self._read(start, stop, 1)]

    def references(self, start: int, stop: int) -> list[list[str]]:
        return [[caption] for caption in self.captions(start, stop)]

    def images(self, start: int, stop: int) -> list[Any]:
        """The pictures, as people see them; stages before have found that they can be read."""
        from unidiffuser.images import open_picture

        return [open_picture(picture) for picture in self._read(start, stop, 0)]

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[FileEntry, int, int]]:
        """(shard, first row, end) of the rows `start` to `stop` - 1 of all."""
        before = 0
        for entry in self.shards:
            if start < before + entry.rows and stop > before:
                yield entry, max(start - before, 0), min(stop - before, entry.rows)
            before += entry.rows

    def _read(self, start: int, stop: int, part: int) -> Iterator[bytes]:
        """The bytes of pictures (part 0) or captions (part 1), and of no other members."""
        for entry, first, end in self._stretches(start, stop):
            try:
                with self.dataset.open(entry) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                    for members in self._members(entry, tar)[first:end]:
                        content = tar.extractfile(members[part])
                        assert content is not None
                        yield content.read()
            except tarfile.TarError as error:
                raise StageError(f"{self.dataset.url(entry)}: not a complete shard ({error}); `unidiffuser verify` it") from None

    def _members(self, entry: FileEntry, tar: tarfile.TarFile) -> list[tuple[tarfile.TarInfo, tarfile.TarInfo]]:
        if self.last[0] != entry.path:
            found: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})["image" if extension in IMAGE_EXTENSIONS else extension] = member
            self.last = entry.path, [(parts["image"], parts["txt"]) for parts in found.values()]
        return self.last[1]
