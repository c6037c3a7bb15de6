"""Pictures as people send them, made into the upright RGB pictures that people see, and into the squares that the encoders take.

Text, profiles and EXIF beside the pixels never decide whether a picture can be read: of all of it the orientation is read, and
the rest is taken away before a decoder can stumble over it.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

# What is opened. Among the others that Pillow knows are some that start a program (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
# Formats that are told by name from what is no picture.
UNSUPPORTED = {
    b"\xff\x0a": "jpeg_xl", b"\0\0\0\x0cJXL ": "jpeg_xl", b"8BPS": "psd", b"%!PS": "eps", b"\xc5\xd0\xd3\xc6": "eps",
    b"\0\0\1\0": "ico",
}  # fmt: skip
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
)  # fmt: skip
# Pillow's own limit.
MAX_PIXELS = 178_956_970

ORIENTATION, SHORT, LONG = 0x0112, 3, 4
SAMPLE_FORMAT, UNSIGNED = 339, 1
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
PNG_BEGINS, PNG_BIT_DEPTH, PNG_PIXELS = b"\x89PNG\r\n\x1a\n", 24, frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
JPEG_BEGINS, JPEG_SCAN, JPEG_ENDS, JPEG_EXIF = b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9", 0xE1
# Of a JPEG. Encoders write a dozen at most; each goes over the whole picture again, and may take next to no bytes.
MAX_SCANS = 100
# Segments with a length of their own that may stand before the scan.
JPEG_HEADER = frozenset({*range(0xC0, 0xD0), *range(0xDB, 0xFF)})
# APP1 to APP15 but for Adobe's APP14, which says what the channels mean; and comments.
JPEG_BESIDE = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})


class PictureError(ValueError):
    """Why there is no picture; the text is one word, which counters count.

    `empty`, `too_many_pixels`, `too_many_scans`, `truncated`, `not_an_image`, or `unsupported_FORMAT` for a picture of a format
    that is not read.
    """


def open_picture(source: bytes | str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file, or in its bytes, as `to_rgb` shows it, loaded.

    Args:
        max_pixels: width x height at most, judged before anything is decoded.

    Raises:
        PictureError: there is none that can be read.
        OSError: the file cannot be read.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    image = peek(data, max_pixels)
    with _reasons(data):
        return to_rgb(image)


def peek(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture that is opened and not decoded yet. What lay beside its pixels is gone, but for `info["exif"]`.

    Raises:
        PictureError: as `open_picture` does; damage behind the header shows only when the picture is loaded.
    """
    with _reasons(data):
        if not data:
            raise PictureError("empty")
        bare, exif = _bare(data)
        image = Image.open(io.BytesIO(bare), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise PictureError("too_many_pixels")
        # Pillow looks for an orientation in the XMP of a TIFF, and falls over what else may stand there.
        image.info.pop("xmp", None)
        if exif:
            image.info["exif"] = exif
        if image.format == "PNG" and "transparency" in image.info:
            image.info["transparency"] = _in_eight_bits(image, data[PNG_BIT_DEPTH])
        return image


@contextmanager
def _reasons(data: bytes) -> Iterator[None]:
    """What Pillow raises in the block, as a PictureError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except PictureError:
        raise
    # Broken files make Pillow's readers raise nearly anything.
    except Exception as error:
        raise PictureError(_reason(data, error)) from None


def _reason(data: bytes, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "too_many_pixels"
    brands = data[8 : int.from_bytes(data[:4])] if data[4:8] == b"ftyp" else b""
    avif = any(brand in brands for brand in AVIF_BRANDS)
    if brands.startswith(HEIC_BRANDS) and not avif:
        return "unsupported_heic"
    if isinstance(error, UnidentifiedImageError):
        if name := next((name for begins, name in UNSUPPORTED.items() if data.startswith(begins)), None):
            return f"unsupported_{name}"
        # Formats whose index lies in the header region cannot even be opened when they end early.
        return "truncated" if data.startswith(SIGNATURES) or avif else "not_an_image"
    early = any(word in str(error).lower() for word in ("truncated", "could not create decoder", "unexpected end"))
    return "truncated" if early else "not_an_image"


def _bare(data: bytes) -> tuple[bytes, bytes]:
    """A file without what says nothing about its pixels, and its EXIF, where that was taken out too.

    Decoders give up on a good picture because of that: text or a profile of more than a megabyte, an index of further pictures or
    EXIF that says nonsense.
    """
    if data.startswith(PNG_BEGINS):
        return _bare_png(data)
    if data.startswith(JPEG_BEGINS):
        return _bare_jpeg(data)
    if data[4:8] == b"ftyp":
        # The index comes before the pixels: an item of an unknown type is left alone. Turns are properties of the picture here.
        index, pixels, rest = data.partition(b"mdat")
        return index.replace(b"Exif", b"free") + pixels + rest, b""
    return data, b""


def _bare_png(data: bytes) -> tuple[bytes, bytes]:
    view, parts, exif, at = memoryview(data), [memoryview(PNG_BEGINS)], b"", len(PNG_BEGINS)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind in PNG_PIXELS:
            parts.append(view[at:end])
        elif kind == b"eXIf":
            exif = data[at + 8 : end - 4]
        at = end
    return b"".join(parts), exif


def _bare_jpeg(data: bytes) -> tuple[bytes, bytes]:
    view, parts, exif, at = memoryview(data), [memoryview(data)[:2]], b"", 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker not in JPEG_HEADER:
            break
        if marker == JPEG_EXIF and not exif and data.startswith(b"Exif\0\0", at + 4):
            exif = data[at + 4 : end]
        if marker not in JPEG_BESIDE:
            parts.append(view[at:end])
        at = end
    # What lies behind the end is another file.
    last = data.find(JPEG_ENDS, at)
    if data.count(JPEG_SCAN, at, last if last >= 0 else len(data)) > MAX_SCANS:
        raise PictureError("too_many_scans")
    return b"".join([*parts, view[at:]]), exif


def _in_eight_bits(image: Image.Image, depth: int) -> int | bytes | tuple[int, ...]:
    """The transparent level of a grey PNG or the transparent colour of another in the levels in which Pillow decodes it."""
    clear = image.info["transparency"]
    if image.mode == "RGB" and depth == 16:
        return tuple(level >> 8 for level in clear)
    if image.mode == "L":
        top = 2**depth - 1
        return (clear & top) * 255 // top
    return clear


def orientation(image: Image.Image) -> int:
    """How a picture that is not loaded yet must be turned, 1 (not at all) to 8, by its EXIF; no other tag is looked at.

    1 where it says nothing that has a meaning, and for TIFF, which turns itself while it is loaded.
    """
    exif: bytes = image.info.get("exif", b"")
    tags = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tags[:2])
    if order is None or image.format == "TIFF":
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tags, 4)
        (count,) = struct.unpack_from(f"{order}H", tags, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tags, at)
            if tag == ORIENTATION and kind in (SHORT, LONG):
                (value,) = struct.unpack_from(order + ("H" if kind == SHORT else "I"), tags, at + 8)
                return value if value in TURNS else 1
    except struct.error:
        pass
    return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB, as a person expects to see it: turned upright by its EXIF orientation, transparency over white,
    greys of more than 8 bits, or of floats up to 1, scaled to 8 bits, the first frame of an animation. It carries no metadata."""
    if image.tell():
        image.seek(0)
    turn = TURNS.get(orientation(image))
    if image.mode.startswith("I") or image.mode == "F":
        rgb = _from_levels(image).convert("RGB")
    elif image.has_transparency_data:
        clear = image.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    else:
        rgb = image.convert("RGB")
    if turn is not None:
        rgb = rgb.transpose(turn)
    # Who sees an orientation here would turn the picture again.
    rgb.info.clear()
    return rgb


def _from_levels(image: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bits or of floats, which PIL would only clip, as greys of 8 bits."""
    levels, tags = np.asarray(image), getattr(image, "tag_v2", None)
    if image.mode == "I" and tags is not None and tags.get(SAMPLE_FORMAT, (UNSIGNED,)) == (UNSIGNED,):
        levels = levels.view(np.uint32)  # PIL has no such mode
    levels = levels.astype(np.float32)
    np.nan_to_num(levels, copy=False, nan=0, posinf=np.inf, neginf=0)
    if image.mode.startswith("I;16"):
        top = 65535.0
    else:
        # Plain "I" holds 8, 16 or 32 bits, and for floats there are several habits: the picture tells which.
        highest = levels.max(initial=0, where=np.isfinite(levels))
        tops = (*([1.0] if image.mode == "F" else []), 255.0, 65535.0, 2.0**31, 2.0**32)
        top = next((top for top in tops if highest <= top), float(highest))
    if (clear := image.info.get("transparency")) is not None:  # the one level of a PNG that is transparent
        levels[levels == clear] = top
    return Image.fromarray((levels.clip(0, top) * (255 / top)).round().astype(np.uint8))


def to_square(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an RGB image, ``size`` pixels wide, resampled with antialiasing, as the training data is.

    It is cut out before it is resized: the work grows with the result, not with the length of a thin picture.
    """
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size as (B, 3, H, W) uint8."""
    import torch  # reading pictures needs none of it, and it takes seconds

    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) uint8 as PIL images."""
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
