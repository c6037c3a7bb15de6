"""Stores: local and S3 protocol alike."""

import base64
import hashlib
import pickle
import socket

import boto3
import pytest
from botocore.exceptions import ClientError
from s3fs import S3FileSystem

from infra import s3 as s3_itself
from infra.external import resolve
from infra.store import Store, StoreError
from infra.store_access import check_access, check_seen, store_error


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


@pytest.mark.parametrize("size", [300_000, 6 * 2**20])
def test_s3_compares_the_digest_itself_and_nothing_is_read_back(bucket, s3, tmp_path, monkeypatch, size):
    monkeypatch.setattr("infra.s3.PART", 5 * 2**20)
    data = bytes(range(256)) * (size // 256)
    (tmp_path / "file").write_bytes(data)
    s3.forget()
    Store(bucket).publish(tmp_path / "file", "sent.bin")
    assert s3.bytes == 0 and s3.requests == (1 if size < 2**20 else 4)
    parts = [data] if size < 2**20 else [data[: 5 * 2**20], data[5 * 2**20 :]]
    told = boto3.client("s3").head_object(Bucket="data", Key="store/sent.bin", ChecksumMode="ENABLED")["ChecksumSHA256"]
    digests = [hashlib.sha256(part).digest() for part in parts]
    whole = digests[0] if len(parts) == 1 else hashlib.sha256(b"".join(digests)).digest()
    assert told.split("-")[0] == base64.b64encode(whole).decode()
    assert Store(bucket).read("sent.bin") == data


def test_a_file_that_changes_while_it_is_sent_is_refused_and_leaves_nothing(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("infra.s3.PART", 5 * 2**20)
    monkeypatch.setattr("infra.store.sha256_of", lambda path: hashlib.sha256(b"as it was").hexdigest())
    (tmp_path / "file").write_bytes(bytes(6 * 2**20))
    with pytest.raises(OSError, match="changed while it was sent"):
        Store(bucket).publish(tmp_path / "file", "changed.bin")
    assert not Store(bucket).exists("changed.bin")
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket="data")


def test_what_speaks_s3_without_comparing_is_read_back(bucket, tmp_path, monkeypatch):
    def lies(fs, source, path, sha256):
        fs.pipe_file(path, b"evil")
        return False

    monkeypatch.setattr("moto.s3.responses.S3Response._get_checksum", lambda *_: ("", None))
    (tmp_path / "file").write_bytes(b"good")
    assert not s3_itself.put(Store(bucket).fs, tmp_path / "file", "data/store/told", hashlib.sha256(b"good").hexdigest())
    monkeypatch.setattr("infra.s3.put", lies)
    with pytest.raises(StoreError, match="read back"):
        Store(bucket).publish(tmp_path / "file", "unit/file.bin")


def test_a_file_that_is_to_be_written_once_stays_as_it_was_first(store):
    assert store.write("once", b"first", once=True) and not store.write("once", b"second", once=True)
    assert store.read("once") == b"first" and store.write("once", b"third") and store.read("once") == b"third"
    store.discard("once")
    store.discard("once")
    assert not store.exists("once")


def test_free_bytes_only_for_disks(tmp_path):
    assert Store(str(tmp_path / "not" / "there")).free_bytes() > 0


def test_the_server_listens_on_loopback_only(bucket):
    """Guards the test itself: nothing of it may be reachable from another machine."""
    import os

    host = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")[0]
    assert socket.gethostbyname(host).startswith("127.")


def test_an_object_that_changes_is_seen_by_the_same_process(bucket, tmp_path):
    """Listings that s3fs remembers are out of date."""
    s3, cache = Store("s3://data/lists"), Store(str(tmp_path / "store"))
    for content in (b"one.example", b"two.example"):
        boto3.client("s3").put_object(Bucket="data", Key="lists/a.txt", Body=content)
        digest = hashlib.sha256(content).hexdigest()
        for pattern in (s3.url("*.txt"), s3.url("a.txt")):
            assert resolve([pattern], cache) == {"s3://data/lists/a.txt": digest}


def test_a_password_in_an_address_of_a_store_is_refused_and_not_shown():
    with pytest.raises(StoreError, match=r"^s3://data/store: the address holds a password, .* environment") as refusal:
        Store("s3://me:pl4nted@data/store")
    assert "pl4nted" not in str(refusal.value)


def test_a_machine_that_does_not_see_the_store_says_so(tmp_path):
    machine = socket.gethostname()
    with pytest.raises(
        StoreError, match=rf"^the machine {machine} has no folder {tmp_path}/gone; mount it there at the same path"
    ):
        check_seen(Store(str(tmp_path / "gone")))
    (tmp_path / "gone").mkdir()
    check_seen(Store(str(tmp_path / "gone")))
