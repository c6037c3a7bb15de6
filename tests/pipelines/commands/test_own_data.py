"""The README's walk with one's own images on a laptop: with the shipped recipe, and without the internet."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.pipelines.conftest import start

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parent.parent.parent.parent / "configs"
IMAGES = 100
# Endings as cameras, phones and websites write them.
ENDINGS = (".jpg", ".JPEG", ".png", ".webp")
# Whatever asks the internet ends here at once: nothing listens on this port.
OFFLINE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}


def own_images(folder: Path) -> None:
    """Soft blobs of light in folders of two years; one has no caption, one is too small, one is no image."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        place = folder / str(2023 + number % 2)
        place.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(256, 480, 2)
        noise = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        noise.filter(ImageFilter.GaussianBlur(4)).save(place / f"IMG_{number:04}{ENDINGS[number % 4]}")
        place.joinpath(f"IMG_{number:04}.txt").write_text(f"holiday picture number {number} with a lot of light\n")
    (folder / "2023" / "IMG_0000.txt").unlink()
    Image.new("RGB", (120, 120)).save(folder / "small.png")
    (folder / "small.txt").write_text("a picture that is too small\n")
    (folder / "broken.jpg").write_bytes(b"no image at all")
    (folder / "broken.txt").write_text("a picture that cannot be read\n")


def test_own_images_on_a_laptop_without_the_internet(tmp_path: Path) -> None:
    own_images(tmp_path / "my-images")
    (tmp_path / "configs").mkdir()
    recipe = tmp_path / "configs" / "laptop.yaml"
    recipe.write_text((CONFIGS / "laptop.yaml").read_text())
    began = time.monotonic()
    store = tmp_path / "runs"
    code, printed = start("run", recipe, "--store", store, **OFFLINE).finish()
    assert code == 0, printed
    minutes = (time.monotonic() - began) / 60

    code, said = start("status", recipe, "--store", store, "--json").finish()
    rows = {row["node"]: row for row in json.loads(said)}
    # Every image ends as a row or as a counted drop with its reason.
    assert rows["mine-folder"]["rows_out"] == IMAGES + 2 - 2
    assert rows["mine-folder"]["dropped"] == {"no_caption": 1, "not_an_image": 1}
    assert rows["mine-filter"]["dropped"]["min_side"] == 1
    assert rows["mine-encode"]["rows_out"] == rows["mine-filter"]["rows_out"] > IMAGES / 2

    out = tmp_path / "samples"
    export = rows["export"]["fingerprint"]
    asked = ("--task", "t2i", "--prompt", "a lot of light", "--steps", "10", "--out", out, "--store", store)
    code, printed = start("sample", export, *asked, **OFFLINE).finish()
    assert code == 0, printed
    (picture,) = out.glob("*.png")
    assert np.asarray(Image.open(picture)).std() > 0
    print(f"own data: {IMAGES + 2} images in {minutes:.1f} minutes on {os.cpu_count()} cores")
