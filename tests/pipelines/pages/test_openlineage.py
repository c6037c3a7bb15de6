"""OpenLineage events through the library's own transports: a file, and a server over HTTP."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from openlineage.client.naming.dataset import GCS, S3, LocalFileSystem

from infra.dataset import Dataset, commit
from infra.store import Store
from pipelines.flows.run import Run, plan_run
from pipelines.pages import openlineage
from pipelines.pages.openlineage import events, outside, send
from stages.catalog import stage_class
from stages.runner.recipe import load_recipe
from stages.runner.run import run_stage
from tests.pipelines.commands.test_plain import a_dataset
from tests.pipelines.conftest import ROWS, write_metadata
from tests.stages import killed

FLOW_RUN = "01936a3c-0000-7000-8000-000000000001"


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sends the events of a select that this process has made, and returns its manifest."""
    for name in [name for name in os.environ if name.startswith("OPENLINEAGE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("stages.runner.pool.run_pool", killed.in_process)
    write_metadata(tmp_path / "metadata" / "part-0.parquet")
    path, store = tmp_path / "tiny.yaml", Store(str(tmp_path / "store"))
    path.write_text("name: tiny\nsubsets:\n  good: {select: {metadata: [metadata/*.parquet], min_width: 256}, download: {}}\n")
    recipe = load_recipe(path)
    planned = plan_run(recipe, store)
    dataset = run_stage(planned["good-select"], store, stage_class("select"))
    run = Run(recipe, store, planned, ["good-select"], SimpleNamespace(), SimpleNamespace(), flow_run=FLOW_RUN)  # type: ignore[arg-type]

    def now() -> Any:
        send(run, dataset)
        return dataset.manifest

    return now


def check(start: dict[str, Any], complete: dict[str, Any], manifest: Any, folder: Path) -> None:
    assert (start["eventType"], complete["eventType"]) == ("START", "COMPLETE")
    assert start["run"] == complete["run"] and start["eventTime"] < complete["eventTime"]
    assert complete["job"]["name"] == "tiny-good-select"
    assert complete["run"]["facets"]["parent"]["run"]["runId"] == FLOW_RUN
    (source,) = complete["inputs"]
    assert (source["namespace"], source["name"]) == ("file", str(folder / "metadata" / "*.parquet"))
    (made,) = complete["outputs"]
    assert (made["namespace"], made["name"]) == (f"file://{folder / 'store'}", "tiny-good-select")
    assert made["facets"]["version"]["datasetVersion"] == manifest.fingerprint
    assert {f["name"]: f["type"] for f in made["facets"]["schema"]["fields"]} == manifest.columns
    assert made["outputFacets"]["outputStatistics"]["rowCount"] == manifest.stats.rows_out < ROWS
    assert made["outputFacets"]["outputStatistics"]["size"] == sum(entry.bytes for entry in manifest.files)


def test_a_file_gets_a_start_and_a_complete_event(sent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "events.jsonl"
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT", json.dumps({"type": "file", "log_file_path": str(log), "append": True}))
    manifest = sent()
    start, complete = map(json.loads, log.read_text().splitlines())
    check(start, complete, manifest, tmp_path)


def test_a_server_gets_them_and_one_that_is_down_fails_nothing(
    sent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    got: list[dict[str, Any]] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        transport = {"type": "http", "url": f"http://127.0.0.1:{server.server_port}", "compression": None, "retry": {"total": 0}}
        monkeypatch.setenv("OPENLINEAGE__TRANSPORT", json.dumps(transport))
        manifest = sent()
        server.shutdown()
    check(*got, manifest, tmp_path)
    sent()
    assert "OpenLineage: good-select of tiny was not sent" in caplog.text


def test_without_configuration_nothing_is_sent(sent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openlineage.client.OpenLineageClient.emit", lambda *_: pytest.fail("sent"))
    sent()


def test_a_dataset_is_an_edge_from_the_version_that_it_was_made_from(sent: Any, tmp_path: Path) -> None:
    manifest = sent()
    recipe, store = load_recipe(tmp_path / "tiny.yaml"), Store(str(tmp_path / "store"))
    planned = plan_run(recipe, store)
    made = a_dataset(store, "download", planned["good-download"].fingerprint, {"rows": manifest.reference()}).manifest
    dataset = commit(store, made.model_copy(update={"node": "good-download", "created": "2026-01-01T00:00:00+00:00"}))
    run = Run(recipe, store, planned, ["good-download"], SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    start, complete = events(run, dataset)
    place = f"file://{tmp_path / 'store'}"
    for event in (start, complete):
        ((source,), job) = (event.inputs, event.job)
        assert (source.namespace, source.name, job.name) == (place, "tiny-good-select", "tiny-good-download")
        assert source.facets["version"].datasetVersion == manifest.fingerprint
        assert {field.name: field.type for field in source.facets["schema"].fields} == manifest.columns
        # No flow run has made it.
        assert "parent" not in event.run.facets
    assert not start.outputs and [output.name for output in complete.outputs] == ["tiny-good-download"]
    # The metadata of the same select, from a bucket.
    bucket = planned["good-select"].config.model_copy(update={"metadata": ["s3://bucket/laion/*.parquet", "/data/more.parquet"]})
    run.planned = {**planned, "good-select": replace(planned["good-select"], config=bucket)}
    (_, complete) = events(run, Dataset(store, manifest))
    assert [(source.namespace, source.name) for source in complete.inputs] == [
        ("s3://bucket", "laion/*.parquet"), ("file", "/data/more.parquet"),
    ]  # fmt: skip


def test_files_from_outside_are_called_as_other_producers_call_them() -> None:
    """By the library's own rules of naming."""
    for pattern, naming in {
        "s3://bucket/metadata/*.parquet": S3("bucket", "metadata/*.parquet"),
        "gs://bucket/one.parquet": GCS("bucket", "one.parquet"),
        "/data/mine/*.jpg": LocalFileSystem("/data/mine/*.jpg"),
        "file:///data/mine/*.jpg": LocalFileSystem("/data/mine/*.jpg"),
        "zip://*.jpg::/data/mine.zip": LocalFileSystem("/data/mine.zip"),
        "zip://*.jpg::s3://bucket/mine.zip": S3("bucket", "mine.zip"),
    }.items():
        assert outside(pattern) == (naming.get_namespace(), naming.get_name())


@pytest.mark.parametrize(("root", "place"), [("{folder}", "file://{folder}"), ("memory://bucket/runs", "memory://bucket/runs")])
def test_a_store_is_a_place_wherever_it_lies(tmp_path: Path, root: str, place: str) -> None:
    assert openlineage._namespace(Store(root.format(folder=tmp_path))) == place.format(folder=tmp_path)
