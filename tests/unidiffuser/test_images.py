"""Opening pictures: what one sees in files of every kind, and what beside the pixels must not matter."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.unidiffuser.pictures import RGB, TURNED, chunk, encoded, exif, pictures, rgb_png, turn
from unidiffuser.images import PictureError, open_picture, to_rgb, to_square

PICTURES = pictures()
LONG = b"a workflow of an editor " * 60_000


def shown(data: bytes) -> np.ndarray:
    return np.asarray(open_picture(data)).astype(int)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_a_person_sees(name):
    data, seen, off = PICTURES[name]
    picture = open_picture(data)
    assert picture.mode == "RGB" and picture.info == {}
    assert np.asarray(picture).shape == seen.shape
    assert np.abs(shown(data) - seen).max() <= off
    assert np.array_equal(np.asarray(to_rgb(picture)), np.asarray(picture)), "what is upright is not turned again"


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize(
    "beside",
    [
        chunk(b"tEXt", b"workflow\0" + LONG),
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG)),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LONG)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + LONG),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(LONG)),
        chunk(b"iCCP", b"profile"),
        chunk(b"gAMA", b"\0"),
        chunk(b"acTL", b"\0"),
        chunk(b"tEXt", b"exif\0" + exif(turn(6))),
        chunk(b"eXIf", b"nonsense"),
        chunk(b"zTXt", b"workflow\0\7nonsense"),
    ],
    ids=lambda beside: repr(beside[4:16]),
)
def test_what_lies_beside_the_pixels_of_a_png_does_not_matter(place, beside):
    assert np.array_equal(shown(rgb_png(**{place: beside})), RGB)


ELSEWHERE = struct.pack("<I", 90_000)
ODD = {
    "a maker elsewhere": [(271, 2, 500, ELSEWHERE), turn(6)],
    "an unknown type": [(271, 99, 1, bytes(4)), turn(6)],
    "a directory elsewhere": [turn(6), (34665, 4, 1, ELSEWHERE)],
    "a directory of letters": [turn(6), (34665, 2, 2, b"a\0\0\0")],
    "a resolution of whole numbers": [turn(6), (282, 3, 1, b"\x48\0\0\0"), (283, 5, 1, ELSEWHERE)],
    "the last of thirteen": [*((tag, 3, 1, bytes(4)) for tag in range(0x0100, 0x010C)), turn(6)],
    "a long orientation": [(0x0112, 4, 1, struct.pack("<I", 6))],
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", ODD)
def test_odd_tags_neither_lose_a_picture_nor_its_orientation(name, kind):
    tags = exif(*ODD[name])
    data = rgb_png(chunk(b"eXIf", tags[6:])) if kind == "PNG" else encoded(RGB, kind, exif=tags)
    assert np.abs(shown(data) - TURNED[6]).mean() < 12


@pytest.mark.parametrize(
    "tags", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(turn(9)), exif((0x0112, 2, 2, b"6\0\0\0")), exif()[:-5]]
)
def test_an_orientation_that_means_nothing_turns_nothing(tags):
    assert np.abs(shown(encoded(RGB, "JPEG", exif=tags)) - RGB).mean() < 12


def test_odd_exif_in_an_avif_does_not_lose_it():
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "a maker of cameras"
    data = encoded(RGB, "AVIF", quality=95, subsampling="4:4:4", exif=tags)
    at = data.rindex(b"MM\0*")
    assert np.abs(shown(data[:at] + b"XXXX" + data[at + 4 :]) - TURNED[6]).max() <= 8


def test_odd_xmp_in_a_tiff_does_not_lose_it():
    # Tag 700 holds XMP, as bytes where all is well.
    data = encoded(RGB, "TIFF", tiffinfo={700: b"<x/>", 0x0112: 6})
    at = data.index(struct.pack("<HH", 700, 1))
    odd = data[:at] + struct.pack("<HHIHH", 700, 3, 1, 9, 0) + data[at + 12 :]
    assert np.array_equal(shown(odd), TURNED[6])


def test_segments_of_a_jpeg_that_say_nonsense_do_not_lose_it():
    data = encoded(RGB, "JPEG", quality=95, subsampling=0)
    for marker, said in (
        (0xE2, b"MPF\0II*\0\x08\0\0\0\1\0" + bytes(12)),
        (0xED, b"Photoshop 3.0\x008BIM\4"),
        (0xE1, b"Exif\0\0"),
    ):
        segment = bytes([0xFF, marker]) + struct.pack(">H", len(said) + 2) + said
        for filling in (b"", b"\xff\xff"):
            assert np.array_equal(shown(data[:2] + filling + segment + data[2:]), shown(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no picture", "not_an_image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "unsupported_heic"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99), "unsupported_heic"),
        (b"\0\0\0\x20ftypisom" + bytes(99), "not_an_image"),
        (b"\xff\x0a" + bytes(99), "unsupported_jpeg_xl"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "unsupported_jpeg_xl"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "unsupported_eps"),
        (encoded(RGB, "PNG")[:-40], "truncated"),
        (encoded(RGB, "JPEG")[:-200], "truncated"),
        (encoded(RGB, "AVIF")[:100], "truncated"),
    ],
)  # fmt: skip
def test_why_there_is_no_picture(data, reason):
    with pytest.raises(PictureError, match=f"^{reason}$"):
        open_picture(data)


def test_pixels_are_counted_before_any_is_decoded(monkeypatch):
    data = encoded(RGB, "PNG")
    assert open_picture(data, max_pixels=RGB.size // 3).size == (36, 24)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(PictureError, match="^too_many_pixels$"):
        open_picture(data, max_pixels=RGB.size // 3 - 1)


def test_a_path_opens_like_its_bytes(tmp_path):
    (tmp_path / "one.txt").write_bytes(encoded(RGB, "BMP"))
    for path in (tmp_path / "one.txt", str(tmp_path / "one.txt")):
        assert np.array_equal(np.asarray(open_picture(path)), RGB)
    with pytest.raises(FileNotFoundError):
        open_picture(tmp_path / "none.png")


def test_a_square_is_cut_out_and_resized_as_training_data_is():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (3, 3999, 3), dtype=np.uint8))
    middle = picture.resize((64, 64), Image.Resampling.LANCZOS, box=(1998, 0, 2001, 3))
    assert np.array_equal(np.asarray(to_square(picture, 64)), np.asarray(middle))


def test_reading_pictures_needs_no_torch():
    code = "import sys, unidiffuser.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_later_frame_is_no_picture_of_its_own():
    image = Image.open(io.BytesIO(PICTURES["animated webp"].data))
    image.seek(1)
    assert np.array_equal(np.asarray(to_rgb(image)), RGB)
