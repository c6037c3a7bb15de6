"""WebDataset shards: ``KEY.jpg``, ``KEY.json`` and ``KEY.txt`` a sample, sorted by key, byte for byte the same every time.

Beside shards lie tables. Both are read from the store through `read_shard` and `open_table`: a file that was damaged after its
commit is then one line that names it, and never fewer rows.
"""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa

from infra.store import Store
from stages.runner.contract import Job, StageError

IMAGE_EXTENSIONS = ("jpg", "png", "webp")
VERIFY = "`unidiffuser verify` names what is damaged"


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


def read_shard(store: Store, path: str, rows: int) -> Iterator[Sample]:
    """All samples of a stored shard in its order, holding one at a time.

    Args:
        rows: how many samples its manifest promises.

    Raises:
        StageError: the file is not a complete shard; when samples are missing, it comes after those that are there.
    """
    found = 0
    with store.open(path) as file:
        for sample in read_samples(file, store.url(path)):
            found += 1
            yield sample
    # A tar that is cut between two samples reads without an error.
    if found != rows:
        raise StageError(f"{store.url(path)}: has {found} samples of {rows}; {VERIFY}")


@contextmanager
def open_table(job: Job, path: str) -> Iterator[BinaryIO]:
    """A stored Parquet file, to be read in the block.

    Raises:
        StageError: what the block reads is not a complete Parquet file.
    """
    try:
        with job.store.open(path) as file:
            yield file
    except (pa.ArrowInvalid, OSError) as error:
        # What the stage made on its way is in no manifest that `verify` reads, but can be made again.
        own = path.startswith(f"{job.stage}/units/")
        fix = f"delete {job.store.url(posixpath.dirname(path))} and run again" if own else VERIFY
        raise StageError(f"{job.store.url(path)}: {' '.join(str(error).split())}; {fix}") from None


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
