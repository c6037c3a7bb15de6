"""Near duplicates across a set, against a comparison of all pairs, whatever the parts in which they are found."""

from __future__ import annotations

import io
import random
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from infra.store import Store
from stages.filter import duplicates
from stages.filter.likeness import COLOUR_BYTES, HASH_BYTES, bands, colours, earlier_alike, key, perceptual_hash
from stages.filter.stage import Filter
from stages.runner.contract import StageError
from tests.stages.packed import blots, download, encoded, sample

LOOKS = tuple[np.ndarray, np.ndarray]


def clusters(seed: int, count: int) -> LOOKS:
    """Hashes and colours around a few centres, some on the brink of a tolerance, some equal."""
    chance = np.random.default_rng(seed)
    centre = chance.integers(0, count // 10, count)
    bits = chance.random((count // 10, HASH_BYTES * 8))[centre] < 0.5
    bits ^= chance.random(bits.shape) < chance.choice([0.0, 0.01, 0.03, 0.06], (count, 1))
    shades = chance.integers(20, 230, (count // 10, COLOUR_BYTES))[centre] + chance.choice([0, 6, 10], (count, 1))
    shades[:: count // 8] = 255
    return np.packbits(bits, axis=1), shades.astype(np.uint8)


def all_pairs(looks: LOOKS, tolerance: int) -> np.ndarray:
    """Which rows resemble an earlier one, from the rule alone."""
    hashes, shades = looks
    bits = np.unpackbits(hashes, axis=1)
    alike = (bits[:, None] != bits[None]).sum(-1) <= tolerance
    alike &= np.abs(shades[:, None].astype(int) - shades[None].astype(int)).max(-1) <= 16
    return np.tril(alike, -1).any(1)


def by_bands(looks: LOOKS, tolerance: int) -> np.ndarray:
    found = [earlier_alike(key(looks[0], band, tolerance), *looks, tolerance) for band in range(bands(tolerance))]
    return np.any(found, axis=0)


@pytest.mark.parametrize("tolerance", [0, 3, 12, 32])
def test_near_duplicates_equal_a_comparison_of_all_pairs(tolerance):
    looks = clusters(0, 240)
    truth = all_pairs(looks, tolerance)
    assert by_bands(looks, tolerance).tolist() == truth.tolist() and 0 < truth.sum() < 240


def test_plain_pictures_that_share_a_key_are_told_apart_by_their_colours():
    chance = np.random.default_rng(7)
    hashes = np.packbits(chance.random((40, HASH_BYTES * 8)) < 0.004, axis=1)
    # Of one colour all over: what is just alike differs by the most that brightness can.
    shades = np.repeat(chance.integers(0, 64, (40, 1)) * 4, COLOUR_BYTES, axis=1).astype(np.uint8)
    truth = all_pairs((hashes, shades), 12)
    assert by_bands((hashes, shades), 12).tolist() == truth.tolist() and 0 < truth.sum() < 40


def test_shards_are_compared_together_up_to_so_many_rows(monkeypatch):
    monkeypatch.setattr(duplicates, "ROWS", 30)
    records = [SimpleNamespace(files=[SimpleNamespace(rows=rows)]) for rows in (10, 10, 10, 1, 29, 30, 31, 3)]
    found = [[record.files[0].rows for record in group] for group in duplicates.groups(records)]
    assert found == [[10, 10, 10], [1, 29], [30], [31], [3]]


def test_every_bit_belongs_to_one_band():
    nothing = np.zeros((1, HASH_BYTES), np.uint8)
    for bit in range(HASH_BYTES * 8):
        one = np.packbits(np.arange(HASH_BYTES * 8) == bit)[None]
        assert sum(int(key(one, band, 12)[0] != key(nothing, band, 12)[0]) for band in range(bands(12))) == 1


@pytest.mark.parametrize("change", ["jpeg", "webp", "half"])
def test_reencoded_pictures_are_near_duplicates_and_others_are_not(change):
    chance = random.Random(6)
    pictures = [blots(chance) for _ in range(40)]
    if change == "half":
        copies = [picture.resize((128, 128), Image.Resampling.BICUBIC) for picture in pictures]
    else:
        copies = [Image.open(io.BytesIO(encoded(picture, change.upper(), quality=80))).convert("RGB") for picture in pictures]
    alike = by_bands(looks_of(pictures + copies), 12)
    assert not alike[:40].any() and alike[40:].mean() > 0.9


def test_a_variant_in_another_colour_of_the_same_brightness_is_another_picture():
    pictures = []
    for ground in ((200, 60, 60), (61, 128, 60)):
        pixels = np.full((256, 256, 3), ground, np.uint8)
        pixels[80:170, 60:200] = 250
        pictures.append(Image.fromarray(pixels))
    hashes, shades = looks_of(pictures)
    assert (hashes[0] == hashes[1]).all() and not by_bands((hashes, shades), 12).any()


def looks_of(pictures: list[Image.Image]) -> LOOKS:
    hashes, shades = (b"".join(map(measure, pictures)) for measure in (perceptual_hash, colours))
    return np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES), np.frombuffer(shades, np.uint8).reshape(-1, COLOUR_BYTES)


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
    """Groups of two shards, many ranges of keys, several row groups."""
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
