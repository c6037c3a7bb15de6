"""What a shard stores of a picture's bytes, by the rules of img2dataset's resizer.

OpenCV decodes, and sees some files otherwise than people do: it ignores an orientation, or puts what is transparent on black.
It gets the bytes where it sees in them what `open_picture` sees, which is nearly always, and else the pixels of `open_picture`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from unidiffuser.images import PNG_BIT_DEPTH, PictureError, open_picture, orientation, peek

# Pixels that a side can have: of the formats, and for JPEG and PNG of the libraries that read and write them.
LONGEST = {"jpg": 65_500, "png": 1_000_000, "webp": 16_383}
# The format's name in Pillow, and what OpenCV calls the quality.
ENCODERS = {
    "jpg": ("JPEG", cv2.IMWRITE_JPEG_QUALITY),
    "png": ("PNG", cv2.IMWRITE_PNG_COMPRESSION),
    "webp": ("WEBP", cv2.IMWRITE_WEBP_QUALITY),
}
PLAIN_MODES = frozenset({"L", "RGB", "P"})
BY_SHORTER, BY_LONGER = ("keep_ratio", "center_crop"), ("keep_ratio_largest", "border")


@dataclass(frozen=True)
class Stored:
    """The encoded bytes to store, its size, the size as a person sees the picture as it came, and the MD5 sum of that."""

    image: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    md5: str | None


@dataclass(frozen=True)
class Storing:
    """Makes `Stored` of a picture's bytes; the fields are those of an `ImageConfig`."""

    image_size: int
    resize_mode: str
    resize_only_if_bigger: bool
    skip_reencode: bool
    encode_format: str
    encode_quality: int
    min_image_size: int
    max_pixels: int
    with_md5: bool

    def __call__(self, data: bytes) -> Stored:
        """Raises PictureError: there is no picture that can be read or stored, or it is `too_small`."""
        cv2.setNumThreads(1)
        image = peek(data, self.max_pixels)
        self._check_result(*image.size)
        pixels = decoded(data) if is_plain(image, data) else None
        keeps = pixels is not None and self.skip_reencode and image.format == ENCODERS[self.encode_format][0]
        if pixels is None:
            pixels = cv2.cvtColor(np.asarray(open_picture(data, self.max_pixels)), cv2.COLOR_RGB2BGR)
        original_height, original_width = pixels.shape[:2]
        shorter, longer = sorted(pixels.shape[:2])
        if shorter < self.min_image_size:
            raise PictureError("too_small")
        if resizes := self._resizes(shorter, longer):
            pixels = self._resized(pixels)
        height, width = pixels.shape[:2]
        stored = data if keeps and not resizes else self._encoded(pixels)
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest() if self.with_md5 else None
        return Stored(stored, width, height, original_width, original_height, md5)

    def _resized(self, pixels: np.ndarray) -> np.ndarray:
        """By area to make a picture smaller, with Lanczos' filter to make it larger."""
        shorter, longer = sorted(pixels.shape[:2])
        side = shorter if self.resize_mode in BY_SHORTER else longer
        if self.resize_mode == "center_crop" and side < self.image_size:
            pixels = middle(pixels, side)  # what is cut off is never made, however thin the picture is
        height, width = (max(1, round(length * (self.image_size / side))) for length in pixels.shape[:2])
        if (height, width) != pixels.shape[:2]:
            how = cv2.INTER_AREA if side > self.image_size else cv2.INTER_LANCZOS4
            pixels = cv2.resize(pixels, (width, height), interpolation=how)
        if self.resize_mode == "center_crop":
            return middle(pixels, self.image_size)
        return self._framed(pixels) if self.resize_mode == "border" else pixels

    def _framed(self, pixels: np.ndarray) -> np.ndarray:
        """In the middle of a white square."""
        missing = [self.image_size - length for length in pixels.shape[:2]]
        (top, bottom), (left, right) = ((length // 2, length - length // 2) for length in missing)
        return cv2.copyMakeBorder(pixels, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(255,) * 3)

    def _encoded(self, pixels: np.ndarray) -> bytes:
        try:
            quality = [ENCODERS[self.encode_format][1], self.encode_quality]
            return cv2.imencode(f".{self.encode_format}", pixels, quality)[1].tobytes()
        except cv2.error:
            raise PictureError("engine_error") from None

    def _check_result(self, width: int, height: int) -> None:
        """What cannot be stored is not worth the work: a thin picture whose shorter side is enlarged gets very long."""
        shorter, longer = sorted((width, height))
        if shorter and self._resizes(shorter, longer):
            scale = self.image_size / (shorter if self.resize_mode == "keep_ratio" else longer)
            shorter, longer = round(shorter * scale), round(longer * scale)
        if longer > LONGEST[self.encode_format]:
            raise PictureError(f"too_long_for_{self.encode_format}")
        if shorter * longer > self.max_pixels:
            raise PictureError("too_many_pixels")

    def _resizes(self, shorter: int, longer: int) -> bool:
        side = shorter if self.resize_mode in BY_SHORTER else longer
        return self.resize_mode != "no" and (side > self.image_size or not self.resize_only_if_bigger)


def decoded(data: bytes) -> np.ndarray | None:
    """(H, W) grey or (H, W, 3) blue, green and red, uint8, or None if OpenCV cannot read it."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None


def middle(pixels: np.ndarray, side: int) -> np.ndarray:
    """The middle square of (H, W, ...)."""
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether OpenCV decodes to what a person sees; `image` is not loaded yet."""
    if image.format not in ("JPEG", "PNG", "WEBP") or image.mode not in PLAIN_MODES or image.has_transparency_data:
        return False
    # A PNG says before its pixels that it is animated, and the picture that it is read as may be none of its frames.
    if image.format == "PNG" and (data[PNG_BIT_DEPTH] > 8 or data.find(b"acTL", 0, data.find(b"IDAT")) >= 0):
        return False
    return not getattr(image, "is_animated", False) and orientation(image) == 1
