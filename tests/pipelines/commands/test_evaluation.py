"""`unidiffuser evaluate` on a checkpoint: what it measures and says, that it does so once, and what misuse is told."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.store import Store
from tests.pipelines.commands.test_sampling import say  # noqa: F401
from tests.stages import killed
from tests.stages.committed import dataset_of
from tests.unidiffuser.test_generation import export, noise_image  # noqa: F401


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Four captions with pictures."""

    def png(seed: int) -> bytes:
        noise_image(seed).save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    captions = ["a red apple", "a small lion", "two birds", "a table"]
    pq.write_table(pa.table({"caption": captions, "image": [png(n) for n in range(4)]}), tmp_path / "held_out.parquet")
    return tmp_path / "held_out.parquet"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units run in this process, and Ray is not started."""
    monkeypatch.setattr("stages.runner.pool.run_pool", killed.in_process)
    monkeypatch.setattr("stages.__main__.connect_ray", lambda: None)


def test_a_folder_is_measured_once_by_the_measures_of_a_preset(export, prompts, here, tmp_path, say, monkeypatch):  # noqa: F811
    asked = ("evaluate", export, "--preset", "laptop", "--prompts", prompts, "--set", "steps=2", "--store", tmp_path / "runs")
    code, printed, errors = say(*asked, "--json")
    assert code == 0, errors
    report: dict[str, Any] = json.loads(printed)
    figures = {figure["name"]: figure for figure in report["figures"]}
    assert figures.keys() >= {
        "fid_clip",
        "kid_clip",
        "cmmd",
        "precision_clip",
        "clip_score_i2t",
        "bleu4",
        "cider",
        "preference_real",
    }
    assert figures["fid_clip"]["note"].startswith("of fewer than 2,048 samples") and figures["kid_clip"]["note"]
    assert (report["node"], report["prompts"], report["sampling"]["steps"]) == (Path(export).name, 4, 2)

    monkeypatch.setattr("stages.__main__.connect_ray", lambda: pytest.fail("nothing is to be done"))
    code, printed, _ = say(*asked)
    assert code == 0 and "fid_clip" in printed and "of fewer than 2,048 samples" in printed
    assert f"report and sheet of samples: {tmp_path}/runs/evaluate/" in printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--set", "cout=3"], "evaluate.cout: unknown field"),
        (["--preset", "tiny"], "evaluate.preset: input should be 'paper', 'small' or 'laptop'"),
        (["--set", "prompts=null"], "evaluate: prompts: field required; name a file of held-out captions"),
        (
            ["--set", "measures=[{kind: fid, features: inception}]"],
            "evaluate: inception: field required; it is the path of",
        ),
        (["--set", "measures=[{kind: fod}]"], "evaluate.measures.0: input tag 'fod' found using 'kind' does not match any of"),
        (["--set", "measures=[{kind: fid}, {kind: fid}]"], "evaluate: measures: fid is there twice; its figures would have one"),
        (
            ["--set", "measures=[{kind: guidance}, {kind: guidance, features: inception}]", "--set", "inception=a.pth"],
            "evaluate: measures: guidance is there twice; its figures would have one name, so leave one",
        ),
    ],
)
def test_misuse_is_one_line(export, prompts, tmp_path, say, arguments, line):  # noqa: F811
    code, printed, errors = say("evaluate", export, "--prompts", prompts, *arguments, "--store", tmp_path / "runs")
    assert (code, printed) == (2, "") and errors.startswith(f"error: {line}") and errors.count("\n") == 1


def test_what_is_no_checkpoint_is_said(prompts, tmp_path, say):  # noqa: F811
    code, _, errors = say("evaluate", prompts, "--store", tmp_path / "runs")
    assert code == 2 and "no whole checkpoint" in errors
    code, _, errors = say("evaluate", tmp_path / "no.yaml", "--store", tmp_path / "runs")
    assert code == 2 and "no such recipe file" in errors


def test_the_judge_in_an_export_is_compared_with_its_record(export, prompts, tmp_path, say):  # noqa: F811
    """It is named by its folder, and what it holds then is its identity: a damaged one would judge, and look like another."""
    dataset = dataset_of(Store(str(tmp_path / "runs")), "export", Path(export), {})
    (path,) = Path(dataset.where, "clip_image").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    code, printed, errors = say("evaluate", dataset.manifest.fingerprint, "--prompts", prompts, "--store", tmp_path / "runs")
    assert (code, printed) == (1, "") and errors.count("\n") == 1
    assert errors.startswith(f"error: {path}: damaged (sha256 ")
