"""How many rows every row group has: out of `files.parquet` where a dataset tells, else out of the shards; work that is shared.

What is told serves every training without `where` that holds out 1/32 of the rows or less (`training.told`): then no shard is
opened. A condition, or a larger part, needs the keys and the scores that it names, and each worker reads those columns of its
share of the shards, many at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.captions import column_of_caption
from training.heldout import LISTED
from training.latents import LatentReader, LatentSpec, ShardError
from training.threads import beside
from training.told import Told, ToldFile

SCANNED_AT_ONCE = 16
Counts = NDArray[np.int32]
Gather = Callable[[list], list[list]]


@dataclass(frozen=True)
class ShardIndex:
    """The row groups of all shards, in the given order: file, number in the file, training and held-out rows, (G,) each.
    `spec` has the further captions that are read."""

    spec: LatentSpec
    file: Counts
    group: Counts
    train: Counts
    held: Counts


@dataclass(frozen=True)
class _Found:
    """What one worker found of some shards: their numbers, bytes (0 where nobody needed to know) and row groups, (n,) each; of
    these, the rows that train and are held out. `source` is where the shapes are from."""

    spec: LatentSpec
    source: str
    files: Counts
    sizes: NDArray[np.int64]
    groups: Counts
    train: Counts
    held: Counts


def index_of(
    reader: LatentReader, told: Sequence[Told] = (), rank: int = 0, world: int = 1, gather: Gather | None = None
) -> ShardIndex:
    """Count the rows of every row group.

    Args:
        reader: of the shards; it learns their sizes.
        told: what datasets tell of their shards; others are scanned.
        rank, world: this worker looks at the `rank`-th of every `world` pieces and shards.
        gather: gives everybody what every worker found, in the order of the ranks; needed when `world` > 1.

    Raises:
        ShardError: a file is damaged, has other shapes than the first, or lacks a column; no file has a further caption that is
            to be read.
    """
    everybody = gather or (lambda found: [found])
    selection = reader.selection
    tells = bool(told) and not selection.where and selection.fraction <= LISTED
    found = _merged(everybody(list(_told(reader, told, rank, world)))) if tells else []
    known = {int(file) for part in found for file in part.files}
    left = [file for file in range(len(reader.shards)) if file not in known]
    if left:
        found += _merged(everybody(_scanned(reader, left[rank::world])))
    found.sort(key=lambda part: int(part.files[0]))
    _check_captions(reader.captions, {name for part in found for name in part.spec.captions})
    # A file without a caption that others have gives its rows' own.
    spec = replace(found[0].spec, captions=reader.captions)
    for part in found:
        if replace(part.spec, captions=reader.captions) != spec:
            raise ShardError(f"{part.source}: rows are {part.spec}, but {found[0].source} has {spec}")
        reader.sizes |= {file: size for file, size in zip(part.files.tolist(), part.sizes.tolist(), strict=True) if size}
    return _ordered(spec, found)


def _check_captions(wanted: Sequence[str], there: Collection[str]) -> None:
    if lost := [name for name in wanted if name not in there]:
        have = ", ".join(map(column_of_caption, sorted(there))) or "none"
        raise ShardError(
            f"data.captions names {lost[0]}, but no shard has a column {column_of_caption(lost[0])}; of further captions there "
            f"are: {have}; name one of these, or give the subset's select or folder `captions`"
        )


def _merged(everybody: Iterable[list[_Found]]) -> list[_Found]:
    return [part for one in everybody for part in one if len(part.files)]


def _told(reader: LatentReader, told: Sequence[Told], rank: int, world: int) -> Iterable[_Found]:
    """What the datasets tell of the shards, this worker's pieces of it."""
    numbers: dict[str, list[int]] = {}
    for number, address in enumerate(reader.shards):
        numbers.setdefault(address, []).append(number)
    seen = 0
    for one in told:
        try:
            file = ToldFile(one)
            spec = LatentSpec.told(file.facts, one.address)
            mine = [piece for piece in range(file.pieces) if (seen + piece) % world == rank]
            seen += file.pieces
            for piece in mine:
                found = file.read(piece, reader.selection.fraction)
                ends = np.cumsum(found.groups)
                # A shard that is here twice is the same shard twice.
                pairs = [(n, at) for at, address in enumerate(found.addresses) for n in numbers.get(address, ())]
                at = np.array([at for _, at in pairs], np.int64)
                groups = found.groups[at]
                rows = _stretches(ends[at] - groups, groups)
                yield _Found(
                    spec, one.address, np.array([n for n, _ in pairs], np.int32), np.array(found.sizes, np.int64)[at], groups,
                    found.train[rows], found.held[rows],
                )  # fmt: skip
        except (OSError, pa.ArrowException) as error:
            raise ShardError(f"{one.address}: cannot be read: {' '.join(str(error).split())}; run the encode again") from error


def _stretches(starts: NDArray[np.int64], lengths: Counts) -> NDArray[np.int64]:
    """The numbers start .. start + length - 1 of every stretch, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def _scanned(reader: LatentReader, files: Sequence[int]) -> list[_Found]:
    """What the shards themselves say: footers, keys and the scores of the conditions."""
    with beside(1 if reader.local else SCANNED_AT_ONCE, "scan") as threads:
        scans = list(threads.map(reader.scan, files))
    # A part for each kind of shard, which is one if all is well.
    kinds: dict[LatentSpec, list[int]] = {}
    for at, (spec, _) in enumerate(scans):
        kinds.setdefault(spec, []).append(at)
    found = []
    for spec, places in kinds.items():
        counts = np.array([pair for at in places for pair in scans[at][1]], np.int32).reshape(-1, 2)
        numbers = np.array([files[at] for at in places], np.int32)
        groups = np.array([len(scans[at][1]) for at in places], np.int32)
        source = reader.shards[int(numbers[0])]
        found.append(_Found(spec, source, numbers, np.zeros(len(numbers), np.int64), groups, counts[:, 0], counts[:, 1]))
    return found


def _ordered(spec: LatentSpec, found: Sequence[_Found]) -> ShardIndex:
    """All parts as one, by number of the shard."""
    files, groups, train, held = (
        np.concatenate([getattr(part, name) for part in found]) for name in ("files", "groups", "train", "held")
    )
    order = np.argsort(files, kind="stable")
    starts = np.cumsum(groups) - groups
    rows = _stretches(starts[order], groups[order])
    of_group = np.repeat(files[order], groups[order]).astype(np.int32)
    number = _stretches(np.zeros(len(order), np.int64), groups[order]).astype(np.int32)
    return ShardIndex(spec, of_group, number, train[rows].astype(np.int32), held[rows].astype(np.int32))
