"""select: from LAION-schema Parquet to the rows that are worth downloading.

    pick        a unit per metadata file: the rows that meet the conditions and are in the sample, as keys of URL and hash
    lists, match, admit     only with `allow` or `deny`, see `stages/select/lists.py`
    duplicates  a unit per range of keys: which rows have the URL or hash of an earlier row
    write       a unit per metadata file: the rows that are left, in shards of `shard_rows`

"Earlier" means the picked rows above it in the same file and all picked rows of the files before it, in the order of file
names. A picked row that is itself a duplicate counts too: the rule is then one of sets, not of the order of work. A file that is
appended (its name sorts last) changes nothing for those before it: of what was done before, only `duplicates` is done again.

Refused before any work starts, with the file's name: Parquet that cannot be read or ends early, a missing column of the schema or
of a condition, a column of a type that it cannot have, or one that is there twice. Counted: rows without a URL or caption
(`no_url`, `no_caption`, text that is not UTF-8 among them) or with a URL that names no web address (`bad_url`); then the first
condition that a row fails, or whose column has a value there that cannot be read (`bad_COLUMN`), `not_sampled`, `not_allowed`,
`denied`, `duplicate_url` and `duplicate_hash`, in this order. A value that cannot be read and that no condition asks for is null.

The work is linear in the rows, and nothing is gathered in one place. A worker needs about 300 MB: a batch of rows and the keys
of a run (pick), the keys of one range (duplicates), or a batch, a shard and a byte a row of its own metadata file (write).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from infra.queries import file_name
from stages.runner.contract import (
    Job,
    NodeConfig,
    Output,
    Phase,
    Records,
    Resources,
    Stage,
    Unit,
    UnitRecord,
    digest_of,
    operational,
)
from stages.runner.recipe import external_file
from stages.select.keys import SPACE, Keys, KeyWriter, RowSets, add_notes, mixed, ranges, read_keys, repeated, text_keys
from stages.select.laion import CANONICAL, Reading, check_metadata, open_metadata
from stages.select.lists import (
    Admit,
    Match,
    ReadList,
    admit_units,
    admitted,
    check_lists,
    domain_keys,
    hash_keys,
    list_units,
    match_units,
)
from stages.select.presets import PRESETS
from stages.select.where import Where
from stages.shards.captions import Names, columns_read, schema_of
from stages.shards.conditions import Condition, Verdict, columns_of, conditions
from stages.shards.tables import write_table
from stages.shards.words import WORDS
from training.names import NAMES

GROUP = 1_000_000

# What urllib would not even try: no scheme that we fetch, or no host.
WEB_ADDRESS = r"^(?i:https?)://[^\s/?#]+"

ListKind = Literal["auto", "url", "hash", "domain"]


class SelectConfig(NodeConfig):
    """Conditions on the metadata. Bounds are inclusive; one that is not set is not asked."""

    metadata: list[str] = external_file(..., "Parquet files with LAION's columns: paths, globs or fsspec URLs", min_length=1)
    laion_schema: Literal[
        "auto", "laion2B-en", "laion2B-en-joined", "laion-high-resolution", "laion-aesthetics", "relaion"
    ] = Field("auto", description="the set whose columns every file must have; auto: whichever each file fits")  # fmt: skip
    columns: dict[str, str] = Field({}, description="column names of a corpus that is not LAION's, such as {url: link}")
    captions: Names = Field(
        (),
        description="columns of further captions beside the row's own, by the file's names; a training's data.captions draws "
        "from them",
    )
    preset: Literal["laion2B-en-256", "laion-high-resolution-512", "laion-aesthetics-512"] | None = operational(
        None, "thresholds of one of the paper's subsets; the fields beside it override them, null takes one away"
    )
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
    min_caption_chars: int | None = Field(None, ge=1, description="characters of the caption, at least")
    max_caption_chars: int | None = Field(None, ge=1, description="characters of the caption, at most")
    min_caption_words: int | None = Field(None, ge=1, description=WORDS)
    max_caption_words: int | None = Field(None, ge=1, description="counted likewise")
    where: tuple[str, ...] = Field(
        (), description='conditions on any column by its own name, such as "NSFW in [UNLIKELY, UNSURE]" or "LICENSE != ?"'
    )
    keep_null: bool = Field(True, description="a row whose value is null meets conditions on it; false: counts as null_COLUMN")
    sample: float | None = Field(None, gt=0, le=1, description="part of the rows that meet the conditions, told by their URL")
    seed: int = Field(0, ge=0, lt=2**63, description="another seed, another sample")
    allow: list[str] = external_file([], "files of URLs, hashes or domains; rows that none of them lists are dropped")
    allow_by: ListKind = Field("auto", description="what `allow` lists; auto: the column that a file has, or how a line looks")
    deny: list[str] = external_file([], "files of URLs, hashes or domains; rows that one of them lists are dropped")
    deny_by: ListKind = Field("auto", description="what `deny` lists, as allow_by")
    shard_rows: int = Field(10_000, ge=1, description="rows of a shard, the piece that download does at once")
    cpus: float = operational(1.0, "CPUs that one worker takes", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(name := values.get("preset"), str):
            return PRESETS.get(name, {}) | values
        return values

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: dict[str, str]) -> dict[str, str]:
        if unknown := [name for name in columns if name not in NAMES]:
            raise ValueError(f"{unknown[0]} is no column of ours; expected {', '.join(NAMES)}")
        return columns

    @field_validator("where")
    @classmethod
    def _parsed(cls, where: tuple[str, ...]) -> tuple[str, ...]:
        for text in where:
            Where.parse(text)
        return where


def conditions_of(config: SelectConfig) -> tuple[list[Condition], Reading]:
    """All conditions, and the reading that gives the columns that they ask for."""
    own = [Where.parse(text) for text in config.where]
    usual = conditions(config)
    others = {where.label: (where.column, where.type) for where in own} | columns_read(config.captions)
    reading = Reading(config.laion_schema, config.columns, frozenset(columns_of(usual)), others)
    return usual + [where.condition() for where in own], reading


def judge(table: pa.Table, tests: list[Condition], keep_null: bool) -> Verdict:
    """Which rows of a canonical table to download: those with a web address and a caption that meet the conditions."""
    verdict = Verdict(np.ones(table.num_rows, dtype=bool))
    verdict.drop("no_url", pc.equal(pc.binary_length(table["url"]), 0), unknown=True)
    verdict.drop("bad_url", pc.invert(pc.match_substring_regex(table["url"], WEB_ADDRESS)), unknown=True)
    verdict.drop("no_caption", pc.equal(pc.binary_length(table["caption"]), 0), unknown=True)
    verdict.judge(table, tests, keep_null)
    return verdict


def sampled(keys: Keys, sample: float, seed: int) -> np.ndarray:
    """Mask of the keys that are in the sample: whatever file a URL lies in, and whatever else there is."""
    return mixed(keys ^ mixed(np.array([seed]))) < np.uint64(min(int(sample * SPACE), SPACE - 1))


class Pick:
    """Worker of the first phase: which rows of a metadata file meet the conditions, and their keys."""

    def __init__(self, job: Job):
        self.config: SelectConfig = job.config
        self.tests, self.reading = conditions_of(job.config)
        self.names = sorted({"url", "caption", "hash"} | columns_of(self.tests))

    def run(self, unit: Unit, out: Output) -> None:
        kinds = unit.payload["kinds"]
        with ExitStack() as stack:
            writers = {kind: stack.enter_context(KeyWriter(out.path(f"{kind}.parquet"))) for kind in kinds}
            metadata = stack.enter_context(open_metadata(unit.payload["address"], self.reading))
            out.notes["schema"] = metadata.schema
            for start, table in metadata.batches(self.names):
                verdict = judge(table, self.tests, self.config.keep_null)
                kept = table.select(["url", "hash"]).filter(pa.array(verdict.passing)).combine_chunks()
                rows = np.flatnonzero(verdict.passing)
                keys = text_keys(kept["url"])
                if self.config.sample is not None:
                    chosen = sampled(keys, self.config.sample, self.config.seed)
                    verdict.dropped["not_sampled"] = int((~chosen).sum())
                    kept, rows, keys = kept.filter(pa.array(chosen)).combine_chunks(), rows[chosen], keys[chosen]
                out.stats.rows_in += table.num_rows
                for reason, count in verdict.dropped.items():
                    out.stats.drop(reason, count)
                self._add(writers, kept, keys, rows + start)
        for kind, writer in writers.items():
            out.rows[f"{kind}.parquet"] = writer.count

    @staticmethod
    def _add(writers: dict[str, KeyWriter], kept: pa.Table, keys: Keys, rows: np.ndarray) -> None:
        writers["url"].add(keys, rows)
        known = kept["hash"].is_valid()
        writers["hash"].add(hash_keys(kept["hash"].filter(known)), rows[known.to_numpy()])
        if "domain" in writers:
            domains, of = domain_keys(kept["url"].combine_chunks())
            writers["domain"].add(domains, rows[of])


class Duplicates:
    """Worker of the phase before the last: holds the keys of one range, of all files."""

    def __init__(self, job: Job):
        self.job = job

    def run(self, unit: Unit, out: Output) -> None:
        low, high = unit.payload["range"]
        paths = unit.payload["keys"]
        files, first_keys, first_rows = [], [], []
        with RowSets(out.path("again.parquet"), len(paths)) as sets:
            for number, path in enumerate(paths):
                for keys, rows in read_keys(self.job, path, low, high):
                    again = repeated(keys)
                    sets.add(number, rows[again])
                    files.append(np.full(len(keys) - again.sum(), number, dtype=np.int32))
                    first_keys.append(keys[~again])
                    first_rows.append(rows[~again])
            if files:
                again = repeated(np.concatenate(first_keys))
                number, rows = np.concatenate(files)[again], np.concatenate(first_rows)[again]
                ends = np.searchsorted(number, np.unique(number), "right")
                for some in np.split(np.arange(len(number)), ends[:-1]):
                    if len(some):
                        sets.add(int(number[some[0]]), rows[some])
        out.rows["again.parquet"] = sets.writer.count
        out.notes["again"] = sets.note()


class Write:
    """Worker of the last phase: leaves duplicates out and writes shards of the canonical columns."""

    def __init__(self, job: Job):
        self.job = job
        self.config: SelectConfig = job.config
        further = columns_read(self.config.captions)
        self.reading = Reading(self.config.laion_schema, self.config.columns, others=further)
        self.names = [*CANONICAL.names[1:], *further]

    def run(self, unit: Unit, out: Output) -> None:
        number = unit.payload["number"]
        with open_metadata(unit.payload["address"], self.reading) as metadata:
            keep = np.zeros(metadata.rows, dtype=bool)
            for rows in self._rows(unit.payload["url"]):
                keep[rows] = True
            out.stats.rows_in = int(keep.sum())
            for kind, paths in unit.payload["again"].items():
                before = keep.sum()
                for path in paths:
                    for rows in self._rows(path, number):
                        keep[rows] = False
                out.stats.drop(f"duplicate_{kind}", int(before - keep.sum()))
            out.stats.rows_out = int(keep.sum())
            tables = metadata.kept(self.names, keep)
            for count, shard in enumerate(self._shards(unit.payload["file"], tables)):
                path = out.path(f"{unit.name}-{count:05d}.parquet", shard.num_rows)
                write_table(shard, path, GROUP)
            out.notes["unread"] = dict(metadata.unread)

    def _rows(self, path: str, file: int | None = None) -> Iterator[np.ndarray]:
        """Row numbers of a file of keys, or those that stand under a metadata file's number."""
        for _, rows in read_keys(self.job, path) if file is None else read_keys(self.job, path, file, file + 1):
            yield rows

    def _shards(self, file: str, tables: Iterable[tuple[np.ndarray, pa.Table]]) -> Iterator[pa.Table]:
        """The kept rows with their keys, `shard_rows` at a time."""
        size = self.config.shard_rows
        waiting: list[pa.Table] = []
        held = 0
        for rows, table in tables:
            numbers = pc.utf8_lpad(pa.array(rows).cast(pa.string()), 8, "0")
            waiting.append(table.add_column(0, CANONICAL.field("key"), pc.binary_join_element_wise(file, numbers, "")))
            held += table.num_rows
            while held >= size:
                joined = pa.concat_tables(waiting)
                yield joined.slice(0, size).combine_chunks()
                waiting, held = [joined.slice(size)], held - size
        if held:
            yield pa.concat_tables(waiting).combine_chunks()


def _files(job: Job) -> list[tuple[str, str]]:
    """(address, digest) in the order that decides which row is earlier."""
    # By name and content, as the fingerprint counts them: where the files lie must not decide which one comes first.
    return sorted(job.sources.items(), key=lambda item: (file_name(item[0]), item[1]))


def _pick_units(job: Job, earlier: Records) -> Iterable[Unit]:
    files = _files(job)
    check_metadata([address for address, _ in files], conditions_of(job.config)[1])
    check_lists(job.config, job.lists)
    kinds = ("url", "hash", "domain") if any(job.lists.values()) else ("url", "hash")
    for address, digest in files:
        yield Unit(PurePosixPath(file_name(address)).stem, (digest, *kinds), {"address": address, "kinds": kinds})


def _duplicate_units(job: Job, earlier: Records) -> Iterable[Unit]:
    """Decided by the keys of all files."""
    for kind in ("url", "hash"):
        keys = [record.file(f"{kind}.parquet") for record in admitted(earlier)]
        paths, digest = tuple(entry.path for entry in keys), digest_of([entry.sha256 for entry in keys])
        for low, high in ranges(sum(entry.rows for entry in keys)):
            yield Unit(f"{kind}-{low:016x}", (digest, f"{low}-{high}"), {"keys": paths, "range": (low, high)})


def _write_units(job: Job, earlier: Records) -> Iterable[Unit]:
    """Decided by the metadata file, its picked rows, and which of them are duplicates."""
    files, left = _files(job), admitted(earlier)
    found = {kind: [r for r in earlier["duplicates"] if r.name.startswith(f"{kind}-")] for kind in ("url", "hash")}
    again = {kind: tuple(record.file("again.parquet").path for record in records) for kind, records in found.items()}
    digests = {kind: add_notes((r.notes["again"] for r in records), len(files)) for kind, records in found.items()}
    for number, ((address, digest), record) in enumerate(zip(files, left, strict=True)):
        picked = record.file("url.parquet")
        decided = (digest, picked.sha256, digests["url"][number], digests["hash"][number])
        payload = {"address": address, "number": number, "file": digest_of(digest)[:10], "url": picked.path, "again": again}
        yield Unit(PurePosixPath(file_name(address)).stem, decided, payload, rows=picked.rows)


def _resources(config: SelectConfig) -> Resources:
    return Resources(cpus=config.cpus)


# Footers that are read before a run begins, of a pattern and in all.
CHECKED = 4
MOST_CHECKED = 64


def by_pattern(patterns: Sequence[str], addresses: Iterable[str]) -> list[list[str]]:
    """The addresses that each pattern means, sorted; and those that none is seen to mean, such as one that ends in capitals."""
    found: dict[str, list[str]] = {}
    for address in sorted(addresses):
        found.setdefault(next((p for p in patterns if p == address or fnmatchcase(address, p)), ""), []).append(address)
    return list(found.values())


# What a phase does not name counts through the content of the files that it reads.
_PICK = frozenset(SelectConfig.model_fields) - {"captions", "shard_rows", "allow_by", "deny_by"}
_READ = frozenset({"laion_schema", "columns"})


class Select(Stage):
    name = "select"
    version = 5
    Config = SelectConfig
    check_refuses = False
    phases = (
        Phase("pick", _pick_units, Pick, fields=_PICK, resources=_resources),
        Phase("lists", list_units, ReadList, fields=frozenset({"columns", "allow_by", "deny_by"}), resources=_resources),
        Phase("match", match_units, Match, fields=frozenset(), resources=_resources),
        Phase("admit", admit_units, Admit, fields=frozenset(), resources=_resources),
        Phase("duplicates", _duplicate_units, Duplicates, fields=frozenset(), resources=_resources),
        Phase("write", _write_units, Write, fields=_READ | {"captions", "shard_rows"}, resources=_resources),
    )

    @classmethod
    def sources(cls, config: SelectConfig) -> list[str]:
        return config.metadata

    @classmethod
    def lists(cls, config: SelectConfig) -> dict[str, list[str]]:
        return {part: files for part in ("allow", "deny") if (files := getattr(config, part))}

    @classmethod
    def check(cls, config: SelectConfig, sources: Mapping[str, str], lists: Mapping[str, Mapping[str, str]]) -> None:
        """The footers of the first few files of every pattern; `pick` is planned from all of them."""
        reading = conditions_of(config)[1]
        some = [address for group in by_pattern(config.metadata, sources) for address in group[:CHECKED]]
        check_metadata(some[:MOST_CHECKED], reading)

    @classmethod
    def bytes_needed(cls, job: Job) -> int:
        """No more than the metadata itself takes and once more a part of it for the keys, as far as it lies on this machine."""
        return sum(os.path.getsize(address) for address in job.sources if os.path.exists(address)) * 3 // 2

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        return {field.name: str(field.type) for field in CANONICAL} | schema_of(job.config.captions)

    @classmethod
    def summary(cls, job: Job, records: Records) -> dict[str, Any]:
        """Files by the schema that they were found to have, entries of the lists by their kind, and cells that became null."""
        schemas = [record.notes["schema"] for record in records["pick"]]
        lists = {
            record.name: {entry.name.removesuffix(".parquet"): entry.rows for entry in record.files if entry.rows}
            for record in records["lists"]
        }
        unread: Counter[str] = sum((Counter(record.notes["unread"]) for record in records["write"]), Counter())
        facts = {"schemas": {name: schemas.count(name) for name in sorted(set(schemas))}}
        return facts | ({"lists": lists} if lists else {}) | ({"unread": dict(sorted(unread.items()))} if unread else {})
