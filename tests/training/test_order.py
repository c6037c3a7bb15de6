"""The order of the data against a slow reference, and what it promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.training.synthetic import config, write_shards
from training.begin import Growth
from training.index import _scanned
from training.loader import Loader
from training.order import Epoch, Order


def reference(counts: list[int], seed: int, number: int, window: int, lanes: int, batch: int) -> list[tuple[int, int]]:
    """An epoch as a list of (group, row), written from the description with lists and loops."""

    def shuffle(kind: int, place: tuple[int, int], items: list) -> list:
        generator = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, kind, *place]))
        return [items[i] for i in generator.permutation(len(items))]

    groups = shuffle(0, (number, 0), list(range(len(counts))))
    sequence: list[tuple[int, int]] = []
    for index in range(0, len(groups), window):
        rows = [(group, row) for group in groups[index : index + window] for row in range(counts[group])]
        sequence += shuffle(1, (number, index // window), rows)

    batches = len(sequence) // batch
    stretch, share = batches * (batch // lanes), batch // lanes
    lane_rows = [sequence[lane * stretch : (lane + 1) * stretch] for lane in range(lanes)]
    order = []
    for k in range(batches):
        for lane in lane_rows:
            order += lane[k * share : (k + 1) * share]
    return order + sequence[batches * batch :]


@pytest.mark.parametrize("batch, lanes, window", [(8, 1, 3), (8, 4, 2), (6, 6, 1), (64, 8, 100), (1, 1, 2)])
def test_epoch_equals_the_reference(batch: int, lanes: int, window: int) -> None:
    counts = [8, 0, 5, 7, 8, 1, 3, 8, 8, 2]
    for number in (0, 3):
        epoch = Epoch(np.array(counts), 11, number, window, lanes, batch)
        groups, rows = epoch.locate(np.arange(epoch.rows))
        assert list(zip(groups.tolist(), rows.tolist(), strict=True)) == reference(counts, 11, number, window, lanes, batch)


def test_every_row_once_an_epoch_and_another_order_in_the_next() -> None:
    counts = np.array([8, 5, 7, 8])
    order = Order(counts, 0, 2, 4, 8)
    everything = {(group, row) for group, count in enumerate(counts) for row in range(count)}
    epochs = []
    for number in range(3):
        groups, rows = order.locate(np.arange(number * 28, (number + 1) * 28))
        epochs.append(list(zip(groups.tolist(), rows.tolist(), strict=True)))
        assert len(epochs[-1]) == 28 and set(epochs[-1]) == everything
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(
    "growths",
    [
        [(0, 3), (30, 5)],  # in the second epoch of the first three groups
        [(0, 3), (20, 5)],  # just at an epoch's end
        [(0, 3), (25, 4), (27, 6)],  # twice in one epoch
        [(0, 2), (40, 4), (100, 6)],
        [(0, 2), (0, 6)],  # before anything was read
    ],
)
def test_what_grows_ends_its_epoch_and_goes_on_with_all_rows(growths: list[tuple[int, int]]) -> None:
    """Against a walk from place to place: an epoch is chosen when it begins, over the groups that are there at that moment."""
    counts, seed, window, lanes, batch = [8, 5, 7, 4, 0, 6], 3, 2, 2, 4
    expected: list[tuple[int, int]] = []
    number, starts = 0, []
    while len(expected) < 200:
        there = [groups for place, groups in growths if place <= len(expected)][-1]
        starts.append((len(expected), there))
        expected += reference(counts[:there], seed, number, window, lanes, batch)
        number += 1
    order = Order(np.array(counts), seed, window, lanes, batch, [Growth(*growth) for growth in growths])
    groups, rows = order.locate(np.arange(200))
    assert list(zip(groups.tolist(), rows.tolist(), strict=True)) == expected[:200]
    # By windows it is the same.
    found = zip(*(part.tolist() for part in order.windows(np.arange(200))), strict=True)
    assert [tuple(int(part[at]) for part in order.window(epoch, window)) for epoch, window, at in found] == expected[:200]
    # Until a growth, what is read is what it would be without.
    before = Order(np.array(counts[: growths[0][1]]), seed, window, lanes, batch)
    assert np.array_equal(before.locate(np.arange(growths[1][0]))[0], groups[: growths[1][0]])
    for place in (0, 26, 99, 150):
        number = max(n for n, (start, _) in enumerate(starts) if start <= place)
        start, there = starts[number]
        assert order.epochs(place) == pytest.approx(number + (place - start) / sum(counts[:there]))
    # Every old row is read once in the epoch that a growth met, and every row, old or new, once in the next.
    for start, there in starts[: len(starts) - 1]:
        everything = {(group, row) for group in range(there) for row in range(counts[group])}
        assert sorted(expected[start : start + len(everything)]) == sorted(everything)


def test_no_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="no row is left"):
        Order(np.array([0, 0]), 0, 2, 1, 8)


def test_keys_do_not_depend_on_workers_or_on_where_one_starts(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    alone = Loader(config(), shards)
    expected = [alone.keys(step) for step in range(20)]
    for world in (2, 4, 8):
        gang = [Loader(config(), shards, rank, world, _gather(config(), shards, world)) for rank in range(world)]
        assert [sum((loader.keys(step) for loader in gang), []) for step in range(20)] == expected
    assert Loader(config(), shards).keys(17) == expected[17]
    epoch = sum(expected, [])[: alone.rows]
    assert len(set(epoch)) == alone.rows == len(epoch)


def _gather(run, shards, world: int):
    """What torch.distributed would gather, worked out in one process."""
    reader = Loader(run, shards).reader
    return lambda mine: [_scanned(reader, range(rank, len(shards), world)) for rank in range(world)]


def test_a_worker_with_lanes_of_its_own_reads_its_share_of_the_groups(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, files=4, rows=64, group=8)
    run = config(data={"shuffle_window": 1, "lanes": 4}, validation={"fraction": 0.0})
    loader = Loader(run, shards, 0, 4, _gather(run, shards, 4))
    touched = []
    load = loader.reader.read

    def noting(file: int, group: int, rows: tuple[int, int] | None = None):
        touched.append((file, group))
        return load(file, group, rows)

    loader.reader.read = noting  # type: ignore[method-assign]
    for _ in loader.batches(0, 32):  # an epoch: 256 rows
        pass
    assert len(touched) == len(set(touched)) == 8  # of 32, each once
