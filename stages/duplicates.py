"""Near duplicates across a whole set, found by workers that each see a part of it (three phases of the filter).

    survey    a unit per group of shards: histograms of the scores, and how many rows have a value of each column that is judged;
              thumbnails of the rows that meet the conditions, along a curve
    compare   a unit per region of the thumbnails' space: which of its rows resemble an earlier one
    gather    a unit per group of shards: these rows by shard, with a digest a shard that decides its part of the last phase

"Earlier" means above it in the input's order. A row that is itself a near duplicate counts too: the rule is then one of sets, and
neither the regions nor the groups show in the result. A worker holds at most about `ROWS` thumbnails (of 768 bytes, three
times while it sorts: 1.2 GB); the driver holds `SAMPLE` rows a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.dataset import FileEntry
from stages.conditions import SCORES, Verdict, columns_of, conditions
from stages.contract import Job, Output, Phase, Records, Resources, Unit, UnitRecord, digest_of
from stages.histogram import count
from stages.regions import Region, curve, regions
from stages.tar import open_table
from stages.thumbnails import QUARTERS, THUMBNAIL_BYTES, brightness, brightness_tolerance, earlier_alike

# Rows of a group of shards, and rows of a region with its margins.
ROWS = 500_000
# Rows of a group whose brightness the driver plans regions by.
SAMPLE = 64
ROW_GROUP = 4096
NONE = digest_of([])

BRIGHTNESS = [f"brightness_{number}" for number in range(QUARTERS)]
THUMBNAILS = pa.schema(
    [
        ("shard", pa.int32()),
        ("row", pa.int32()),
        *((name, pa.uint8()) for name in BRIGHTNESS),
        ("thumbnail", pa.binary(THUMBNAIL_BYTES)),
    ]
)
PLACES = pa.schema([("group", pa.int32()), ("shard", pa.int32()), ("row", pa.int32())])


def judge(scores: pa.Table, config: Any) -> Verdict:
    """Which rows of a table of scores can be decoded and meet the conditions."""
    verdict = Verdict(np.ones(scores.num_rows, dtype=bool))
    verdict.drop("undecodable", scores["thumbnail"].is_null())
    verdict.judge(scores, conditions(config), config.keep_null)
    return verdict


def columns_judged(config: Any) -> set[str]:
    return {"width", "height", "caption", "thumbnail"} | columns_of(conditions(config))


def groups(records: list[UnitRecord]) -> list[list[UnitRecord]]:
    """Scored shards, in their order, up to `ROWS` rows together; a shard that is appended changes the last group at most."""
    found: list[list[UnitRecord]] = []
    held = 0
    for record in records:
        rows = record.files[0].rows
        if not found or held + rows > ROWS:
            found.append([])
            held = 0
        found[-1].append(record)
        held += rows
    return found


def survey_units(job: Job, earlier: Records) -> Iterable[Unit]:
    for shards in groups(earlier["score"]):
        files = [record.files[0] for record in shards]
        payload = {"scores": [file.path for file in files]}
        yield Unit(shards[0].name, tuple(file.sha256 for file in files), payload, sum(file.rows for file in files))


class Survey:
    """Worker: what the whole set must know of a group of shards."""

    def __init__(self, job: Job):
        self.job = job
        self.columns = sorted(columns_judged(job.config) | set(SCORES))

    def run(self, unit: Unit, out: Output) -> None:
        histograms: dict[str, np.ndarray] = {}
        known: Counter[str] = Counter()
        parts = []
        for number, path in enumerate(unit.payload["scores"]):
            with open_table(self.job, path) as file:
                scores = pq.read_table(file, columns=self.columns)
            known.update({column: scores.num_rows - scores[column].null_count for column in self.columns})
            for score in SCORES:
                histograms[score] = histograms.get(score, 0) + np.array(count(score, scores[score]))
            if self.job.config.duplicate_tolerance is not None:
                rows = np.flatnonzero(judge(scores, self.job.config).passing)
                parts.append((np.full(len(rows), number), rows, pixels_of(scores["thumbnail"].take(pa.array(rows)))))
        out.notes["histograms"] = {score: counts.tolist() for score, counts in histograms.items()}
        out.notes["known"] = dict(known)
        if parts:
            shards, rows, thumbnails = (np.concatenate(part) for part in zip(*parts, strict=True))
            self.write(out, shards, rows, thumbnails)

    def write(self, out: Output, shards: np.ndarray, rows: np.ndarray, thumbnails: np.ndarray) -> None:
        # Of equal thumbnails the first stands for all: the same picture of a missing picture comes a million times.
        first = np.sort(np.unique(thumbnails.view(f"V{THUMBNAIL_BYTES}").ravel(), return_index=True)[1])
        again = np.setdiff1d(np.arange(len(rows)), first, assume_unique=True)
        write_places(out, "equal.parquet", np.zeros(len(again)), shards[again], rows[again])
        quarters = brightness(thumbnails[first])
        along = curve(quarters)
        chosen = first[along]
        quarters = quarters[along]
        columns = [pa.array(values, field.type) for values, field in zip(
            (shards[chosen], rows[chosen], *quarters.T), THUMBNAILS, strict=False)]  # fmt: skip
        flat = pa.py_buffer(thumbnails[chosen].tobytes())
        columns.append(pa.FixedSizeBinaryArray.from_buffers(THUMBNAILS.field("thumbnail").type, len(chosen), [None, flat]))
        path = out.path("thumbnails.parquet", len(chosen))
        pq.write_table(pa.table(columns, schema=THUMBNAILS), path, compression="zstd", row_group_size=ROW_GROUP)
        out.notes["thumbnails"] = len(chosen)
        out.notes["sample"] = quarters[np.linspace(0, len(chosen) - 1, min(SAMPLE, len(chosen))).astype(int)].tolist()


def compare_units(job: Job, earlier: Records) -> Iterable[Unit]:
    surveyed = earlier["survey"]
    if job.config.duplicate_tolerance is None or not surveyed:
        return
    files = [file_of(record, "thumbnails.parquet") for record in surveyed]
    paths, decided = [file.path for file in files], digest_of([file.sha256 for file in files])
    samples = [np.array(record.notes["sample"], np.uint8).reshape(-1, QUARTERS) for record in surveyed]
    weights = [np.full(len(s), r.notes["thumbnails"] / max(len(s), 1)) for s, r in zip(samples, surveyed, strict=True)]
    margin = brightness_tolerance(job.config.duplicate_tolerance)
    for number, region in enumerate(regions(np.concatenate(samples), np.concatenate(weights), margin, ROWS)):
        payload = {"files": paths, "low": region.low, "high": region.high}
        yield Unit(f"region-{number:05d}", (decided, str(region)), payload)


class Compare:
    """Worker: the near duplicates in one region."""

    def __init__(self, job: Job):
        self.job = job
        self.tolerance: int = job.config.duplicate_tolerance

    def run(self, unit: Unit, out: Output) -> None:
        region = Region(tuple(unit.payload["low"]), tuple(unit.payload["high"]))
        margin = brightness_tolerance(self.tolerance)
        parts = []
        for group, path in enumerate(unit.payload["files"]):
            with open_table(self.job, path) as file:
                table = pq.read_table(file, filters=within(region, margin))
            quarters = np.stack([table[name].to_numpy() for name in BRIGHTNESS], axis=1)
            places = np.stack([np.full(len(table), group), table["shard"].to_numpy(), table["row"].to_numpy()])
            parts.append((places, region.holds(quarters), pixels_of(table["thumbnail"])))
        places = np.concatenate([part[0] for part in parts], axis=1)
        order = np.lexsort(places[::-1])
        asked = np.concatenate([part[1] for part in parts])[order]
        thumbnails = np.concatenate([part[2] for part in parts])[order]
        write_places(out, "alike.parquet", *places[:, order][:, earlier_alike(thumbnails, self.tolerance, asked)])


def within(region: Region, margin: int) -> list[tuple[str, str, int]]:
    """The region and its margin as a filter of Parquet, which skips row groups by their statistics."""
    below = [(name, ">=", max(low - margin, 0)) for name, low in zip(BRIGHTNESS, region.low, strict=True)]
    return below + [(name, "<=", min(high + margin - 1, 255)) for name, high in zip(BRIGHTNESS, region.high, strict=True)]


def gather_units(job: Job, earlier: Records) -> Iterable[Unit]:
    if job.config.duplicate_tolerance is None:
        return
    files = [file_of(record, "alike.parquet") for record in earlier["compare"]]
    paths, decided = [file.path for file in files], digest_of([file.sha256 for file in files])
    for number, (shards, surveyed) in enumerate(zip(groups(earlier["score"]), earlier["survey"], strict=True)):
        equal = file_of(surveyed, "equal.parquet")
        payload = {"group": number, "shards": len(shards), "equal": equal.path, "alike": paths}
        yield Unit(surveyed.name, (decided, equal.sha256, str(number), str(len(shards))), payload)


class Gather:
    """Worker: the near duplicates of a group's shards."""

    def __init__(self, job: Job):
        self.job = job

    def run(self, unit: Unit, out: Output) -> None:
        tables = [self.read(unit.payload["equal"], 0)]
        tables += [self.read(path, unit.payload["group"]) for path in unit.payload["alike"]]
        found = pa.concat_tables(tables).sort_by([("shard", "ascending"), ("row", "ascending")])
        shards, rows = found["shard"].to_numpy(), found["row"].to_numpy()
        write_places(out, "drops.parquet", np.zeros(len(rows)), shards, rows)
        out.notes["drops"] = [digest_of(rows[shards == number].tolist()) for number in range(unit.payload["shards"])]

    def read(self, path: str, group: int) -> pa.Table:
        with open_table(self.job, path) as file:
            return pq.read_table(file, filters=[("group", "==", group)])


def drops_by_shard(earlier: Records) -> Iterator[tuple[str, dict[str, Any]]]:
    """For every scored shard, in order: a digest of its near duplicates, and where `dropped_rows` finds them."""
    for record, shards in zip(earlier["gather"], groups(earlier["score"]), strict=True) if earlier["gather"] else ():
        path = file_of(record, "drops.parquet").path
        for number, (digest, _) in enumerate(zip(record.notes["drops"], shards, strict=True)):
            yield digest, {"drops": path, "number": number}
    if not earlier["gather"]:
        yield from ((NONE, {"drops": None}) for _ in earlier["score"])


def dropped_rows(job: Job, payload: dict[str, Any]) -> np.ndarray:
    """Rows of a shard that are near duplicates, ascending."""
    if payload["drops"] is None:
        return np.array([], dtype=np.int32)
    with open_table(job, payload["drops"]) as file:
        return pq.read_table(file, filters=[("shard", "==", payload["number"])])["row"].to_numpy()


def write_places(out: Output, name: str, groups: np.ndarray, shards: np.ndarray, rows: np.ndarray) -> None:
    columns = [pa.array(values, field.type, safe=False) for values, field in zip((groups, shards, rows), PLACES, strict=True)]
    pq.write_table(pa.table(columns, schema=PLACES), out.path(name, len(rows)), compression="zstd", row_group_size=ROW_GROUP)


def file_of(record: UnitRecord, name: str) -> FileEntry:
    return next(file for file in record.files if file.name == name)


def pixels_of(thumbnails: pa.ChunkedArray) -> np.ndarray:
    """A column of thumbnails without nulls as (rows, THUMBNAIL_BYTES) uint8."""
    whole = thumbnails.combine_chunks()
    pixels = np.frombuffer(whole.buffers()[1] or b"", np.uint8).reshape(-1, THUMBNAIL_BYTES)
    return pixels[whole.offset : whole.offset + len(whole)]


def _resources(config: Any) -> Resources:
    return Resources(1.0, 0.0, config.workers)


PHASES = (
    Phase("survey", survey_units, Survey, resources=_resources),
    Phase("compare", compare_units, Compare, fields=frozenset({"duplicate_tolerance"}), resources=_resources),
    Phase("gather", gather_units, Gather, fields=frozenset(), resources=_resources),
)
