"""Near duplicates across a set, against a comparison of all pairs, whatever the parts in which they are found."""

from __future__ import annotations

import io
import random
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from infra.store import Store
from stages.filter import duplicates, likeness, search
from stages.filter.duplicates import sizes
from stages.filter.likeness import COLOUR_BYTES, HASH_BYTES, colours, perceptual_hash
from stages.filter.search import NOTHING, Looks, deal, decide, point, ranks
from stages.filter.stage import Filter
from stages.runner.contract import StageError
from tests.stages.packed import blots, download, encoded, kept_of, sample

PICTURES = tuple[np.ndarray, np.ndarray]


def clusters(seed: int, count: int) -> PICTURES:
    """Hashes and colours around a few centres, some on the brink of a tolerance, some equal."""
    chance = np.random.default_rng(seed)
    centre = chance.integers(0, count // 10, count)
    bits = chance.random((count // 10, HASH_BYTES * 8))[centre] < 0.5
    bits ^= chance.random(bits.shape) < chance.choice([0.0, 0.01, 0.03, 0.06], (count, 1))
    shades = chance.integers(20, 230, (count // 10, COLOUR_BYTES))[centre] + chance.choice([0, 6, 10], (count, 1))
    shades[:: count // 8] = 255
    return np.packbits(bits, axis=1), shades.astype(np.uint8)


def plain(seed: int, count: int) -> PICTURES:
    """Of one colour all over, with hardly a bit: what is just alike differs by the most that brightness can."""
    chance = np.random.default_rng(seed)
    hashes = np.packbits(chance.random((count, HASH_BYTES * 8)) < 0.004, axis=1)
    return hashes, np.repeat(chance.integers(0, 64, (count, 1)) * 4, COLOUR_BYTES, axis=1).astype(np.uint8)


def drifting(seed: int, count: int) -> PICTURES:
    """A film: each picture is a few bits from the one before it."""
    bits = np.cumsum(np.random.default_rng(seed).random((count, HASH_BYTES * 8)) < 0.012, axis=0) % 2
    return np.packbits(bits.astype(bool), axis=1), np.full((count, COLOUR_BYTES), 90, np.uint8)


def near(pictures: PICTURES, tolerance: int) -> np.ndarray:
    """(rows, rows): which are near duplicates, from the rule alone."""
    hashes, shades = pictures
    bits = np.unpackbits(hashes, axis=1)
    alike = (bits[:, None] != bits[None]).sum(-1) <= tolerance
    return alike & (np.abs(shades[:, None].astype(int) - shades[None].astype(int)).max(-1) <= 16)


def all_pairs(pictures: PICTURES, pixels: np.ndarray, tolerance: int) -> np.ndarray:
    """Which rows go, from the rule alone: from the largest on, each that is alike to one that has stayed."""
    alike, gone = near(pictures, tolerance), np.zeros(len(pixels), bool)
    stays: list[int] = []
    for row in sorted(range(len(pixels)), key=lambda row: (-pixels[row], row)):
        gone[row] = alike[row, stays].any()
        stays += [] if gone[row] else [row]
    return gone


def by_search(pictures: PICTURES, pixels: np.ndarray, tolerance: int, parts: int = 1) -> np.ndarray:
    """The same as the phases find it, of rows in so many blocks."""
    rows = np.array_split(np.arange(len(pixels)), parts)
    looks = [
        Looks(deal(pictures[0][some], tolerance), pictures[1][some], ranks(pixels[some], int(some[0])), tolerance)
        for some in rows
    ]
    best = [np.full(len(some), NOTHING) for some in rows]
    for block, own in enumerate(looks):
        for other in range(block + 1):
            found, found_other = own.ranks.copy(), looks[other].ranks.copy()
            point(own, looks[other], found, found if other == block else found_other)
            for number, some, now in ((block, own, found), (other, looks[other], found_other)):
                best[number] = np.minimum(best[number], np.where(now < some.ranks, now, NOTHING))
    return decide([len(some) for some in rows], best.__getitem__, looks.__getitem__)


@pytest.mark.parametrize("pictures", [clusters(0, 240), plain(7, 60), drifting(2, 200)], ids=["clusters", "plain", "drifting"])
@pytest.mark.parametrize("tolerance", [0, 3, 12, 32])
def test_what_goes_equals_a_comparison_of_all_pairs(pictures, tolerance):
    count = len(pictures[0])
    for seed, parts in ((1, 1), (2, 3), (3, 7)):
        # Few sizes, so that the order decides too.
        pixels = np.random.default_rng(seed).integers(1, 6, count) * 10_000
        gone = all_pairs(pictures, pixels, tolerance)
        assert by_search(pictures, pixels, tolerance, parts).tolist() == gone.tolist()
        alike = near(pictures, tolerance)
        assert alike[np.ix_(gone, ~gone)].any(1).all() and not np.triu(alike[np.ix_(~gone, ~gone)], 1).any()
        assert tolerance == 0 or 0 < gone.sum() < count


def test_a_chain_of_look_alikes_leaves_none_without_one_that_it_resembles():
    """Of equal size: the first alone would have taken all of them along."""
    pictures = drifting(5, 300)
    gone = by_search(pictures, np.full(300, 10_000), 12, 3)
    assert not near(pictures, 12)[0, 100:].any() and 20 < gone.sum() < 290
    assert gone.tolist() == all_pairs(pictures, np.full(300, 10_000), 12).tolist()


def test_one_picture_in_many_encodings_is_compared_with_its_largest_copy_alone(monkeypatch):
    chance = np.random.default_rng(0)
    picture = chance.random(256) < 0.5
    bits = picture ^ (chance.random((3000, 256)) < 0.008)
    bits[1234] = picture
    hashes = np.packbits(np.concatenate([bits, chance.random((1000, 256)) < 0.5]), axis=1)
    shades = np.concatenate([np.full((3000, COLOUR_BYTES), 90), chance.integers(0, 255, (1000, COLOUR_BYTES))]).astype(np.uint8)
    pixels = np.full(4000, 10_000)
    pixels[1234] = 20_000
    compared = []
    monkeypatch.setattr(search, "alike", lambda *given: compared.append(len(given[2])) or likeness.alike(*given))
    gone = by_search((hashes, shades), pixels, 12)
    assert gone.sum() == 2999 and not gone[1234] and sum(compared) < 4 * 4000


def test_blocks_stay_as_they_are_when_shards_are_appended():
    assert sizes(15) == [1] * 15 and sizes(16) == [8] + [1] * 8 and sum(sizes(100_000)) == 100_000
    before = set[tuple[int, int]]()
    changed = 0
    for shards in range(1, 1200):
        edges = np.concatenate([[0], np.cumsum(sizes(shards))]).tolist()
        now = set(zip(edges, edges[1:], strict=False))
        assert edges[-1] == shards and len(now) < 60
        # The new shard alone, but for when eight of a size become one.
        changed += sum(high - low for low, high in now - before)
        before = now
    assert changed < 1200 * 4


def test_a_block_holds_so_many_rows_at_most(monkeypatch):
    monkeypatch.setattr(duplicates, "ROWS", 30)
    monkeypatch.setattr(duplicates, "sizes", lambda shards: [shards])
    records = [SimpleNamespace(files=[SimpleNamespace(rows=rows)]) for rows in (10, 10, 10, 1, 29, 30, 31, 3)]
    found = [[record.files[0].rows for record in block] for block in duplicates.blocks(records)]
    assert found == [[10, 10, 10], [1, 29], [30], [31], [3]]


def test_a_block_of_several_shards_has_the_name_of_none():
    records = [SimpleNamespace(name=f"rows-{number:05d}") for number in range(8)]
    assert duplicates.name_of(records) == "rows-00000-rows-00007" and duplicates.name_of(records[3:4]) == "rows-00003"


def test_every_bit_belongs_to_one_band():
    nothing = np.zeros((1, HASH_BYTES), np.uint8)
    for bit in range(HASH_BYTES * 8):
        one = np.packbits(np.arange(HASH_BYTES * 8) == bit)[None]
        both = [Looks(deal(hashes, 12), np.zeros((1, COLOUR_BYTES), np.uint8), np.zeros(1), 12) for hashes in (one, nothing)]
        assert sum(int(both[0].keys(band)[0] != both[1].keys(band)[0]) for band in range(13)) == 1


@pytest.mark.parametrize("change", ["jpeg", "webp", "half"])
def test_reencoded_pictures_are_near_duplicates_and_others_are_not(change):
    chance = random.Random(6)
    pictures = [blots(chance) for _ in range(40)]
    if change == "half":
        copies = [picture.resize((128, 128), Image.Resampling.BICUBIC) for picture in pictures]
    else:
        copies = [Image.open(io.BytesIO(encoded(picture, change.upper(), quality=80))).convert("RGB") for picture in pictures]
    alike = by_search(looks_of(pictures + copies), np.full(80, 10_000), 12)
    assert not alike[:40].any() and alike[40:].mean() > 0.9


def test_a_variant_in_another_colour_of_the_same_brightness_is_another_picture():
    pictures = []
    for ground in ((200, 60, 60), (61, 128, 60)):
        pixels = np.full((256, 256, 3), ground, np.uint8)
        pixels[80:170, 60:200] = 250
        pictures.append(Image.fromarray(pixels))
    hashes, shades = looks_of(pictures)
    assert (hashes[0] == hashes[1]).all() and not by_search((hashes, shades), np.full(2, 10_000), 12).any()


def looks_of(pictures: list[Image.Image]) -> PICTURES:
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
    """From four shards on, two are one block; several row groups."""
    monkeypatch.setattr(duplicates, "TOGETHER", 2)
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
    blocks = [len(list((tmp_path / name).glob("filter/units/*/*/firsts.parquet"))) for name in ("whole", "parts")]
    assert blocks == [5, 4]


def test_an_appended_shard_costs_its_own_share_and_equals_a_run_from_nothing(
    tmp_path, store, make, in_process, digests, unit_times
):
    """Its pictures come again, larger, in two of the shards before it: these are written again, and no other."""
    chance = random.Random(4)
    pictures = [[blots(chance) for _ in range(4)] for _ in range(5)]
    pictures.append([pictures[1][0].resize((512, 512)), pictures[3][2].resize((400, 400)), pictures[3][0].resize((200, 200))])
    samples = [[sample(10 * n + m, encoded(picture)) for m, picture in enumerate(some)] for n, some in enumerate(pictures)]
    before = make(Filter, store, {"rows": download(store, samples[:5])}, clip_scores=False)
    done = unit_times(store, "filter")
    after = make(Filter, store, {"rows": download(store, samples)}, clip_scores=False)
    assert unit_times(store, "filter").items() > done.items()
    # Of the new shard its scores, its looks, its comparison and its rows; what goes, of all; and the two shards that lose one.
    assert len(unit_times(store, "filter")) - len(done) == 7
    other = Store(str(tmp_path / "other"))
    assert digests(make(Filter, other, {"rows": download(other, samples)}, clip_scores=False)) == digests(after)
    lost = {one.key for one in kept_of(before)} - {one.key for one in kept_of(after)}
    assert lost == {"00000010", "00000032"} and after.manifest.stats.dropped == {"near_duplicate": 3}


def test_of_all_copies_the_largest_stays_wherever_it_stands(store, make, in_process):
    chance = random.Random(9)
    picture, other = blots(chance), blots(chance)
    sides = [256, 300, 640, 260, 640, 220]
    rows = [sample(n, encoded(picture.resize((side, side)), "JPEG")) for n, side in enumerate(sides)] + [
        sample(9, encoded(other))
    ]
    kept = make(Filter, store, {"rows": download(store, [rows[:2], rows[2:]])}, clip_scores=False)
    assert [one.key for one in kept_of(kept)] == ["00000002", "00000009"]


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
