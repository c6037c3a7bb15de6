"""Pictures as they come, resized and encoded as shards store them: img2dataset's resizer behind the project's one reader.

The resizer decodes with OpenCV, which sees some files otherwise than people do: it ignores an orientation, or puts what is
transparent on black. It gets the bytes as they came where it sees in them what `open_picture` sees, which is nearly always,
and else the pixels of `open_picture`.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from typing import Any

# img2dataset imports albumentations, which asks its server for a newer version, and takes torch (0.5 GB, 2 s of a core) where it
# finds it, for conversions that are never made.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
_torch = sys.modules.get("torch")
sys.modules["torch"] = None  # type: ignore[assignment]
try:
    from img2dataset.resizer import Resizer
finally:
    del sys.modules["torch"]
    if _torch is not None:
        sys.modules["torch"] = _torch

from PIL import Image  # noqa: E402

from stages.shards.images import ImageConfig  # noqa: E402
from unidiffuser.images import PNG_BIT_DEPTH, PictureError, open_picture, orientation, peek  # noqa: E402

# Pixels that a side can have: of the formats, and for JPEG and PNG of the libraries that read and write them.
LONGEST = {"jpg": 65_500, "png": 1_000_000, "webp": 16_383}
PLAIN_MODES = frozenset({"L", "RGB", "P"})
TOO_SMALL = "image too small"


class ImageResizer:
    """Turns a picture's bytes into those that a shard stores; img2dataset's interface of a resizer."""

    def __init__(self, config: ImageConfig, with_md5: bool = False):
        self.resizer = Resizer(
            config.image_size, config.resize_mode, config.resize_only_if_bigger, encode_format=config.encode_format,
            encode_quality=config.encode_quality, skip_reencode=config.skip_reencode, min_image_size=config.min_image_size,
        )  # fmt: skip
        self.config = config
        self.with_md5 = with_md5
        self.md5: str | None = None

    def __call__(self, stream: io.BytesIO, boxes: None = None) -> tuple[Any, ...]:
        """(bytes, width, height, original width, original height, None), or five times None and the reason.

        Sizes are pixels of the picture as a person sees it. `self.md5` is then that of the stream's bytes, if it was asked for.
        """
        data = stream.getvalue()
        self.md5 = hashlib.md5(data, usedforsecurity=False).hexdigest() if self.with_md5 else None
        try:
            return self._resized(data)
        except PictureError as reason:
            return None, None, None, None, None, str(reason)

    def _resized(self, data: bytes) -> tuple[Any, ...]:
        image = peek(data, self.config.max_pixels)
        self._check_result(*image.size)
        cut = self._cuts_first(*image.size)
        if is_plain(image, data) and not cut:
            result = self.resizer(io.BytesIO(data))
            if result[5] is None:
                return result
        picture = open_picture(data, self.config.max_pixels)
        original = picture.size
        if cut:
            side = min(original)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            picture = picture.crop((left, top, left + side, top + side))
        result = self.resizer(io.BytesIO(_bmp(picture)))
        if result[5] is not None:
            raise PictureError("too_small" if result[5] == TOO_SMALL else "engine_error")
        return *result[:3], *original, None

    def _check_result(self, width: int, height: int) -> None:
        """What cannot be stored is not worth the work: a thin picture whose shorter side is enlarged gets very long."""
        config, (shorter, longer) = self.config, sorted((width, height))
        if shorter and self._resizes(shorter, longer):
            scale = config.image_size / (shorter if config.resize_mode == "keep_ratio" else longer)
            shorter, longer = round(shorter * scale), round(longer * scale)
        if longer > LONGEST[config.encode_format]:
            raise PictureError(f"too_long_for_{config.encode_format}")
        if shorter * longer > config.max_pixels:
            raise PictureError("too_many_pixels")

    def _resizes(self, shorter: int, longer: int) -> bool:
        config = self.config
        side = shorter if config.resize_mode in ("keep_ratio", "center_crop") else longer
        return config.resize_mode != "no" and (side > config.image_size or not config.resize_only_if_bigger)

    def _cuts_first(self, width: int, height: int) -> bool:
        """Whether the resizer would enlarge a whole picture, only to cut its middle square out of the result."""
        enlarges = not self.config.resize_only_if_bigger and min(width, height) < self.config.image_size
        return self.config.resize_mode == "center_crop" and enlarges and width != height


def is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether OpenCV decodes to what a person sees; `image` is not loaded yet."""
    if image.format not in ("JPEG", "PNG", "WEBP") or image.mode not in PLAIN_MODES or image.has_transparency_data:
        return False
    # A PNG says before its pixels that it is animated, and the picture that it is read as may be none of its frames.
    if image.format == "PNG" and (data[PNG_BIT_DEPTH] > 8 or data.find(b"acTL", 0, data.find(b"IDAT")) >= 0):
        return False
    return not getattr(image, "is_animated", False) and orientation(image) == 1


def _bmp(picture: Image.Image) -> bytes:
    """Takes a tenth of PNG's time, and OpenCV reads the same pixels."""
    buffer = io.BytesIO()
    picture.save(buffer, "BMP")
    return buffer.getvalue()
