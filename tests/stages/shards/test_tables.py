"""One flipped bit in what the store holds is an error that names the file, never another number, pixel or row."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.store import Store
from stages.runner.contract import Job, StageError
from stages.select.keys import KeyWriter, read_keys
from stages.shards.tables import read_table, write_table
from stages.shards.tar import Sample, ShardWriter, read_samples, read_shard
from tests.stages.committed import dataset_of, flip

ROOT = Path(__file__).parent.parent.parent.parent


def job(store: Store, stage: str = "filter") -> Job:
    return Job(store, stage, f"x-{stage}", None, {}, {}, {})


def test_a_table_is_refused_wherever_a_bit_of_it_flips(store: Store, tmp_path: Path) -> None:
    table = pa.table({"key": [f"{n:08d}" for n in range(20)], "clip": [bytes([n]) * 64 for n in range(20)], "row": range(20)})
    path = "filter/units/aa/aaaa/scores.parquet"
    write_table(table, tmp_path / "table", row_group_size=10)
    metadata = pq.read_metadata(tmp_path / "table")
    for group in range(2):
        for number in range(3):
            store.publish(tmp_path / "table", path)
            assert read_table(job(store), path).equals(table)
            column = metadata.row_group(group).column(number)
            start = column.dictionary_page_offset or column.data_page_offset
            flip(store.url(path), start + column.total_compressed_size - 1)
            line = f"^{store.url(path)}: .*CRC.* in row group {group}; delete {store.url('filter/units/aa/aaaa')} and run again$"
            with pytest.raises(StageError, match=line):
                read_table(job(store), path)


def test_a_table_that_was_given_is_for_verify_though_the_stage_made_it_once(store: Store, tmp_path: Path) -> None:
    """A download that tries again reads tables of an earlier one."""
    folder = tmp_path / "files"
    folder.mkdir()
    write_table(pa.table({"key": ["a"]}), folder / "00000.parquet")
    dataset = dataset_of(store, "download", folder, {})
    flip(dataset.url(dataset.files[0]), 30)
    again = Job(store, "download", "x-download", None, {"parent": dataset}, {}, {})
    with pytest.raises(StageError, match="in row group 0; `unidiffuser verify` names what is damaged$"):
        read_table(again, dataset.files[0].path)


def test_keys_are_refused_where_a_bit_of_them_flips(store: Store, tmp_path: Path) -> None:
    keys = np.arange(100, dtype=np.uint64) * 2**50
    with KeyWriter(tmp_path / "keys") as writer:
        writer.add(keys, np.arange(100))
    path = "select/units/aa/aaaa/url.parquet"
    store.publish(tmp_path / "keys", path)
    ((found, rows),) = read_keys(job(store, "select"), path)
    assert found.tolist() == keys.tolist() and rows.tolist() == list(range(100))
    flip(store.url(path), keys[40:50].tobytes())
    with pytest.raises(StageError, match=f"^{store.url(path)}: .* in row group 0; delete "):
        list(read_keys(job(store, "select"), path))


def test_a_shard_is_refused_where_a_bit_of_a_picture_flips(store: Store, tmp_path: Path) -> None:
    """Such a tar reads to its end, and such a picture may decode."""
    with ShardWriter(tmp_path / "tar") as tar:
        for number in range(3):
            tar.add(Sample(f"{number:08d}", bytes([number + 1]) * 5000, "png", "words", {}))
    path = "download/units/aa/aaaa/00000.tar"
    _, digest = store.publish(tmp_path / "tar", path)
    assert len(list(read_shard(store, path, 3, digest))) == 3
    flip(store.url(path), bytes([2]) * 5000)
    with store.open(path) as file:
        assert len(list(read_samples(file))) == 3
    with pytest.raises(StageError, match=f"^{store.url(path)}: damaged .sha256 .*; `unidiffuser verify` names what is damaged$"):
        list(read_shard(store, path, 3, digest))


def test_every_writer_of_stored_parquet_adds_checksums() -> None:
    """Readers can compare only what writers wrote; Arrow leaves it out by default, and says nowhere whether it is there."""
    bare = []
    for path in [*ROOT.glob("stages/**/*.py"), *ROOT.glob("infra/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("pq.write_table", "pq.ParquetWriter"):
                told = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if told.get("write_page_checksum") != "True":
                    bare.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert bare == []
