"""Stores: local and S3 protocol alike."""

import hashlib
import pickle
import socket

import boto3
import pytest
from botocore.exceptions import ClientError
from s3fs import S3FileSystem

from infra.external import resolve
from infra.store import Store, StoreError
from infra.store_access import check_access, store_error


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    return Store(str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("bucket"))


def refused(root, write=True):
    with pytest.raises(StoreError) as raised:
        check_access(Store(root), write)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_bucket_is_looked_for_and_written_to_and_one_that_is_not_there_is_named(bucket):
    check_access(Store(bucket), write=False)
    assert not Store(bucket).exists(".state/checked")
    check_access(Store(bucket), write=True)
    assert Store(bucket).exists(".state/checked")
    assert refused("s3://nowhere/store") == "s3://nowhere/store: there is no bucket nowhere; create it, or name another --store"


def test_no_credentials_is_one_line_that_says_which_to_set(bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    S3FileSystem.clear_instance_cache()
    said = refused(bucket)
    S3FileSystem.clear_instance_cache()
    assert said.startswith(f"{bucket}: no credentials (") and "AWS_ACCESS_KEY_ID" in said


def test_what_a_bucket_of_another_region_and_a_key_without_rights_answer_has_its_fix():
    region = OSError(22, "the region 'us-east-1' is wrong; expecting 'eu-west-1'")
    region.__cause__ = ClientError({"Error": {"Code": "AuthorizationHeaderMalformed"}}, "ListObjectsV2")
    assert str(store_error("s3://a/b", region)).endswith("set AWS_DEFAULT_REGION to the bucket's")
    said = str(store_error("s3://a/b", PermissionError("Access Denied")))
    assert said.startswith("s3://a/b: access is refused (Access Denied); set AWS_ACCESS_KEY_ID")
    assert "gcloud" in str(store_error("gs://a/b", PermissionError("403")))


def test_a_file_system_that_is_not_installed_or_not_known_is_one_line(monkeypatch):
    def missing(name):
        raise ImportError("Please install gcsfs") from ModuleNotFoundError("No module named 'gcsfs'", name="gcsfs")

    monkeypatch.setattr("fsspec.core.get_filesystem_class", missing)
    assert refused("gs://a/b") == "gs://a/b: gcsfs is not installed, which such a store needs; pip install gcsfs"
    monkeypatch.undo()
    assert "Protocol not known: foo; expected a folder or an fsspec URL" in refused("foo://a/b")


def test_a_folder_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert (
        refused(str(tmp_path / "file" / "store"))
        == f"{tmp_path}/file/store: {tmp_path}/file is a file; name a folder with --store"
    )
    check_access(Store(str(tmp_path / "new" / "store")), write=True)
    assert not (tmp_path / "new").exists()


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


def test_what_others_write_is_seen_by_who_has_looked_before(bucket):
    mine, theirs = Store(bucket), boto3.client("s3")
    theirs.put_object(Bucket="data", Key="store/seen/a", Body=b"1")
    assert mine.list("seen") == ["a"] and [name for name, *_ in mine.walk("seen")] == ["seen/a"]
    theirs.put_object(Bucket="data", Key="store/seen/b", Body=b"12")
    assert mine.exists("seen/b") and mine.is_there() and mine.list("seen") == ["a", "b"]
    assert {name: size for name, size, _ in mine.walk("seen")} == {"seen/a": 1, "seen/b": 2}
    theirs.delete_object(Bucket="data", Key="store/seen/a")
    assert not mine.exists("seen/a") and mine.read_json("seen/a") is None


def test_what_is_read_whole_is_one_request_and_so_is_what_is_not_there(bucket, s3):
    store = Store(bucket)
    store.write_json("one.json", {})
    s3.forget()
    assert store.read_json("one.json") == {} and store.read("one.json") == b"{}\n" and store.read_json("none.json") is None
    assert list(store.read_many(["one.json", "none.json"])) == [b"{}\n", None]
    assert s3.requests == 5


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
