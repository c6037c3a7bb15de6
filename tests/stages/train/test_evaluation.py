"""Evaluations of checkpoints beside a training: of which, with which numbers, and that none stands in the training's way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray

from infra.dataset import Dataset
from infra.store import Store
from stages.measuring.beside import evaluation_of, measured
from stages.runner.chain import Chain
from stages.runner.contract import RECORD, Job, StageError, Stats, UnitRecord
from stages.train.evaluation import Evaluations, check_beside, check_beside_before
from stages.train.stage import TrainStageConfig

MEASURES: list[dict[str, Any]] = [{"kind": "clip-score"}, {"kind": "fid"}]
BESIDE: dict[str, Any] = {"every": 2, "count": 4, "steps": 1, "batch": 4, "beams": 1, "guidance": 1.0, "measures": MEASURES}


def config_of(**changes: Any) -> TrainStageConfig:
    return TrainStageConfig.model_validate(
        {"steps": 600, "checkpoint_every": 100, "global_batch": 8, "evaluate": {**BESIDE, **changes}}
    )


def test_every_other_checkpoint_is_measured_one_at_a_time_and_a_failure_is_a_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, begun, rows = config_of(), list[tuple[str, float]](), list[dict[str, Any]]()
    chain = Chain(Job(Store(str(tmp_path)), "train", "train-256", config, {}, {}, {}), "k" * 24, config.steps)
    for step in range(100, 700, 100):
        record = UnitRecord(key=chain.key_of(step), name=f"step-{step}", files=[], stats=Stats())
        chain.job.store.write(f"{chain.job.unit_folder(record.key)}/unit.json", RECORD.dump_json(record))
    state: dict[str, Any] = {"ready": False, "result": {"figures": [{"name": "fid_clip", "value": 2.5}]}}

    class Remote:
        def __init__(self, **resources: Any) -> None:
            self.gpus = resources["num_gpus"]

        def __call__(self, function: Any) -> Remote:
            assert function is measured
            return self

        def remote(self, job: str, path: str) -> str:
            begun.append((path.rsplit("/", 1)[-1], self.gpus))
            return path

    def get(_: Any) -> Any:
        if isinstance(state["result"], Exception):
            raise state["result"]
        return state["result"]

    monkeypatch.setattr(ray, "remote", Remote)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []) if state["ready"] else ([], refs))
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr("stages.train.evaluation.evaluation_of", lambda job, step, record: record.key)
    evaluations = Evaluations(chain, rows.append)
    for step in (101, 199, 250, 310, 450):
        evaluations.seen(step)
    assert begun == [("00000200.json", 0)] and rows == []
    state["ready"] = True
    evaluations.seen(460)
    assert rows == [{"kind": "evaluate", "step": 200, "fid_clip": 2.5}]
    told = json.loads(capsys.readouterr().out.removeprefix("@progress "))
    assert (told["phase"], told["done"], told["total"], told["fid_clip"]) == ("evaluate", 200, 600, 2.5)
    state["result"] = RuntimeError("worker died\nno space left")
    evaluations.close()
    assert [name for name, _ in begun] == ["00000200.json", "00000400.json"] and len(rows) == 1
    assert caplog.messages == ["train-256: no evaluation at step 400: no space left"]
    Evaluations(Chain(Job(chain.job.store, "train", "x", config_of(every=0), {}, {}, {}), "k", 600), rows.append).seen(450)
    assert len(begun) == 2, "none is made unless asked for"


def test_a_checkpoint_that_is_no_dataset_yet_is_measured_as_one_that_is(checkpoint: Dataset, made: Dataset, store: Store) -> None:
    job = Job(store, "train", "train-shapes", config_of(), {"data.shapes": made}, {}, {}, recipe="shapes")
    record = UnitRecord("f" * 24, "step-00000200", checkpoint.files, Stats(1, 1))
    evaluation = evaluation_of(job, 200, record)
    report = measured(evaluation, "evaluations/200.json")
    assert (report["node"], report["step"], report["checkpoint"]) == ("train-shapes", 200, "f" * 24)
    assert [figure["name"] for figure in report["figures"]] == ["clip_score_t2i", "clip_score_i2t", "clip_score_real", "fid_clip"]
    assert json.loads(store.read("evaluations/200.json")) == report
    store.remove(made.files[1].path)
    assert measured(evaluation, "evaluations/200.json") == report, "what was drawn is there"


def test_what_an_evaluation_beside_needs_is_looked_at_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one\n")
    for changes, line in (
        ({"prompts": str(tmp_path / "no.txt")}, "evaluate.prompts: .*no.txt: no such file"),
        ({"prompts": str(tmp_path / "one.txt")}, "one.txt: has 1 rows; at least 2 prompts"),
        ({"inception": str(tmp_path / "no.pth")}, "evaluate.inception: .*no.pth: no such file; it is the path of weights-incep"),
    ):
        with pytest.raises(StageError, match=line):
            check_beside(config_of(**changes).evaluate)
    with pytest.raises(StageError, match="^evaluate.prompts: field required; name a file of held-out captions"):
        check_beside_before(config_of().evaluate, {"text-codec": ()})
    check_beside_before(config_of().evaluate, {"world": ()})
