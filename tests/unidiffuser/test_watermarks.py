"""The marks in pictures: what they survive, what they cost, and that a clean picture has none."""

from __future__ import annotations

import hashlib
import io
import random
import sys
import types

import numpy as np
import pytest
from PIL import Image

from examples.little_web.compose import all_scenes, render
from unidiffuser.watermarks import Found, check_of, code_of
from unidiffuser.watermarks.tiled import SMALLEST, Tiled
from unidiffuser.watermarks.trustmark import TrustMark

SCENE = random.Random(5).choice(all_scenes())
CODE = 0x3F9A2C1D


def jpeg(picture: Image.Image, quality: int = 75) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def psnr(one: Image.Image, other: Image.Image) -> float:
    return float(10 * np.log10(255**2 / np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2)))


@pytest.fixture(scope="module")
def marked() -> Image.Image:
    return Tiled().embed(render(SCENE, 256), CODE)


@pytest.mark.parametrize(
    "change",
    [
        lambda picture: picture,
        jpeg,
        lambda picture: picture.resize((128, 128)),
        lambda picture: picture.resize((410, 410)),
        lambda picture: picture.crop((61, 17, 61 + 180, 17 + 180)),
        lambda picture: jpeg(picture.crop((30, 50, 250, 240))),
        lambda picture: picture.convert("L"),
    ],
    ids=["as it is", "JPEG 75", "half", "larger", "crop", "crop and JPEG", "grey"],
)
def test_a_mark_outlives_what_happens_to_pictures(marked, change):
    assert Tiled().find(change(marked)) == Found("tiled", CODE)


def changed(clean: Image.Image, picture: Image.Image) -> np.ndarray:
    """Grey levels by which pixels differ."""
    return np.abs(np.asarray(clean, int) - np.asarray(picture, int))


def test_a_mark_costs_little_and_is_read_for_any_code():
    for code, size in ((0, (256, 256)), (2**32 - 1, (320, 256)), (CODE, (512, 640))):
        clean = render(SCENE, *size)
        picture = Tiled().embed(clean, code)
        assert picture.size == size and psnr(clean, picture) > 48
        assert changed(clean, picture).max() <= 9
        assert Tiled().find(picture) == Found("tiled", code)


@pytest.mark.parametrize("colour", [(214, 60, 56), (128, 128, 128), (255, 255, 255), (0, 0, 0)])
@pytest.mark.parametrize("size", [(256, 256), (512, 512), (700, 300)])
def test_a_mark_on_a_plain_ground_is_one_grey_level_at_most(colour, size):
    clean = Image.new("RGB", size, colour)
    picture = Tiled().embed(clean, CODE)
    assert changed(clean, picture).max() == 1 and 0.2 < changed(clean, picture).mean() < 0.65
    assert Tiled().find(picture) == Found("tiled", CODE)


def test_a_plain_ground_beside_an_outline_is_marked_like_any():
    clean = Image.new("RGB", (512, 512), (214, 60, 56))
    clean.paste((0, 0, 0), (100, 100, 300, 300))
    differs = changed(clean, Tiled().embed(clean, CODE))
    assert differs.max() == 1 and Tiled().find(Tiled().embed(clean, CODE)) == Found("tiled", CODE)


def test_a_busy_picture_carries_more_of_the_mark_within_bounds():
    rng = np.random.default_rng(0)
    busy = Image.fromarray(rng.integers(90, 166, (256, 256), dtype=np.uint8)).convert("RGB")
    differs = changed(busy, Tiled().embed(busy, CODE))
    assert 2 < differs.mean() < 5 and differs.max() <= 9 and psnr(busy, Tiled().embed(busy, CODE)) > 34
    assert Tiled().find(jpeg(Tiled().embed(busy, CODE).crop((30, 20, 222, 212)))) == Found("tiled", CODE)


def test_a_clean_picture_has_none():
    rng = np.random.default_rng(0)
    board = Image.fromarray((np.indices((256, 256)) // 4).sum(0).astype(np.uint8) % 2 * 255)
    noise = Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8))
    plain = [Image.new("RGB", size, (200, 10, 90)) for size in ((1, 1), (20, 400), (256, 256))]
    for picture in (render(SCENE, 256), board, noise, *plain):
        assert Tiled().find(picture) is None


def test_what_is_read_counts_by_its_check_alone(marked, monkeypatch):
    """Without the check any picture would name some checkpoint."""
    from unidiffuser.watermarks import tiled

    right = tiled._bits(CODE)
    assert tiled._told(right) == Found("tiled", CODE)
    faint = right.copy()
    faint[[0, 9, 30, 50]] *= -0.1
    assert tiled._told(faint) == Found("tiled", CODE)
    wrong = right.copy()
    wrong[[3, 40]] *= -1
    assert tiled._told(np.where(np.isin(np.arange(len(wrong)), range(10, 18)), 0.1 * wrong, wrong)) is None
    assert check_of(CODE) == int(hashlib.sha256(bytes.fromhex("3f9a2c1d")).hexdigest()[:6], 16)


def test_a_picture_that_is_too_small_stays_as_it_is():
    small = render(SCENE, SMALLEST - 1)
    assert Tiled().embed(small, CODE) is small
    assert Tiled().find(Tiled().embed(render(SCENE, SMALLEST), CODE)) == Found("tiled", CODE)


def test_the_code_is_the_beginning_of_the_fingerprint():
    assert Found("tiled", code_of({"fingerprint": "3f9a2c1d" + "0" * 16})).checkpoint == "3f9a2c1d"
    assert code_of({}) == 0 and Found("tiled", 0).checkpoint is None


class Stand:
    """The interface of `trustmark.TrustMark`, with bits in a picture's first row instead of a network."""

    def __init__(self, verbose: bool, device: str, model_type: str, loadRemover: bool) -> None:
        print("Global step: 1")
        self.loaded = [self.load_model(f"/package/trustmark_{model_type}.yaml", f"/package/decoder_{model_type}.ckpt")]

    def load_model(self, config: str, weights: str) -> tuple[str, str]:
        return config, weights

    def encode(self, picture: Image.Image, bits: str, MODE: str) -> Image.Image:
        assert MODE == "binary" and len(bits) == 61
        pixels = np.array(picture)
        pixels[0, :61] = np.array([[int(bit)] * 3 for bit in bits])
        return Image.fromarray(pixels)

    def decode(self, picture: Image.Image, MODE: str) -> tuple[str, bool, int]:
        return "".join(str(bit) for bit in np.asarray(picture)[0, :61, 0] % 2), True, 1


def test_weights_of_a_path_are_read_from_there_and_nowhere_else(tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/encoder_Q.ckpt: no such file"):
        TrustMark(tmp_path)
    for name in ("encoder_B.ckpt", "decoder_B.ckpt", "trustmark_B.yaml"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "trustmark", None)
    with pytest.raises(FileNotFoundError, match=r"trustmark: not installed .*pip install 'unidiffuser\[trustmark\]'"):
        TrustMark(tmp_path)
    package = types.ModuleType("trustmark")
    package.TrustMark = Stand
    monkeypatch.setitem(sys.modules, "trustmark", package)
    mark = TrustMark(tmp_path)
    assert mark.model.loaded == [(str(tmp_path / "trustmark_B.yaml"), str(tmp_path / "decoder_B.ckpt"))]
    assert capsys.readouterr().out == ""
    picture = mark.embed(render(SCENE, 128), CODE)
    assert mark.find(picture) == Found("trustmark", CODE)
    pixels = np.array(picture)
    pixels[0, 60] ^= 1
    assert mark.find(Image.fromarray(pixels)) is None and mark.find(render(SCENE, 128)) is None
