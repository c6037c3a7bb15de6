"""evaluate: what it takes of the prompts."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
from PIL import Image

from stages.evaluate.stage import Model


def png(image: Image.Image, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **settings)
    return file.getvalue()


def test_pictures_of_prompts_are_taken_as_one_sees_them() -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    model = Model.__new__(Model)
    values = [png(upright.transpose(Image.Transpose.ROTATE_90), exif=exif), png(Image.new("RGBA", (2, 2), (9, 9, 9, 0)))]
    model.prompts = pa.table({"image": values})
    turned, clear = model.real_images(0, 2)
    assert np.array_equal(np.asarray(turned), np.asarray(upright))
    assert clear.mode == "RGB" and clear.getpixel((0, 0)) == (255, 255, 255)
