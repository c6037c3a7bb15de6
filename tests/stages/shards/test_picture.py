"""The resizer of pictures: what a shard stores, and what every stage and command then sees."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.dataset import Stats
from pipelines.commands.checkpoints import Misuse
from pipelines.commands.sampling import read_image
from stages.download.downloader import Downloader
from stages.encode.square import Squaring
from stages.encode.stage import Encoder
from stages.measuring.prompts import Prompts
from stages.runner.contract import StageError
from stages.shards import picture as front
from stages.shards import stored as decoders
from stages.shards.images import ImageConfig
from stages.shards.picture import ImageResizer
from stages.shards.tar import Sample, ShardWriter
from tests.unidiffuser.pictures import HEIGHT, RGB, WIDTH, chunk, encoded, exif, pictures, rgb_png, turn
from unidiffuser.images import PictureError, open_picture

PICTURES = pictures()
LOSSLESS = {"encode_format": "png", "encode_quality": 1}


def pixels(picture) -> np.ndarray:
    return np.asarray(picture).astype(int)


def resized(data: bytes, **fields) -> tuple:
    return ImageResizer(ImageConfig(**fields))(io.BytesIO(data))


@pytest.fixture
def unboxed(monkeypatch):
    """The work is done in this process, where a test can listen."""
    monkeypatch.setattr(front, "boxed", lambda work, data: work(data))


def thin(width: int, height: int) -> bytes:
    return encoded(np.full((height, width, 3), (9, 99, 199), np.uint8), "PNG")


@pytest.fixture
def decodes(monkeypatch, unboxed):
    """The bytes that OpenCV is given."""
    given = []
    plain = decoders.decoded
    monkeypatch.setattr(decoders, "decoded", lambda data: [given.append(data), plain(data)][1])
    return given


@pytest.mark.parametrize(("encode_format", "most"), [("png", 9), ("jpg", 100), ("webp", 100)])
def test_png_has_compression_levels_up_to_9_in_place_of_qualities(encode_format, most):
    assert ImageConfig(encode_format=encode_format, encode_quality=most).encode_quality == most
    with pytest.raises(ValueError, match="encode_quality"):
        ImageConfig(encode_format=encode_format, encode_quality=most + 1)


def test_what_is_stored_is_what_a_person_sees():
    for name, (data, seen, off) in PICTURES.items():
        for fields in (LOSSLESS, {**LOSSLESS, "skip_reencode": False}, {**LOSSLESS, "resize_mode": "no"}):
            stored, width, height, *original, reason = resized(data, **fields)
            assert reason is None, name
            assert [width, height] == original == list(seen.shape[1::-1]), name
            # Two decoders of JPEG differ by a level or two.
            assert np.abs(pixels(Image.open(io.BytesIO(stored)).convert("RGB")) - seen).max() <= off + 2, name


@pytest.mark.parametrize("encode_format", ["jpg", "webp"])
def test_bytes_that_are_kept_are_seen_alike_by_all(encode_format, decodes):
    """Every picture as stored in its own format: filter, encode and `sample --image` see the pixels of the first reader."""
    kept = 0
    for name, (data, seen, off) in PICTURES.items():
        stored = resized(data, encode_format=encode_format, encode_quality=100)[0]
        kept += stored == data
        assert np.abs(pixels(open_picture(stored)) - seen).mean() <= off + 8, name
    assert kept >= 2, "plain pictures are stored as they came"


def test_every_entrance_sees_the_same(tmp_path, store):
    names = sorted(PICTURES)
    seen = {name: pixels(open_picture(PICTURES[name].data)) for name in names}
    for name in names:
        (tmp_path / "picture").write_bytes(PICTURES[name].data)
        assert np.array_equal(pixels(read_image(tmp_path / "picture")), seen[name]), name
    images = pa.table({"image": [PICTURES[name].data for name in names]})
    pq.write_table(images.append_column("caption", pa.array(names)), place := str(tmp_path / "prompts.parquet"))
    for name, picture in zip(names, Prompts({place: ""}, len(names)).images(0, len(names)), strict=True):
        assert np.array_equal(pixels(picture), seen[name]), name
    for name, square in encodes(tmp_path, store, [PICTURES[name].data for name in names], HEIGHT).items():
        name = names[int(name)]
        left, top = ((side - HEIGHT) // 2 for side in seen[name].shape[1::-1])
        assert np.array_equal(square, seen[name][top : top + HEIGHT, left : left + HEIGHT]), name


def encodes(tmp_path, store, files: list[bytes], size: int, stats: Stats | None = None) -> dict[str, np.ndarray]:
    """Key -> (size, size, 3), as encode's worker reads them out of a shard."""
    with ShardWriter(tmp_path / "shard.tar") as tar:
        for number, data in enumerate(files):
            tar.add(Sample(f"{number:04d}", data, "png", "", {}))
    _, digest = store.publish(tmp_path / "shard.tar", "shard.tar")
    worker = Encoder.__new__(Encoder)
    worker.job = SimpleNamespace(config=SimpleNamespace(size=size, batch=4), store=store)
    worker.squaring = Squaring(size, None)
    unit = SimpleNamespace(payload={"path": "shard.tar"}, rows=len(files), digests=(digest,))
    out = SimpleNamespace(stats=stats or Stats())
    return {sample.key: seen.pixels.astype(int) for sample, seen in worker.pictures(unit, out)}


def test_a_picture_that_cannot_be_read_is_a_counted_row_or_named(tmp_path, store):
    stats = Stats()
    assert list(encodes(tmp_path, store, [b"none", rgb_png()], 24, stats)) == ["0001"]
    assert stats.dropped == {"undecodable": 1}
    (tmp_path / "none.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    with pytest.raises(Misuse, match=r"none\.heic: not a picture that can be read \(unsupported_heic\)$"):
        read_image(tmp_path / "none.heic")
    for lost, why in ((b"none", "not_an_image"), (None, "empty")):
        table = pa.table({"caption": ["a", "b"], "image": pa.array([rgb_png(), lost], pa.binary())})
        pq.write_table(table, place := str(tmp_path / "prompts.parquet"))
        with pytest.raises(StageError, match=rf"prompts\.parquet: row 1, column image: {why}; "):
            Prompts({place: ""}, 2).images(0, 2)


def test_a_picture_that_ends_its_decoder_is_a_counted_row_of_encode(tmp_path, store, monkeypatch):
    def fragile(work, data):
        if data.endswith(b"fatal"):
            raise PictureError("crashed")
        return work(data)

    monkeypatch.setattr("stages.encode.stage.boxed", fragile)
    stats = Stats()
    assert list(encodes(tmp_path, store, [rgb_png(), rgb_png() + b"fatal", rgb_png()], 24, stats)) == ["0000", "0002"]
    assert stats.rows_in == 3 and stats.dropped == {"crashed": 1}


def test_text_and_profiles_of_megabytes_do_not_lose_a_picture():
    text = b"a workflow of an editor " * 60_000
    for beside in (chunk(b"tEXt", b"workflow\0" + text), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text)):
        for data in (rgb_png(before=beside), rgb_png(behind=beside)):
            stored, *_, reason = resized(data, **LOSSLESS)
            assert reason is None and np.array_equal(pixels(open_picture(stored)), RGB)


def test_plain_pictures_go_to_the_decoder_as_they_came(decodes):
    plain = [
        encoded(RGB, "JPEG", exif=exif(turn(1)), icc_profile=bytes(3000)), encoded(RGB, "PNG"), encoded(RGB[..., 0], "PNG"),
        encoded(RGB, "WEBP"), rgb_png(behind=chunk(b"tEXt", b"a\0b")),
    ]  # fmt: skip
    for data in plain:
        assert resized(data)[5] is None
    assert decodes == plain


@pytest.mark.parametrize(
    ("size", "fields", "reason"),
    [
        ((16_383, 2), {"encode_format": "webp"}, None),
        ((16_384, 2), {"encode_format": "webp"}, "too_long_for_webp"),
        ((2, 16_384), {"encode_format": "webp", "resize_mode": "no"}, "too_long_for_webp"),
        ((16_384, 32), {"encode_format": "webp", "image_size": 16}, None),
        ((16_384, 2), {"encode_format": "webp", "resize_mode": "border", "image_size": 16}, None),
        ((65_500, 1), {}, None),
        ((65_501, 1), {}, "too_long_for_jpg"),
        ((65_501, 1), {"encode_format": "png", "encode_quality": 1}, None),
        ((5_000, 1), {"resize_only_if_bigger": False, "image_size": 16}, "too_long_for_jpg"),
        ((100, 1), {"resize_only_if_bigger": False, "image_size": 64}, None),
        ((99_999, 1), {"resize_only_if_bigger": False, "image_size": 16, **LOSSLESS}, "too_long_for_png"),
        ((1_000, 1), {"resize_only_if_bigger": False, "image_size": 64, "max_pixels": 999_999}, "too_many_pixels"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_named_and_costs_nothing(size, fields, reason, decodes):
    found = resized(thin(*size), **fields)
    assert found[5] == reason
    assert bool(decodes) == (reason is None)


def test_the_middle_is_cut_out_before_it_is_enlarged(monkeypatch, unboxed):
    given, resize = [], decoders.cv2.resize
    monkeypatch.setattr(
        decoders.cv2, "resize", lambda pixels, *how, **more: [given.append(pixels), resize(pixels, *how, **more)][1]
    )
    strip = np.zeros((1, 9_999, 3), np.uint8)
    strip[:, 4_999] = 9, 99, 199
    fields = {"resize_mode": "center_crop", "resize_only_if_bigger": False, "image_size": 64, **LOSSLESS}
    stored, width, height, *original, reason = resized(encoded(strip, "PNG"), **fields)
    assert (width, height, original, reason) == (64, 64, [9_999, 1], None)
    assert (pixels(open_picture(stored)) == (9, 99, 199)).all()
    assert [pixels.shape for pixels in given] == [(1, 1, 3)]


def test_sizes_are_those_of_the_upright_picture():
    found = resized(PICTURES["jpeg, turned 6"].data, image_size=16)
    assert found[1:5] == (16, WIDTH * 16 // HEIGHT, HEIGHT, WIDTH)


@pytest.mark.parametrize("encode_format", ["jpg", "png", "webp"])
@pytest.mark.parametrize("mode", ["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"])
def test_plain_pictures_are_stored_as_img2dataset_stores_them(mode, encode_format, unboxed):
    from img2dataset.resizer import Resizer

    assert Downloader, "imported first, without torch"
    noise = np.random.default_rng(0).integers(0, 256, (75, 118, 3)).astype(np.uint8)
    files = [encoded(noise, "JPEG"), encoded(noise[..., 0], "JPEG"), encoded(noise[:, :75], "PNG"), encoded(noise[:9], "WEBP")]
    for side, smaller_only, skip in (
        (24, True, True),
        (75, True, True),
        (75, False, False),
        (131, True, True),
        (131, False, True),
    ):
        fields = {
            "resize_only_if_bigger": smaller_only,
            "skip_reencode": skip,
            "encode_format": encode_format,
            "encode_quality": 9,
        }
        theirs = Resizer(side, mode, min_image_size=9, **fields)
        for data in files if mode != "center_crop" or smaller_only else files[2:3]:  # a thin picture is cut before it is enlarged
            ours = resized(data, image_size=side, resize_mode=mode, min_image_size=9, **fields)
            assert ours == theirs(io.BytesIO(data)), (side, fields)
    assert resized(files[3], min_image_size=10)[5] == "too_small"


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded():
    data = encoded(RGB, "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    with pytest.raises(PictureError, match="^too_many_scans$"):
        open_picture(data[:end] + data[last:end] * 100 + data[end:])
    assert resized(data[:end] + data[last:end] * 100 + data[end:])[5] == "too_many_scans"
    # What a camera hangs on behind the picture is another file.
    assert np.array_equal(pixels(open_picture(data + data[last:end] * 200)), pixels(open_picture(data)))
