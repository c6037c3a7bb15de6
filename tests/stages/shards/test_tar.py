"""Shards as webdataset, the format's own library, reads them."""

import hashlib
import json
import random
from dataclasses import replace

import pytest
import webdataset

from infra.store import Store
from stages.runner.contract import StageError
from stages.shards.tar import ShardWriter, read_samples, whole
from tests.stages.packed import blots, encoded, sample


def test_webdataset_reads_the_same_keys_and_members(tmp_path):
    chance, path = random.Random(0), tmp_path / "00000.tar"
    captions = ["a red bicycle", "größer als 3.5 m", "two\nlines", "自転車"]
    written = [
        sample(number, encoded(blots(chance, 64, 48), "JPEG"), caption, punsafe=0.25, licence=None)
        for number, caption in enumerate(captions)
    ]
    with ShardWriter(path) as tar:
        for one in written:
            tar.add(one)
    with path.open("rb") as file:
        own = list(read_samples(file))
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert own == written
    assert [each["__key__"] for each in theirs] == [one.key for one in written]
    assert [{name for name in each if not name.startswith("__")} for each in theirs] == [{"jpg", "json", "txt"}] * 4
    for each, one in zip(theirs, written, strict=True):
        assert (each["jpg"], each["txt"].decode(), json.loads(each["json"])) == (one.image, one.caption, one.meta)


def test_webdataset_decodes_them_as_its_users_do(tmp_path):
    path = tmp_path / "00000.tar"
    picture = blots(random.Random(1), 64, 50)
    with ShardWriter(path) as tar:
        tar.add(replace(sample(7, encoded(picture, "PNG"), "a caption", similarity=0.31), extension="png"))
    ((image, text, meta),) = webdataset.WebDataset(str(path), shardshuffle=False).decode("pil").to_tuple("png", "txt", "json")
    assert (image.tobytes(), text, meta["similarity"]) == (picture.tobytes(), "a caption", 0.31)


def test_the_digest_is_of_the_whole_file_however_little_of_it_is_read(tmp_path):
    data = random.Random(0).randbytes(3_000_000)
    (tmp_path / "file").write_bytes(data)
    for size in (0, 1, len(data)):
        with whole(Store(str(tmp_path)), "file", hashlib.sha256(data).hexdigest()) as file:
            assert file.read(size) == data[:size]
    with pytest.raises(StageError, match="file: damaged"), whole(Store(str(tmp_path)), "file", "0" * 64) as file:
        file.read(1)
