"""What a start and the steps read: the list of files alone, and of the shards hardly more than what is trained on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.counted import counted_s3
from infra.dataset import FileEntry, find
from infra.store import Store
from tests.training.synthetic import config, write_shards
from tests.training.told import dataset_of
from training.heldout import LISTED, held_out
from training.index import index_of
from training.latents import LatentReader, Selection, ShardError
from training.loader import Loader
from training.told import Told
from training.where import Comparison

SIDE, GROUP = 32, 8


def _counts(shards: list[str], fraction: float) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """File and number of every row group, with its training and held-out rows, counted key by key."""
    places, train, held = [], [], []
    for number, shard in enumerate(shards):
        file = pq.ParquetFile(shard)
        for group in range(file.num_row_groups):
            keys = file.read_row_group(group, ["key"])["key"].to_pylist()
            places.append((number, group))
            held.append(sum(held_out(key, fraction) for key in keys))
            train.append(len(keys) - held[-1])
    return places, train, held


def gang(world: int) -> list[tuple[int, int, Callable[[list], list[list]]]]:
    """Rank, world and gather of each of some threads."""
    given: list[list] = [[] for _ in range(world)]
    barrier = Barrier(world, timeout=30)

    def gather(rank: int, found: list) -> list[list]:
        given[rank] = found
        barrier.wait()
        everybody = list(given)
        barrier.wait()
        return everybody

    return [(rank, world, partial(gather, rank)) for rank in range(world)]


@pytest.mark.parametrize("fraction", [0.0, 0.011, LISTED, 0.2])
def test_what_is_told_is_what_a_scan_of_the_keys_counts(tmp_path: Path, fraction: float) -> None:
    store = Store(str(tmp_path / "store"))
    first = write_shards(tmp_path / "first", files=3, rows=50)
    second = write_shards(tmp_path / "second", files=2, rows=300, group=64)
    (untold,) = write_shards(tmp_path / "untold", files=1, rows=20)
    datasets = [dataset_of(store, shards, name * 24) for shards, name in ((first, "a"), (second, "b"))]
    told = [told for _, told in datasets]
    shards = [dataset.url(entry) for dataset, _ in datasets for entry in dataset.files]
    # In another order, one twice, and one that no dataset tells of.
    shards = [*shards[::-1], shards[1], untold]
    places, train, held = _counts(shards, fraction)
    selection = Selection((), fraction)
    for world in (1, 3):
        with ThreadPoolExecutor(world) as workers:
            found = [workers.submit(index_of, LatentReader(shards, selection), told, *of) for of in gang(world)]
            for index in (one.result() for one in found):
                assert list(zip(index.file.tolist(), index.group.tolist(), strict=True)) == places
                assert (index.train.tolist(), index.held.tolist()) == (train, held)
    assert sum(held) > 0 or fraction == 0


def test_a_start_opens_no_shard_and_conditions_read_them(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    dataset, told = dataset_of(store, write_shards(tmp_path / "shards"))
    shards = [dataset.url(entry) for entry in dataset.files]
    expected = Loader(config(validation={"fraction": LISTED}), shards).keys(3)
    found = find(store, "encode", "a" * 24)
    assert found is not None and found.files == dataset.files
    assert found.manifest.file_columns == ["groups", "listed", "hashes"]
    shutil.move(tmp_path / "store" / "encode" / "units", tmp_path / "aside")
    loader = Loader(config(validation={"fraction": LISTED}), shards, told=[told])
    for more in ({"validation": {"fraction": 0.05}}, {"data": {"where": ["aesthetic > 1"]}, "validation": {"fraction": 0.0}}):
        with pytest.raises(ShardError, match="00000.parquet: cannot be read as Parquet"):
            Loader(config(**more), shards, told=[told])
    shutil.move(tmp_path / "aside", tmp_path / "store" / "encode" / "units")
    assert loader.keys(3) == expected
    # A shard that is another one since.
    (other,) = write_shards(tmp_path / "other", files=1, rows=38)
    shutil.copy(other, shards[0])
    with pytest.raises(
        ShardError, match="row group 4 has 6 rows to train on and 0 held out; its dataset tells of 8 and 0; `unid"
    ):
        [Loader(config(validation={"fraction": 0.0}), shards, told=[told]).keys(step) for step in range(10)]


def test_a_list_that_is_damaged_or_tells_of_other_shapes_is_one_line(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    dataset, told = dataset_of(store, write_shards(tmp_path / "small"))
    larger, of_larger = dataset_of(store, write_shards(tmp_path / "larger", side=8), "b" * 24)
    shards = [found.url(entry) for found in (dataset, larger) for entry in found.files]
    with pytest.raises(ShardError, match=f"^{of_larger.address}: rows are .*, but {told.address} has "):
        index_of(LatentReader(shards, Selection((), 0.0)), [told, of_larger])
    with open(told.address, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ShardError, match=f"^{told.address}: cannot be read: .*; run the encode again$"):
        index_of(LatentReader(shards, Selection((), 0.0)), [told])
    with pytest.raises(ShardError, match="^/nowhere/files.parquet: cannot be read: "):
        index_of(LatentReader(shards, Selection((), 0.0)), [Told("/nowhere/files.parquet", "/nowhere")])


def test_on_an_object_store_a_start_reads_the_list_and_steps_read_what_they_use(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "shards", files=6, rows=256, group=GROUP, side=SIDE)
    table = pq.read_schema(paths[0])
    row = sum(table.field(part).type.byte_width for part in ("moments", "clip", "text"))
    with counted_s3() as counted:
        store = Store("s3://data/store")
        _, told = dataset_of(store, paths)
        counted.forget()
        dataset = find(store, "encode", "a" * 24)
        assert dataset is not None and len(dataset.files) == 6
        shards = [dataset.url(entry) for entry in dataset.files]
        world, run = 4, config(global_batch=64, validation={"fraction": 0.01}, data={"shuffle_window": 8})
        # By themselves these four read the list each: together they are what four workers ask for.
        gang = [Loader(run, shards, told=[told]) for _ in range(world)]
        assert not [path for path in counted.paths if "units" in path], "a start opened a shard"
        assert counted.requests <= 4 + 4 * world and counted.bytes < 5 * 2**16
        assert gang[0].reader.sizes == {number: entry.bytes for number, entry in enumerate(dataset.files)}
        counted.forget()
        steps, seen = gang[0].rows // 64, 0
        for rank, loader in enumerate(gang):
            loader.rank, loader.world = rank, world
            seen += sum(len(batch) for batch in loader.batches(0, steps))
        assert seen == steps * 64
        assert counted.bytes <= 1.4 * seen * row, f"{counted.bytes / (seen * row):.2f} of what was used"
        # A row group is a request for its keys and one for its latents; a footer is read once.
        assert counted.requests <= 2.5 * len(gang[0].index.train) + world * 2 * len(shards)
        # A condition reads keys and scores, and no latents.
        counted.forget()
        scan = index_of(LatentReader(shards, Selection((Comparison.parse("aesthetic >= 4"),), 0.01)), [told])
        assert 0 < scan.train.sum() < 256 * 6 and counted.bytes < 0.4 * row * 256 * 6


def test_the_list_has_a_row_for_every_file_and_other_readers_see_no_more_than_the_files(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    dataset, told = dataset_of(store, write_shards(tmp_path / "shards", files=3))
    table = pq.read_table(told.address)
    assert table["groups"].to_pylist() == [[8] * 5] * 3
    assert table["path"].to_pylist() == [entry.path for entry in dataset.files]
    hashes = b"".join(table["hashes"].to_pylist())
    assert len(hashes) == 4 * sum(sum(counts) for counts in table["listed"].to_pylist())
    assert table.schema.field("hashes").type == pa.binary()
    assert np.all(np.frombuffer(hashes, "<u4") < LISTED * 2**32)
    assert all(isinstance(entry, FileEntry) for entry in dataset.files)
