"""What passes for a copy: encodings and sizes of symmetric pictures do, and pictures that differ do not."""

from __future__ import annotations

import numpy as np
import pytest
from imagehash import phash
from PIL import Image, ImageDraw, ImageFont

from examples.little_web.compose import BACKGROUNDS, DRAWINGS, Scene, render
from stages.filter.likeness import COLOUR_BYTES, HASH_BYTES, colours, perceptual_hash
from stages.filter.stage import Filter, FilterConfig
from tests.stages.drawn import FLAGS, SYMMETRIC, copies, decoded
from tests.stages.filter.test_filter_duplicates import by_search
from tests.stages.packed import download, kept_of, sample

TOLERANCE = FilterConfig.model_fields["duplicate_tolerance"].default


def looks(pictures: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    hashes, shades = (b"".join(map(measure, pictures)) for measure in (perceptual_hash, colours))
    return np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES), np.frombuffer(shades, np.uint8).reshape(-1, COLOUR_BYTES)


def alike(pictures: list[Image.Image]) -> np.ndarray:
    """(pictures, pictures): which are near duplicates, from the rule alone."""
    hashes, shades = looks(pictures)
    bits = np.unpackbits(hashes, axis=1)
    near = (bits[:, None] != bits[None]).sum(-1) <= TOLERANCE
    return near & (np.abs(shades[:, None].astype(int) - shades[None].astype(int)).max(-1) <= 16)


def test_bits_are_the_cosine_sums_that_stand_out_from_the_noise_of_encoding():
    for picture in (SYMMETRIC["stop"], SYMMETRIC["faint gradient"], render(Scene("panda", "large", "left", "green", 3), 200)):
        grey = np.asarray(picture.convert("L").resize((64, 64), Image.Resampling.LANCZOS), dtype=float)
        places, order = np.arange(64), np.arange(16)[:, None]
        waves = np.cos(np.pi * order * (2 * places + 1) / 128) * np.where(order, np.sqrt(2 / 64), np.sqrt(1 / 64))
        bits = np.unpackbits(np.frombuffer(perceptual_hash(picture), np.uint8)).reshape(16, 16)
        assert bits.tolist() == (waves @ grey @ waves.T > 6).astype(int).tolist()


def test_of_a_rich_picture_the_bits_are_the_librarys_but_for_what_hardly_stands_out():
    for picture in scenes()[15:]:
        bits = np.unpackbits(np.frombuffer(perceptual_hash(picture), np.uint8))
        librarys = phash(picture, hash_size=16).hash.ravel().astype(int)
        assert (bits <= librarys).all() and (bits != librarys).mean() < 0.2


@pytest.mark.parametrize("some", [FLAGS, SYMMETRIC], ids=["flags", "all"])
def test_of_the_copies_of_flags_signs_bands_and_gradients_one_stays(some, store, make, in_process):
    kinds = ["png", "jpeg 80", "webp 80"] if some is FLAGS else list(copies(FLAGS["disc"]))
    encodings = [data for picture in some.values() for kind, data in copies(picture).items() if kind in kinds]
    rows = download(store, [[sample(number, data) for number, data in enumerate(encodings)]])
    kept = make(Filter, store, {"rows": rows}, clip_scores=False, min_side=None)
    firsts = [f"{number:08d}" for number in range(0, len(encodings), len(kinds))]
    assert [one.key for one in kept_of(kept)] == firsts and len(firsts) == len(some)
    assert kept.manifest.stats.dropped == {"near_duplicate": len(encodings) - len(firsts)}


def test_any_two_copies_of_a_symmetric_picture_are_near_duplicates_and_the_bands_find_them():
    pictures = [decoded(data) for picture in SYMMETRIC.values() for data in copies(picture).values()]
    each = len(copies(FLAGS["disc"]))
    truth = alike(pictures)
    owner = np.arange(len(pictures)) // each
    assert np.argwhere(truth != (owner[:, None] == owner[None])).tolist() == []
    shuffled = np.random.default_rng(0).permutation(len(pictures))
    hashes, shades = (values[shuffled] for values in looks(pictures))
    gone = by_search((hashes, shades), np.full(len(pictures), 10_000), TOLERANCE)
    assert gone.tolist() == np.tril(truth[shuffled][:, shuffled], -1).any(1).tolist()


def drawings() -> list[Image.Image]:
    """Every drawing of the little web, alone on the same ground, and one of them on every ground."""
    scenes = [Scene(name, "large", "centre", "white") for name in DRAWINGS]
    return [render(scene, 256) for scene in scenes + [Scene("panda", "small", "left", ground) for ground in BACKGROUNDS]]


def letters() -> list[Image.Image]:
    found = []
    for letter in "ABCDEFGHKLMPRSTXZ":
        picture = Image.new("RGB", (256, 256), "white")
        ImageDraw.Draw(picture).text((128, 128), letter, fill="black", anchor="mm", font=ImageFont.load_default(140))
        found.append(picture)
    return found


def scenes() -> list[Image.Image]:
    """Noise with the spectrum of photographs, some of it as faint as fog."""
    chance = np.random.default_rng(1)
    cycles = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None]) * 256
    found = []
    for contrast in [4.0] * 15 + [40.0] * 15:
        noise = np.fft.ifft2(np.fft.fft2(chance.standard_normal((256, 256))) / np.maximum(cycles, 1) ** 1.3).real
        grey = np.clip(128 + contrast * noise / noise.std(), 0, 255).astype(np.uint8)
        found.append(Image.fromarray(grey).convert("RGB"))
    return found


@pytest.mark.parametrize("make_pictures", [drawings, letters, scenes])
def test_pictures_that_differ_are_not_near_duplicates(make_pictures):
    assert np.argwhere(np.tril(alike(make_pictures()), -1)).tolist() == []
