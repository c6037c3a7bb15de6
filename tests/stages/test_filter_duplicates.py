"""Near duplicates across a set, against a comparison of all pairs, whatever the parts in which they are found."""

from __future__ import annotations

import io
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.store import Store
from stages import duplicates
from stages.contract import StageError
from stages.duplicates import within
from stages.filter import Filter
from stages.regions import Region, curve, regions
from stages.thumbnails import THUMBNAIL_BYTES, brightness, brightness_tolerance, earlier_alike, thumbnail
from tests.stages.shards import blots, download, encoded, sample


def clusters(seed: int, count: int) -> np.ndarray:
    """Thumbnails around a few centres, some on the brink of the tolerance, some equal."""
    chance = np.random.default_rng(seed)
    centres = chance.integers(0, 256, (count // 10, 16, 16, 3)) // 2 + chance.integers(0, 128, (count // 10, 1, 1, 3))
    noise = chance.integers(-7, 8, (count, 16, 16, 3)) + chance.integers(-3, 4, (count, 1, 1, 1))
    thumbs = np.clip(centres[chance.integers(0, len(centres), count)] + noise, 0, 255).astype(np.uint8)
    thumbs[:: count // 8] = 255
    return thumbs.reshape(count, THUMBNAIL_BYTES)


def all_pairs(thumbs: np.ndarray, tolerance: int) -> np.ndarray:
    """Which rows resemble an earlier one, from the rule alone."""
    gaps = np.abs(thumbs[:, None].astype(np.int16) - thumbs[None].astype(np.int16)).max(-1) <= tolerance
    pixels = thumbs.reshape(-1, 16, 16, 3).astype(float) @ [0.25, 0.625, 0.125]
    for part in (pixels[:, :8, :8], pixels[:, :8, 8:], pixels[:, 8:, :8], pixels[:, 8:, 8:]):
        mean = np.floor(part.mean((1, 2)))
        gaps &= np.abs(mean[:, None] - mean[None]) <= tolerance // 4
    return np.tril(gaps, -1).any(1)


@pytest.mark.parametrize("tolerance", [0, 3, 12, 30])
def test_near_duplicates_equal_a_comparison_of_all_pairs(tolerance):
    thumbs = clusters(0, 240)
    truth = all_pairs(thumbs, tolerance)
    assert earlier_alike(thumbs, tolerance).tolist() == truth.tolist() and 0 < truth.sum() < 240


@pytest.mark.parametrize("limit", [10, 60, 1000])
def test_regions_cover_everything_and_see_all_that_their_rows_can_resemble(limit):
    thumbs = clusters(1, 240)
    quarters, margin = brightness(thumbs), brightness_tolerance(12)
    sample = np.arange(0, 240, 3)
    found = list(regions(quarters[sample], np.full(len(sample), 3.0), margin, limit))
    alike = np.zeros(240, dtype=int)
    owners = np.zeros(240, dtype=int)
    for region in found:
        seen = np.flatnonzero(region.holds(quarters, margin))
        asked = region.holds(quarters[seen])
        owners[seen[asked]] += 1
        alike[seen[earlier_alike(thumbs[seen], 12, asked)]] += 1
    assert (owners == 1).all() and alike.tolist() == all_pairs(thumbs, 12).astype(int).tolist()
    assert (len(found) == 1) == (limit == 1000)


def test_a_region_is_read_without_most_of_the_file(tmp_path):
    quarters = np.random.default_rng(2).integers(0, 256, (4096, 4)).astype(np.uint8)
    quarters = quarters[curve(quarters)]
    region = Region((0, 128, 0, 128), (64, 192, 256, 256))
    table = duplicates.pa.table({name: values for name, values in zip(duplicates.BRIGHTNESS, quarters.T, strict=True)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=64)
    read = pq.read_table(tmp_path / "t.parquet", filters=within(region, 3))
    assert len(read) == region.holds(quarters, 3).sum() > 0
    held = region.holds(quarters, 3).reshape(-1, 64).any(1)
    assert held.mean() < 0.25


@pytest.mark.parametrize("change", ["jpeg", "webp", "half"])
def test_reencoded_pictures_are_near_duplicates_and_others_are_not(change):
    chance = random.Random(6)
    pictures = [blots(chance) for _ in range(40)]
    if change == "half":
        copies = [picture.resize((128, 128), Image.Resampling.BICUBIC) for picture in pictures]
    else:
        copies = [Image.open(io.BytesIO(encoded(picture, change.upper(), quality=80))).convert("RGB") for picture in pictures]
    thumbs = np.frombuffer(b"".join(map(thumbnail, pictures + copies)), np.uint8).reshape(-1, THUMBNAIL_BYTES)
    alike = earlier_alike(thumbs, 12)
    assert not alike[:40].any() and alike[40:].mean() > 0.9


def some(seed: int, count: int, shard: int = 15) -> list:
    """Shards of pictures of which every third comes again, somewhere, in another encoding."""
    chance = random.Random(seed)
    pictures = [blots(chance) for _ in range(count * 2 // 3)]
    pictures += chance.choices(pictures, k=count - len(pictures))
    chance.shuffle(pictures)
    kinds = [("PNG",), ("WEBP",), ("JPEG",)]
    samples = [sample(number, encoded(picture, *chance.choice(kinds))) for number, picture in enumerate(pictures)]
    return [samples[start : start + shard] for start in range(0, count, shard)]


@pytest.fixture
def small_parts(monkeypatch):
    """Groups of two shards, many regions, several row groups."""
    monkeypatch.setattr(duplicates, "ROWS", 30)
    monkeypatch.setattr(duplicates, "ROW_GROUP", 4)


def test_parts_do_not_show_in_the_result(tmp_path, make, in_process, digests, request):
    shards = some(3, 75)
    found = []
    for name in ("whole", "parts"):
        store = Store(str(tmp_path / name))
        dataset = make(Filter, store, {"rows": download(store, shards)}, clip_scores=False)
        found.append(set(digests(dataset).values()))
        if name == "whole":
            request.getfixturevalue("small_parts")
    assert found[0] == found[1] and dataset.manifest.stats.dropped["near_duplicate"] >= 20
    assert len(list((tmp_path / "parts").glob("filter/units/*/*/alike.parquet"))) > 3


def test_appended_shard_keeps_finished_units_and_equals_a_run_from_nothing(
    tmp_path, store, make, in_process, digests, unit_times, small_parts
):
    shards = some(4, 75)
    before = make(Filter, store, {"rows": download(store, shards[:4])}, clip_scores=False)
    done = unit_times(store, "filter")
    after = make(Filter, store, {"rows": download(store, shards)}, clip_scores=False)
    assert unit_times(store, "filter").items() > done.items()
    assert digests(after).items() > digests(before).items() and len(after.files) == len(before.files) + 2
    other = Store(str(tmp_path / "other"))
    assert digests(make(Filter, other, {"rows": download(other, shards)}, clip_scores=False)) == digests(after)


def test_another_tolerance_writes_only_the_shards_whose_duplicates_change(store, make, in_process, digests, unit_times):
    shards = some(5, 45)
    rows = download(store, shards)
    kept = make(Filter, store, {"rows": rows}, clip_scores=False)
    assert digests(make(Filter, store, {"rows": rows}, clip_scores=False, duplicate_tolerance=13)) == digests(kept)
    all_of_them = make(Filter, store, {"rows": rows}, clip_scores=False, duplicate_tolerance=None)
    assert "near_duplicate" not in all_of_them.manifest.stats.dropped
    assert all_of_them.manifest.stats.rows_out == kept.manifest.stats.rows_out + kept.manifest.stats.dropped["near_duplicate"]


def test_no_row_meets_the_conditions(store, make, in_process):
    with pytest.raises(StageError, match="no row is left of 10: 10 min_side; loosen the conditions"):
        make(Filter, store, {"rows": download(store, some(6, 10))}, clip_scores=False, min_side=300)
