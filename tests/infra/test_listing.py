"""Paths, globs and URLs: which files they mean, and what is said of those that they pass over."""

from __future__ import annotations

import errno
import os
import zipfile
from pathlib import Path

import fsspec
import pytest

from infra.external import resolve
from infra.listing import OutsideError
from infra.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def names(patterns: list[str], store: Store, folder: Path) -> list[str]:
    return sorted(os.path.relpath(path, folder) for path in resolve(patterns, store))


def test_what_exists_means_itself(store: Store, folder: Path):
    write(folder, "photo [1].jpg", "photo 1.jpg", "what?.jpg", "whats.jpg", "a*.jpg", "ab.jpg", "set [2]/x.jpg", "set 2/x.jpg")
    for name in ("photo [1].jpg", "what?.jpg", "a*.jpg", "set [2]/x.jpg"):
        assert names([f"{folder}/{name}"], store, folder) == [name]
    assert names([f"{folder}/set [2]/*.jpg"], store, folder) == ["set [2]/x.jpg"]
    assert names([f"{folder}/set [23]/*.jpg"], store, folder) == ["set 2/x.jpg"]
    assert names([f"{folder}/photo ?.jpg"], store, folder) == ["photo 1.jpg"]
    with fsspec.open(f"{folder}/photo [1].jpg", "rb") as file:
        assert file.read() == b"photo [1].jpg", "readers open what was found"


def test_what_exists_means_itself_elsewhere_too(store: Store):
    memory = fsspec.filesystem("memory")
    for name in ("photo [1].jpg", "photo 1.jpg", "set [2]/x.jpg", "set 2/x.jpg"):
        memory.pipe_file(f"/brackets/{name}", b"x")
    for pattern, found in {
        "photo [1].jpg": "photo [1].jpg",
        "set [2]/*.jpg": "set [2]/x.jpg",
        "set [23]/*": "set 2/x.jpg",
    }.items():
        assert list(resolve([f"memory://brackets/{pattern}"], store)) == [f"memory:///brackets/{found}"]


@pytest.mark.parametrize("place", ["{folder}", "{folder}/", "memory://alone", "{folder}/set [1]"])
def test_a_folder_alone_is_refused_with_the_fix(store: Store, folder: Path, place: str):
    write(folder, "x.parquet", "set [1]/y.parquet")
    fsspec.filesystem("memory").pipe_file("/alone/x.parquet", b"x")
    place = place.format(folder=folder)
    with pytest.raises(OutsideError) as refused:
        resolve([place], store)
    bare = place.rstrip("/")
    assert str(refused.value) == f"{place}: a folder; name its files, as {bare}/*.parquet or, at any depth, {bare}/**/*.jpg does"


def test_what_is_no_data_is_passed_over_counted_and_said_once(store: Store, folder: Path, caplog: pytest.LogCaptureFixture):
    data = ["part-0.parquet", "part-1.parquet", "empty.parquet"]
    write(folder, *data, "_SUCCESS", "_metadata", ".part-0.parquet.crc", "part=1/x.parquet")
    for name in ("empty.parquet", "DONE"):
        (folder / name).write_bytes(b"")
    for _ in range(2):
        found = resolve([f"{folder}/*"], store)
        assert [Path(path).name for path in found] == ["part-0.parquet", "part-1.parquet"]
    assert caplog.messages == [
        f"{folder}/*: passed over folders: 1 (part=1); hidden files and markers: 5 (.part-0.parquet.crc, ...)"
    ]
    assert len(names([f"{folder}/*.parquet"], store, folder)) == 3, "an empty file of data is its reader's business"
    assert names([f"{folder}/_SUCC*", f"{folder}/.part*"], store, folder) == [".part-0.parquet.crc", "_SUCCESS"]


def test_odd_files_do_not_stop_a_walk_and_links_do_not_lead_round(
    store: Store, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write(folder, "a.jpg", "a.txt", "deep/b.jpg", "._a.jpg", ".trash/c.jpg")
    write(tmp_path / "other", "d.jpg")
    (folder / "broken.jpg").symlink_to("nowhere.jpg")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / "linked.jpg").symlink_to(tmp_path / "other" / "d.jpg")
    (folder / "deep" / "up").symlink_to("..")
    os.mkfifo(folder / "pipe.jpg")
    Path(os.fsdecode(bytes(folder) + b"/caf\xe9.jpg")).write_text("latin")
    found = resolve([f"{folder}/**/*.jpg", f"{folder}/**/*.txt"], store)
    assert [os.path.relpath(path, folder) for path in found] == ["a.jpg", "a.txt", "deep/b.jpg", "linked.jpg"]
    (line,) = caplog.messages
    for part in (
        "broken links: 2 (broken.jpg, ...)", "hidden files and markers: 2 (._a.jpg, ...)",
        "neither files nor folders: 1 (pipe.jpg)", "links to folders, which are not entered: 1 (deep/up)",
        "names that are not UTF-8: 1 (caf\\xe9.jpg)",
    ):  # fmt: skip
        assert part in line
    assert "\n" not in line


def test_capitals_match_and_images_of_other_endings_are_counted(store: Store, folder: Path, caplog: pytest.LogCaptureFixture):
    write(folder, "a.jpg", "b.JPG", "c.Jpg", "d.jpeg", "e.JPEG", "f.png", "deep/g.webp", "h.txt", "i.TXT")
    write(folder, ".trash/k.png")
    Path(os.fsdecode(bytes(folder) + b"/caf\xe9.gif")).write_text("latin")
    patterns = [f"{folder}/**/*.jpg", f"{folder}/**/*.txt"]
    assert names(patterns, store, folder) == ["a.jpg", "b.JPG", "c.Jpg", "h.txt", "i.TXT"]
    assert caplog.messages == [
        f"{folder}/**/*.jpg: leaves out other images that lie there: 2 .jpeg, 1 .png, 1 .webp; to take them too, add "
        f"{folder}/**/*.jpeg and {folder}/**/*.png and {folder}/**/*.webp"
    ]
    caplog.clear()
    (folder / ".trash/k.png").unlink()
    assert len(names([f"{folder}/**/*.{ending}" for ending in ("jpg", "jpeg", "png", "webp")], store, folder)) == 7
    assert caplog.messages == []


def test_only_the_glob_itself_asks_for_what_is_hidden(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch):
    write(folder, "a.jpg", "._a.jpg", ".cache/_sets/b.jpg", ".cache/_sets/._b.jpg")
    monkeypatch.chdir(folder)
    assert names(["./*.jpg"], store, folder) == names([f"../{folder.name}/*.jpg"], store, folder) == ["a.jpg"]
    assert names([f"{folder}/.cache/_sets/*.jpg"], store, folder) == [".cache/_sets/b.jpg"]
    assert names([f"{folder}/.*/**/.*.jpg"], store, folder) == [".cache/_sets/._b.jpg"]


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("zip://*.jpg::{folder}/no.zip", "cannot be read: File is not a zip file"),
        ("tar://*.jpg::{folder}/no.tar", "cannot be read: "),
        ("zip://*.jpg::{folder}/gone.zip", "{folder}/gone.zip: cannot be read: No such file or directory"),
        ("nowhere://x/*.jpg", "cannot be read: Protocol not known: nowhere"),
        (
            "zip://deep::{folder}/a.zip",
            "a folder; name its files, as zip://deep/*.parquet::{folder}/a.zip or, at any depth, "
            "zip://deep/**/*.jpg::{folder}/a.zip does",
        ),
    ],
)
def test_an_address_of_which_nothing_can_be_looked_at_is_one_line(store: Store, folder: Path, address: str, why: str):
    write(folder, "no.zip", "no.tar")
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("deep/x.jpg", b"x")
    address = address.format(folder=folder)
    with pytest.raises(OutsideError) as refused:
        resolve([address], store)
    assert str(refused.value).startswith(f"{address}: {why.format(folder=folder)}")
    assert "\n" not in str(refused.value)


def test_an_object_store_is_listed_alike(store: Store, caplog: pytest.LogCaptureFixture):
    memory = fsspec.filesystem("memory")
    for name in ("a.jpg", "b.JPG", "c.png", "deep/d.jpg", ".hidden/e.jpg", "deep.jpg/x.txt"):
        memory.pipe_file(f"/pictures/{name}", b"x")
    found = resolve(["memory://pictures/**/*.jpg"], store)
    assert [path.removeprefix("memory:///pictures/") for path in found] == ["a.jpg", "b.JPG", "deep/d.jpg"]
    assert caplog.messages == [
        "memory://pictures/**/*.jpg: passed over hidden files and markers: 1 (.hidden/e.jpg)",
        "memory://pictures/**/*.jpg: leaves out other images that lie there: 1 .png; to take them too, add "
        "memory://pictures/**/*.png",
    ]


def test_a_file_that_may_not_be_read_is_named_and_never_left_out(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch):
    write(folder, "a.jpg", "b.jpg")

    def read(path: str, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("infra.hashed.open", read, raising=False)
    with pytest.raises(OutsideError) as refused:
        resolve([f"{folder}/*.jpg"], store)
    assert str(refused.value) == f"{folder}/*.jpg: {folder}/a.jpg: cannot be read: Permission denied"


def test_a_link_that_leads_nowhere_is_no_file(store: Store, folder: Path):
    (folder / "list.txt").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="list.txt: no such file; expected a path, glob or URL that exists$"):
        resolve([f"{folder}/list.txt"], store)
