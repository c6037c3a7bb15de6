"""Pictures that show the same, whatever their pixels: the filter's `semantic` (SemDeDup, arXiv 2303.09540), in three phases.

    centres   one unit: K-means on the CLIP embeddings of a sample of the rows that are no near duplicates
    members   a unit per some shards: these rows with their embeddings, in the order of the centre that is nearest
    meaning   one unit: which rows go, cluster by cluster

A row goes when its embedding has a cosine of `min_cosine` or more with that of a row of its cluster that comes before it and
stays; which comes first, `stages.filter.search.ranks` says. A worker of `centres` holds the sample, one of `members` the
embeddings of `HELD_ROWS` rows, and one of `meaning` those of one cluster: with `clusters` of a ten-thousandth of the rows, 20 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from stages.filter.duplicates import MEMORY, blocks, drops_file, looks_of, name_of, starts_of, write_drops
from stages.filter.search import NUMBER, ranks
from stages.runner.contract import Job, Output, Phase, Records, Resources, StageConfig, StageError, Unit, digest_of
from stages.shards.tables import read_table, write_table

# Embeddings that K-means sees of each cluster, as faiss has it.
SAMPLE = 256
ROUNDS = 20
# Rows of a cluster that are held against those that stay at once.
AT_ONCE = 512
ROW_GROUP = 1024
# Rows whose embeddings a worker holds (of 1,024 numbers half a gigabyte), and cosines that it computes at once.
HELD_ROWS, PRODUCTS = 2**18, 2**26
# Numbers of an embedding that is wide.
WIDTH = 1024

MEMBERS = pa.schema([("cluster", pa.int32()), ("rank", pa.int64()), ("clip", pa.binary())])


class SemanticConfig(StageConfig):
    """Which pictures count as the same by their CLIP embeddings."""

    clusters: int = Field(..., ge=1, description="groups that K-means makes; only pictures of one group are compared")
    min_cosine: float = Field(0.95, gt=0, le=1, description="of two embeddings that mean the same, at least")


def check_semantic(config: Any) -> None:
    """Raises StageError: what makes the clusters is not installed."""
    from importlib.util import find_spec

    if config.semantic is not None and find_spec("faiss") is None:
        raise StageError("semantic: faiss is not installed; pip install 'unidiffuser[semantic]'")


def _payload(earlier: Records) -> dict[str, Any]:
    (settled,) = earlier["settle"]
    found = blocks(earlier["score"])
    return {
        "looks": looks_of(earlier),
        "drops": [settled.file(drops_file(block)).path for block in range(len(found))],
        "scores": [[record.files[0].path for record in block] for block in found],
    }


def _decided(earlier: Records) -> str:
    """A digest of the rows that are no near duplicates, and of what was measured of them."""
    files = [record.files[0].sha256 for record in earlier["score"] + earlier["survey"]]
    return digest_of([files, earlier["settle"][0].notes["drops"]])


def centres_units(job: Job, earlier: Records) -> Iterable[Unit]:
    if job.config.semantic is not None and earlier["settle"]:
        yield Unit("all", (_decided(earlier),), _payload(earlier))


def staying(job: Job, payload: dict[str, Any], block: int, shards: Iterable[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ranks (rows,) and normalised embeddings (rows, width) fp32 of shards' rows that are no near duplicates, shard by shard.

    Args:
        shards: their numbers in the block.
    """
    (path, _), first = payload["looks"][block], starts_of(payload["looks"])[block]
    looks, gone = read_table(job, path, ["shard", "row", "pixels"]), read_table(job, payload["drops"][block])
    of, rows = looks["shard"].to_numpy(), looks["row"].to_numpy()
    stays = ~np.isin(of.astype(np.int64) << 32 | rows, gone["shard"].to_numpy().astype(np.int64) << 32 | gone["row"].to_numpy())
    rank = ranks(looks["pixels"].to_numpy(), first)
    for number in shards:
        here = stays & (of == number)
        clip = read_table(job, payload["scores"][block][number], ["clip"])["clip"]
        cells = clip.take(pa.array(rows[here])).to_pylist()
        found = np.frombuffer(b"".join(cells), np.float16).reshape(len(cells), -1 if cells else 0).astype(np.float32)
        length = np.linalg.norm(found, axis=1)
        # What overflowed in the network says nothing of the picture.
        good = np.isfinite(length) & (length > 0)
        yield rank[here][good], found[good] / length[good, None]


class Centres:
    """Worker: the centres of the clusters."""

    def __init__(self, job: Job):
        self.job = job

    def run(self, unit: Unit, out: Output) -> None:
        wanted, files = self.job.config.semantic.clusters * SAMPLE, unit.payload["looks"]
        share = min(1.0, wanted / max(1, sum(rows for _, rows in files)))
        parts = []
        for block, scores in enumerate(unit.payload["scores"]):
            for _, found in staying(self.job, unit.payload, block, range(len(scores))):
                parts.append(found[np.linspace(0, len(found) - 1, int(np.ceil(share * len(found)))).astype(int)])
        sample = np.concatenate([part for part in parts if len(part)] or parts)
        count = min(self.job.config.semantic.clusters, len(sample))
        np.save(out.path("centres.npy", count), k_means(sample, count) if count else sample)


def k_means(sample: np.ndarray, count: int) -> Any:
    """So many centres (count, width) of embeddings (rows, width), of length 1."""
    import faiss

    kmeans = faiss.Kmeans(
        sample.shape[1], count, niter=ROUNDS, seed=0, spherical=True, min_points_per_centroid=1, max_points_per_centroid=SAMPLE
    )
    kmeans.train(sample)
    return kmeans.centroids


def members_units(job: Job, earlier: Records) -> Iterable[Unit]:
    if not earlier["centres"]:
        return
    (centres,), payload, decided = earlier["centres"], _payload(earlier), _decided(earlier)
    (file,) = centres.files
    for block, records in enumerate(blocks(earlier["score"])):
        for shards in pieces([record.files[0].rows for record in records]):
            scores = {block: {number: payload["scores"][block][number] for number in shards}}
            told = {**payload, "scores": scores, "block": block, "centres": file.path}
            some = [records[number] for number in shards]
            yield Unit(name_of(some), (decided, file.sha256, *(record.files[0].sha256 for record in some)), told)


def pieces(rows: list[int]) -> list[range]:
    """Neighbouring shards, by their numbers, that have so many rows that one worker holds their embeddings."""
    found = [range(0, 0)]
    held = 0
    for number, more in enumerate(rows):
        if held and held + more > HELD_ROWS:
            found.append(range(number, number))
            held = 0
        found[-1] = range(found[-1].start, number + 1)
        held += more
    return found


class Members:
    """Worker: the rows of some shards by their clusters."""

    def __init__(self, job: Job):
        self.job = job

    def run(self, unit: Unit, out: Output) -> None:
        with self.job.store.open(unit.payload["centres"]) as file:
            centres = np.load(file)
        block = unit.payload["block"]
        ranked, nearest, cells = list[np.ndarray](), list[np.ndarray](), list[bytes]()
        for rank, found in staying(self.job, unit.payload, block, unit.payload["scores"][block]):
            for some in np.array_split(found, len(found) * len(centres) // PRODUCTS + 1) if len(found) else ():
                nearest.append((some @ centres.T).argmax(axis=1).astype(np.int32))
            ranked.append(rank)
            cells += [row.tobytes() for row in found.astype(np.float16)]
        cluster = np.concatenate([np.zeros(0, np.int32), *nearest])
        order = np.argsort(cluster, kind="stable")
        table = pa.table([cluster, np.concatenate(ranked), pa.array(cells, pa.binary())], schema=MEMBERS).take(pa.array(order))
        write_table(table, out.path("members.parquet", table.num_rows), ROW_GROUP)


def meaning_units(job: Job, earlier: Records) -> Iterable[Unit]:
    if not earlier["centres"]:
        return
    members = [record.files[0] for record in earlier["members"]]
    payload = {
        "looks": looks_of(earlier),
        "shards": [len(block) for block in blocks(earlier["score"])],
        "members": [file.path for file in members],
        "clusters": earlier["centres"][0].files[0].rows,
    }
    decided = digest_of([file.sha256 for file in members])
    yield Unit("all", (_decided(earlier), decided, digest_of(payload["shards"])), payload)


class Meaning:
    """Worker: which rows go."""

    def __init__(self, job: Job):
        self.job = job

    def run(self, unit: Unit, out: Output) -> None:
        starts = starts_of(unit.payload["looks"])
        gone = np.zeros(starts[-1], bool)
        for cluster in range(unit.payload["clusters"]):
            parts = [read_table(self.job, path, filters=[("cluster", "==", cluster)]) for path in unit.payload["members"]]
            table = pa.concat_tables(parts)
            rank = table["rank"].to_numpy()
            order = np.argsort(rank)
            found = np.frombuffer(b"".join(table["clip"].to_pylist()), np.float16).reshape(len(rank), -1 if len(rank) else 0)
            stays = apart(found[order].astype(np.float32), self.job.config.semantic.min_cosine)
            gone[rank[order][~stays] & NUMBER] = True
        write_drops(self.job, out, gone, unit.payload["looks"], unit.payload["shards"])


def apart(found: np.ndarray, least: float) -> np.ndarray:
    """Mask of the rows that stay, in their order, when each is held against those that stay before it.

    Args:
        found: (rows, width), of length 1.
        least: cosine from which on two are the same.
    """
    stays, kept = np.zeros(len(found), bool), found[:0]
    for start in range(0, len(found), AT_ONCE):
        some = found[start : start + AT_ONCE]
        free = (some @ kept.T < least).all(axis=1)
        same = some @ some.T >= least
        for row in np.flatnonzero(free):
            if free[row]:
                free[row + 1 :] &= ~same[row, row + 1 :]
        stays[start : start + len(some)] = free
        kept = np.concatenate([kept, some[free]])
    return stays


def _resources(config: Any) -> Resources:
    return Resources(1.0, 0.0, config.workers, MEMORY)


def _of_centres(config: Any) -> Resources:
    """The sample and its copy in one piece."""
    sample = config.semantic.clusters * SAMPLE * WIDTH * 4 if config.semantic is not None else 0
    return Resources(1.0, 0.0, config.workers, MEMORY + 2 * sample)


FIELDS = frozenset({"semantic"})
PHASES = (
    Phase("centres", centres_units, Centres, fields=FIELDS, resources=_of_centres),
    Phase("members", members_units, Members, fields=FIELDS, resources=_resources),
    Phase("meaning", meaning_units, Meaning, fields=FIELDS, resources=_resources),
)
