"""Pictures in shards, as the download stage leaves them, and a stand-in for CLIP: for the tests of filter and encode."""

from __future__ import annotations

import io
import os
import random
import tarfile

import numpy as np
import torch
from PIL import Image

from infra.dataset import Dataset, FileEntry, Manifest, Stats, commit
from infra.store import Store
from stages.runner.contract import digest_of
from stages.shards.tar import Sample, ShardWriter, read_samples
from unidiffuser.clip_preprocess import Preprocess


class ColourClip:
    """Stands in for CLIP: an image is its mean colour, a caption the colour that it names first."""

    WORDS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 1.0, 0.1), "blue": (0.1, 0.1, 1.0)}
    embed_dim = 3
    preprocess = Preprocess((8, 8), (0.0,) * 3, (1.0,) * 3, "bilinear", "squash", 0)

    def __init__(self, ref: str = "embedded"):
        self.ref = ref

    def image(self, images):
        return self.seen(self.preprocess.pixels(images))

    def seen(self, pixels):
        return pixels.float().mean((2, 3)) / 255 + 0.01

    def text(self, captions):
        found = (next((word for word in caption.split() if word in self.WORDS), None) for caption in captions)
        return torch.tensor([self.WORDS[word] if word else (0.5, 0.5, 0.5) for word in found])


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
        path = f"download/units/{number}/{name}"
        size, digest = store.publish(local, path)
        files.append(FileEntry(path=path, rows=len(samples), bytes=size, sha256=digest, unit=str(number)))
    rows = sum(len(samples) for samples in shards)
    manifest = Manifest(
        stage="download", node="test-download", fingerprint=digest_of([entry.sha256 for entry in files]), generation=0,
        inputs={}, config={}, sources={}, code={}, schema={"key": "string"}, stats=Stats(rows_in=rows, rows_out=rows),
        summary={}, seconds=0, created="", files=files,
    )  # fmt: skip
    return commit(store, manifest)


def cut_between_samples(path: str, left: int) -> None:
    """Leave the first samples of a tar, so that nothing in it says that there were more."""
    with tarfile.open(path) as tar:
        end = tar.getmembers()[3 * left].offset
    os.truncate(path, end)


def kept_of(dataset: Dataset) -> list[Sample]:
    found = []
    for entry in dataset.files:
        if entry.name.endswith(".tar"):
            with dataset.open(entry) as file:
                samples = list(read_samples(file))
            assert len(samples) == entry.rows
            found += samples
    return found
