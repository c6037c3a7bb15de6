"""Several captions a row: which one is read where, against a count by hand, and what is read of the shards for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from infra.store import Store
from tests.training.synthetic import TEXT, KeepIn, config, history, write_shards
from tests.training.test_order import _gather
from tests.training.told import dataset_of
from training.job import TrainJob
from training.latents import ShardError
from training.loader import Loader
from training.loop import run

CPU = torch.device("cpu")
SHARES = {"synthetic": 0.5, "alt": 0.2}
OWN, ALT, SYNTHETIC = 0.0, 500.0, 1000.0
NULL = 5  # row % 10 without an alt


def captioned(folder: Path, files: int = 2, without: int | None = None, **options: Any) -> tuple[str, ...]:
    """Shards whose text latents tell the caption: the number of the row, and 0, 500 or 1000 (own, alt, synthetic), which fp16
    holds apart; every tenth row has no alt, and the file `without` no column of it."""
    shards = write_shards(folder, files, **options)
    for file, path in enumerate(shards):
        table, group = pq.read_table(path), pq.ParquetFile(path).metadata.row_group(0).num_rows
        rows = len(table)
        for name, base in {"text": OWN, "text.alt": ALT, "text.synthetic": SYNTHETIC}.items():
            if name == "text.alt" and file == without:
                continue
            cells = [np.full(TEXT, base + row, np.float16).tobytes() for row in range(rows)]
            nulls = [name == "text.alt" and row % 10 == NULL for row in range(rows)]
            column = pa.array([None if null else cell for cell, null in zip(cells, nulls, strict=True)], pa.binary(len(cells[0])))
            place = table.column_names.index(name) if name in table.column_names else len(table.column_names)
            table = table.set_column(place, name, column) if place < table.num_columns else table.append_column(name, column)
        pq.write_table(table, path, row_group_size=group, compression="none", use_dictionary=False, write_page_checksum=True)
    return shards


def by_hand(seed: int, place: int, stream: int = 2) -> float:
    """What the caption at a place tells beside the row's number: from a generator made for that place alone."""
    word = int(np.random.Philox(key=[seed, 2], counter=[place, stream, 0, 0]).random_raw(4)[0])
    u = (word >> 11) / 2**53
    return ALT if u < 0.2 else SYNTHETIC if u < 0.7 else OWN


def expected(seed: int, place: int, key: str, without: int | None = None, stream: int = 2) -> float:
    base, row = by_hand(seed, place, stream), int(key[4:])
    lacks = row % 10 == NULL or int(key[:4]) == without
    return row + (OWN if base == ALT and lacks else base)


def settings(**changes: Any) -> Any:
    return config(**{"data": {"shuffle_window": 3, "captions": SHARES}, **changes})


@pytest.mark.parametrize("without", [None, 1])
def test_each_place_has_the_caption_that_is_drawn_there(tmp_path: Path, without: int | None) -> None:
    loader = Loader(settings(), captioned(tmp_path, without=without))
    for step, batch in enumerate(loader.batches(3, 9), start=3):
        text = batch.clean["text"]
        assert (text == text[:, :1, :1]).all()
        places = range(8 * step, 8 * step + 8)
        told = [expected(5, place, key, without) for place, key in zip(places, loader.keys(step), strict=True)]
        assert text[:, 0, 0].tolist() == told


def test_an_epoch_has_the_counts_of_the_draw_and_about_its_shares(tmp_path: Path) -> None:
    loader = Loader(settings(global_batch=64, validation={"fraction": 0.0}), captioned(tmp_path, files=8, rows=400, group=64))
    epoch = [batch.clean["text"][:, 0, 0].numpy() for batch in loader.batches(0, 50)]
    assert loader.rows == 3200
    keys = [key for step in range(50) for key in loader.keys(step)]
    assert np.concatenate(epoch).tolist() == [expected(5, place, key) for place, key in enumerate(keys)]
    drawn = np.array([by_hand(5, place) for place in range(3200)])
    for base, share in ((ALT, 0.2), (SYNTHETIC, 0.5), (OWN, 0.3)):
        assert (drawn == base).mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 3200))
    # Another epoch draws anew.
    again = np.array([by_hand(5, place) for place in range(3200, 6400)])
    assert 0.3 < (again == drawn).mean() < 0.5


def test_any_number_of_workers_reads_the_same_captions(tmp_path: Path) -> None:
    shards, wanted = captioned(tmp_path), settings()
    alone, gather = Loader(wanted, shards), _gather(wanted, shards, 2)
    gang = [Loader(wanted, shards, rank, 2, gather) for rank in range(2)]
    for step in (0, 7, 31):
        assert torch.equal(torch.cat([loader.batch(step).clean["text"] for loader in gang]), alone.batch(step).clean["text"])
    held = alone.validation()
    parts = [part for loader in gang if (part := loader.validation()) is not None]
    assert held is not None and torch.equal(torch.cat([part.clean["text"] for part in parts]), held.clean["text"])
    bases = [by_hand(5, number, stream=3) for number in range(len(held))]
    told = held.clean["text"][:, 0, 0].numpy()
    assert {OWN, ALT, SYNTHETIC} == set(bases)
    rows = told % 500
    lacks = rows % 10 == NULL
    assert told.tolist() == (rows + np.where((np.array(bases) == ALT) & lacks, OWN, bases)).tolist()


def test_a_restart_goes_on_with_the_same_captions(tmp_path: Path, alone: None) -> None:
    shards = captioned(tmp_path / "shards")

    def trained(steps: int, place: str, **more: Any) -> list[dict[str, Any]]:
        job = TrainJob(settings(steps=steps), shards, str(tmp_path / "work"), KeepIn(str(tmp_path / place)), **more)
        run(job, CPU)
        return [row for row in history(tmp_path / place / str(steps)) if row["kind"] == "train"]

    whole = trained(5, "whole")
    trained(3, "part")
    assert trained(5, "again", resume=str(tmp_path / "part" / "3")) == whole


@pytest.fixture
def columns_read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of all columns that are read of the shards from now on."""
    found: set[str] = set()
    honest: Callable[..., Any] = pq.ParquetFile.read_row_group

    def noting(self: pq.ParquetFile, group: int, columns: list[str], **more: Any) -> Any:
        found.update(columns)
        return honest(self, group, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noting)
    return found


@pytest.mark.parametrize("captions", [{}, {"alt": 0.5}])
def test_no_column_is_read_that_is_not_asked_for(tmp_path: Path, columns_read: set[str], captions: dict[str, float]) -> None:
    loader = Loader(config(data={"shuffle_window": 3, "captions": captions}), captioned(tmp_path))
    assert columns_read == {"key"}, "an index counts rows"
    loader.batch(0)
    assert columns_read == {"key", "moments", "clip", "text", *(f"text.{name}" for name in captions)}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    shards = captioned(tmp_path / "shards")
    lost = (
        r"^data.captions names alt2, but no shard has a column text.alt2; of further captions there are: "
        r"text.alt, text.synthetic; name one of these, or give the subset's select or folder `captions`$"
    )
    wanted = config(data={"captions": {"alt2": 0.5, "synthetic": 0.1}})
    with pytest.raises(ShardError, match=lost):
        Loader(wanted, shards)
    with pytest.raises(ShardError, match="of further captions there are: none;"):
        Loader(wanted, write_shards(tmp_path / "plain"))
    with pytest.raises(ValidationError, match="the probabilities sum to 1.1; lower them to 1 at most"):
        config(data={"captions": {"a": 0.6, "b": 0.5}})
    assert config(data={"captions": {str(n): 0.1 for n in range(10)}})
    table = pq.read_table(shards[0])
    narrow = pa.array([b"12"] * len(table), pa.binary(2))
    pq.write_table(table.set_column(table.column_names.index("text.alt"), "text.alt", narrow), shards[0])
    with pytest.raises(ShardError, match=r"text.alt is fixed_size_binary\[2\], expected fixed_size_binary\[30\]"):
        Loader(settings(), shards)


def test_what_a_dataset_tells_of_its_captions_is_known_without_opening_a_shard(tmp_path: Path, columns_read: set[str]) -> None:
    shards = captioned(tmp_path / "shards")
    for path in shards:
        table = pq.read_table(path)
        facts = json.loads(table.schema.metadata[b"unidiffuser"]) | {"captions": ["alt", "synthetic"]}
        pq.write_table(table.replace_schema_metadata({b"unidiffuser": json.dumps(facts).encode()}), path, row_group_size=8)
    dataset, told = dataset_of(Store(str(tmp_path / "store")), shards)
    columns_read.clear()
    stored = [dataset.url(entry) for entry in dataset.files]
    wanted = settings(validation={"fraction": 0.01})
    loader = Loader(wanted, stored, told=[told])
    assert not any(name.startswith(("text", "moments", "key")) for name in columns_read)
    assert torch.equal(loader.batch(2).clean["text"], Loader(wanted, shards).batch(2).clean["text"])
    with pytest.raises(ShardError, match="no shard has a column text.other"):
        Loader(config(data={"captions": {"other": 0.5}}, validation={"fraction": 0.01}), stored, told=[told])
