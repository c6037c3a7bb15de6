"""What a file holds is what it counts by: the same Parquet here, on S3 in one piece or in parts, and behind a signed address."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import boto3
import pytest

from benchmarks.counted import BUCKET, Counted
from infra import hashing
from infra.dataset import Dataset, find
from infra.external import resolve
from infra.queries import QUERIES
from infra.store import Store
from pipelines.flows.run import Run, pinned, snapshot
from pipelines.servers.deployments import check_addresses
from stages.__main__ import main
from stages.runner.graph import plan
from stages.runner.recipe import Recipe, RecipeError, load_recipe
from tests.pipelines.conftest import ROWS, write_metadata

FILE = "part-0.parquet"
NODE = "a-select"


@pytest.fixture
def copies(s3: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Where the same file lies, by how it came there."""
    monkeypatch.setenv(QUERIES, "{}")
    monkeypatch.setattr("stages.__main__.connect_ray", lambda: None)
    write_metadata(tmp_path / "here" / FILE)
    data, client = (tmp_path / "here" / FILE).read_bytes(), boto3.client("s3")
    client.put_object(Bucket=BUCKET, Key=f"put/{FILE}", Body=data)
    parts = {"Bucket": BUCKET, "Key": f"parts/{FILE}"}
    parts["UploadId"] = client.create_multipart_upload(**parts)["UploadId"]
    tag = client.upload_part(**parts, PartNumber=1, Body=data)["ETag"]
    client.complete_multipart_upload(**parts, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": tag}]})
    assert client.head_object(Bucket=BUCKET, Key=f"put/{FILE}")["ETag"] != tag + "-1"
    return {
        "here": str(tmp_path / "here" / FILE),
        "put": f"s3://{BUCKET}/put/{FILE}",
        "parts": f"s3://{BUCKET}/parts/*.parquet",
        "web": signed(f"put/{FILE}"),
    }


def signed(key: str, seconds: int = 60) -> str:
    """A web address that opens an object for some time."""
    return cast(str, boto3.client("s3").generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": key}, seconds))


def recipe_of(folder: Path, address: str) -> Recipe:
    file = folder / "tiny.yaml"
    file.write_text(f"name: tiny\nsubsets:\n  a: {{select: {{metadata: ['{address}'], min_width: 256, shard_rows: 20}}}}\n")
    return load_recipe(file)


def made(folder: Path, address: str, store: Store) -> Dataset:
    fingerprint = plan(recipe_of(folder, address), store)[NODE].fingerprint
    assert main([str(folder / "tiny.yaml"), NODE, "--store", store.root]) == 0
    found = find(store, "select", fingerprint)
    assert found is not None and found.manifest.stats.rows_in == ROWS and len(found.files) == 3
    return found


def test_a_file_counts_by_its_content_however_it_came_to_its_place(
    copies: dict[str, str], tmp_path: Path, in_process: None
) -> None:
    laptop, cluster = Store(str(tmp_path / "store")), Store(f"s3://{BUCKET}/runs")
    (digest,) = resolve([copies["here"]], laptop).values()
    here = made(tmp_path, copies["here"], laptop)
    for how in ("put", "parts", "web"):
        node = plan(recipe_of(tmp_path, copies[how]), laptop)[NODE]
        assert (how, list(node.sources.values()), node.state) == (how, [digest], "hit")
    there = made(tmp_path, copies["parts"], cluster)
    assert here.manifest.reference() == there.manifest.reference()
    assert [(e.name, e.unit, e.sha256) for e in here.files] == [(e.name, e.unit, e.sha256) for e in there.files]


def test_a_file_is_read_once_for_all_plans_and_signatures(
    copies: dict[str, str], tmp_path: Path, s3: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    root.mkdir()
    s3.forget()
    first = [plan(recipe_of(tmp_path, copies[how]), Store(str(root)))[NODE].fingerprint for how in ("put", "parts", "web")]
    assert sorted(set(s3.paths) - {f"/{BUCKET}"}) == [f"/{BUCKET}/parts/{FILE}", f"/{BUCKET}/put/{FILE}"] and len(set(first)) == 1
    s3.forget()
    again = [copies["put"], copies["parts"], signed(f"put/{FILE}", seconds=90), f"s3://{BUCKET}/put/*"]
    assert {plan(recipe_of(tmp_path, address), Store(str(root)))[NODE].fingerprint for address in again} == set(first)
    assert not [path for path in s3.paths if path.endswith(FILE)]
    boto3.client("s3").put_object(Bucket=BUCKET, Key=f"put/{FILE}", Body=b"other")
    assert plan(recipe_of(tmp_path, copies["put"]), Store(str(root)))[NODE].fingerprint not in first


def test_a_cluster_reads_what_is_large(
    s3: Counted, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In tasks; it is said when that takes long. A worker of this Ray knows no S3 server, but opens its web addresses."""
    asked: list[str] = []
    ends = iter([False, False, *[True] * 9])

    class Jobs:
        def __init__(self, address: str, token: str | None) -> None:
            asked.append(address)

        def submit(self, job: str, entrypoint: str, environment: dict[str, str]) -> None:
            assert entrypoint.startswith("python -m infra.hashing ")
            hashing.main(entrypoint.split()[3:])

        def check(self) -> None: ...

        def ended(self, job: str) -> bool:
            return next(ends)

    monkeypatch.setattr(hashing, "RayJobs", Jobs)
    monkeypatch.setattr(hashing, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(hashing, "QUIET", 0.0)
    monkeypatch.setattr("infra.contents.MANY", 3)
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265/")
    boto3.client("s3").put_object(Bucket=BUCKET, Key="list.txt", Body=b"large", ACL="public-read")
    address = signed("list.txt").partition("?")[0]
    store = Store(f"s3://{BUCKET}/large")
    store.write(".state/begun", b"")
    for _ in range(2):
        assert resolve([address], store) == {address: hashlib.sha256(b"large").hexdigest()}
    assert asked == ["http://head:8265"], "once"
    (line,) = [line for line in caplog.messages if "is not done reading 1 files" in line]
    assert line.startswith(f"{address}: job contents-") and "on http://head:8265" in line
    assert len(store.list(hashing.FOLDER)) == 1, "what was asked and answered is gone"
    resolve([address], Store(str(tmp_path / "store")))
    assert len(asked) == 1, "a cluster cannot write where this machine's store is"


def test_a_signature_and_a_password_are_written_nowhere(
    copies: dict[str, str], tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Neither by a command and the job that it starts, nor for a dataset or an error."""
    store = Store(str(tmp_path / "store"))
    store.write(".state/begun", b"")
    web = copies["web"].replace("://", "://me:pl4nted-and-nobodys@")
    recipe = recipe_of(tmp_path, web)
    query = web.partition("?")[2]
    planned = plan(recipe, store)
    run = cast(Run, SimpleNamespace(planned=planned, store=store))
    arguments = [snapshot(recipe, store), NODE, "--store", store.root, "--outside", pinned(run)]
    assert main([*arguments, "--expect", planned[NODE].fingerprint]) == 0
    dataset = find(store, "select", planned[NODE].fingerprint)
    assert dataset is not None and list(dataset.manifest.sources.values()) == list(planned[NODE].sources.values())
    assert main([str(tmp_path / "tiny.yaml"), NODE, "--store", store.root, "--set", "subsets.a.select.min_width=300"]) == 0
    gone = signed("put/gone.parquet").replace("://", "://me:pl4nted-and-nobodys@")
    recipe_of(tmp_path, gone)
    assert main([str(tmp_path / "tiny.yaml"), NODE, "--store", store.root, "--debug"]) == 2
    written = {path: path.read_bytes() for path in Path(store.root).rglob("*") if path.is_file()}
    assert len(written) > 20
    told = "".join(capfd.readouterr())
    for secret in {part.partition("=")[2] for address in (query, gone) for part in address.split("&")[-2:]} | {
        query,
        "pl4nted-and-nobodys",
    }:
        assert len(secret) > 8
        assert not [path for path, data in written.items() if secret.encode() in data or secret in str(path)]
        assert secret not in told
    with pytest.raises(
        RecipeError, match=r"^subsets.a.select.metadata: http://.*/part-0.parquet#q-\w{8} has a query or a password, which"
    ):
        check_addresses(recipe)
