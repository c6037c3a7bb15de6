"""Scores that the filter does not know: of some rows they are null, of all rows a condition on them is refused."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from stages.filter import duplicates
from stages.filter.stage import Filter, FilterConfig
from stages.runner.contract import StageError
from stages.runner.graph import Planned
from stages.runner.run import phase_states
from tests.stages.packed import ColourClip, blots, download, encoded, kept_of, sample
from unidiffuser.images import PictureError


class DarkClip(ColourClip):
    """Overflows, as half precision may, on pictures that are all black."""

    def seen(self, pixels):
        seen = super().seen(pixels)
        return torch.where(seen.sum(1, keepdim=True) < 0.1, torch.nan, seen)


@pytest.fixture(autouse=True)
def clip(monkeypatch):
    monkeypatch.setattr("stages.filter.heads.Scorer.load_clip", lambda self, ref: DarkClip(ref))
    monkeypatch.setattr("stages.filter.stage.weights_digest", lambda ref, kind: f"digest of {ref}")


@pytest.fixture
def small_groups(monkeypatch):
    """A survey for every shard."""
    monkeypatch.setattr(duplicates, "ROWS", 3)


def pictures(count: int, first: int = 0, **meta: object) -> list:
    chance = random.Random(first)
    return [sample(first + n, encoded(blots(chance)), **meta) for n in range(count)]


def head(folder, value: float) -> dict[str, object]:
    """A head that gives the brightness of a picture plus a number."""
    layer = nn.Linear(3, 1)
    nn.init.ones_(layer.weight)
    nn.init.constant_(layer.bias, value)
    torch.save(layer.state_dict(), folder / "head.pth")
    return {"weights": str(folder / "head.pth"), "architecture": "linear", "normalise": False}


ABSENT = [
    ({"min_aesthetic": 5}, "min_aesthetic; set heads.aesthetic.weights or leave min_aesthetic out"),
    ({"max_punsafe": 0.5}, "max_punsafe; set heads.punsafe.weights or leave max_punsafe out"),
    ({"max_pwatermark": 0.5}, "max_pwatermark; set heads.pwatermark.weights or leave max_pwatermark out"),
    ({"min_similarity": 0.3}, "min_similarity; leave min_similarity out"),
    ({"languages": ["en"]}, "languages; leave languages out"),
    ({"preset": "datacomp-basic", "languages": ["de"]}, "languages; leave languages out"),
    ({"preset": "datacomp-basic", "languages": ["fr"]}, "languages; leave languages out"),
    (
        {"min_similarity": 0.3, "min_aesthetic": 5},
        "min_similarity, min_aesthetic; set heads.aesthetic.weights or leave min_similarity, min_aesthetic out",
    ),
]


@pytest.mark.parametrize(("config", "words"), ABSENT)
@pytest.mark.parametrize("more", [{}, {"duplicate_tolerance": None}, {"keep_null": False}])
def test_a_condition_on_a_score_that_no_row_has_is_refused(store, make, in_process, small_groups, config, words, more):
    rows = download(store, [pictures(3), pictures(3, 3)])
    with pytest.raises(StageError) as caught:
        make(Filter, store, {"rows": rows}, clip_scores=False, **config, **more)
    assert str(caught.value) == f"test-filter: no row has a value for {words}"
    assert [name for name in store.list("filter") if name != "units"] == []


@pytest.mark.parametrize("tolerance", [12, None])
@pytest.mark.parametrize("name", ["min_aesthetic", "languages"])
def test_rows_without_a_score_stay_where_one_row_has_it(store, make, in_process, small_groups, name, tolerance):
    known = pictures(2, 3, aesthetic=6.0, language="en") + pictures(1, 5, aesthetic=1.0, language="de")
    rows = download(store, [pictures(3), [], known])
    bound = {"min_aesthetic": 5, "languages": ["en"]}[name]
    dataset = make(Filter, store, {"rows": rows}, clip_scores=False, duplicate_tolerance=tolerance, **{name: bound})
    assert [int(one.key) for one in kept_of(dataset)] == [0, 1, 2, 3, 4]


def test_what_was_written_for_more_rows_is_no_way_around_a_refusal(store, make, in_process):
    shards = [pictures(3), pictures(3, 3, aesthetic=6.0)]
    config = {"clip_scores": False, "min_aesthetic": 5, "duplicate_tolerance": None}
    assert make(Filter, store, {"rows": download(store, shards)}, **config).manifest.stats.rows_out == 6
    with pytest.raises(StageError, match="no row has a value for min_aesthetic"):
        make(Filter, store, {"rows": download(store, shards[:1])}, **config)


def test_a_refusal_is_nothing_that_a_look_at_the_state_fails_at(store, make, in_process):
    rows = download(store, [pictures(3)])
    config = {"clip_scores": False, "min_aesthetic": 5}
    with pytest.raises(StageError, match="no row has a value"):
        make(Filter, store, {"rows": rows}, **config)
    references = {"rows": rows.manifest.reference()}
    planned = Planned(
        "test", "test-filter", "filter", FilterConfig(**config), references, {"rows": "rows"}, {}, {}, 0, "f" * 24
    )  # fmt: skip
    assert [(state.name, state.done, state.total) for state in phase_states(planned, store, Filter)] == [
        ("score", 1, 1), ("survey", 1, 1), ("compare", 1, 1), ("settle", 1, 1),
        ("centres", 0, 0), ("members", 0, 0), ("meaning", 0, 0), ("write", 0, 1),
    ]  # fmt: skip


def test_a_preset_asks_for_what_may_be_missing_and_says_so_once(store, make, in_process, caplog):
    rows = download(store, [pictures(3), pictures(3, 3)])
    with caplog.at_level(logging.WARNING, "stages"):
        dataset = make(Filter, store, {"rows": rows}, clip_scores=False, preset="datacomp-basic")
    assert dataset.manifest.stats.rows_out == 6
    words = "test-filter: no row has a value for the preset's languages, which keeps them all"
    assert [record.message for record in caplog.records] == [words]


def test_where_nothing_can_be_decoded_that_is_what_is_said(tmp_path, store, make, in_process):
    rows = download(store, [[sample(n, b"broken") for n in range(3)]])
    with pytest.raises(StageError, match="no row is left of 3: 3 undecodable"):
        make(Filter, store, {"rows": rows}, heads={"aesthetic": head(tmp_path, 0)}, min_aesthetic=5)


def test_a_picture_that_ends_its_decoder_is_counted_by_how_it_did(store, make, in_process, monkeypatch):
    """As encode and download count it."""
    ends = {b"a": "crashed", b"b": "too_slow"}

    def ended(work, data):
        if data in ends:
            raise PictureError(ends[data])
        return work(data)

    monkeypatch.setattr("stages.filter.stage.boxed", ended)
    rows = download(store, [[*pictures(3), *(sample(number, data) for number, data in enumerate([b"a", b"b", b"b", b"c"], 3))]])
    dataset = make(Filter, store, {"rows": rows}, clip_scores=False, preset="none")
    assert dataset.manifest.stats.dropped == {"crashed": 1, "too_slow": 2, "undecodable": 1}
    assert dataset.manifest.stats.rows_out == 3
    (table,) = (entry for entry in dataset.files if entry.name.endswith(".parquet"))
    assert "fault" not in pq.read_schema(Path(dataset.store.root, table.path)).names


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_head_that_never_gives_a_number_is_refused(tmp_path, store, make, in_process, value):
    rows = download(store, [pictures(3)])
    with pytest.raises(StageError, match="no row has a value for min_aesthetic; check heads.aesthetic.weights or leave"):
        make(Filter, store, {"rows": rows}, heads={"aesthetic": head(tmp_path, value)}, min_aesthetic=5)


@pytest.mark.parametrize("keep_null", [True, False])
def test_a_score_that_is_no_number_counts_as_unknown(tmp_path, store, make, in_process, keep_null):
    shards = [[*pictures(3), sample(3, encoded(Image.new("RGB", (256, 256))))]]
    config = {"heads": {"aesthetic": head(tmp_path, 1)}, "min_aesthetic": 0.5, "min_clip_similarity": -1, "keep_null": keep_null}
    dataset = make(Filter, store, {"rows": download(store, shards)}, **config)
    manifest = dataset.manifest
    scores = {int(one.key): (one.meta["aesthetic"], one.meta["clip_similarity"]) for one in kept_of(dataset)}
    for name in ("aesthetic", "clip_similarity"):
        assert manifest.summary["scores"][name]["unknown"] == 1 and sum(manifest.summary["scores"][name]["counts"]) == 3
    if keep_null:
        assert scores[3] == (None, None) and manifest.stats.dropped == {}
    else:
        assert 3 not in scores and manifest.stats.dropped == {"null_clip_similarity": 1}
    assert all(value is not None for key in range(3) for value in scores[key])
