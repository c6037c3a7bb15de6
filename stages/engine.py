"""img2dataset's engine, one shard a call: its thread pool, downloader and resizer between a table of rows and a tar.

Its own writers put samples down in the order in which they arrive, and its resizer ignores EXIF orientation and takes half
an image for a whole one. `ShardSink` and `ImageResizer` stand in those two places.
"""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

# img2dataset imports albumentations, which asks its server for a newer version, and takes torch (0.5 GB, 2 s of a core) where it
# finds it, for conversions that the engine never makes.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
_torch = sys.modules.get("torch")
sys.modules["torch"] = None  # type: ignore[assignment]
try:
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
finally:
    del sys.modules["torch"]
    if _torch is not None:
        sys.modules["torch"] = _torch

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
from PIL import Image, ImageOps, UnidentifiedImageError  # noqa: E402

from stages.fetch import FetchError  # noqa: E402

# What OpenCV decodes by itself as it should; the rest goes through Pillow first.
DECODED_BY_OPENCV = frozenset({"JPEG", "PNG", "WEBP", "BMP"})
ORIENTATION = 0x0112
PNG_BIT_DEPTH = 24
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")

REASON = re.compile(r"[a-z0-9_]+")

# img2dataset's messages in the vocabulary of the counters; a fetch that failed speaks it already.
REASONS = {"image too small": "too_small"}


@dataclass(frozen=True)
class Outcome:
    """What became of one row. `reason` is empty for a success; then the image's bytes lie in the sink's spool.

    Sizes are pixels: `width` and `height` of the stored image, `original_width` and `original_height` as fetched.
    """

    reason: str
    offset: int = 0
    length: int = 0
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    sha256: str | None = None


class ShardSink:
    """Takes samples in the order in which they arrive: images into a spool file, outcomes into memory, by row number."""

    def __init__(self, spool: Path):
        self.file: BinaryIO = open(spool, "w+b")  # noqa: SIM115
        self.outcomes: dict[int, Outcome] = {}
        self.failure: OSError | None = None

    def write(self, image: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        """img2dataset's writer interface."""
        row = meta["row"]
        if image is None:
            message = meta["error_message"]
            self.outcomes[row] = Outcome(REASONS.get(message) or (message if REASON.fullmatch(message) else "engine_error"))
            return
        sizes = {name: meta[name] for name in ("width", "height", "original_width", "original_height")}
        try:
            self.outcomes[row] = Outcome("", self.spool(image), len(image), sha256=meta["sha256"], **sizes)
        except OSError as error:
            # The engine would print this and go on without the row: a full disk must not look like a dead link.
            self.failure = self.failure or error

    def spool(self, image: bytes) -> int:
        """Where the image begins in the spool."""
        offset = self.file.tell()
        self.file.write(image)
        return offset

    def image(self, outcome: Outcome) -> bytes:
        self.file.seek(outcome.offset)
        return self.file.read(outcome.length)

    def close(self) -> None:
        """img2dataset is done writing; the spool stays open for reading."""
        self.file.flush()


class ImageResizer:
    """img2dataset's resizer behind what it leaves out.

    The pixel count is judged before decoding, EXIF orientation is applied, 16-bit and unusual formats become plain 8-bit
    images (the first picture of an animation), and a file that ends early is told from one that is no image.
    """

    def __init__(self, resizer: Resizer, max_pixels: int):
        self.resizer = resizer
        self.max_pixels = max_pixels

    def __call__(self, stream: io.BytesIO, boxes: None = None) -> tuple[Any, ...]:
        """(bytes, width, height, original width, original height, None), or five times None and the reason."""
        data = stream.getvalue()
        try:
            prepared = self.prepare(data)
        except FetchError as reason:
            return None, None, None, None, None, str(reason)
        result = self.resizer(io.BytesIO(prepared))
        return result if result[5] in (None, "image too small") else (None, None, None, None, None, diagnosis(data))

    def prepare(self, data: bytes) -> bytes:
        """The same image in a form that OpenCV reads rightly.

        Raises:
            FetchError: why there is none.
        """
        if not data:
            raise FetchError("empty")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = Image.open(io.BytesIO(data))
                if image.width * image.height > self.max_pixels:
                    raise FetchError("too_many_pixels")
                if image.format == "PNG" and data[PNG_BIT_DEPTH] == 16:
                    return _eight_bit(data)
                turned = "exif" in image.info and image.getexif().get(ORIENTATION, 1) != 1
                if image.format in DECODED_BY_OPENCV and not turned:
                    return data
                upright = ImageOps.exif_transpose(image)
                return _lossless(upright.convert("RGBA" if upright.has_transparency_data else "RGB"))
        except Image.DecompressionBombError:
            raise FetchError("too_many_pixels") from None
        except FetchError:
            raise
        # Broken files make Pillow's and OpenCV's readers raise nearly anything.
        except Exception:
            raise FetchError(diagnosis(data)) from None


def _eight_bit(data: bytes) -> bytes:
    """A deep PNG scaled to 8 bits; Pillow would clip it."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise FetchError(diagnosis(data))
    return _lossless(Image.fromarray(pixels[..., ::-1]))


def _lossless(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def diagnosis(data: bytes) -> str:
    """Why bytes could not be decoded: `truncated` when they begin as an image does, else `not_an_image`."""
    try:
        Image.open(io.BytesIO(data)).load()
    except UnidentifiedImageError:
        # Formats whose index lies in the header region cannot even be opened when they end early.
        return "truncated" if data.startswith(SIGNATURES) or data[4:8] == b"ftyp" else "not_an_image"
    except Exception as error:
        early = any(word in str(error).lower() for word in ("truncated", "could not create decoder", "unexpected end"))
        return "truncated" if early else "not_an_image"
    return "not_an_image"


def download_rows(rows: pa.Table, config: Any, scratch: Path) -> ShardSink:
    """Fetch and resize the images of a shard.

    Args:
        rows: columns `row` (0, 1, 2, ...) and `url`.
        config: a `DownloadConfig`.
        scratch: folder for the engine's own files.

    Returns:
        the outcomes by row number; a row that the engine lost has none.

    Raises:
        OSError: an image could not be put down.
    """
    table = scratch / "rows.arrow"
    with pa.OSFile(str(table), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows)
    sink = ShardSink(scratch / "images")
    resizer = Resizer(
        config.image_size, config.resize_mode, config.resize_only_if_bigger, encode_format=config.encode_format,
        encode_quality=config.encode_quality, skip_reencode=config.skip_reencode, min_image_size=config.min_image_size,
    )  # fmt: skip
    engine = Downloader(
        sample_writer_class=lambda *_: sink,
        resizer=ImageResizer(resizer, config.max_pixels),
        thread_count=config.threads,
        save_caption=False,
        extract_exif=False,
        output_folder=str(scratch),
        column_list=["row", "url"],
        timeout=config.timeout,
        number_sample_per_shard=max(2, rows.num_rows),
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=config.encode_format,
        # The installed opener retries, and knows what can heal. It also reads X-Robots-Tag.
        retries=0,
        user_agent_token=config.user_agent_token,
        disallowed_header_directives=None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.download_shard((0, str(table)))
    if sink.failure is not None:
        sink.file.close()
        raise sink.failure
    return sink
