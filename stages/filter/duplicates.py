"""Near duplicates across a whole set, found by workers that each see a part of it (three phases of the filter).

    survey    a unit per block of shards: histograms of the scores, and how many rows have a value of each column that is judged;
              what the rows that meet the conditions look like
    compare   a unit per block: the first alike of its rows among all rows up to its end, and of the rows before it in it
    settle    one unit: which rows go, by shard, with a digest a shard that decides its part of the last phase

"First" is the largest picture, and of equally large ones that which stands first in the input. A row goes when it is alike to one
that comes before it and stays: so the largest copy of a picture stays, and whatever goes is within the tolerance of something
that stays. The rule is one of sets: the blocks do not show in the result.

A block holds a shard; from sixteen of these, the first eight become one block, and so on up to `SHARDS`. Shards that are appended
leave the blocks before theirs as they are, so that only they are surveyed and compared, with all others. A worker holds two
blocks of `ROWS` rows at most, which takes up to `MEMORY`; `settle` besides two bytes a row of the whole set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.filter.histogram import count
from stages.filter.likeness import COLOUR_BYTES, HASH_BYTES
from stages.filter.search import NOTHING, NUMBER, Looks, deal, decide, point, ranks
from stages.runner.contract import Job, Output, Phase, Records, Resources, StageError, Unit, UnitRecord, digest_of
from stages.shards.conditions import Verdict, columns_of, conditions
from stages.shards.scores import SCORES
from stages.shards.tables import read_table, write_table

# Rows of a block, and its shards.
ROWS = 4_000_000
SHARDS = 512
# Blocks of a size that become one block of the next, once there are twice as many of them.
TOGETHER = 8
# Bytes of a worker that holds two blocks.
MEMORY = 2_000_000_000
ROW_GROUP = 65_536
# The column of the scores that says why a picture cannot be decoded.
FAULT = "fault"
NONE = digest_of([])

LOOKS = pa.schema(
    [
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("pixels", pa.int64()),
        ("phash", pa.binary(HASH_BYTES)),
        ("colours", pa.binary(COLOUR_BYTES)),
    ]
)
# A row's number among all rows that are compared, and the rank of its first alike: see `stages.filter.search.ranks`.
FIRSTS = pa.schema([("number", pa.int64()), ("first", pa.int64())])
PLACES = pa.schema([("shard", pa.int32()), ("row", pa.int32())])


def judge(scores: pa.Table, config: Any) -> Verdict:
    """Which rows of a table of scores can be decoded and meet the conditions."""
    verdict = Verdict(np.ones(scores.num_rows, dtype=bool))
    for reason in scores[FAULT].unique().drop_null().to_pylist():
        verdict.drop(reason, pc.equal(scores[FAULT], reason))
    verdict.judge(scores, conditions(config), config.keep_null)
    return verdict


def columns_judged(config: Any) -> set[str]:
    return {FAULT, "width", "height", "caption", "phash", "colours"} | columns_of(conditions(config))


def blocks(records: list[UnitRecord]) -> list[list[UnitRecord]]:
    """Scored shards, in their order, in blocks; the last ones are the smallest."""
    found: list[list[UnitRecord]] = []
    start = 0
    for size in sizes(len(records)):
        held = ROWS + 1
        for record in records[start : start + size]:
            rows = record.files[0].rows
            if held + rows > ROWS:
                found.append([])
                held = 0
            found[-1].append(record)
            held += rows
        start += size
    return found


def sizes(shards: int) -> list[int]:
    """How many shards each block has, before large ones are cut."""
    found: list[int] = []
    size = 1
    while shards:
        last = shards < 2 * TOGETHER or size * TOGETHER > SHARDS
        of_this = shards if last else TOGETHER + shards % TOGETHER
        found = [size] * of_this + found
        shards, size = (shards - of_this) // TOGETHER, size * TOGETHER
    return found


def survey_units(job: Job, earlier: Records) -> Iterable[Unit]:
    for shards in blocks(earlier["score"]):
        files = [record.files[0] for record in shards]
        payload = {"scores": [file.path for file in files]}
        yield Unit(name_of(shards), tuple(file.sha256 for file in files), payload, sum(file.rows for file in files))


def name_of(shards: list[UnitRecord]) -> str:
    """FIRST-LAST, as of its shards, or that of the only one."""
    first, last = shards[0].name, shards[-1].name
    return first if first == last else f"{first}-{last}"


class Survey:
    """Worker: what the whole set must know of a block of shards."""

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
                parts.append(self.looks(scores, number))
        out.notes["histograms"] = {score: counts.tolist() for score, counts in histograms.items()}
        out.notes["known"] = dict(known)
        if parts:
            table = pa.concat_tables(parts)
            write_table(table, out.path("looks.parquet", table.num_rows), ROW_GROUP)

    def looks(self, scores: pa.Table, number: int) -> pa.Table:
        rows = np.flatnonzero(judge(scores, self.job.config).passing)
        chosen = scores.select(["width", "height", "phash", "colours"]).take(pa.array(rows)).combine_chunks()
        pixels = chosen["width"].to_numpy().astype(np.int64) * chosen["height"].to_numpy()
        hashes = deal(bytes_of(chosen["phash"]), self.job.config.duplicate_tolerance)
        columns = [np.full(len(rows), number, np.int32), rows.astype(np.int32), pixels, fixed(hashes), chosen["colours"]]
        return pa.table(columns, schema=LOOKS)


def looks_of(earlier: Records) -> list[list[Any]]:
    """Path and rows of each block's looks."""
    return [[file.path, file.rows] for file in (record.file("looks.parquet") for record in earlier["survey"])]


def starts_of(looks: list[list[Any]]) -> list[int]:
    """The number of each block's first row among all rows, and how many there are."""
    return list(accumulate((rows for _, rows in looks), initial=0))


def read_looks(job: Job, path: str, first: int) -> Looks:
    """The looks of a block whose first row has the number `first`."""
    table = read_table(job, path, ["pixels", "phash", "colours"])
    pixels, tolerance = table["pixels"].to_numpy(), job.config.duplicate_tolerance
    return Looks(bytes_of(table["phash"]), bytes_of(table["colours"]), ranks(pixels, first), tolerance)


def compare_units(job: Job, earlier: Records) -> Iterable[Unit]:
    """Decided by the looks of a block and of those before it."""
    if job.config.duplicate_tolerance is None:
        return
    files = [record.file("looks.parquet") for record in earlier["survey"]]
    starts = list(accumulate((file.rows for file in files), initial=0))
    if starts[-1] > NUMBER:
        raise StageError(f"{job.node}: {starts[-1]:,} rows to compare, {NUMBER:,} at most; filter the subset in parts")
    decided = ""
    for number, (record, file) in enumerate(zip(earlier["survey"], files, strict=True)):
        decided = digest_of([decided, file.sha256])
        payload = {"looks": [[file.path, start] for file, start in zip(files[: number + 1], starts, strict=False)]}
        yield Unit(record.name, (decided,), payload, file.rows)


class Compare:
    """Worker: the first alike of a block's rows, and of the rows before it in the block."""

    def __init__(self, job: Job):
        self.job = job

    def run(self, unit: Unit, out: Output) -> None:
        *before, last = unit.payload["looks"]
        own = read_looks(self.job, *last)
        best, found = own.ranks.copy(), []
        for path, first in before:
            other = read_looks(self.job, path, first)
            best_other = other.ranks.copy()
            point(own, other, best, best_other)
            found.append(_firsts(other, best_other))
        point(own, own, best, best)
        table = pa.concat_tables([*found, _firsts(own, best)])
        write_table(table, out.path("firsts.parquet", table.num_rows), ROW_GROUP)


def _firsts(looks: Looks, best: np.ndarray) -> pa.Table:
    found = best < looks.ranks
    return pa.table([looks.ranks[found] & NUMBER, best[found]], schema=FIRSTS)


def settle_units(job: Job, earlier: Records) -> Iterable[Unit]:
    if job.config.duplicate_tolerance is None or not earlier["survey"]:
        return
    looks = looks_of(earlier)
    firsts = [record.file("firsts.parquet") for record in earlier["compare"]]
    shards = [len(block) for block in blocks(earlier["score"])]
    payload = {
        "looks": looks,
        "firsts": [file.path for file in firsts],
        "shards": shards,
    }
    digests = [record.files[0].sha256 for record in earlier["survey"] + earlier["compare"]]
    yield Unit("all", (digest_of(digests), digest_of(shards)), payload, sum(rows for _, rows in looks))


class Settle:
    """Worker: which rows go, of all shards."""

    def __init__(self, job: Job):
        self.job = job

    def run(self, unit: Unit, out: Output) -> None:
        files, firsts = unit.payload["looks"], unit.payload["firsts"]
        rows = [rows for _, rows in files]
        starts = starts_of(files)

        def best(block: int) -> np.ndarray:
            found = np.full(rows[block], NOTHING)
            inside = [("number", ">=", starts[block]), ("number", "<", starts[block + 1])]
            # A row of a block has a first alike in the block's own unit, and in those of blocks after it.
            for path in firsts[block:]:
                table = read_table(self.job, path, filters=inside)
                at = table["number"].to_numpy() - starts[block]
                found[at] = np.minimum(found[at], table["first"].to_numpy())
            return found

        gone = decide(rows, best, lambda block: read_looks(self.job, files[block][0], starts[block]))
        write_drops(self.job, out, gone, files, unit.payload["shards"])


def write_drops(job: Job, out: Output, gone: np.ndarray, looks: list[list[Any]], shards: list[int]) -> None:
    """Write the rows that go, a file a block, and note a digest of them for every shard.

    Args:
        gone: mask over the rows of all blocks.
        looks: path and rows of each block's looks.
        shards: how many each block has.
    """
    starts = starts_of(looks)
    out.notes["drops"] = []
    for block, (path, _) in enumerate(looks):
        places = read_table(job, path, ["shard", "row"]).filter(pa.array(gone[starts[block] : starts[block + 1]]))
        write_table(places.cast(PLACES), out.path(drops_file(block), places.num_rows), ROW_GROUP)
        of, lost = places["shard"].to_numpy(), places["row"].to_numpy()
        edges = np.searchsorted(of, np.arange(shards[block] + 1))
        out.notes["drops"] += [digest_of(lost[low:high].tolist()) for low, high in zip(edges, edges[1:], strict=False)]


def drops_file(block: int) -> str:
    return f"drops-{block:05d}.parquet"


def drops_by_shard(earlier: Records, phase: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """For every scored shard, in order: a digest of the rows that go by a phase, and where `dropped_rows` finds them."""
    if not earlier[phase]:
        yield from ((NONE, {"drops": None}) for _ in earlier["score"])
        return
    (record,) = earlier[phase]
    digests, path = iter(record.notes["drops"]), cache(lambda block: record.file(drops_file(block)).path)
    for block, shards in enumerate(blocks(earlier["score"])):
        for number in range(len(shards)):
            yield next(digests), {"drops": path(block), "number": number}


def dropped_rows(job: Job, place: dict[str, Any], rows: int) -> np.ndarray:
    """Mask of the rows that go, of a shard that has so many."""
    gone = np.zeros(rows, bool)
    if place["drops"] is not None:
        gone[read_table(job, place["drops"], filters=[("shard", "==", place["number"])])["row"].to_numpy()] = True
    return gone


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
    return Resources(1.0, 0.0, config.workers, MEMORY)


PHASES = (
    Phase("survey", survey_units, Survey, resources=lambda config: Resources(1.0, 0.0, config.workers)),
    Phase("compare", compare_units, Compare, fields=frozenset({"duplicate_tolerance"}), resources=_resources),
    Phase("settle", settle_units, Settle, fields=frozenset({"duplicate_tolerance"}), resources=_resources),
)
