"""filter, against the rules stated once more as plain loops over decoded images."""

from __future__ import annotations

import io
import random
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from infra.dataset import Dataset, FileEntry, Manifest, Stats, commit
from infra.store import Store
from stages.contract import StageError, digest_of
from stages.download import Download
from stages.duplicates import THUMBNAIL_BYTES, Near, thumbnail
from stages.filter import Filter, FilterConfig
from stages.histogram import RANGES
from stages.select import Select
from stages.tar import Sample, ShardWriter, read_samples
from tests.stages.hostile_web import HOST, hostile_web


class ColourClip:
    """Stands in for CLIP: an image is its mean colour, a caption the colour that it names first."""

    WORDS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 1.0, 0.1), "blue": (0.1, 0.1, 1.0)}

    def image(self, images):
        return torch.tensor(np.stack([np.asarray(image).reshape(-1, 3).mean(0) / 255 + 0.01 for image in images]))

    def text(self, captions):
        found = (next((word for word in caption.split() if word in self.WORDS), None) for caption in captions)
        return torch.tensor([self.WORDS[word] if word else (0.5, 0.5, 0.5) for word in found], dtype=torch.float64)


@pytest.fixture(autouse=True)
def colour_clip(monkeypatch):
    monkeypatch.setattr("stages.filter.load_clip", lambda config: ColourClip())
    monkeypatch.setattr("stages.filter.weights_digest", lambda ref, kind: f"digest of {ref}")


def sample(number: int, image: bytes, caption: str = "a picture of something", **meta: object) -> Sample:
    return Sample(f"{number:08d}", image, "jpg", caption, {"url": f"http://a.example/{number}", "width": 1, "height": 1, **meta})


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def blots(chance: random.Random, width: int = 256, height: int = 256) -> Image.Image:
    """A picture that nothing else resembles: a few coloured boxes."""
    pixels = np.full((height, width, 3), chance.randrange(256), np.uint8)
    for _ in range(8):
        x, y = chance.randrange(width - 40), chance.randrange(height - 40)
        pixels[y : y + chance.randrange(30, 120), x : x + chance.randrange(30, 120)] = [chance.randrange(256) for _ in range(3)]
    return Image.fromarray(pixels)


def download(store: Store, shards: list[list[Sample]]) -> Dataset:
    """A committed dataset as the download stage writes them."""
    files = []
    for number, samples in enumerate(shards):
        name = f"{number:05d}.tar"
        local = store.root + f".{name}"
        with ShardWriter(local) as tar:
            for one in samples:
                tar.add(one)
        size, digest = store.publish(local, f"download/units/{name}")
        files.append(FileEntry(path=f"download/units/{name}", rows=len(samples), bytes=size, sha256=digest, unit=str(number)))
    rows = sum(len(samples) for samples in shards)
    manifest = Manifest(
        stage="download", node="test-download", fingerprint=digest_of([entry.sha256 for entry in files]), generation=0,
        inputs={}, config={}, sources={}, code={}, schema={"key": "string"}, stats=Stats(rows_in=rows, rows_out=rows),
        summary={}, seconds=0, created="", files=files,
    )  # fmt: skip
    return commit(store, manifest)


def kept_of(dataset: Dataset) -> list[Sample]:
    found = []
    for entry in dataset.files:
        if entry.name.endswith(".tar"):
            with dataset.open(entry) as file:
                samples = list(read_samples(file))
            assert len(samples) == entry.rows
            found += samples
    return found


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
        shards[-1].append(sample(number, data, caption, aesthetic=chance.choice([None, *[10 * chance.random()] * 5]), **scores))
    return shards


def expected(shards: list[list[Sample]], config: FilterConfig) -> tuple[list[str], dict[str, int]]:
    kept, dropped, earlier = [], {}, []
    for one in (sample for shard in shards for sample in shard):
        reason = first_reason(one, config)
        if reason is None:
            small = np.asarray(Image.open(io.BytesIO(one.image)).convert("RGB").resize((16, 16), Image.Resampling.BOX)).astype(
                int
            )
            if any(np.abs(small - other).max() <= config.duplicate_tolerance for other in earlier):
                reason = "near_duplicate"
            earlier.append(small)
        if reason is None:
            kept.append(one.key)
        else:
            dropped[reason] = dropped.get(reason, 0) + 1
    return kept, dropped


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
    for column, name, below in (("clip_similarity", "min_clip_similarity", True), ("punsafe", "max_punsafe", False),
                                ("pwatermark", "max_pwatermark", False), ("aesthetic", "min_aesthetic", True)):  # fmt: skip
        value, bound = scores[column], getattr(config, name)
        if not config.keep_null:
            bounds.append((f"null_{column}", value is None))
        bounds.append((name, value is not None and (value < bound if below else value > bound)))
    return next((name for name, fails in bounds if fails), None)


CONDITIONS = {
    "max_aspect_ratio": 2.0, "min_caption_chars": 7, "min_clip_similarity": 0.75, "max_punsafe": 0.9, "max_pwatermark": 0.95,
    "min_aesthetic": 1.0,
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
    assert {"undecodable", "min_side", "near_duplicate", "min_clip_similarity", "min_caption_words"} <= set(dropped)
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
    assert len(done) == 6 and len(unit_times(store, "filter")) == 9 and unit_times(store, "filter").items() > done.items()
    twice = make(Filter, store, {"rows": loose}, min_aesthetic=4.0)
    first, second = kept_of(tight), kept_of(twice)
    assert {one.key for one in second} <= {one.key for one in first} and second


def test_appended_shard_keeps_finished_units_and_equals_a_run_from_nothing(
    tmp_path, store, make, in_process, digests, unit_times
):
    shards = mixed(4, 90)
    before = make(Filter, store, {"rows": download(store, shards[:2])})
    done = unit_times(store, "filter")
    after = make(Filter, store, {"rows": download(store, shards)})
    assert unit_times(store, "filter").items() > done.items() and len(unit_times(store, "filter")) == len(done) + 2
    assert digests(after).items() > digests(before).items()
    other = Store(str(tmp_path / "other"))
    assert digests(make(Filter, other, {"rows": download(other, shards)})) == digests(after)


def test_histograms_count_every_score(store, make, in_process):
    shards = mixed(5)
    rows = [one for shard in shards for one in shard]
    scores = make(Filter, store, {"rows": download(store, shards)}, clip_scores=False).manifest.summary["scores"]
    assert set(scores) == {"similarity", "punsafe", "pwatermark", "aesthetic"}
    for name, histogram in scores.items():
        values = np.array([one.meta[name] for one in rows if one.meta[name] is not None], np.float32)
        assert histogram["counts"] == np.histogram(values, 100, RANGES[name])[0].tolist()
        assert histogram["unknown"] == len(rows) - len(values)
        for threshold, left in histogram["rows_at"]:
            assert left == (values < threshold if name in ("punsafe", "pwatermark") else values >= threshold).sum()


def test_near_duplicates_equal_a_comparison_of_all_pairs():
    chance = np.random.default_rng(0)
    centres = chance.integers(0, 256, (40, THUMBNAIL_BYTES))
    thumbs = np.clip(centres[chance.integers(0, 40, 400)] + chance.integers(-7, 8, (400, THUMBNAIL_BYTES)), 0, 255).astype(
        np.uint8
    )
    thumbs[::50] = 255
    near = Near(thumbs[300:], 12)
    near.add(thumbs[:200])
    near.add(thumbs[200:300])
    gaps = np.abs(thumbs[:, None].astype(np.int16) - thumbs[None].astype(np.int16)).max(-1) <= 12
    truth = [bool(gaps[row, :row].any()) for row in range(300, 400)]
    assert near.resembles.tolist() == truth and 0 < sum(truth) < 100


@pytest.mark.parametrize("change", ["jpeg", "webp", "half"])
def test_reencoded_pictures_are_near_duplicates_and_others_are_not(change):
    chance = random.Random(6)
    pictures = [blots(chance) for _ in range(40)]
    if change == "half":
        copies = [picture.resize((128, 128), Image.Resampling.BICUBIC) for picture in pictures]
    else:
        copies = [Image.open(io.BytesIO(encoded(picture, change.upper(), quality=80))).convert("RGB") for picture in pictures]
    thumbs = [np.frombuffer(b"".join(map(thumbnail, some)), np.uint8).reshape(-1, THUMBNAIL_BYTES) for some in (pictures, copies)]
    near = Near(thumbs[1], 12)
    assert not near.resembles.any()
    near.add(thumbs[0])
    assert near.resembles.mean() > 0.9


@pytest.mark.parametrize(
    ("keep", "words"), [(5000, "not a complete shard"), (0, "not a complete shard"), (None, "has 2 samples of 20")]
)
def test_damaged_shard_is_named(store, make, in_process, keep, words):
    rows = download(store, mixed(7))
    path = rows.store.root + "/" + rows.files[1].path
    with tarfile.open(path) as tar:
        third = tar.getmembers()[6].offset
    with open(path, "r+b") as file:
        file.truncate(third if keep is None else keep)
    with pytest.raises(StageError, match=f"00001.tar: {words}.*unidiffuser verify"):
        make(Filter, store, {"rows": rows})


def test_threshold_without_scores_is_refused():
    with pytest.raises(ValidationError, match="min_clip_similarity needs clip_scores"):
        FilterConfig(clip_scores=False, min_clip_similarity=0.2)


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
    # All four show the same picture.
    assert found[0][2].manifest.stats.dropped == {"near_duplicate": 3}
