"""Near duplicates across a whole set, found by workers that each see a part of it (three phases of the filter).

    survey    a unit per group of shards: histograms of the scores, and how many rows have a value of each column that is judged;
              hashes of the rows that meet the conditions, a file a band, in the order of its keys
    compare   a unit per range of a band's keys, or for several small bands: which of its rows resemble an earlier one
    gather    a unit per group of shards: these rows by shard, with a digest a shard that decides its part of the last phase

"Earlier" means above it in the input's order. A row that is itself a near duplicate counts too: the rule is then one of sets, and
neither the ranges nor the groups show in the result. A worker takes `ROWS` rows at most, 2.2 GB at its peak; the driver holds the
hashes of `SAMPLE` rows a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from stages.filter.histogram import count
from stages.filter.likeness import COLOUR_BYTES, HASH_BYTES, bands, earlier_alike, key
from stages.runner.contract import Job, Output, Phase, Records, Resources, Unit, UnitRecord, digest_of
from stages.shards.conditions import Verdict, columns_of, conditions
from stages.shards.scores import SCORES
from stages.shards.tables import read_table, write_table

# Rows of a group of shards, and rows that a unit compares.
ROWS = 4_000_000
# Rows of a group whose hashes the driver plans ranges by.
SAMPLE = 64
ROW_GROUP = 8192
NONE = digest_of([])

LOOKS = pa.schema(
    [
        ("key", pa.int64()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("phash", pa.binary(HASH_BYTES)),
        ("colours", pa.binary(COLOUR_BYTES)),
    ]
)
PLACES = pa.schema([("group", pa.int32()), ("shard", pa.int32()), ("row", pa.int32())])


def judge(scores: pa.Table, config: Any) -> Verdict:
    """Which rows of a table of scores can be decoded and meet the conditions."""
    verdict = Verdict(np.ones(scores.num_rows, dtype=bool))
    verdict.drop("undecodable", scores["phash"].is_null())
    verdict.judge(scores, conditions(config), config.keep_null)
    return verdict


def columns_judged(config: Any) -> set[str]:
    return {"width", "height", "caption", "phash", "colours"} | columns_of(conditions(config))


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
            scores = read_table(self.job, path, self.columns)
            known.update({column: scores.num_rows - scores[column].null_count for column in self.columns})
            for score in SCORES:
                histograms[score] = histograms.get(score, 0) + np.array(count(score, scores[score]))
            if self.job.config.duplicate_tolerance is not None:
                rows = np.flatnonzero(judge(scores, self.job.config).passing)
                passing = scores.select(["phash", "colours"]).take(pa.array(rows))
                parts.append((np.full(len(rows), number), rows, bytes_of(passing["phash"]), bytes_of(passing["colours"])))
        out.notes["histograms"] = {score: counts.tolist() for score, counts in histograms.items()}
        out.notes["known"] = dict(known)
        if parts:
            self.write(out, *(np.concatenate(part) for part in zip(*parts, strict=True)))

    def write(self, out: Output, shards: np.ndarray, rows: np.ndarray, hashes: np.ndarray, shades: np.ndarray) -> None:
        # Of rows that look the same the first stands for all: the picture of a missing picture comes a million times.
        both = np.concatenate([hashes, shades], axis=1).view(f"V{HASH_BYTES + COLOUR_BYTES}").ravel()
        first = np.sort(np.unique(both, return_index=True)[1])
        again = np.setdiff1d(np.arange(len(rows)), first, assume_unique=True)
        write_places(out, "equal.parquet", np.zeros(len(again)), shards[again], rows[again])
        tolerance = self.job.config.duplicate_tolerance
        for band in range(bands(tolerance)):
            keys = key(hashes[first], band, tolerance)
            along = np.argsort(keys, kind="stable")
            chosen = first[along]
            columns = [pa.array(keys[along]), pa.array(shards[chosen], pa.int32()), pa.array(rows[chosen], pa.int32())]
            columns += [fixed(values[chosen]) for values in (hashes, shades)]
            path = out.path(band_file(band), len(chosen))
            write_table(pa.table(columns, schema=LOOKS), path, ROW_GROUP)
        sample = first[np.linspace(0, len(first) - 1, min(SAMPLE, len(first))).astype(int)]
        out.notes["looks"] = len(first)
        out.notes["sample"] = [row.tobytes().hex() for row in hashes[sample]]


def band_file(band: int) -> str:
    return f"band-{band:02d}.parquet"


def ranges(job: Job, surveyed: list[UnitRecord]) -> Iterator[tuple[int, int, int, float]]:
    """(band, low, high, rows): ranges of keys, high included, that cover every band; about `ROWS` rows at most in each.

    Only pictures that are alike in a whole band cannot be parted.
    """
    tolerance = job.config.duplicate_tolerance
    samples = [np.frombuffer(bytes.fromhex("".join(r.notes["sample"])), np.uint8).reshape(-1, HASH_BYTES) for r in surveyed]
    weights = [np.full(len(s), r.notes["looks"] / max(len(s), 1)) for s, r in zip(samples, surveyed, strict=True)]
    hashes, weight = np.concatenate(samples), np.concatenate(weights)
    parts = int(np.ceil(weight.sum() / ROWS))
    for band in range(bands(tolerance)):
        keys = key(hashes, band, tolerance)
        order = np.argsort(keys, kind="stable")
        below = np.cumsum(weight[order])
        cuts = np.searchsorted(below, below[-1:] * np.arange(1, parts) / max(parts, 1))
        # A range begins with a key, so equal keys are never parted.
        lows = sorted({0, *keys[order][cuts].tolist()})
        for low, after in zip(lows, [*lows[1:], 2**63], strict=True):
            inside = (keys >= low) & (keys <= after - 1)
            yield band, low, after - 1, float(weight[inside].sum())


def compare_units(job: Job, earlier: Records) -> Iterable[Unit]:
    surveyed = earlier["survey"]
    if job.config.duplicate_tolerance is None or not surveyed:
        return
    # One list a band, which all its units share: there are thousands of them at LAION's size.
    files = [[record.file(band_file(band)) for record in surveyed] for band in range(bands(job.config.duplicate_tolerance))]
    paths = [[file.path for file in found] for found in files]
    digests = [digest_of([file.sha256 for file in found]) for found in files]
    packs: list[list[tuple[int, int, int]]] = []
    held = 0.0
    for band, low, high, rows in ranges(job, surveyed):
        if not packs or held + rows > ROWS:
            packs.append([])
            held = 0.0
        packs[-1].append((band, low, high))
        held += rows
    for number, pack in enumerate(packs):
        needed = sorted({band for band, *_ in pack})
        payload = {"ranges": pack, "files": {str(band): paths[band] for band in needed}}
        yield Unit(f"bands-{number:05d}", (*(digests[band] for band in needed), digest_of(pack)), payload)


class Compare:
    """Worker: the near duplicates among the rows of some ranges of keys."""

    def __init__(self, job: Job):
        self.job = job
        self.tolerance: int = job.config.duplicate_tolerance

    def run(self, unit: Unit, out: Output) -> None:
        found = [self.alike(unit.payload["files"][str(band)], low, high) for band, low, high in unit.payload["ranges"]]
        # Rows that are alike in several bands come once.
        write_places(out, "alike.parquet", *np.unique(np.concatenate(found, axis=1), axis=1))

    def alike(self, paths: list[str], low: int, high: int) -> np.ndarray:
        """Places of the near duplicates, (3, rows): group, shard and row."""
        parts = []
        for group, path in enumerate(paths):
            # Keys are sorted, so Parquet's statistics leave the rest of the file unread.
            table = read_table(self.job, path, filters=[("key", ">=", low), ("key", "<=", high)])
            places = np.stack([np.full(len(table), group), table["shard"].to_numpy(), table["row"].to_numpy()])
            parts.append((places, table["key"].to_numpy(), bytes_of(table["phash"]), bytes_of(table["colours"])))
        places = np.concatenate([part[0] for part in parts], axis=1)
        order = np.lexsort(places[::-1])
        keys, hashes, shades = (np.concatenate(part)[order] for part in list(zip(*parts, strict=True))[1:])
        return places[:, order][:, earlier_alike(keys, hashes, shades, self.tolerance)]


def gather_units(job: Job, earlier: Records) -> Iterable[Unit]:
    if job.config.duplicate_tolerance is None:
        return
    files = [record.file("alike.parquet") for record in earlier["compare"]]
    paths, decided = [file.path for file in files], digest_of([file.sha256 for file in files])
    for number, (shards, surveyed) in enumerate(zip(groups(earlier["score"]), earlier["survey"], strict=True)):
        equal = surveyed.file("equal.parquet")
        payload = {"group": number, "shards": len(shards), "equal": equal.path, "alike": paths}
        yield Unit(surveyed.name, (decided, equal.sha256, str(number), str(len(shards))), payload)


class Gather:
    """Worker: the near duplicates of a group's shards."""

    def __init__(self, job: Job):
        self.job = job

    def run(self, unit: Unit, out: Output) -> None:
        tables = [self.read(unit.payload["equal"], 0)]
        tables += [self.read(path, unit.payload["group"]) for path in unit.payload["alike"]]
        # A row that is alike in several bands comes from several units.
        found = pa.concat_tables(tables).group_by(["shard", "row"]).aggregate([])
        found = found.sort_by([("shard", "ascending"), ("row", "ascending")])
        shards, rows = found["shard"].to_numpy(), found["row"].to_numpy()
        write_places(out, "drops.parquet", np.zeros(len(rows)), shards, rows)
        out.notes["drops"] = [digest_of(rows[shards == number].tolist()) for number in range(unit.payload["shards"])]

    def read(self, path: str, group: int) -> pa.Table:
        return read_table(self.job, path, filters=[("group", "==", group)])


def drops_by_shard(earlier: Records) -> Iterator[tuple[str, dict[str, Any]]]:
    """For every scored shard, in order: a digest of its near duplicates, and where `dropped_rows` finds them."""
    for record, shards in zip(earlier["gather"], groups(earlier["score"]), strict=True) if earlier["gather"] else ():
        path = record.file("drops.parquet").path
        for number, (digest, _) in enumerate(zip(record.notes["drops"], shards, strict=True)):
            yield digest, {"drops": path, "number": number}
    if not earlier["gather"]:
        yield from ((NONE, {"drops": None}) for _ in earlier["score"])


def dropped_rows(job: Job, payload: dict[str, Any]) -> np.ndarray:
    """Rows of a shard that are near duplicates, ascending."""
    if payload["drops"] is None:
        return np.array([], dtype=np.int32)
    return read_table(job, payload["drops"], filters=[("shard", "==", payload["number"])])["row"].to_numpy()


def write_places(out: Output, name: str, groups: np.ndarray, shards: np.ndarray, rows: np.ndarray) -> None:
    columns = [pa.array(values, field.type, safe=False) for values, field in zip((groups, shards, rows), PLACES, strict=True)]
    write_table(pa.table(columns, schema=PLACES), out.path(name, len(rows)), ROW_GROUP)


def bytes_of(column: pa.ChunkedArray) -> np.ndarray:
    """A column of binaries of one length, without nulls, as (rows, length) uint8."""
    whole, length = column.combine_chunks(), column.type.byte_width
    values = np.frombuffer(whole.buffers()[1] or b"", np.uint8).reshape(-1, length)
    return values[whole.offset : whole.offset + len(whole)]


def fixed(values: np.ndarray) -> pa.Array:
    """The inverse of `bytes_of`."""
    kind = pa.binary(values.shape[1])
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(values.tobytes())])


def _resources(config: Any) -> Resources:
    return Resources(1.0, 0.0, config.workers)


PHASES = (
    Phase("survey", survey_units, Survey, resources=_resources),
    Phase("compare", compare_units, Compare, fields=frozenset({"duplicate_tolerance"}), resources=_resources),
    Phase("gather", gather_units, Gather, fields=frozenset(), resources=_resources),
)
