"""folder: a corpus of one's own, images with their captions in files beside them, packed as `download` packs the web's.

``photo.jpg`` belongs to ``photo.txt``, which is one caption, or one a line where `captions` names those behind the first.
Beside each ``SHARD.tar`` lies ``SHARD.parquet`` with every image and what became of it. A shard ends where a hash of the next
file's name says so: files that are added or removed change the shards they fall into and no others. Where the files
lie changes nothing, only their names and contents do.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterable, Iterator
from io import BytesIO
from typing import Any, NamedTuple

import pyarrow as pa
from pydantic import Field

from infra.external import member
from infra.queries import file_name, opened
from infra.text import TextError, text_of
from stages.runner.contract import (
    Job,
    Output,
    Phase,
    Records,
    Resources,
    Stage,
    StageError,
    Unit,
    UnitRecord,
    digest_of,
    operational,
)
from stages.runner.recipe import external_file
from stages.shards.captions import Names, column_of_caption, schema_of
from stages.shards.images import RESULT, ImageConfig, Outcome
from stages.shards.outside import UNPACKING
from stages.shards.tables import write_table
from stages.shards.tar import Sample, ShardWriter

SHA256_DIGITS = 64


class FolderConfig(ImageConfig):
    """Which files, beside how images are stored."""

    images: list[str] = external_file(..., "image files: paths, globs (** is any folder) or fsspec URLs", min_length=1)
    caption_extension: str = Field("txt", pattern=r"^\w+$", description="what the caption's file ends in instead of the image's")
    captions: Names = Field(
        (),
        description="names of further captions, which are the lines behind the first one of a caption's file, in this order; a "
        "line that is empty or missing is none. Without names the whole file is one caption. A training's data.captions draws "
        "from them",
    )
    shard_rows: int = Field(1000, ge=1, description="images of a shard, on average")
    cpus: float = operational(1.0, "CPUs that one worker takes", gt=0)
    workers: int | None = operational(None, "workers at most", ge=1)


class Pair(NamedTuple):
    """An image and its caption. `key` is decided by the name and both contents; `caption` is empty where there is none."""

    name: str
    key: str
    image: str
    digest: str
    caption: str


class Packer:
    """Worker: one shard of files in, one tar and one table of outcomes out."""

    def __init__(self, job: Job):
        from stages.shards.picture import ImageResizer

        self.config: FolderConfig = job.config
        self.resize = ImageResizer(job.config)

    def run(self, unit: Unit, out: Output) -> None:
        tar_name = f"{unit.name}.tar"
        rows: list[dict[str, Any]] = []
        before = ""
        with ShardWriter(out.path(tar_name)) as tar:
            for pair in sorted((Pair(*values) for values in unit.payload["pairs"]), key=lambda pair: pair.key):
                captions, image, outcome = ({}, b"", Outcome("duplicate_file")) if pair.key == before else self.pack(pair)
                before = pair.key
                rows.append({"key": pair.key, "file": pair.name, **captions, "status": outcome.reason or "success"})
                rows[-1] |= outcome.measured()
                if outcome.reason:
                    out.stats.drop(outcome.reason)
                    continue
                caption, meta = captions.pop("caption"), {"file": pair.name, **captions, **outcome.measured()}
                tar.add(Sample(pair.key, image, self.config.encode_format, caption, meta))
                out.rows[tar_name] += 1
        out.stats.rows_in, out.stats.rows_out = len(rows), out.rows[tar_name]
        texts = ("key", "file", "caption", *schema_of(self.config.captions))
        schema = pa.schema([*((name, pa.string()) for name in texts), *RESULT])
        write_table(pa.Table.from_pylist(rows, schema), out.path(f"{unit.name}.parquet", len(rows)))

    def pack(self, pair: Pair) -> tuple[dict[str, str], bytes, Outcome]:
        """(captions by column, bytes to store, outcome) of one image; without its own caption there are none."""
        try:
            return self._pack(pair)
        except UNPACKING:
            return {}, b"", Outcome("damaged_in_archive")

    def _pack(self, pair: Pair) -> tuple[dict[str, str], bytes, Outcome]:
        if not pair.caption:
            return {}, b"", Outcome("no_caption")
        try:
            captions = self.captions(text_of(_read(pair.caption)))
        except TextError:
            return {}, b"", Outcome("caption_not_utf8")
        if "caption" not in captions:
            return {}, b"", Outcome("no_caption")
        data = _read(pair.image)
        found = hashlib.sha256(data).hexdigest()
        # A member of a ZIP counts by its checksum, which reading it has compared.
        if len(pair.digest) == SHA256_DIGITS and pair.digest != found:
            raise StageError(f"{pair.image}: changed while it was being read; run again")
        if len(data) > self.config.max_bytes:
            return captions, b"", Outcome("too_large", sha256=found)
        image, width, height, original_width, original_height, reason = self.resize(BytesIO(data))
        return captions, image or b"", Outcome(reason or "", width, height, original_width, original_height, found)

    def captions(self, text: str) -> dict[str, str]:
        """The captions that a file holds, by column."""
        names = self.config.captions
        columns = ("caption", *map(column_of_caption, names))
        lines = (line.strip() for line in (text.split("\n") if names else [text]))
        return {column: line for column, line in zip(columns, lines, strict=False) if line}


def _read(address: str) -> bytes:
    try:
        with opened(address) as file:
            return file.read()
    except FileNotFoundError:
        raise StageError(f"{address}: no such file (any more)") from None


def pairs_of(config: FolderConfig, sources: Any) -> list[Pair]:
    """The images with their captions, by name; `sources` is address -> digest of all files. Endings may be in capitals."""
    ending = f".{config.caption_extension}"
    images: list[tuple[str, str]] = []
    captions: dict[str, tuple[bool, str, str]] = {}
    for address, digest in sources.items():
        own = member(address)
        if not own.lower().endswith(ending.lower()):
            images.append((address, digest))
            continue
        # Of two captions, the one that is spelled as the recipe says counts, else the last.
        stem, found = _stem(address), (own.endswith(ending), address, digest)
        captions[stem] = max(captions.get(stem, found), found)
    pairs = []
    for address, digest in images:
        _, caption, told = captions.get(_stem(address), (True, "", ""))
        name = file_name(address)
        key = hashlib.sha256("\n".join((name, digest, told)).encode()).hexdigest()[:20]
        pairs.append(Pair(name, key, address, digest, caption))
    return sorted(pairs)


def _stem(address: str) -> str:
    """The address without its file's ending."""
    own, colons, archive = address.partition("::")
    return posixpath.splitext(own)[0] + colons + archive


def shards(pairs: list[Pair], rows: int) -> Iterator[list[Pair]]:
    """Shards of about as many pairs; equal names stay together."""
    shard: list[Pair] = []
    for pair in pairs:
        first = not shard or pair.name != shard[-1].name
        if shard and first and int(hashlib.sha256(pair.name.encode()).hexdigest()[:8], 16) % rows == 0:
            yield shard
            shard = []
        shard.append(pair)
    if shard:
        yield shard


def _units(job: Job, earlier: Records) -> Iterable[Unit]:
    for shard in shards(pairs_of(job.config, job.sources), job.config.shard_rows):
        digest = digest_of([pair.key for pair in shard])
        yield Unit(digest[:12], (digest,), {"pairs": [tuple(pair) for pair in shard]}, len(shard))


def _resources(config: FolderConfig) -> Resources:
    return Resources(config.cpus, 0, config.workers)


class Folder(Stage):
    name = "folder"
    version = 3
    Config = FolderConfig
    phases = (Phase("pack", _units, Packer, resources=_resources, takes_sources=False),)

    @classmethod
    def sources(cls, config: FolderConfig) -> list[str]:
        parts = (pattern.partition("::") for pattern in config.images)
        captions = (f"{_stem(own)}.{config.caption_extension}{colons}{archive}" for own, colons, archive in parts)
        return list(dict.fromkeys([*config.images, *captions]))

    @classmethod
    def bytes_needed(cls, job: Job) -> int:
        """As `download`: 50 kB an image of 512 x 512 pixels."""
        return int(len(job.sources) / 2 * 50_000 * (job.config.image_size / 512) ** 2)

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        sample = {"key": "string", "caption": "string", "file": "string"}
        further = schema_of(job.config.captions)
        return sample | further | {field.name: str(field.type) for field in RESULT if field.name != "status"}
