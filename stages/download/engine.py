"""img2dataset's engine, one shard a call: its thread pool, downloader and resizer between a table of rows and a tar.

Its own writers put samples down in the order in which they arrive, and its resizer ignores EXIF orientation and takes half
an image for a whole one. `ShardSink` and `ImageResizer` stand in those two places.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import urllib.request
import warnings
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

from stages.download.politeness import FetchError  # noqa: E402
from stages.shards.images import ImageConfig, Outcome  # noqa: E402

# What OpenCV decodes by itself as it should; the rest goes through Pillow first.
DECODED_BY_OPENCV = frozenset({"JPEG", "PNG", "WEBP", "BMP"})
ORIENTATION = 0x0112
PNG_BIT_DEPTH = 24
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")

REASON = re.compile(r"[a-z0-9_]+")

# The resizer's messages in the vocabulary of the counters.
REASONS = {"image too small": "too_small"}


class ShardSink:
    """Takes samples in the order in which they arrive: images into a spool file, outcomes into memory, by row number."""

    def __init__(self, spool: Path, resizer: ImageResizer):
        self.file: BinaryIO = open(spool, "w+b")  # noqa: SIM115
        self.resizer = resizer
        self.outcomes: dict[int, Outcome] = {}
        self.failure: OSError | None = None

    def write(self, image: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        """img2dataset's writer interface."""
        row = meta["row"]
        if image is None:
            self.outcomes[row] = Outcome(reason_of(meta["error_message"], meta["url"]))
            return
        sizes = {name: meta[name] for name in ("width", "height", "original_width", "original_height")}
        try:
            # The engine resizes and writes a sample before it turns to the next.
            digests = {"sha256": meta["sha256"], "md5": self.resizer.md5}
            self.outcomes[row] = Outcome("", **sizes, **digests, offset=self.spool(image), length=len(image))
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

    def __init__(self, config: ImageConfig, with_md5: bool = False):
        self.resizer = Resizer(
            config.image_size, config.resize_mode, config.resize_only_if_bigger, encode_format=config.encode_format,
            encode_quality=config.encode_quality, skip_reencode=config.skip_reencode, min_image_size=config.min_image_size,
        )  # fmt: skip
        self.max_pixels = config.max_pixels
        self.with_md5 = with_md5
        self.md5: str | None = None

    def __call__(self, stream: io.BytesIO, boxes: None = None) -> tuple[Any, ...]:
        """(bytes, width, height, original width, original height, None), or five times None and the reason.

        `self.md5` is then that of the stream's bytes, if it was asked for.
        """
        data = stream.getvalue()
        self.md5 = hashlib.md5(data, usedforsecurity=False).hexdigest() if self.with_md5 else None
        try:
            prepared = self.prepare(data)
        except FetchError as reason:
            return None, None, None, None, None, str(reason)
        result = self.resizer(io.BytesIO(prepared))
        if result[5] is not None:
            result = (*result[:5], REASONS.get(result[5]) or diagnosis(data))
        return result

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
                if (image.format == "PNG" and data[PNG_BIT_DEPTH] == 16) or image.mode.startswith("I;16"):
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
    """A deep image scaled to 8 bits; Pillow would clip it."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise FetchError(diagnosis(data))
    return _lossless(Image.fromarray(pixels[..., ::-1]))


def _lossless(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def reason_of(message: str, url: str) -> str:
    """The engine's message where it is a reason already; else `bad_url` for what it could not even make a request of."""
    if REASON.fullmatch(message):
        return message
    try:
        urllib.request.Request(url)
    except ValueError:
        return "bad_url"
    return "engine_error"


def diagnosis(data: bytes) -> str:
    """Why bytes could not be decoded: `truncated` when they begin as an image does, else `not_an_image`."""
    try:
        Image.open(io.BytesIO(data)).load()
    except UnidentifiedImageError:
        # Formats whose index lies in the header region cannot even be opened when they end early.
        return "truncated" if data.startswith(SIGNATURES) or data[4:12] in (b"ftypavif", b"ftypavis") else "not_an_image"
    except Exception as error:
        early = any(word in str(error).lower() for word in ("truncated", "could not create decoder", "unexpected end"))
        return "truncated" if early else "not_an_image"
    return "not_an_image"


def download_rows(rows: pa.Table, config: Any, scratch: Path, with_md5: bool = False) -> ShardSink:
    """Fetch and resize images through the opener that is installed in `urllib.request`.

    Args:
        rows: columns `row` (its number) and `url`, in the order in which they are tried.
        config: a `DownloadConfig`.
        scratch: folder for the engine's own files.
        with_md5: whether the outcomes hold MD5 sums.

    Returns:
        the outcomes by row number; a row that the engine lost has none.

    Raises:
        OSError: an image could not be put down.
    """
    table = scratch / "rows.arrow"
    with pa.OSFile(str(table), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows)
    resizer = ImageResizer(config, with_md5)
    sink = ShardSink(scratch / "images", resizer)
    engine = Downloader(
        sample_writer_class=lambda *_: sink,
        resizer=resizer,
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
