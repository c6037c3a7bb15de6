"""Bodies that the web serves under the names of images: name -> (bytes, status that download gives them)."""

from __future__ import annotations

import gzip
import io
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(width: int = 320, height: int = 240, seed: int = 0) -> Image.Image:
    """Bright on the left, dark on the right, so that a turned picture can be told."""
    across = np.linspace(255, 0, width)[None, :].repeat(height, 0)
    return Image.fromarray(np.stack([across, across * 0.5, np.full_like(across, seed % 255)], -1).astype(np.uint8))


def deep(width: int = 320) -> Image.Image:
    return Image.fromarray(np.linspace(65535, 0, width)[None, :].repeat(240, 0).astype(np.uint16))


def turned(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return encoded(picture(), "JPEG", exif=tags)


def several(kind: str) -> bytes:
    return encoded(picture(), kind, save_all=True, append_images=[picture(seed=9), picture(seed=99)])


def png_of_size(width: int, height: int) -> bytes:
    """The header of a PNG that claims a size, and next to no pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size than it has."""
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", height, width) + JPEG[at + 4 :]


def text_bomb() -> bytes:
    """A PNG with a comment of 80 MB, packed into 80 kB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 80_000_000, zip=True)
    return encoded(picture(), "PNG", pnginfo=info)


JPEG = encoded(picture(), "JPEG")
GIF = encoded(picture(), "GIF")
PNG = encoded(picture(), "PNG")
FILES: dict[str, tuple[bytes, str]] = {
    "jpeg": (JPEG, "success"),
    "progressive": (encoded(picture(), "JPEG", progressive=True), "success"),
    "png": (PNG, "success"),
    "webp": (encoded(picture(), "WEBP"), "success"),
    "avif": (encoded(picture(), "AVIF"), "success"),
    "gif": (GIF, "success"),
    "tiff": (encoded(picture(), "TIFF"), "success"),
    "bmp": (encoded(picture(), "BMP"), "success"),
    "gray": (encoded(picture().convert("L"), "JPEG"), "success"),
    "cmyk": (encoded(picture().convert("CMYK"), "JPEG"), "success"),
    "palette": (encoded(picture().convert("P"), "PNG"), "success"),
    "deep": (encoded(deep(), "PNG"), "success"),
    "deep-tiff": (encoded(deep(), "TIFF"), "success"),
    "transparent": (encoded(Image.new("RGBA", (320, 240), (255, 0, 0, 0)), "PNG"), "success"),
    **{f"turned-{orientation}": (turned(orientation), "success") for orientation in range(1, 9)},
    "animated": (several("GIF"), "success"),
    "animated-png": (several("PNG"), "success"),
    "animated-webp": (several("WEBP"), "success"),
    "large": (encoded(picture(1600, 1200), "JPEG"), "success"),
    "jpeg-and-zip": (JPEG + b"PK\x05\x06" + bytes(18), "success"),
    "jpeg-and-script": (encoded(picture(), "JPEG", comment=b"<script>alert(1)</script>"), "success"),
    "gif-and-script": (encoded(picture(), "GIF", comment=b"*/=1;alert(1)//"), "success"),
    "bomb-text": (text_bomb(), "success"),
    "small": (encoded(picture(40, 30), "JPEG"), "too_small"),
    "one-pixel": (encoded(Image.new("P", (1, 1)), "GIF"), "too_small"),
    "ribbon": (encoded(picture(2000, 20), "PNG"), "too_small"),
    "bomb": (encoded(Image.new("1", (12_000, 12_000)), "PNG"), "too_many_pixels"),
    "bomb-png-header": (png_of_size(2**30, 2**30), "too_many_pixels"),
    "bomb-jpeg-header": (jpeg_of_size(65_000, 65_000), "too_many_pixels"),
    "bomb-gif-header": (GIF[:6] + struct.pack("<HH", 65_000, 65_000) + GIF[10:], "too_many_pixels"),
    "heavy": (JPEG + bytes(3_000_000), "too_large"),
    "empty": (b"", "empty"),
    "one-byte": (b"\xff", "not_an_image"),
    "html": (b"<!DOCTYPE html><html><body>gone</body></html>", "not_an_image"),
    "html-and-jpeg": (b"<html>" + JPEG, "not_an_image"),
    "pdf-and-jpeg": (b"%PDF-1.7\n" + JPEG, "not_an_image"),
    "json": (b'{"error": "not found"}', "not_an_image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="320" height="240"/>', "not_an_image"),
    "film": (b"\0\0\0\x20ftypisom" + bytes(500), "not_an_image"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500), "unsupported_heic"),
    "jpeg-xl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(500), "unsupported_jpeg_xl"),
    "jpeg-xl-bare": (b"\xff\x0a" + bytes(500), "unsupported_jpeg_xl"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 320 240\n%%EndComments\nshowpage\n", "unsupported_eps"),
    "psd": (b"8BPS\0\1" + bytes(500), "unsupported_psd"),
    "ico": (encoded(picture(64, 64), "ICO"), "unsupported_ico"),
    "noise": (bytes(range(256)) * 40, "not_an_image"),
    "gzip": (gzip.compress(JPEG), "not_an_image"),
    "half-jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "half-png": (PNG[:-200], "truncated"),
    "half-webp": (encoded(picture(), "WEBP")[:-200], "truncated"),
    "half-gif": (GIF[: len(GIF) // 2], "truncated"),
    "head-of-jpeg": (JPEG[:20], "truncated"),
    "png-without-width": (png_of_size(0, 240), "truncated"),
    "png-without-pixels": (png_of_size(320, 240), "truncated"),
}
