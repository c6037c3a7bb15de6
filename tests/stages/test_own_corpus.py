"""A corpus of one's own: a folder of images with captions, a list of URLs, and the example recipes for both."""

from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.dataset import verify
from infra.store import Store
from stages.__main__ import run_node
from stages.contract import StageError
from stages.folder import Folder
from stages.recipe import RecipeError, load_recipe, parse_recipe
from tests.stages.hostile_files import FILES, encoded
from tests.stages.hostile_web import HOST, hostile_web
from tests.stages.pages import name_of, samples_of, table_of

CONFIGS = Path(__file__).parent.parent.parent / "configs"
# The examples name public models; these ship with the project.
EMBEDDED = [f"encoders.{name}=embedded" for name in ("vae", "clip", "text", "gpt2")]


def different(number: int, size: int = 300) -> bytes:
    """A picture like no other of the corpus."""
    pixels = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST), "JPEG")


@pytest.fixture
def corpus(tmp_path):
    """Twenty good pairs in two folders, and what may go wrong beside them."""
    folder = tmp_path / "mine"
    (folder / "deeper").mkdir(parents=True)
    for number in range(20):
        place = folder / ("deeper" if number % 2 else "") / f"photo {number}.jpg"
        place.write_bytes(different(number))
        place.with_suffix(".txt").write_text(f"  a pattern with the number {number}\n", encoding="utf-8")
    wrong = {"uncaptioned": None, "blank": b" \n", "latin": "caf\u00e9".encode("latin-1"), "svg": b"a drawing"}
    for name, caption in wrong.items():
        (folder / f"{name}.jpg").write_bytes(FILES["svg" if name == "svg" else "jpeg"][0])
        if caption is not None:
            (folder / f"{name}.txt").write_bytes(caption)
    for place in ("", "deeper"):
        (folder / place / "twin.jpg").write_bytes(FILES["png"][0])
        (folder / place / "twin.txt").write_text("twice the same")
    return folder


DROPPED = {"no_caption": 2, "caption_not_utf8": 1, "not_an_image": 1, "duplicate_file": 1}


@pytest.mark.usefixtures("in_process")
def test_a_folder_becomes_shards_and_every_file_is_accounted_for(store, make, corpus):
    dataset = make(Folder, store, images=[str(corpus / "**" / "*.jpg")], shard_rows=8, image_size=200)
    stats = dataset.manifest.stats
    assert (stats.rows_in, stats.rows_out, stats.dropped) == (26, 21, DROPPED)
    samples = samples_of(dataset)
    assert {sample.caption for sample in samples} == {f"a pattern with the number {n}" for n in range(20)} | {"twice the same"}
    for sample in samples:
        file = next(corpus.rglob(sample.meta["file"]))
        image = Image.open(io.BytesIO(sample.image))
        assert image.size == (sample.meta["width"], sample.meta["height"]) and min(image.size) == 200
        assert sample.meta["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    rows = table_of(dataset).to_pylist()
    assert len(rows) == 26 and {row["file"]: row["status"] for row in rows}["svg.jpg"] == "not_an_image"
    assert len({row["key"] for row in rows}) == 25, "the twins share theirs"
    assert verify(dataset) == []


@pytest.mark.usefixtures("in_process")
def test_where_it_lies_changes_nothing_and_one_more_file_changes_one_shard(tmp_path, store, make, corpus, digests):
    first = make(Folder, store, images=[str(corpus / "**" / "*.jpg")], shard_rows=4)
    moved = shutil.move(corpus, tmp_path / "elsewhere")
    again = make(Folder, Store(str(tmp_path / "other")), images=[f"{moved}/**/*.jpg"], shard_rows=4)
    assert again.manifest.fingerprint == first.manifest.fingerprint and digests(again) == digests(first)
    shards = {entry.unit for entry in first.files}
    assert len(shards) > 3
    Path(moved, "more.jpg").write_bytes(different(99))
    Path(moved, "more.txt").write_text("one more pattern than before")
    more = make(Folder, store, images=[f"{moved}/**/*.jpg"], shard_rows=4)
    assert more.manifest.stats.rows_out == 22 and len(shards - {entry.unit for entry in more.files}) == 1


@pytest.mark.usefixtures("in_process")
def test_a_file_that_changes_while_it_is_read_is_an_error(store, make, corpus, monkeypatch):
    def read(address):
        return b"another content" if address.endswith("photo 3.jpg") else Path(address).read_bytes()

    monkeypatch.setattr("stages.folder._read", read)
    with pytest.raises(StageError, match=r"photo 3\.jpg: changed while it was being read; run again"):
        make(Folder, store, images=[str(corpus / "**" / "*.jpg")])


def test_a_folder_starts_a_subset(tmp_path):
    def parse(**subsets):
        return parse_recipe({"name": "x", "subsets": subsets}, tmp_path)

    folder = {"images": ["*.jpg"]}
    assert list(parse(a={"folder": folder, "filter": {}}, b={"from": "a-folder", "filter": {"min_side": 300}}).nodes) == [
        "a-folder", "a-filter", "b-filter",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="subsets.a.select: unknown; expected folder, filter, encode or from"):
        parse(a={"folder": folder, "select": {}})
    with pytest.raises(RecipeError, match="subsets.b.from: a folder has nothing before it; remove `from` or `folder`"):
        parse(a={"folder": folder}, b={"from": "a-folder", "folder": folder})
    with pytest.raises(RecipeError, match="text-codec.captions: expected a subset that has a select or a folder, got 'z'"):
        parse_recipe({"name": "x", "subsets": {"a": {"folder": folder}}, "text-codec": {"captions": "z"}}, tmp_path)


@pytest.mark.parametrize("name", ["folder", "urls"])
def test_the_example_is_ten_lines_and_valid(name):
    lines = [line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if not line.startswith(("#", "encoders:"))]
    assert len(lines) <= 11
    recipe = load_recipe(CONFIGS / f"{name}.yaml", EMBEDDED)
    assert {"mine-filter", "mine-encode", "text-codec", "train-256", "export"} < set(recipe.nodes)


def run_through(recipe, store, *nodes):
    return [run_node(recipe, node, store) for node in nodes]


@pytest.mark.usefixtures("in_process")
def test_the_folder_example_runs(tmp_path, store, corpus, monkeypatch):
    monkeypatch.setattr("stages.__main__.connect_ray", lambda: None)
    monkeypatch.setattr("stages.pool.gpus_each", lambda: 0.0)
    images = f"subsets.mine.folder.images=[{corpus}/**/*.jpg]"
    settings = [*EMBEDDED, images, "subsets.mine.filter.min_clip_similarity=-1", "subsets.mine.filter.duplicate_tolerance=null"]
    recipe = load_recipe(CONFIGS / "folder.yaml", settings)
    packed, kept = run_through(recipe, store, "mine-folder", "mine-filter")
    assert packed.manifest.stats.dropped == DROPPED
    assert kept.manifest.stats.rows_in == packed.manifest.stats.rows_out == 21
    assert kept.manifest.stats.rows_out == 21


@pytest.mark.usefixtures("in_process")
def test_the_urls_example_runs(tmp_path, store, monkeypatch):
    monkeypatch.setattr("stages.__main__.connect_ray", lambda: None)
    monkeypatch.setattr("stages.pool.gpus_each", lambda: 0.0)
    names = ["jpeg", "png", "webp", "status-404", "html"]
    links = {"link": [f"http://{HOST}/{name}" for name in names], "title": [f"a caption for {name}" for name in names]}
    pq.write_table(pa.table(links), tmp_path / "mine.parquet")
    with hostile_web() as place:
        settings = [
            *EMBEDDED,
            f"subsets.mine.select.metadata=[{tmp_path}/mine.parquet]",
            f"subsets.mine.download.hosts={{{HOST}: '{place}'}}",
            "subsets.mine.filter.min_clip_similarity=-1",
            "subsets.mine.filter.duplicate_tolerance=null",
        ]
        recipe = load_recipe(CONFIGS / "urls.yaml", settings)
        _, fetched, kept = run_through(recipe, store, "mine-select", "mine-download", "mine-filter")
    assert fetched.manifest.stats.dropped == {"http_404": 1, "not_an_image": 1}
    assert {name_of(sample.meta["url"]) for sample in samples_of(kept)} == {"jpeg", "png", "webp"}
