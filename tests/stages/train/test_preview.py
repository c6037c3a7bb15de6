"""Sheets of samples beside a training: of which checkpoints, one at a time, and never at the training's cost."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from infra.dataset import Dataset, FileEntry, InputRef
from infra.store import Store
from stages.runner.chain import Chain
from stages.runner.contract import RECORD, Job, Stats, UnitRecord
from stages.train.beside import PATIENCE
from stages.train.preview import Previews, draw_sheet
from stages.train.stage import TrainStageConfig
from tests.stages.committed import dataset_of


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In place of Ray: whether the sheet that was begun is ready, and how it ended."""
    state: dict[str, Any] = {"ready": False, "error": None}

    def get(_: Any) -> None:
        if state["error"]:
            raise state["error"]

    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []) if state["ready"] else ([], refs))
    monkeypatch.setattr(ray, "get", get)
    return state


def previews(tmp_path: Path, begun: list[int], count: int = 2) -> Previews:
    """Of a training whose checkpoints are all there; what is begun is noted in place of being drawn."""
    config = TrainStageConfig.model_validate(
        {"steps": 300, "checkpoint_every": 100, "global_batch": 8, "preview": {"count": count}}
    )
    chain = Chain(Job(Store(str(tmp_path)), "train", "train-256", config, {}, {}, {}), "k" * 24, config.steps)
    for step in (100, 200, 300):
        file = FileEntry(path=f"train/step-{step}", rows=1, bytes=1, sha256="0" * 64, unit=chain.key_of(step))
        record = UnitRecord(key=chain.key_of(step), name=f"step-{step}", files=[file], stats=Stats())
        chain.job.store.write(f"{chain.job.unit_folder(record.key)}/unit.json", RECORD.dump_json(record))
    found = Previews(chain)

    def begin(step: int, record: UnitRecord) -> None:
        _, (_, files, _) = found.work(step, record)
        assert [entry.path for entry in files] == [f"train/step-{step}"], "a sheet is of the checkpoint that it names"
        begun.append(step)
        found.last, found.running = step, object()

    found._begin = begin  # type: ignore[method-assign]
    return found


def test_one_sheet_at_a_time_of_the_newest_checkpoint_but_the_last(
    tmp_path: Path, drawing: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[int] = []
    sheets = previews(tmp_path, begun)
    for step in (50, 100):
        sheets.seen(step)
    assert begun == [], "the checkpoint of step 100 is written after the row of step 100"
    for step in (110, 150, 210):
        sheets.seen(step)
    assert begun == [100] and capsys.readouterr().out == ""
    drawing["ready"] = True
    sheets.seen(250)
    fields = json.loads(capsys.readouterr().out.removeprefix("@progress "))
    assert (fields["phase"], fields["done"], fields["total"]) == ("preview", 100, 300) and fields["picture"] == sheets.path
    assert begun == [100, 200]
    sheets.seen(300)
    assert '"done": 200' in capsys.readouterr().out
    sheets.seen(300)
    sheets.close()
    assert begun == [100, 200], "evaluate draws the last one, and none is drawn twice"


def test_training_waits_for_a_sheet_that_is_being_drawn_but_not_for_ever(
    tmp_path: Path, drawing: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patience: list[float] = []
    answer = ray.wait
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (patience.append(timeout), answer(refs, timeout))[1])
    begun: list[int] = []
    sheets = previews(tmp_path, begun)
    sheets.close()
    assert patience == [], "nothing was begun"
    sheets.seen(150)
    sheets.seen(160)
    sheets.close()
    assert (patience, begun) == ([0.0, PATIENCE], [100]) and capsys.readouterr().out == ""


def test_a_sheet_that_fails_is_a_warning_and_the_next_is_drawn(
    tmp_path: Path, drawing: dict[str, Any], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[int] = []
    sheets = previews(tmp_path, begun)
    drawing.update(ready=True, error=RuntimeError("worker died\nno space left"))
    sheets.seen(150)
    sheets.seen(250)
    assert begun == [100, 200] and caplog.messages == ["train-256: no sheet of samples at step 100: no space left"]
    assert capsys.readouterr().out == ""


def test_none_are_drawn_unless_asked_for(tmp_path: Path, drawing: dict[str, Any]) -> None:
    begun: list[int] = []
    sheets = previews(tmp_path, begun, count=0)
    sheets.seen(250)
    sheets.close()
    assert begun == []


def test_a_sheet_is_drawn_by_the_moving_average_for_the_first_captions_of_the_data(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dataset(stage: str, inputs: dict[str, InputRef], **files: bytes) -> Dataset:
        for name, content in files.items():
            (tmp_path / stage).mkdir(exist_ok=True)
            (tmp_path / stage / name.replace("_", ".")).write_bytes(content)
        return dataset_of(store, stage, tmp_path / stage, inputs)

    parquet = io.BytesIO()
    pq.write_table(pa.table({"caption": ["one", "two", "three"], "key": ["a", "b", "c"]}), parquet, write_page_checksum=True)
    codec = dataset("text-codec", {}, codec_json=b"{}")
    data = dataset("encode", {"codec": codec.manifest.reference()}, shard_parquet=parquet.getvalue())
    checkpoint = dataset("train", {}, config_json=b"{}", ema_safetensors=b"average", model_safetensors=b"last")
    config = {"steps": 300, "global_batch": 8, "preview": {"count": 4, "steps": 7, "guidance": 2.0}}
    job = Job(store, "train", "train-x", TrainStageConfig.model_validate(config), {"data.a": data}, {}, {})
    asked: list[tuple[str, list[int], Any]] = []

    class Model:
        def generate(self, task: str, seeds: range, steps: int, guidance: float, **wanted: Any) -> list[Any]:
            assert (steps, guidance) == (7, 2.0)
            asked.append((task, list(seeds), wanted.get("prompts", wanted.get("count"))))
            return [SimpleNamespace(image=Image.new("RGB", (8, 8), "red"), caption="said")] * len(seeds)

    def load(folder: Path, device: str) -> Model:
        assert (folder / "uvit" / "model.safetensors").read_bytes() == b"average"
        assert (folder / "text_codec" / "codec.json").read_bytes() == b"{}"
        return Model()

    monkeypatch.setattr("unidiffuser.generation.UniDiffuser.load", load)
    draw_sheet(job, checkpoint.files, "sheets/x.png")
    # Fewer captions than samples: again from the first.
    first = ["one", "two", "three", "one"]
    assert asked == [(task, [0, 1, 2, 3], first if task == "t2i" else 4) for task in ("t2i", "joint", "i", "t")]
    with Image.open(io.BytesIO(store.read("sheets/x.png"))) as sheet:
        assert sheet.format == "PNG"
    store.remove(f"{codec.folder}/manifest.json")
    with pytest.raises(FileNotFoundError, match="the text codec of the latents is no longer in the store"):
        draw_sheet(job, checkpoint.files, "sheets/x.png")
