"""The little web: what it draws, what its metadata says, and how it misbehaves, as a client sees it."""

from __future__ import annotations

import hashlib
import io
import random
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError

from examples.little_web.build import HELD_OUT_ROWS, TROUBLE_PERCENT, add_part, build
from examples.little_web.compose import BACKGROUNDS, PLACES, SIZES, Scene, all_scenes, caption, render
from examples.little_web.server import LittleWeb

LAION_COLUMNS = ["URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE", "hash"]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 links of a seed that has every kind of trouble in it."""
    return build(tmp_path_factory.mktemp("web"), rows=160, seed=5)


def rows_of(folder: Path) -> list[dict]:
    return [row for path in sorted((folder / "metadata").iterdir()) for row in pq.read_table(path).to_pylist()]


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def get(address: str, url: str) -> tuple[int, str, dict[str, str], bytes]:
    try:
        with urllib.request.urlopen(f"http://{address}{urlparse(url).path}", timeout=10) as reply:
            return reply.status, reply.url, dict(reply.headers), reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.url, dict(error.headers), error.read()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", SIZES)
def test_the_drawing_stands_where_the_caption_says(size: str, place: str) -> None:
    picture = np.asarray(render(Scene("football", size, place, "green"), 256)).astype(int)
    painted = np.abs(picture - BACKGROUNDS["green"]).sum(-1) > 30
    rows, columns = np.nonzero(painted)
    middle = columns.mean() / 256, rows.mean() / 256
    expected = {"left": (0, 1), "right": (2, 1), "top": (1, 0), "bottom": (1, 2), "centre": (1, 1)}[place]
    assert tuple(0 if x < 0.4 else 2 if x > 0.6 else 1 for x in middle) == expected
    assert 0.01 < painted.mean() < 0.09 if size == "small" else 0.12 < painted.mean() < 0.3


def test_a_variation_changes_the_picture_slightly_and_a_wide_picture_holds_the_scene_in_its_square() -> None:
    scene, varied = (Scene("panda", "large", "left", "pink", variation) for variation in (0, 7))
    exact, other = (np.asarray(render(each, 256)).astype(int) for each in (scene, varied))
    assert 0 < np.abs(exact - other).mean() < 20
    wide = np.asarray(render(scene, 400, 256))
    assert wide.shape == (256, 400, 3)
    assert np.array_equal(wide[:, 72:328], exact)


def test_captions_name_every_part_and_are_mostly_8_words_or_more() -> None:
    rng = random.Random(0)
    texts = [(scene, caption(scene, rng)) for scene in all_scenes()]
    for scene, text in texts:
        assert all(word in text for word in (scene.drawing, scene.size, scene.place, scene.background))
    assert np.mean([len(text.split()) >= 8 for _, text in texts]) > 0.95


def test_held_out_combinations_are_unseen_and_their_parts_are_seen(web: Path) -> None:
    held, seen = ([s for s in all_scenes() if s.held_out == flag] for flag in (True, False))
    for part in ("drawing", "size", "place", "background"):
        assert {getattr(scene, part) for scene in held} == {getattr(scene, part) for scene in seen}
    table = pq.read_table(web / "held_out.parquet")
    assert table.schema.types == [pa.string(), pa.binary()]
    captions = table["caption"].to_pylist()
    assert len(set(captions)) == HELD_OUT_ROWS
    assert not {row["TEXT"] for row in rows_of(web)} & set(captions)
    assert Image.open(io.BytesIO(table["image"][0].as_py())).size == (256, 256)


def test_metadata_has_laions_schema_and_its_drift(web: Path) -> None:
    first, second = (pq.read_table(web / "metadata" / f"part-0000{part}.parquet") for part in (0, 1))
    assert first.column_names == second.column_names == LAION_COLUMNS
    assert [first.schema.field(name).type for name in ("WIDTH", "HEIGHT")] == [pa.int32()] * 2
    assert [second.schema.field(name).type for name in ("WIDTH", "HEIGHT")] == [pa.float64()] * 2
    assert sum(first[name].null_count for name in LAION_COLUMNS) == 0 < second["AESTHETIC_SCORE"].null_count
    rows = rows_of(web)
    assert len(rows) == 160
    assert 0 < sum(row["similarity"] < 0.28 for row in rows) < 16
    assert len({row["hash"] for row in rows}) == len({(row["URL"], row["TEXT"]) for row in rows})


def test_the_web_misbehaves_as_its_paths_say(web: Path) -> None:
    by_kind: dict[str, list[dict]] = {}
    for row in rows_of(web):
        by_kind.setdefault(urlparse(row["URL"]).path.split("/")[1], []).append(row)
    assert set(by_kind) == {"pictures", *TROUBLE_PERCENT} - {"again"}
    with LittleWeb(web) as server:
        for kind, rows in by_kind.items():
            status, url, headers, body = get(server.address, rows[0]["URL"])
            assert status == {"dead": 404, "broken": 500}.get(kind, 200)
            assert (urlparse(url).path != urlparse(rows[0]["URL"]).path) == (kind == "moved")
            assert ("noai" in headers.get("X-Robots-Tag", "")) == (kind == "noai")
            if kind in ("dead", "broken", "page", "truncated"):
                with pytest.raises((UnidentifiedImageError, OSError)):
                    Image.open(io.BytesIO(body)).load()
            else:
                picture = Image.open(io.BytesIO(body))
                assert picture.size == (rows[0]["WIDTH"], rows[0]["HEIGHT"])
                assert (min(picture.size) < 256) == (kind == "small")
        address = server.address
    with pytest.raises(urllib.error.URLError):
        get(address, "/pictures/gone")


def test_some_links_and_some_pictures_come_twice(web: Path) -> None:
    urls = Counter(row["URL"] for row in rows_of(web))
    assert any(count > 1 for count in urls.values())
    contents = Counter(hashlib.sha256(path.read_bytes()).digest() for path in (web / "pages").glob("[pc][io]*/*"))
    assert any(count > 1 for count in contents.values())


def test_the_same_seed_gives_the_same_bytes_and_another_part_touches_nothing(tmp_path: Path) -> None:
    first, second = (digests(build(tmp_path / name, rows=24, seed=5)) for name in ("a", "b"))
    assert first == second
    path = add_part(tmp_path / "a", part=2, rows=12, seed=5)
    after = digests(tmp_path / "a")
    assert first.items() <= after.items()
    old = {row["URL"] for part in (0, 1) for row in pq.read_table(path.with_name(f"part-0000{part}.parquet")).to_pylist()}
    assert not old & {row["URL"] for row in pq.read_table(path).to_pylist()}


def test_a_folder_without_pages_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no pages/"):
        LittleWeb(tmp_path)
