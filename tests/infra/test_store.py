"""Stores: local and S3 protocol alike."""

import hashlib
import pickle
import socket

import boto3
import pytest
from moto.server import ThreadedMotoServer

from infra.external import resolve
from infra.store import Store, StoreError


@pytest.fixture(scope="module")
def bucket():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="data")
        yield "s3://data/store"
    server.stop()


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    return Store(str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("bucket"))


def test_what_is_written_is_read(store, tmp_path):
    store.write_json("a/b.json", {"x": 1})
    assert store.read_json("a/b.json") == {"x": 1}
    assert store.exists("a/b.json") and not store.exists("a/c.json")
    assert store.read_json("a/c.json") is None
    assert pickle.loads(pickle.dumps(store)).read_json("a/b.json") == {"x": 1}


def test_publish_returns_size_and_digest(store, tmp_path):
    data = bytes(range(256)) * 1000
    (tmp_path / "file").write_bytes(data)
    assert store.publish(tmp_path / "file", "unit/file.bin") == (len(data), hashlib.sha256(data).hexdigest())
    assert store.read("unit/file.bin") == data
    assert store.fetch("unit/file.bin", tmp_path / "back").read_bytes() == data
    assert "file.bin" in store.list("unit")
    store.remove("unit")
    assert store.list("unit") == []


def test_a_missing_file_is_named(store):
    with pytest.raises(StoreError, match="nowhere.bin: no such file"):
        store.open("nowhere.bin")


def test_publish_notices_a_disk_that_lies(tmp_path, monkeypatch):
    """Read-back check: the copy differs from the source, so nothing appears under the final name."""
    store = Store(str(tmp_path / "store"))
    (tmp_path / "file").write_bytes(b"good")
    monkeypatch.setattr("shutil.copyfile", lambda source, target: open(target, "wb").write(b"evil"))
    with pytest.raises(StoreError, match="read back"):
        store.publish(tmp_path / "file", "unit/file.bin")
    assert not store.exists("unit/file.bin")


def test_free_bytes_only_for_disks(tmp_path):
    assert Store(str(tmp_path / "not" / "there")).free_bytes() > 0


def test_the_server_listens_on_loopback_only(bucket):
    """Guards the test itself: nothing of it may be reachable from another machine."""
    import os

    host = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")[0]
    assert socket.gethostbyname(host).startswith("127.")


def test_an_object_that_changes_is_seen_by_the_same_process_and_counts_as_before(bucket, tmp_path):
    """By size and ETag, which is the MD5 sum of what was put in one piece; listings that s3fs remembers are out of date."""
    s3, cache = Store("s3://data/lists"), Store(str(tmp_path / "store"))
    for content in (b"one.example", b"two.example"):
        boto3.client("s3").put_object(Bucket="data", Key="lists/a.txt", Body=content)
        digest = f"{len(content)}:{hashlib.md5(content).hexdigest()}"
        for pattern in (s3.url("*.txt"), s3.url("a.txt")):
            assert resolve([pattern], cache) == {"s3://data/lists/a.txt": digest}
