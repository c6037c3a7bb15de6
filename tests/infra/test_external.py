"""Digests of files from outside: another content is another digest, whatever the place tells of it."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from infra.contents import remote_digests
from infra.external import fetch_outside, resolve
from infra.listing import OutsideError
from infra.room import DISK_RESERVE, NoRoom
from infra.store import Store
from unidiffuser.references import EMBEDDED

ONE, TWO = b"one.example\n", b"two.example\n"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


class Answers(BaseHTTPRequestHandler):
    """One file with the headers that the test wants."""

    content = b""
    headers_given: dict[str, str] = {}
    status = 200
    asked: list[str] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.asked.append(self.command)
        self.send_response(self.status)
        for name, value in {"Content-Length": str(len(self.content)), **self.headers_given}.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)


@pytest.fixture(scope="module")
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


EARLY, LATE = "Tue, 14 Nov 2023 22:13:20 GMT", "Tue, 14 Nov 2023 22:30:00 GMT"
HEADERS = {
    "nothing": ({}, {}),
    "weak-etag": ({"ETag": 'W/"same"'}, {"ETag": 'W/"same"'}),
    "weak-etag-and-time": ({"ETag": 'W/"same"', "Last-Modified": EARLY}, {"ETag": 'W/"same"', "Last-Modified": LATE}),
    "etag": ({"ETag": '"a"', "Last-Modified": EARLY}, {"ETag": '"b"', "Last-Modified": EARLY}),
    "time": ({"Last-Modified": EARLY}, {"Last-Modified": LATE}),
    "md5": ({"Content-MD5": "a"}, {"Content-MD5": "b"}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_web_file_of_the_same_size_counts_as_changed(web: str, store: Store, monkeypatch: pytest.MonkeyPatch, name: str):
    digests = []
    for content, headers in zip((ONE, TWO), HEADERS[name], strict=True):
        monkeypatch.setattr(Answers, "content", content)
        monkeypatch.setattr(Answers, "headers_given", headers)
        (digest,) = resolve([f"{web}/list.txt"], store).values()
        assert resolve([f"{web}/list.txt"], store) == {f"{web}/list.txt": digest}
        digests.append(digest)
    assert digests == [hashlib.sha256(content).hexdigest() for content in (ONE, TWO)]


class Told:
    """A file system that tells what the real one of that name tells (`info` of its implementation), and counts what is read."""

    def __init__(self, info: dict[str, Any], content: bytes = ONE):
        self.told = {"name": "x", "size": 12, "type": "file", **info}
        self.content, self.read = content, 0

    def info(self, path: str) -> dict[str, Any]:
        return self.told

    def open(self, path: str, mode: str) -> Any:
        self.read += 1
        return io.BytesIO(self.content)


def digest_there(fs: Told, store: Store) -> str:
    """Of the one file that it tells of."""
    return remote_digests(fs, {"told://folder/x": "x"}, store)["told://folder/x"]


TELLS = {
    "s3": {"ETag": '"9b2c"', "LastModified": "2026-01-01", "VersionId": "null"},
    "gcs": {"etag": "CJ", "md5Hash": "aa==", "generation": "17"},
    "abfs": {"etag": "0x8D", "last_modified": "2026"},
    "hf": {"blob_id": "9b2c", "lfs": None, "xet_hash": None, "last_commit": None},
    "hf-bucket": {"xet_hash": "9b2c", "mtime": "2026"},
    "github": {"sha": "9b2c", "mode": "100644"},
    "git": {"hex": "9b2c", "mode": "100644"},
    "hdfs": {"mtime": "2026-01-01 10:00:00"},
    "webhdfs": {"modificationTime": 1_700_000_000_000, "length": 12},
    "sftp": {"mtime": "2026-01-01 10:00:00", "time": "accessed"},
    "smb": {"mtime": 1_700_000_000.5},
    "dropbox": {"content_hash": "9b2c"},
    "ftp": {"modify": "20260101100000"},
    "s3-without-tags": {"ETag": "", "LastModified": "2026-01-01"},
}


@pytest.mark.parametrize("name", TELLS)
def test_a_file_is_read_once_for_all_that_a_file_system_tells_of_its_content_or_its_time(name: str, store: Store):
    Path(store.root).mkdir()
    told = TELLS[name]
    first, again = Told(told), Told(told)
    assert digest_there(first, store) == digest_there(again, Store(store.root)) == hashlib.sha256(ONE).hexdigest()
    assert (first.read, again.read) == (1, 0)
    first_told = next(key for key, value in told.items() if value)
    value = told[first_told]
    other = value + 1 if isinstance(value, int | float) else value.replace("2026", "2027") + "0"
    for changed in (told | {first_told: other}, told | {"size": 13}):
        after = Told(changed, TWO)
        assert digest_there(after, store) == hashlib.sha256(TWO).hexdigest() and after.read == 1


def test_what_is_remembered_and_damaged_is_read_again(store: Store):
    Path(store.root).mkdir()
    told = TELLS["s3"]
    digest_there(Told(told), store)
    (memory,) = Path(store.root, ".state/contents").iterdir()
    memory.write_bytes(memory.read_bytes()[:-9])
    after, again = Told(told), Told(told)
    assert digest_there(after, store) == digest_there(again, store) == hashlib.sha256(ONE).hexdigest()
    assert (after.read, again.read) == (1, 0)


@pytest.mark.parametrize(
    "told", [{}, {"created": 1}, {"mtime": None, "ETag": None}, {"modify": "Jan 01 10:00"}, {"ETag": 'W/"a"'}]
)
def test_where_nothing_is_told_the_content_is_read_each_time(told: dict[str, Any], store: Store):
    Path(store.root).mkdir()
    for content in (ONE, TWO):
        assert digest_there(Told(told, content), store) == hashlib.sha256(content).hexdigest()


def test_who_only_asks_makes_no_store(store: Store):
    digest_there(Told(TELLS["s3"]), store)
    assert not store.is_there()


def test_a_file_in_memory_counts_by_its_content(store: Store):
    memory = fsspec.filesystem("memory")
    for content in (ONE, TWO):
        memory.pipe_file("/lists/opted-out.txt", content)
        expected = {"memory:///lists/opted-out.txt": hashlib.sha256(content).hexdigest()}
        assert resolve(["memory://lists/opted-out.txt"], store) == resolve(["memory://lists/*.txt"], store) == expected


def test_a_member_of_an_archive_counts_by_its_content_and_can_be_opened(tmp_path: Path, store: Store):
    """Archives may be packed with fixed times, as this project's are."""
    found: dict[str, list[dict[str, str]]] = {"zip": [], "tar": []}
    for content in (ONE, TWO):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
            packed.writestr(zipfile.ZipInfo("in/list.txt"), content)
        with tarfile.open(tmp_path / "a.tar", "w") as packed:
            entry = tarfile.TarInfo("in/list.txt")
            entry.size, entry.mtime = len(content), 1_700_000_000
            packed.addfile(entry, io.BytesIO(content))
        for kind, digests in found.items():
            pattern = f"{kind}://in/*.txt::file://{tmp_path}/a.{kind}"
            digests.append(resolve([pattern], store))
            (address,) = digests[-1]
            assert address == pattern.replace("*", "list")
            with fsspec.open(address, "rb") as file:
                assert file.read() == content
    for before, after in found.values():
        assert before.keys() == after.keys() and before != after


def test_a_local_file_that_is_replaced_with_its_time_kept_counts_as_changed(tmp_path: Path, store: Store):
    path = tmp_path / "list.txt"
    for content in (ONE, TWO):
        (tmp_path / "new").write_bytes(content)
        os.utime(tmp_path / "new", (1_700_000_000,) * 2)
        os.replace(tmp_path / "new", path)
        assert resolve([str(path)], store) == {str(path): hashlib.sha256(content).hexdigest()}


def test_what_a_web_server_refuses_is_not_called_missing(web: str, store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Answers, "status", 403)
    with pytest.raises(OutsideError, match="list.txt: the server answers 403; expected 200$"):
        resolve([f"{web}/list.txt"], store)
    monkeypatch.setattr(Answers, "status", 404)
    with pytest.raises(FileNotFoundError, match="list.txt: no such file; expected a path, glob or URL that exists$"):
        resolve([f"{web}/list.txt"], store)
    with pytest.raises(OutsideError, match="^http://127.0.0.1:9/list.txt: cannot be read: .*") as refused:
        resolve(["http://127.0.0.1:9/list.txt"], store)
    assert not isinstance(refused.value, FileNotFoundError) and "\n" not in str(refused.value)


@pytest.mark.parametrize("here", [True, False], ids=["local", "remote"])
def test_what_is_fetched_is_what_was_planned_with(tmp_path: Path, store: Store, here: bool):
    root = str(tmp_path / "weights") if here else f"memory://{tmp_path.name}/weights"
    files = {f"{root}/config.json": b"{}", f"{root}/below/model.bin": b"numbers"}

    def write(address: str, content: bytes) -> None:
        with fsspec.open(address, "wb", auto_mkdir=True) as file:
            file.write(content)

    for address, content in files.items():
        write(address, content)
    planned = resolve(list(files), store)
    folder = fetch_outside(planned, root, store, tmp_path / "one")
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == {
        "config.json": b"{}", "below/model.bin": b"numbers",
    }  # fmt: skip
    (alone,) = (address for address in planned if address.endswith("model.bin"))
    assert fetch_outside({alone: planned[alone]}, alone, store, tmp_path / "two").read_bytes() == b"numbers"
    write(f"{root}/below/model.bin", b"other numbers")
    with pytest.raises(OutsideError, match=f"^{root}: has changed since the run was planned; run again$"):
        fetch_outside(planned, root, store, tmp_path / "three")


def test_weights_that_come_cut_off_are_refused(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch):
    root = f"memory://{tmp_path.name}/weights"
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"{root}/model.bin", b"numbers")
    planned = resolve([f"{root}/*"], store)
    monkeypatch.setattr(type(memory), "get_file", lambda self, path, copy: Path(copy).write_bytes(b"numb"))
    with pytest.raises(OutsideError, match=r"/model\.bin: came with other bytes than it has; run again$"):
        fetch_outside(planned, root, store, tmp_path / "one")


def test_a_name_from_outside_that_leads_out_of_its_folder_is_refused(tmp_path: Path, store: Store):
    with zipfile.ZipFile(tmp_path / "weights.zip", "w") as archive:
        archive.writestr("top/model.bin", b"numbers")
        archive.writestr("top/../../../x", b"no")
    address = f"zip://top/../../../x::{tmp_path}/weights.zip"
    with pytest.raises(OutsideError, match="lists 'top/../../../x', which leads out of its folder; take it from a place that"):
        fetch_outside(resolve([address], store), f"zip://top::{tmp_path}/weights.zip", store, tmp_path / "a" / "b" / "c" / "here")
    assert not (tmp_path / "a").exists() and not (tmp_path / "x").exists()


def test_weights_that_do_not_fit_the_machines_disk_are_not_fetched(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch):
    root = f"memory://{tmp_path.name}/weights"
    fsspec.filesystem("memory").pipe_file(f"{root}/model.bin", b"numbers")
    planned = resolve([f"{root}/*"], store)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=DISK_RESERVE + 6))
    with pytest.raises(NoRoom, match=f"^{root}: 0.0 GiB are to be fetched to {tmp_path} of the machine "):
        fetch_outside(planned, root, store, tmp_path / "one")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=DISK_RESERVE + 7))
    assert (fetch_outside(planned, root, store, tmp_path / "two") / "model.bin").read_bytes() == b"numbers"


def test_what_is_shipped_with_the_package_has_one_name_wherever_that_lies(tmp_path: Path, store: Store):
    """A path would be another on each machine, and the times of two installations differ."""
    names = [f"embedded://base/uvit/{name}" for name in ("config.json", "model.safetensors")]
    expected = {name: hashlib.sha256((EMBEDDED / name.removeprefix("embedded://")).read_bytes()).hexdigest() for name in names}
    assert dict(resolve(names, store)) == expected
    assert "mtime" not in fsspec.url_to_fs(names[0])[0].info("base/uvit/config.json")
    fetched = fetch_outside(expected, "embedded://base", store, tmp_path / "elsewhere")
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (fetched / "uvit").iterdir()}
    assert found == {name.rpartition("/")[2]: digest for name, digest in expected.items()}
