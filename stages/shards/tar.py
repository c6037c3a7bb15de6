"""WebDataset shards: ``KEY.jpg``, ``KEY.json`` and ``KEY.txt`` a sample, sorted by key, byte for byte the same every time.

They are read from the store through `read_shard`: a file that was damaged after its commit is then one line that names it, and
never fewer rows or other pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar, cast

from infra.dataset import VERIFY
from infra.store import Store
from stages.runner.contract import StageError

T = TypeVar("T")
IMAGE_EXTENSIONS = ("jpg", "png", "webp")


@dataclass(frozen=True)
class Sample:
    """One row of a shard.

    Attributes:
        key: without dots; ties the row to the metadata that it came from.
        image: encoded bytes, as `extension` says.
        extension: jpg, png or webp.
        caption: text.
        meta: what is known of the row: url, width and height of the stored image, original_width, original_height, sha256
            of the bytes as fetched, scores.
    """

    key: str
    image: bytes
    extension: str
    caption: str
    meta: dict[str, Any]


class ShardWriter:
    """Writes samples in the order in which they are added; the caller adds them sorted by key.

    Owners, modes and times are fixed, and JSON has sorted keys, so equal samples make equal files.
    """

    def __init__(self, path: Path):
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._last = ""

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tar.close()

    def add(self, sample: Sample) -> None:
        """Raises ValueError when the key does not sort after the one before."""
        if sample.key <= self._last:
            raise ValueError(f"{sample.key} follows {self._last}: samples must be added sorted by key")
        self._last = sample.key
        document = json.dumps(sample.meta, sort_keys=True, ensure_ascii=False, allow_nan=False)
        self._member(f"{sample.key}.{sample.extension}", sample.image)
        self._member(f"{sample.key}.json", document.encode())
        self._member(f"{sample.key}.txt", sample.caption.encode())

    def _member(self, name: str, data: bytes) -> None:
        # A fresh TarInfo has time 0, owner 0 and mode 0644.
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


def read_shard(store: Store, path: str, rows: int, sha256: str) -> Iterator[Sample]:
    """All samples of a stored shard in its order, holding one at a time.

    Args:
        rows, sha256: how many samples its manifest promises, and the digest of the file.

    Raises:
        StageError: the file is not a complete shard, or not the one of this digest; this may come after all samples.
    """
    found = 0
    with whole(store, path, sha256) as file:
        for sample in read_samples(file, store.url(path)):
            found += 1
            yield sample
        # A tar that is cut between two samples reads without an error.
        if found != rows:
            raise StageError(f"{store.url(path)}: has {found} samples of {rows}; {VERIFY}")


@contextmanager
def whole(store: Store, path: str, sha256: str) -> Iterator[BinaryIO]:
    """A stored file, to be read in the block from its start, once; its digest is compared when the block is done.

    Raises:
        StageError: the file is not the one that has this digest.
    """
    with store.open(path) as file:
        passing = _Digesting(file)
        yield cast(BinaryIO, passing)
        while passing.read(2**20):
            pass
    if (found := passing.digest.hexdigest()) != sha256:
        raise StageError(f"{store.url(path)}: damaged (sha256 {found[:12]}, its record says {sha256[:12]}); {VERIFY}")


class _Digesting:
    """Passes on what is read of a file, and adds up its sha256."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` items (itertools.batched came with Python 3.12)."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def read_samples(file: BinaryIO, name: str | None = None) -> Iterator[Sample]:
    """Samples of a shard as far as it goes, for who looks at a few or knows their keys; `name` is what errors call the file.

    Raises:
        StageError: the file is not a complete shard; one that is cut between two samples passes, see `read_shard`.
    """
    name = name or getattr(file, "name", "shard")
    parts: dict[str, bytes] = {}
    key = ""
    try:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                following, _, extension = member.name.partition(".")
                if following != key and parts:
                    yield _sample(key, parts)
                    parts = {}
                content = tar.extractfile(member)
                if content is not None:
                    key, parts[extension] = following, content.read()
            if parts:
                yield _sample(key, parts)
    except (tarfile.TarError, KeyError, StopIteration, ValueError) as error:
        raise StageError(f"{name}: not a complete shard ({error}); {VERIFY}") from None


def _sample(key: str, parts: dict[str, bytes]) -> Sample:
    extension = next(extension for extension in IMAGE_EXTENSIONS if extension in parts)
    return Sample(key, parts[extension], extension, parts["txt"].decode(), json.loads(parts["json"]))
