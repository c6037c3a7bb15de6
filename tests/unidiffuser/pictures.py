"""Picture files of every kind beside the pixels that a person sees in them, which follow from how each file was made."""

from __future__ import annotations

import io
import struct
import zlib
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

HEIGHT, WIDTH = 24, 36
ACROSS, DOWN = np.meshgrid(np.arange(WIDTH) * 7, np.arange(HEIGHT) * 10)
RGB = np.stack([ACROSS, DOWN, 255 - ACROSS], -1).astype(np.uint8)
GREY = RGB[..., 0]
ALPHA = np.where(ACROSS < 100, 0, np.where(ACROSS < 180, 128, 255)).astype(np.uint8)
TURNED = {
    1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2), 6: np.rot90(RGB, -1),
    7: np.rot90(RGB, 2).transpose(1, 0, 2), 8: np.rot90(RGB),
}  # fmt: skip


class Picture(NamedTuple):
    """`data` is the file, `seen` (H, W, 3) uint8 what a person sees, give or take `off` levels."""

    data: bytes
    seen: np.ndarray
    off: int = 0


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows: np.ndarray, depth: int, colour: int, before: bytes = b"", behind: bytes = b"") -> bytes:
    """A PNG by the letter: (H, bytes a row) uint8 of `WIDTH` pixels, with chunks before and behind them."""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [chunk(b"IHDR", header), before, chunk(b"IDAT", pixels), behind, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rgb_png(before: bytes = b"", behind: bytes = b"") -> bytes:
    return png(RGB.reshape(HEIGHT, -1), 8, 2, before, behind)


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of (tag, type, count, four bytes of value) by the letter, true or not."""
    body = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


def turn(number: int) -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack("<HH", number, 0)


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    if colours.ndim == 2:
        colours = np.dstack([colours] * 3)
    share = alpha[..., None] / 255
    return np.rint(colours * share + 255 * (1 - share)).astype(np.uint8)


def grey(levels: np.ndarray) -> np.ndarray:
    return np.dstack([levels] * 3)


def few_bits(depth: int, clear: int) -> Picture:
    """A grey PNG of 2 or 4 bits with a transparent level."""
    levels = (ACROSS // 7) % 2**depth
    packed = levels.reshape(HEIGHT, -1, 8 // depth) @ (2 ** (depth * np.arange(8 // depth)[::-1]))
    seen = np.where(levels == clear, 255, levels * 255 // (2**depth - 1)).astype(np.uint8)
    return Picture(png(packed.astype(np.uint8), depth, 0, chunk(b"tRNS", struct.pack(">H", clear))), grey(seen))


def deep_with_clear_colour() -> Picture:
    """A colour PNG of 16 bits with a transparent colour, that of its first pixel."""
    wide = RGB.astype(">u2") * 257
    seen = np.where((RGB == RGB[0, 0]).all(-1, keepdims=True), 255, RGB).astype(np.uint8)
    data = png(wide.reshape(HEIGHT, -1).view(np.uint8), 16, 2, chunk(b"tRNS", wide[0, 0].tobytes()))
    return Picture(data, seen)


def opencv(pixels: np.ndarray, ending: str) -> bytes:
    return cv2.imencode(ending, pixels)[1].tobytes()


def unsigned(levels: np.ndarray) -> bytes:
    """A TIFF of uint32: one of int32 whose tag says otherwise."""
    return encoded(levels.view(np.int32), "TIFF").replace(struct.pack("<HHIH", 339, 3, 1, 2), struct.pack("<HHIH", 339, 3, 1, 1))


def palette(transparency: int | bytes) -> Picture:
    """A palette of greys, one for every column; alpha by number of the entry."""
    image = Image.fromarray(np.broadcast_to(np.arange(WIDTH, dtype=np.uint8), (HEIGHT, WIDTH)).copy(), "P")
    image.putpalette(np.repeat(GREY[0], 3).tolist())
    alphas = np.full(WIDTH, 255, np.uint8)
    if isinstance(transparency, int):
        alphas[transparency] = 0
    else:
        alphas[: len(transparency)] = list(transparency)
    return Picture(encoded(image, "PNG", transparency=transparency), over_white(GREY, np.broadcast_to(alphas, GREY.shape)), 1)


def pictures() -> dict[str, Picture]:
    image, other = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    few = image.quantize(64)
    several = {"save_all": True, "append_images": [other]}
    wide = GREY.astype(np.uint16) * 257
    deep = np.dstack([RGB[..., ::-1], ALPHA]).astype(np.uint16) * 257
    inks = Image.fromarray(np.dstack([255 - RGB, np.full_like(GREY, 100)]), "CMYK")
    found = {
        "jpeg": Picture(encoded(image, "JPEG", quality=95, subsampling=0), RGB, 6),
        "jpeg of Adobe's RGB": Picture(encoded(image, "JPEG", quality=95, keep_rgb=True), RGB, 6),
        "grey jpeg": Picture(encoded(GREY, "JPEG", quality=95), grey(GREY), 4),
        "cmyk jpeg": Picture(encoded(image.convert("CMYK"), "JPEG", quality=95), RGB, 8),
        "cmyk jpeg with black": Picture(encoded(inks, "JPEG", quality=95), np.rint(RGB * (155 / 255)), 8),
        "two pictures in a jpeg": Picture(encoded(image, "MPO", quality=95, subsampling=0, **several), RGB, 6),
        "png": Picture(rgb_png(), RGB),
        "grey png": Picture(encoded(GREY, "PNG"), grey(GREY)),
        "grey png, one level clear": Picture(
            encoded(GREY, "PNG", transparency=14), grey(np.where(GREY == 14, 255, GREY).astype(np.uint8))
        ),
        "grey png of 2 bits, one level clear": few_bits(2, 1),
        "grey png of 4 bits, one level clear": few_bits(4, 9),
        "black and white png": Picture(encoded(Image.fromarray(GREY > 99), "PNG"), grey(np.where(GREY > 99, 255, 0))),
        "png, one colour clear": Picture(
            encoded(image, "PNG", transparency=tuple(RGB[3, 3].tolist())),
            np.where((RGB == RGB[3, 3]).all(-1, keepdims=True), 255, RGB),
        ),
        "palette png": Picture(encoded(few, "PNG"), np.asarray(few.convert("RGB"))),
        "palette png, one entry clear": palette(3),
        "palette png with alpha": palette(bytes([0, 128, 200])),
        "grey png with alpha": Picture(encoded(np.dstack([GREY, ALPHA]), "PNG"), over_white(GREY, ALPHA), 1),
        "png with alpha": Picture(encoded(np.dstack([RGB, ALPHA]), "PNG"), over_white(RGB, ALPHA), 1),
        "grey png of 16 bits": Picture(opencv(wide, ".png"), grey(GREY)),
        "png of 16 bits": Picture(opencv(deep[..., :3], ".png"), RGB),
        "png of 16 bits with alpha": Picture(opencv(deep, ".png"), over_white(RGB, ALPHA), 1),
        "png of 16 bits, one colour clear": deep_with_clear_colour(),
        "animated png": Picture(encoded(image, "PNG", **several), RGB),
        "animated png behind a still": Picture(encoded(image, "PNG", default_image=True, **several), RGB),
        "webp": Picture(encoded(image, "WEBP", lossless=True), RGB),
        "webp with alpha": Picture(
            encoded(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True), over_white(RGB, ALPHA), 1
        ),
        "animated webp": Picture(encoded(image, "WEBP", lossless=True, **several), RGB),
        "gif": Picture(encoded(few, "GIF"), np.asarray(few.convert("RGB"))),
        "animated gif": Picture(
            encoded(few, "GIF", save_all=True, append_images=[other.quantize(64)]), np.asarray(few.convert("RGB"))
        ),
        "bmp": Picture(encoded(image, "BMP"), RGB),
        "avif": Picture(encoded(image, "AVIF", quality=95, subsampling="4:4:4"), RGB, 8),
        "jpeg 2000": Picture(encoded(image, "JPEG2000"), RGB),
        "tiff": Picture(encoded(image, "TIFF"), RGB),
        "cmyk tiff": Picture(encoded(image.convert("CMYK"), "TIFF"), RGB),
        "tiff of 16 bits": Picture(encoded(wide, "TIFF"), grey(GREY)),
        "tiff of 32 bits": Picture(encoded(wide.astype(np.int32), "TIFF"), grey(GREY)),
        "tiff of all 32 bits": Picture(encoded((GREY / 255 * (2**31 - 1)).astype(np.int32), "TIFF"), grey(GREY), 4),
        "tiff of all 32 bits, unsigned": Picture(unsigned(GREY.astype(np.uint32) * 16_843_009), grey(GREY)),
        "tiff of floats to 1": Picture(encoded((GREY / 252).astype(np.float32), "TIFF"), grey(np.rint(GREY * (255 / 252))), 1),
        "tiff of floats to 255": Picture(encoded(GREY.astype(np.float32), "TIFF"), grey(GREY)),
    }  # fmt: skip
    holes = (GREY / 252).astype(np.float32)
    holes[:, :4] = np.nan
    seen = np.nan_to_num(holes) * 255
    found["tiff of floats with holes"] = Picture(encoded(holes, "TIFF"), grey(np.rint(seen)), 1)
    for number, seen in TURNED.items():
        tags = exif(turn(number))
        found[f"jpeg, turned {number}"] = Picture(encoded(image, "JPEG", quality=95, subsampling=0, exif=tags), seen, 6)
        found[f"png, turned {number}"] = Picture(rgb_png(behind=chunk(b"eXIf", tags[6:])), seen)
        found[f"webp, turned {number}"] = Picture(encoded(image, "WEBP", lossless=True, exif=tags), seen)
        found[f"tiff, turned {number}"] = Picture(encoded(image, "TIFF", tiffinfo={0x0112: number}), seen)
        found[f"avif, turned {number}"] = Picture(encoded(image, "AVIF", quality=95, subsampling="4:4:4", exif=tags), seen, 8)
    return found
