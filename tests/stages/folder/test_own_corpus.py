"""A corpus of one's own: a folder of images with captions, a list of URLs, and the example recipes for both."""

from __future__ import annotations

import hashlib
import io
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from examples.little_web import compose
from infra.dataset import verify
from infra.store import Store
from stages.__main__ import run_node
from stages.folder.stage import Folder
from stages.runner.contract import StageError
from stages.runner.recipe import RecipeError, load_recipe, parse_recipe
from tests.stages.boxed import FATAL, SLOW, Fragile, own_children
from tests.stages.committed import flip
from tests.stages.hostile_files import FILES, encoded
from tests.stages.hostile_web import HOST, hostile_web
from tests.stages.pages import samples_of, table_of

CONFIGS = Path(__file__).parent.parent.parent.parent / "configs"
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
def test_however_a_caption_is_encoded_it_is_the_same(tmp_path, store, make):
    """Editors of Windows mark the beginning of a text and end its lines in their own way."""
    said = "caf\u00e9 \u65e5\u672c\r\nby the sea\r\n"
    ways = [said.encode(), said.encode("utf-8-sig"), said.encode("utf-16"), b"\xfe\xff" + said.encode("utf-16-be")]
    for number, data in enumerate(ways):
        (tmp_path / f"{number}.jpg").write_bytes(different(number))
        (tmp_path / f"{number}.txt").write_bytes(data)
    dataset = make(Folder, store, images=[str(tmp_path / "*.jpg")])
    assert [sample.caption for sample in samples_of(dataset)] == ["caf\u00e9 \u65e5\u672c\nby the sea"] * 4


@pytest.mark.usefixtures("in_process")
def test_lines_of_a_file_are_captions_of_their_own_where_they_have_names(tmp_path, store, make, in_process):
    texts = {"a": "one\r\ntwo\n three \nfour", "b": "one\n\nthree", "c": "one", "d": "\ntwo"}
    for number, (name, text) in enumerate(texts.items()):
        (tmp_path / f"{name}.jpg").write_bytes(different(number))
        (tmp_path / f"{name}.txt").write_text(text)
    dataset = make(Folder, store, images=[f"{tmp_path}/*.jpg"], captions=["long", "alt"])
    samples = {one.meta["file"]: one for one in samples_of(dataset)}
    found = {name: (one.caption, *(one.meta.get(f"caption.{n}") for n in ("long", "alt"))) for name, one in samples.items()}
    assert found == {"a.jpg": ("one", "two", "three"), "b.jpg": ("one", None, "three"), "c.jpg": ("one", None, None)}
    assert dataset.manifest.stats.dropped == {"no_caption": 1}
    rows = {row["file"]: row for row in table_of(dataset).to_pylist()}
    assert [rows[f"{name}.jpg"]["caption.alt"] for name in texts] == ["three", "three", None, None]
    assert dataset.manifest.columns["caption.alt"] == "string"


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

    monkeypatch.setattr("stages.folder.stage._read", read)
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
    lines = [line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 10
    recipe = load_recipe(CONFIGS / f"{name}.yaml", EMBEDDED)
    assert {"mine-filter", "mine-encode", "text-codec", "train-256", "export"} < set(recipe.nodes)


@pytest.fixture
def drawings():
    """File name -> (bytes, caption): eight pairs that the embedded CLIP knows, the first once more, and one that does not fit."""
    chance = random.Random(0)
    scenes = chance.sample(compose.all_scenes(), 9)
    pairs = {
        f"{n}.jpg": (encoded(compose.render(scene, 300), "JPEG"), compose.caption(scene, chance))
        for n, scene in enumerate(scenes)
    }
    pairs["again.png"] = (encoded(compose.render(scenes[0], 300).resize((450, 450)), "PNG"), pairs["0.jpg"][1])
    pairs["8.jpg"] = (pairs["8.jpg"][0], pairs["1.jpg"][1])
    return pairs


def check_filtered(kept, drawings):
    """By the captions, since any of two that are alike may stay."""
    assert kept.manifest.stats.dropped == {"near_duplicate": 1, "min_clip_similarity": 1}
    assert sorted(sample.caption for sample in samples_of(kept)) == sorted(drawings[f"{number}.jpg"][1] for number in range(8))


@pytest.fixture
def run_nodes(store, in_process, monkeypatch):
    """(example, overrides, nodes) -> the nodes' datasets, with the encoders that ship with the project."""
    monkeypatch.setattr("stages.__main__.connect_ray", lambda: None)
    monkeypatch.setattr("stages.runner.cluster.gpus_each", lambda machines: 0.0)

    def run(example, overrides, *nodes):
        recipe = load_recipe(CONFIGS / f"{example}.yaml", [*EMBEDDED, *overrides])
        return [run_node(recipe, node, store) for node in nodes]

    return run


def test_the_folder_example_runs(tmp_path, drawings, run_nodes):
    """Up to the latents that training reads. Two steps make a codec of no use, in seconds."""
    for name, (image, text) in drawings.items():
        (tmp_path / name).write_bytes(image)
        (tmp_path / name).with_suffix(".txt").write_text(text)
    overrides = [f"subsets.mine.folder.images=[{tmp_path}/**/*.jpg, {tmp_path}/**/*.png]", "text-codec.steps=2"]
    nodes = ("mine-folder", "mine-filter", "text-codec", "mine-encode")
    packed, kept, _, latents = run_nodes("folder", overrides, *nodes)
    assert packed.manifest.stats.rows_out == len(drawings)
    check_filtered(kept, drawings)
    assert sorted(table_of(latents)["key"].to_pylist()) == sorted(sample.key for sample in samples_of(kept))


def test_the_urls_example_runs(tmp_path, drawings, run_nodes, monkeypatch):
    for name, (image, _) in drawings.items():
        monkeypatch.setitem(FILES, name, (image, "success"))
    titles = {name: text for name, (_, text) in drawings.items()} | {"status-404": "gone", "html": "a page"}
    links = {"link": [f"http://{HOST}/{name}" for name in titles], "title": list(titles.values())}
    pq.write_table(pa.table(links), tmp_path / "mine.parquet")
    with hostile_web() as place:
        overrides = [
            f"subsets.mine.select.metadata=[{tmp_path}/mine.parquet]",
            f"subsets.mine.download.hosts={{{HOST}: '{place}'}}",
        ]
        _, fetched, kept = run_nodes("urls", overrides, "mine-select", "mine-download", "mine-filter")
    assert fetched.manifest.stats.dropped == {"http_404": 1, "not_an_image": 1}
    check_filtered(kept, drawings)


@pytest.mark.usefixtures("in_process")
def test_names_with_brackets_endings_in_capitals_and_archives_are_read(tmp_path, store, make):
    """As cameras, Windows and sync programs name them."""
    names = ("photo [1].jpg", "photo 1.JPG", "photo 2.Jpg")
    folder = tmp_path / "set [a]"
    folder.mkdir()
    for number, name in enumerate(names):
        (folder / name).write_bytes(different(number))
        (folder / name).with_suffix(".TXT" if number else ".txt").write_text(f"caption {number}")
    shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    patterns = (f"{folder}/*.jpg", f"zip://*.jpg::file://{tmp_path}/packed.zip")
    made = [make(Folder, store, images=[pattern]) for pattern in patterns]
    made.append(make(Folder, store, images=[f"{folder}/photo [1].jpg"]))
    found = [{sample.meta["file"]: sample.caption for sample in samples_of(dataset)} for dataset in made]
    assert found[0] == found[1] == {name: f"caption {number}" for number, name in enumerate(names)}
    assert found[2] == {names[0]: "caption 0"}


@pytest.mark.usefixtures("in_process")
def test_a_file_of_more_bytes_than_allowed_is_counted_and_not_packed(tmp_path, store, make):
    for name in ("just.jpg", "over.jpg"):
        (tmp_path / name).write_bytes(different(0) + bytes(name == "over.jpg"))
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}")
    dataset = make(Folder, store, images=[str(tmp_path / "*.jpg")], max_bytes=(tmp_path / "just.jpg").stat().st_size)
    assert [sample.caption for sample in samples_of(dataset)] == ["caption of just.jpg"]
    assert dataset.manifest.stats.dropped == {"too_large": 1}
    (over,) = [row for row in table_of(dataset).to_pylist() if row["status"] != "success"]
    found = hashlib.sha256((tmp_path / "over.jpg").read_bytes()).hexdigest()
    assert (over["file"], over["caption"], over["sha256"]) == ("over.jpg", "caption of over.jpg", found)


@pytest.mark.usefixtures("in_process")
def test_what_is_damaged_in_an_archive_is_counted(tmp_path, store, make):
    """Of a ZIP only the list of its members is read before the work begins."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(3):
            archive.writestr(f"{number}.jpg", different(number))
            archive.writestr(f"{number}.txt", f"caption {number}")
        places = [archive.getinfo(name).header_offset for name in ("0.jpg", "1.txt")]
    for place in places:
        flip(tmp_path / "a.zip", place + 30 + len("0.jpg"))
    dataset = make(Folder, store, images=[f"zip://*::{tmp_path}/a.zip"])
    assert [sample.caption for sample in samples_of(dataset)] == ["caption 2"]
    assert dataset.manifest.stats.dropped == {"damaged_in_archive": 2}


def test_pictures_that_end_or_hold_up_their_decoder_are_a_row_each(tmp_path, store, make, in_process, monkeypatch):
    monkeypatch.setattr("stages.shards.picture.Storing", Fragile)
    for name, behind in (("good", b""), ("fatal", FATAL), ("slow", SLOW), ("fine", b"")):
        (tmp_path / f"{name}.jpg").write_bytes(different(len(name)) + behind)
        (tmp_path / f"{name}.txt").write_text(name)
    with own_children(monkeypatch, seconds=0.5):
        made = make(Folder, store, images=[str(tmp_path / "*.jpg")])
    assert made.manifest.stats.dropped == {"crashed": 1, "too_slow": 1}
    assert sorted(sample.caption for sample in samples_of(made)) == ["fine", "good"]
