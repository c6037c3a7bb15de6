"""filter, against the rules stated once more as plain loops over decoded images."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from infra.store import Store
from stages.download.stage import Download
from stages.filter.histogram import RANGES
from stages.filter.stage import Filter, FilterConfig
from stages.runner.contract import StageError, result_fields
from stages.select.stage import Select
from stages.shards.tar import Sample
from tests.stages.hostile_web import HOST, hostile_web
from tests.stages.packed import ColourClip, blots, cut_between_samples, download, encoded, kept_of, sample


@pytest.fixture(autouse=True)
def colour_clip(monkeypatch):
    monkeypatch.setattr("stages.filter.heads.Scorer.load_clip", lambda self, ref: ColourClip(ref))
    monkeypatch.setattr("stages.filter.stage.weights_digest", lambda ref, kind: f"digest of {ref}")


def mixed(seed: int, count: int = 60) -> list[list[Sample]]:
    """Three shards of pictures, some repeated in another encoding, some broken, with scores that may be missing."""
    chance = random.Random(seed)
    pictures: list[Image.Image] = []
    shards: list[list[Sample]] = []
    for number in range(count):
        if number % (count // 3) == 0:
            shards.append([])
        if pictures and chance.random() < 0.5:
            picture = chance.choice(pictures)
        else:
            picture = blots(chance, chance.choice([256, 300, 280, 700, 290, 310]), chance.choice([150, 256, 300, 270, 310]))
        pictures.append(picture)
        data = encoded(picture, *chance.choice([("PNG",), ("WEBP",), ("JPEG",)]))
        if chance.random() < 0.1:
            data = chance.choice([data[: len(data) // 2], b"nothing", b""])
        words = chance.choice(["red", "green", "blue", "some"])
        caption = chance.choice([f"a {words} thing", f"{words} x", f"the {words} big box", f"one {words} jar"])
        scores = {name: chance.choice([None, *[chance.random()] * 5]) for name in ("punsafe", "pwatermark", "similarity")}
        scores["aesthetic"] = chance.choice([None, *[10 * chance.random()] * 5])
        language = chance.choice([None, *["en"] * 12, "de"])
        shards[-1].append(sample(number, data, caption, language=language, **scores))
    return shards


def expected(shards: list[list[Sample]], config: FilterConfig) -> tuple[list[str], dict[str, int]]:
    kept, dropped, earlier = [], {}, []
    for one in (one for shard in shards for one in shard):
        reason = first_reason(one, config)
        if reason is None:
            picture = Image.open(io.BytesIO(one.image)).convert("RGB")
            small = np.asarray(picture.resize((16, 16), Image.Resampling.BOX)).astype(int)
            if any(alike(small, other, config.duplicate_tolerance) for other in earlier):
                reason = "near_duplicate"
            earlier.append(small)
        if reason is None:
            kept.append(one.key)
        else:
            dropped[reason] = dropped.get(reason, 0) + 1
    return kept, dropped


def alike(one: np.ndarray, other: np.ndarray, tolerance: int) -> bool:
    """Thumbnails (16, 16, 3), pixel by pixel and by the brightness of their quarters."""
    for top, left in ((0, 0), (0, 8), (8, 0), (8, 8)):
        means = [int((t[top : top + 8, left : left + 8] @ [2, 5, 1]).mean() / 8) for t in (one, other)]
        if abs(means[0] - means[1]) > tolerance // 4:
            return False
    return bool(np.abs(one - other).max() <= tolerance)


def first_reason(one: Sample, config: FilterConfig) -> str | None:
    try:
        image = Image.open(io.BytesIO(one.image)).convert("RGB")
    except OSError:
        return "undecodable"
    clip = ColourClip()
    seen, read = clip.image([image])[0].numpy(), clip.text([one.caption])[0].numpy()
    cosine = seen @ read / np.linalg.norm(seen) / np.linalg.norm(read)
    scores = one.meta | {"clip_similarity": np.float32(cosine)}
    bounds = [
        ("min_side", min(image.size) < 200),
        ("max_aspect_ratio", max(image.size) > 2 * min(image.size)),
        ("min_caption_chars", len(one.caption) < 7),
        ("min_caption_words", len(one.caption.split()) < 3),
    ]
    language = one.meta["language"]
    for column, name, below in (("clip_similarity", "min_clip_similarity", True), ("punsafe", "max_punsafe", False),
                                ("pwatermark", "max_pwatermark", False), ("aesthetic", "min_aesthetic", True)):  # fmt: skip
        value, bound = scores[column], getattr(config, name)
        if not config.keep_null:
            bounds.append((f"null_{column}", value is None))
        bounds.append((name, value is not None and (value < bound if below else value > bound)))
    if not config.keep_null:
        bounds.append(("null_language", language is None))
    bounds.append(("language", language not in (None, "en")))
    return next((name for name, fails in bounds if fails), None)


CONDITIONS = {
    "max_aspect_ratio": 2.0, "min_caption_chars": 7, "min_clip_similarity": 0.75, "max_punsafe": 0.9, "max_pwatermark": 0.95,
    "min_aesthetic": 1.0, "languages": ["en"],
}  # fmt: skip


@pytest.mark.parametrize("keep_null", [True, False])
def test_keeps_and_counts_what_a_plain_loop_does(store, make, in_process, keep_null):
    shards = mixed(1, 180)
    config = {**CONDITIONS, "keep_null": keep_null, "batch": 7}
    dataset = make(Filter, store, {"rows": download(store, shards)}, **config)
    kept, dropped = expected(shards, FilterConfig(**config))
    stats = dataset.manifest.stats
    assert [sample.key for sample in kept_of(dataset)] == kept
    assert stats.dropped == dropped and stats.rows_in == 180
    assert {"undecodable", "min_side", "near_duplicate", "min_clip_similarity", "min_caption_words", "language"} <= set(dropped)
    assert len(kept) >= 5


def test_samples_carry_bytes_and_measurements(store, make, in_process):
    shards = mixed(2)
    given = {sample.key: sample for shard in shards for sample in shard}
    dataset = make(Filter, store, {"rows": download(store, shards)})
    kept = kept_of(dataset)
    for one in kept:
        image = Image.open(io.BytesIO(one.image))
        assert one.image == given[one.key].image and one.caption == given[one.key].caption
        assert (one.meta["width"], one.meta["height"]) == image.size
        assert one.meta["url"] == given[one.key].meta["url"] and -1 <= one.meta["clip_similarity"] <= 1
    table = [row for e in dataset.files if e.name.endswith(".parquet") for row in pq.read_table(dataset.url(e)).to_pylist()]
    assert [row["key"] for row in table] == [one.key for one in kept]
    seen = ColourClip().image([Image.open(io.BytesIO(kept[0].image)).convert("RGB")])[0].numpy()
    assert np.frombuffer(table[0]["clip"], np.float16) == pytest.approx(seen, abs=1e-3)


def test_a_threshold_redoes_only_the_writing_and_a_filter_feeds_a_filter(store, make, in_process, unit_times):
    rows = download(store, mixed(3))
    loose = make(Filter, store, {"rows": rows})
    done = unit_times(store, "filter")
    tight = make(Filter, store, {"rows": rows}, min_aesthetic=4.0)
    # Of three shards: the survey, the comparison and the writing, and what goes of all; no image is decoded again.
    assert len(done) == 13 and len(unit_times(store, "filter")) == 23 and unit_times(store, "filter").items() > done.items()
    assert len(list(Path(store.root).glob("filter/units/*/*/scores.parquet"))) == 3
    twice = make(Filter, store, {"rows": loose}, min_aesthetic=4.0)
    first, second = kept_of(tight), kept_of(twice)
    assert {one.key for one in second} <= {one.key for one in first} and second


def test_histograms_cover_what_a_score_can_be():
    similarity, probability = (-1.0, 1.0), (0.0, 1.0)
    assert RANGES == {
        "clip_similarity": similarity, "similarity": similarity, "punsafe": probability, "pwatermark": probability,
        "aesthetic": (0.0, 10.0),
    }  # fmt: skip


def test_histograms_count_every_score(store, make, in_process):
    shards = mixed(5)
    rows = [one for shard in shards for one in shard]
    scores = make(Filter, store, {"rows": download(store, shards)}, clip_scores=False).manifest.summary["scores"]
    assert set(scores) == {"similarity", "punsafe", "pwatermark", "aesthetic"}
    for name, histogram in scores.items():
        values = np.array([one.meta[name] for one in rows if one.meta[name] is not None], np.float32)
        assert histogram["counts"] == np.histogram(values, 200, RANGES[name])[0].tolist()
        assert histogram["unknown"] == len(rows) - len(values)
        for threshold, left in histogram["rows_at"]:
            assert left == (values < threshold if name in ("punsafe", "pwatermark") else values >= threshold).sum()


@pytest.mark.parametrize(
    ("keep", "words"), [(5000, "not a complete shard"), (0, "not a complete shard"), (None, "has 2 samples of 20")]
)
def test_damaged_shard_is_named(store, make, in_process, keep, words):
    rows = download(store, mixed(7))
    path = rows.store.root + "/" + rows.files[1].path
    if keep is None:
        cut_between_samples(path, 2)
    else:
        os.truncate(path, keep)
    with pytest.raises(StageError, match=f"00001.tar: {words}.*unidiffuser verify"):
        make(Filter, store, {"rows": rows})


def test_a_shard_that_was_cut_after_it_was_scored_is_named(store, make, in_process):
    """The scores are there, and say nothing of the samples that are missing from the tar."""
    rows = download(store, mixed(7))
    make(Filter, store, {"rows": rows})
    cut_between_samples(rows.url(rows.files[1]), 2)
    with pytest.raises(StageError, match="00001.tar: has 2 samples of 20; `unidiffuser verify` names"):
        make(Filter, store, {"rows": rows}, min_aesthetic=2.0)


def test_threshold_without_scores_is_refused():
    with pytest.raises(ValidationError, match="min_clip_similarity needs clip_scores"):
        FilterConfig(clip_scores=False, min_clip_similarity=0.2)


def test_presets_are_thresholds_that_a_field_beside_them_overrides():
    plain, basic = FilterConfig(), FilterConfig(preset="datacomp-basic", min_side=512)
    assert (plain.min_side, plain.max_aspect_ratio, plain.min_caption_chars, plain.min_caption_words) == (200, 3.0, 6, 3)
    assert result_fields(basic) == {**result_fields(plain), "min_side": 512, "languages": ["en"]}
    asked = result_fields(FilterConfig(preset="none"))
    assert [
        name for name, value in asked.items() if value is not None and name.startswith(("min_", "max_", "lang", "dupl"))
    ] == []


def test_three_stages_on_ray_and_again_in_this_process(tmp_path, make, ray_cluster, digests, request):
    """One worker each: what is tested is that the stages travel, and that where they run shows in no file."""
    names = ["jpeg", "png", "large", "status-404", "half-png", "noai", "webp"]
    table = {"URL": [f"http://{HOST}/{name}" for name in names], "TEXT": [f"a caption of {name}" for name in names]}
    pq.write_table(pa.table(table), tmp_path / "pages.parquet")
    found = []
    with hostile_web() as place:
        for number in range(2):
            store = Store(str(tmp_path / f"store-{number}"))
            rows = make(Select, store, metadata=[str(tmp_path / "pages.parquet")], shard_rows=4)
            images = make(Download, store, {"rows": rows}, hosts={HOST: place}, workers=1)
            found.append([rows, images, make(Filter, store, {"rows": images}, clip_scores=False, workers=1)])
            if not number:
                request.getfixturevalue("in_process")
    assert [digests(dataset) for dataset in found[0]] == [digests(dataset) for dataset in found[1]]
    assert found[0][1].manifest.stats.dropped == {"disallowed": 1, "http_404": 1, "truncated": 1}
    # All four show the same bare gradient.
    assert found[0][2].manifest.stats.dropped == {"near_duplicate": 3}


def test_a_shard_that_is_skipped_is_counted_and_the_others_stay_as_they_are(store, make, in_process, unit_times):
    rows = download(store, mixed(4, 15))
    config = {"clip_scores": False, "preset": "none"}
    whole, before = make(Filter, store, {"rows": rows}, **config), unit_times(store, "filter")
    part = make(Filter, store, {"rows": rows}, **config, skip=["00001"])
    assert unit_times(store, "filter") == before, "so few shards are looked at one by one"
    assert part.manifest.fingerprint != whole.manifest.fingerprint
    assert part.files == [entry for entry in whole.files if not entry.name.startswith("00001")] != whole.files
    lost = next(entry.rows for entry in rows.files if entry.name == "00001.tar")
    stats = part.manifest.stats
    assert (stats.rows_in, stats.dropped["skipped"], stats.adds_up()) == (whole.manifest.stats.rows_in, lost, True)
    with pytest.raises(StageError, match=r"^test-filter: skip: no shard 0001 goes into it; nearest are 0000"):
        make(Filter, store, {"rows": rows}, **config, skip=["0001"])
