"""select, against a plain loop over Python rows that states the rules once more."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from infra.store import Store
from stages.runner.contract import StageError
from stages.select.stage import Select


def laion_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows as LAION has them: nulls, duplicates (within and, since URLs repeat, across files), rubbish URLs, empty captions."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        number = chance.randrange(count * 3)
        url = chance.choice(
            [f"http://images.example/{number}.jpg"] * 20 + ["", None, "ftp://old.example/a.jpg", "not a url", "http://"]
        )
        caption = chance.choice([" ".join("word" for _ in range(chance.randrange(1, 9)))] * 20 + ["", "   ", None])
        rows.append(
            {
                "URL": url,
                "TEXT": caption,
                "WIDTH": chance.choice([None, *[chance.randrange(150, 900)] * 12]),
                "HEIGHT": chance.choice([None, *[chance.randrange(150, 900)] * 12]),
                "similarity": chance.choice([None, *[chance.uniform(0.25, 0.45)] * 12]),
                "punsafe": chance.choice([None, *[chance.uniform(0, 0.7)] * 12]),
                "pwatermark": chance.choice([None, *[chance.random()] * 12]),
                "AESTHETIC_SCORE": chance.choice([None, *[chance.uniform(4, 9)] * 12]),
                "hash": chance.choice([None, chance.randrange(-(2**62), 2**62), chance.randrange(150)]),
            }
        )
    return rows


def write(path: Path, rows: list[dict[str, Any]], size: pa.DataType, score: pa.DataType, lower: bool = False) -> Path:
    """A metadata file with the given types; `lower` gives Re-LAION's names."""
    types = {"URL": pa.string(), "TEXT": pa.string(), "WIDTH": size, "HEIGHT": size, "similarity": score, "punsafe": score}
    types |= {"pwatermark": score, "AESTHETIC_SCORE": score, "hash": pa.int64()}
    renamed = {"URL": "url", "TEXT": "caption", "AESTHETIC_SCORE": "aesthetic"}
    columns = {
        (renamed.get(name, name.lower()) if lower else name): pa.array([row[name] for row in rows], kind)
        for name, kind in types.items()
    }
    pq.write_table(pa.table(columns), path, row_group_size=100)
    return path


def expected(files: list[list[dict[str, Any]]], keep_null: bool) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(url, caption) of the rows that stay and the drops by reason, by the rules as documented."""
    kept, dropped, urls, hashes = [], {}, set(), set()
    for rows in files:
        for row in rows:
            reason = first_reason(row, keep_null)
            if reason is None:
                new_url, new_hash = row["URL"] not in urls, row["hash"] is None or row["hash"] not in hashes
                urls.add(row["URL"])
                hashes.add(row["hash"])
                reason = "duplicate_url" if not new_url else "duplicate_hash" if not new_hash else None
            if reason is None:
                kept.append((row["URL"], row["TEXT"].strip()))
            else:
                dropped[reason] = dropped.get(reason, 0) + 1
    return kept, dropped


def first_reason(row: dict[str, Any], keep_null: bool) -> str | None:
    if not row["URL"]:
        return "no_url"
    if not row["URL"].startswith("http://images"):
        return "bad_url"
    if not (row["TEXT"] or "").strip():
        return "no_caption"
    sizes = [row["WIDTH"], row["HEIGHT"]]
    if None in sizes:
        if not keep_null:
            return "null_width" if row["WIDTH"] is None else "null_height"
    elif min(sizes) < 200:
        return "min_side"
    elif max(sizes) > 3 * min(sizes):
        return "max_aspect_ratio"
    if len(row["TEXT"].split()) < 3:
        return "min_caption_words"
    for column, reason, fails in (
        ("similarity", "min_similarity", lambda value: value < 0.28),
        ("punsafe", "max_punsafe", lambda value: value > 0.5),
        ("AESTHETIC_SCORE", "min_aesthetic", lambda value: value < 5),
    ):
        if row[column] is None:
            if not keep_null:
                return f"null_{column}".replace("AESTHETIC_SCORE", "aesthetic")
        elif fails(row[column]):
            return reason
    return None


CONDITIONS = {
    "min_side": 200, "max_aspect_ratio": 3.0, "min_similarity": 0.28, "max_punsafe": 0.5, "min_aesthetic": 5.0,
    "min_caption_words": 3, "shard_rows": 50,
}  # fmt: skip


def read(dataset) -> pa.Table:
    return pa.concat_tables([pq.read_table(dataset.url(entry)) for entry in dataset.files])


@pytest.mark.parametrize("keep_null", [True, False])
def test_keeps_and_counts_what_a_plain_loop_does(tmp_path, store, make, in_process, keep_null):
    first, second, third = laion_rows(900, 1), laion_rows(700, 2), laion_rows(500, 3)
    write(tmp_path / "part-0.parquet", first, pa.int32(), pa.float32())
    write(tmp_path / "part-1.parquet", second, pa.float64(), pa.float64())
    write(tmp_path / "part-2.parquet", third, pa.int64(), pa.float64(), lower=True)
    dataset = make(Select, store, metadata=[str(tmp_path / "part-*.parquet")], keep_null=keep_null, **CONDITIONS)
    kept, dropped = expected([first, second, third], keep_null)
    rows = read(dataset)
    assert list(zip(rows["url"].to_pylist(), rows["caption"].to_pylist(), strict=True)) == kept
    assert dataset.manifest.stats.dropped == dropped
    assert dataset.manifest.stats.rows_in == 2100 and len(kept) > 50
    assert {"duplicate_url", "duplicate_hash", "no_url", "bad_url", "no_caption", "min_side"} <= set(dropped)
    assert len(set(rows["key"].to_pylist())) == len(kept)
    assert all(entry.rows <= 50 for entry in dataset.files)
    assert {field.name: str(field.type) for field in rows.schema} == dataset.manifest.columns


def test_same_rows_in_other_types_give_the_same_values(tmp_path, store, make, in_process):
    rows = [row | {"URL": f"http://images.example/{i}"} for i, row in enumerate(laion_rows(300, 4))]
    one = make(Select, store, metadata=[str(write(tmp_path / "a.parquet", rows, pa.int32(), pa.float32()))])
    other = make(Select, store, metadata=[str(write(tmp_path / "b.parquet", rows, pa.float64(), pa.float64(), lower=True))])
    assert read(one).drop_columns("key").equals(read(other).drop_columns("key"))


def test_appended_file_keeps_finished_units_and_equals_a_run_from_nothing(tmp_path, store, make, in_process, digests, unit_times):
    for number in range(3):
        write(tmp_path / f"part-{number}.parquet", laion_rows(400, number), pa.int32(), pa.float32())
    pattern = str(tmp_path / "part-*.parquet")
    hidden = (tmp_path / "part-2.parquet").rename(tmp_path / "later")
    before = make(Select, store, metadata=[pattern], shard_rows=64)
    done = unit_times(store, "select")
    hidden.rename(tmp_path / "part-2.parquet")
    after = make(Select, store, metadata=[pattern], shard_rows=64)
    assert unit_times(store, "select").items() >= done.items()
    assert len(unit_times(store, "select")) == len(done) + 4, "pick and write of the new file, duplicates by URL and by hash"
    assert digests(after).items() > digests(before).items()
    again = make(Select, Store(str(tmp_path / "other")), metadata=[pattern], shard_rows=64)
    assert digests(again) == digests(after)


def test_a_shard_size_redoes_only_the_writing(tmp_path, store, make, in_process, unit_times):
    path = write(tmp_path / "a.parquet", laion_rows(300, 5), pa.int32(), pa.float32())
    first = make(Select, store, metadata=[str(path)], shard_rows=64)
    second = make(Select, store, metadata=[str(path)], shard_rows=32)
    assert len(unit_times(store, "select")) == 5
    assert read(first).equals(read(second))


def test_columns_of_another_corpus(tmp_path, store, make, in_process):
    table = pa.table({"link": ["https://a.example/1", "https://a.example/2"], "alt": ["one", "two"]})
    pq.write_table(table, tmp_path / "own.parquet")
    dataset = make(Select, store, metadata=[str(tmp_path / "own.parquet")], columns={"url": "link", "caption": "alt"})
    assert read(dataset)["caption"].to_pylist() == ["one", "two"]


@pytest.mark.usefixtures("bucket")
def test_metadata_and_lists_in_an_object_store(tmp_path, store, make, in_process):
    # Connections are kept by the process, also those to another test's server.
    S3FileSystem.clear_instance_cache()
    for number in range(2):
        write(tmp_path / f"part-{number}.parquet", laion_rows(300, number), pa.int32(), pa.float32())
    (tmp_path / "deny.txt").write_text("".join(f"http://images.example/{number}.jpg\n" for number in range(300)))
    fsspec.filesystem("s3").put([str(path) for path in tmp_path.glob("*.*")], "data/metadata/")
    local, remote = (
        make(Select, kept, metadata=[f"{place}/part-*.parquet"], deny=[f"{place}/deny.txt"], min_similarity=0.3)
        for kept, place in ((store, tmp_path), (type(store)(str(tmp_path / "other")), "s3://data/metadata"))
    )
    assert remote.manifest.fingerprint == local.manifest.fingerprint, "files count by their content"
    assert remote.manifest.stats == local.manifest.stats and local.manifest.stats.dropped["denied"] > 50
    assert read(remote).equals(read(local))
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("columns", "config", "words"),
    [
        ({"LINK": ["http://a.example"], "TEXT": ["a"]}, {}, ["LINK, TEXT", "url (URL or url)"]),
        ({"URL": ["http://a.example"]}, {}, ["columns found: URL", "caption (TEXT"]),
        ({"URL": ["http://a.example"], "TEXT": ["a"]}, {"min_aesthetic": 5}, ["aesthetic (AESTHETIC_SCORE"]),
        ({"URL": ["http://a.example"], "TEXT": [7]}, {}, ["column TEXT is int64, expected string"]),
        (
            {"URL": ["http://a.example"], "TEXT": ["a"], "WIDTH": [[9]]},
            {"min_side": 1},
            ["column WIDTH is list<", "expected int32"],
        ),
    ],
)
def test_metadata_that_cannot_be_used_is_named(tmp_path, store, make, in_process, columns, config, words):
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(StageError) as error:
        make(Select, store, metadata=[str(path)], **config)
    assert all(word in str(error.value) for word in [str(path), *words]) and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 40, 0.5, -4])
def test_unreadable_parquet_is_named(tmp_path, store, make, in_process, keep):
    path = write(tmp_path / "a.parquet", laion_rows(300, 6), pa.int32(), pa.float32())
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(StageError, match="a.parquet: not a complete Parquet file"):
        make(Select, store, metadata=[str(path)])


def test_damaged_page_is_named(tmp_path, store, make, in_process):
    path = write(tmp_path / "a.parquet", laion_rows(300, 6), pa.int32(), pa.float32())
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    with pytest.raises(StageError, match="a.parquet: not a complete Parquet file"):
        make(Select, store, metadata=[str(path)])


def test_no_row_left_shows_the_reasons(tmp_path, store, make, in_process):
    path = write(tmp_path / "a.parquet", laion_rows(50, 7), pa.int32(), pa.float32())
    with pytest.raises(StageError, match="no row is left of 50: .*min_width"):
        make(Select, store, metadata=[str(path)], min_width=5000, keep_null=False)
