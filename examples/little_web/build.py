"""Builds the little web: pictures, LAION-schema metadata in two Parquet files, and held-out scenes for evaluation.

    <folder>/pages/...               what the server serves, one file a path
    <folder>/metadata/part-*.parquet URL, TEXT, WIDTH, HEIGHT, similarity, punsafe, pwatermark, AESTHETIC_SCORE, hash
    <folder>/held_out.parquet        caption string, image bytes (PNG, 256 px)

About a tenth of the links misbehave. The first directory of a path says how, so the server needs no state: see `server`.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from examples.little_web.compose import Scene, all_scenes, caption, render

HOST = "http://little-web.example"
HELD_OUT_ROWS = 240
HELD_OUT_PIXELS = 256
SIZES: tuple[tuple[int, int], ...] = ((640, 640), (640, 640), (512, 512), (600, 600), (640, 512), (512, 640), (720, 540))
TOO_SMALL: tuple[tuple[int, int], ...] = ((96, 96), (128, 128), (200, 200))
FORMATS: tuple[str, ...] = ("png", "jpg", "jpg", "webp")
TROUBLE_PERCENT: dict[str, float] = {  # first directory of the path -> share of the rows
    "dead": 2.0,
    "broken": 1.0,
    "moved": 1.5,
    "slow": 0.5,
    "truncated": 1.0,
    "small": 1.5,
    "again": 1.0,
    "copy": 1.0,
    "page": 1.0,
    "noai": 1.0,
}


@dataclass(frozen=True)
class Link:
    """One row of the metadata and the file behind it.

    Attributes:
        path: of the URL. width, height: as the metadata says, which is true of the file where there is one.
    """

    path: str
    text: str
    scene: Scene
    width: int
    height: int

    @property
    def url(self) -> str:
        return f"{HOST}/{self.path}"


def build(folder: str | Path, rows: int = 1000, seed: int = 0) -> Path:
    """Write a little web of `rows` links into `folder`, and return the folder. The same arguments give the same bytes.

    Raises:
        ValueError: fewer than 2 rows.
    """
    if rows < 2:
        raise ValueError(f"rows={rows}: the little web needs 2 links or more, one for each metadata file")
    folder = Path(folder)
    links = _links(rows, seed)
    _draw(folder, links)
    half = rows // 2
    write_metadata(folder / "metadata" / "part-00000.parquet", links[:half], pa.int32(), seed)
    write_metadata(folder / "metadata" / "part-00001.parquet", links[half:], pa.float64(), seed + 1)
    write_held_out(folder / "held_out.parquet", seed)
    return folder


def add_part(folder: str | Path, part: int, rows: int = 100, seed: int = 0) -> Path:
    """Add `metadata/part-<part>.parquet` with `rows` new links to a little web that exists; the other files stay as they are.

    Returns:
        the new metadata file.
    """
    folder = Path(folder)
    links = _links(rows, seed + 1000 * part, prefix=f"{part:02d}")
    _draw(folder, links)
    return write_metadata(folder / "metadata" / f"part-{part:05d}.parquet", links, pa.int32(), seed + part)


def _links(rows: int, seed: int, prefix: str = "") -> list[Link]:
    rng = random.Random(f"links {seed}")
    scenes = [scene for scene in all_scenes() if not scene.held_out]
    rng.shuffle(scenes)
    links: list[Link] = []
    for row in range(rows):
        scene = replace(scenes[row % len(scenes)], variation=rng.randrange(1, 2**31))
        kind = rng.choices([*TROUBLE_PERCENT, "pictures"], [*TROUBLE_PERCENT.values(), 100 - sum(TROUBLE_PERCENT.values())])[0]
        earlier = [link for link in links[-200:] if link.path.startswith("pictures/")]
        width, height = rng.choice(TOO_SMALL if kind == "small" else SIZES)
        name = f"{prefix}{row:05d}.{'jpg' if kind == 'page' else rng.choice(FORMATS)}"
        if kind in ("again", "copy") and earlier:
            first = rng.choice(earlier)
            path = first.path if kind == "again" else f"copy/{name.split('.')[0]}.{first.path.split('.')[-1]}"
            links.append(replace(first, path=path))
        else:
            kind = "pictures" if kind in ("again", "copy") else kind
            links.append(Link(f"{kind}/{name}", caption(scene, rng), scene, width, height))
    return links


def _draw(folder: Path, links: list[Link]) -> None:
    """Write the file behind every link that has one, in processes where there are many (spawned: torch may be loaded)."""
    for name in ("pictures", *TROUBLE_PERCENT):
        (folder / "pages" / name).mkdir(parents=True, exist_ok=True)
    files = list({link.path: link for link in links if not link.path.startswith("dead/")}.values())
    jobs = [(folder / "pages" / link.path, link) for link in files]
    workers = min(os.cpu_count() or 1, 8)
    if workers == 1 or len(jobs) < 100 * workers:
        for job in jobs:
            _write_file(job)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in pool.imap_unordered(_write_file, jobs, chunksize=16):
            pass


def _write_file(job: tuple[Path, Link]) -> None:
    path, link = job
    if link.path.startswith("page/"):
        path.write_text("<!doctype html><title>Not here</title><p>The picture has moved.</p>\n", encoding="utf-8")
        return
    path.write_bytes(_encode(render(link.scene, link.width, link.height), path.suffix))


def _encode(picture: Image.Image, suffix: str) -> bytes:
    buffer = io.BytesIO()
    if suffix == ".png":
        picture.save(buffer, "PNG", compress_level=3)
    elif suffix == ".webp":
        picture.save(buffer, "WEBP", quality=90, method=0)
    else:
        picture.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def write_metadata(path: Path, links: list[Link], sizes: pa.DataType, seed: int) -> Path:
    """Write links in the schema of laion-aesthetics v2.

    As in LAION, WIDTH and HEIGHT are int32 in some files and float64 in others, and the files with float64 have rows without
    scores. `hash` is the first 8 bytes of BLAKE2b of URL and TEXT (LAION's own is a MurmurHash of the same).
    """
    rng = random.Random(f"scores {seed}")
    drifted = pa.types.is_floating(sizes)

    def scores(draw: Callable[[], float]) -> list[float | None]:
        return [None if drifted and rng.random() < 0.02 else round(draw(), 4) for _ in links]

    columns = {
        "URL": pa.array([link.url for link in links], pa.string()),
        "TEXT": pa.array([link.text for link in links], pa.string()),
        "WIDTH": pa.array([link.width for link in links], pa.int32()).cast(sizes),
        "HEIGHT": pa.array([link.height for link in links], pa.int32()).cast(sizes),
        "similarity": pa.array([round(min(0.45, max(0.2, rng.gauss(0.34, 0.03))), 4) for _ in links], pa.float64()),
        "punsafe": pa.array(scores(lambda: rng.betavariate(1, 16)), pa.float64()),
        "pwatermark": pa.array(scores(lambda: rng.betavariate(1, 5)), pa.float64()),
        "AESTHETIC_SCORE": pa.array(scores(lambda: rng.gauss(5.9, 0.45)), pa.float64()),
        "hash": pa.array([link_hash(link.url, link.text) for link in links], pa.int64()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def link_hash(url: str, text: str) -> int:
    """A signed 64-bit hash of a row."""
    digest = hashlib.blake2b((url + text).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def write_held_out(path: Path, seed: int) -> Path:
    """Write held-out scenes, unseen combinations of parts that are all seen in training, with one caption each."""
    rng = random.Random(f"held out {seed}")
    chosen = rng.sample([scene for scene in all_scenes() if scene.held_out], HELD_OUT_ROWS)
    captions = [caption(scene, rng) for scene in chosen]
    images = [_encode(render(scene, HELD_OUT_PIXELS), ".png") for scene in chosen]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"caption": pa.array(captions, pa.string()), "image": pa.array(images, pa.binary())}), path)
    return path
