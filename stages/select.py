"""select: from LAION-schema Parquet to the rows that are worth downloading.

    pick    a unit per metadata file: the rows that meet the conditions, as row numbers and digests of URL and hash
    write   a unit per metadata file: those of them that no earlier row has the URL or hash of, in shards of `shard_rows`

"Earlier" means the picked rows above it in the same file and all picked rows of the files before it, in the order of file
names. A picked row that is itself a duplicate counts too: the rule is then one of sets, not of the order of work. Units need
nothing of each other's results, and a file that is appended (its name sorts last) changes nothing for those before it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from stages.conditions import Condition, Verdict, columns_of, conditions
from stages.contract import Job, Output, Phase, Records, Resources, Stage, StageConfig, Unit, UnitRecord, operational
from stages.laion import BATCH, CANONICAL, NAMES, open_metadata, text_digests
from stages.recipe import external_file

KEYS = pa.schema([("row", pa.int64()), ("url", pa.uint64()), ("hash", pa.int64())])
GROUP = 1_000_000

# What urllib would not even try: no scheme that we fetch, or no host.
WEB_ADDRESS = r"^(?i:https?)://[^\s/?#]+"


class SelectConfig(StageConfig):
    """Conditions on the metadata. Bounds are inclusive; one that is not set is not asked."""

    metadata: list[str] = external_file(..., "Parquet files with LAION's columns: paths, globs or fsspec URLs", min_length=1)
    columns: dict[str, str] = Field({}, description="column names of a corpus that is not LAION's, such as {url: link}")
    min_width: int | None = Field(None, ge=1, description="pixels")
    max_width: int | None = Field(None, ge=1, description="pixels")
    min_height: int | None = Field(None, ge=1, description="pixels")
    max_height: int | None = Field(None, ge=1, description="pixels")
    min_side: int | None = Field(None, ge=1, description="pixels of the shorter side")
    max_side: int | None = Field(None, ge=1, description="pixels of the longer side")
    max_aspect_ratio: float | None = Field(None, ge=1, description="longer side / shorter side")
    min_similarity: float | None = Field(None, description="CLIP similarity of image and caption, as LAION computed it")
    max_punsafe: float | None = Field(None, description="probability that the image is unsafe")
    max_pwatermark: float | None = Field(None, description="probability of a watermark")
    min_aesthetic: float | None = Field(None, description="LAION's aesthetic score, 0 to 10")
    languages: list[str] | None = Field(None, min_length=1, description="language codes to keep")
    min_caption_chars: int | None = Field(None, ge=1)
    max_caption_chars: int | None = Field(None, ge=1)
    min_caption_words: int | None = Field(None, ge=1)
    max_caption_words: int | None = Field(None, ge=1)
    keep_null: bool = Field(True, description="a row whose value is null meets conditions on it; false: counts as null_COLUMN")
    shard_rows: int = Field(10_000, ge=1, description="rows of a shard, the piece that download does at once")
    cpus: float = operational(1.0, "CPUs that one worker takes", gt=0)

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: dict[str, str]) -> dict[str, str]:
        if unknown := [name for name in columns if name not in NAMES]:
            raise ValueError(f"{unknown[0]} is no column of ours; expected {', '.join(NAMES)}")
        return columns


def judge(table: pa.Table, tests: list[Condition], keep_null: bool) -> Verdict:
    """Which rows of a canonical table to download: those with a web address and a caption that meet the conditions."""
    verdict = Verdict(np.ones(table.num_rows, dtype=bool))
    verdict.drop("no_url", pc.equal(pc.utf8_length(table["url"]), 0), unknown=True)
    verdict.drop("bad_url", pc.invert(pc.match_substring_regex(table["url"], WEB_ADDRESS)), unknown=True)
    verdict.drop("no_caption", pc.equal(pc.utf8_length(table["caption"]), 0), unknown=True)
    verdict.judge(table, tests, keep_null)
    return verdict


class Pick:
    """Worker of the first phase: which rows of a metadata file meet the conditions, and their digests."""

    def __init__(self, job: Job):
        self.config: SelectConfig = job.config
        self.tests = conditions(job.config)
        self.needed = columns_of(self.tests)

    def run(self, unit: Unit, out: Output) -> None:
        picked = 0
        with (
            open_metadata(unit.payload["address"], self.config.columns, self.needed) as metadata,
            pq.ParquetWriter(out.path("keys.parquet"), KEYS, compression="zstd", use_dictionary=False) as writer,
        ):
            for start, table in metadata.batches():
                verdict = judge(table, self.tests, self.config.keep_null)
                out.stats.rows_in += table.num_rows
                for reason, rows in verdict.dropped.items():
                    out.stats.drop(reason, rows)
                indices = np.flatnonzero(verdict.passing)
                kept = table.select(["url", "hash"]).take(pa.array(indices))
                columns = [pa.array(indices + start), pa.array(text_digests(kept["url"])), kept["hash"].combine_chunks()]
                writer.write_table(pa.table(columns, schema=KEYS), row_group_size=GROUP)
                picked += len(indices)
        out.rows["keys.parquet"] = picked


class Write:
    """Worker of the second phase: drops duplicates and writes shards of the canonical columns."""

    def __init__(self, job: Job):
        self.job = job
        self.config: SelectConfig = job.config

    def run(self, unit: Unit, out: Output) -> None:
        with self.job.store.open(unit.payload["keys"]) as file:
            own = pq.read_table(file)
        by_url, by_hash = Seen(own["url"]), Seen(own["hash"])
        for path in unit.payload["earlier"]:
            with self.job.store.open(path) as file:
                for batch in pq.ParquetFile(file).iter_batches(BATCH):
                    by_url.add(batch["url"])
                    by_hash.add(batch["hash"])
        same_url, same_hash = by_url.repeated(), by_hash.repeated()
        out.stats.drop("duplicate_url", int(same_url.sum()))
        out.stats.drop("duplicate_hash", int((same_hash & ~same_url).sum()))
        kept = own["row"].to_numpy()[~(same_url | same_hash)]
        out.stats.rows_in, out.stats.rows_out = own.num_rows, len(kept)
        for number, shard in enumerate(self._shards(unit.payload["address"], unit.payload["file"], kept)):
            path = out.path(f"{unit.name}-{number:05d}.parquet", shard.num_rows)
            pq.write_table(shard, path, compression="zstd", row_group_size=GROUP)

    def _shards(self, address: str, file: str, kept: np.ndarray) -> Iterator[pa.Table]:
        """The kept rows with their keys, `shard_rows` at a time."""
        size = self.config.shard_rows
        waiting: list[pa.Table] = []
        held = 0
        with open_metadata(address, self.config.columns, set()) as metadata:
            for start, table in metadata.batches():
                low, high = np.searchsorted(kept, (start, start + table.num_rows))
                rows = kept[low:high]
                numbers = pc.utf8_lpad(pa.array(rows).cast(pa.string()), 8, "0")
                keys = pc.binary_join_element_wise(file, numbers, "")
                taken = table.take(pa.array(rows - start))
                waiting.append(taken.append_column("key", keys).select(CANONICAL.names).cast(CANONICAL))
                held += len(rows)
                while held >= size:
                    joined = pa.concat_tables(waiting)
                    yield joined.slice(0, size).combine_chunks()
                    waiting, held = [joined.slice(size)], held - size
        if held:
            yield pa.concat_tables(waiting).combine_chunks()


class Seen:
    """Which rows of one file have a value that an earlier row has; memory grows with this file's rows, not with the others'."""

    def __init__(self, column: pa.ChunkedArray):
        """`column`: the file's own values, shape (rows,), in row order; null equals nothing."""
        valid = pc.is_valid(column).to_numpy().astype(bool)
        self.values, first, inverse = np.unique(column.drop_null().to_numpy(), return_index=True, return_inverse=True)
        self.before = np.zeros(len(self.values), dtype=bool)
        self.place = np.full(len(column), -1)
        self.place[valid] = inverse
        self.first = np.zeros(len(column), dtype=bool)
        self.first[np.flatnonzero(valid)[first]] = True

    def add(self, column: pa.Array) -> None:
        """Values of rows that come before the whole file."""
        other = column.drop_null().to_numpy(zero_copy_only=False)
        if len(self.values) and len(other):
            at = np.minimum(np.searchsorted(self.values, other), len(self.values) - 1)
            self.before[at[self.values[at] == other]] = True

    def repeated(self) -> np.ndarray:
        """Mask of the rows with an earlier equal, shape (rows,)."""
        if not len(self.values):
            return np.zeros(len(self.place), dtype=bool)
        return (self.place >= 0) & (~self.first | self.before[self.place])


def _pick_units(job: Job, earlier: Records) -> Iterable[Unit]:
    # By name and content, as the fingerprint counts them: where the files lie must not decide which one comes first.
    for address, digest in sorted(job.sources.items(), key=lambda item: (PurePosixPath(item[0]).name, item[1])):
        file = hashlib.sha256(digest.encode()).hexdigest()[:10]
        yield Unit(PurePosixPath(address).stem, (digest,), {"address": address, "file": file})


def _write_units(job: Job, earlier: Records) -> Iterable[Unit]:
    """Decided by the metadata file and, through a running digest, by the keys of all files before it."""
    before: list[str] = []
    digest = ""
    for unit, record in zip(_pick_units(job, earlier), earlier["pick"], strict=True):
        (keys,) = record.files
        digest = hashlib.sha256((digest + keys.sha256).encode()).hexdigest()
        payload = {**unit.payload, "keys": keys.path, "earlier": tuple(before)}
        yield Unit(unit.name, (*unit.digests, digest), payload, rows=keys.rows)
        before.append(keys.path)


def _resources(config: SelectConfig) -> Resources:
    return Resources(cpus=config.cpus)


class Select(Stage):
    name = "select"
    version = 1
    Config = SelectConfig
    phases = (
        Phase("pick", _pick_units, Pick, fields=frozenset(SelectConfig.model_fields) - {"shard_rows"}, resources=_resources),
        Phase("write", _write_units, Write, resources=_resources),
    )

    @classmethod
    def sources(cls, config: SelectConfig) -> list[str]:
        return config.metadata

    @classmethod
    def bytes_needed(cls, job: Job) -> int:
        """No more than the metadata itself takes, as far as it lies on this machine."""
        return sum(os.path.getsize(address) for address in job.sources if os.path.exists(address))

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        return {field.name: str(field.type) for field in CANONICAL}
