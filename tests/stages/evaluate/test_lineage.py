"""What a checkpoint says it was made from: every dataset once, behind what it was made from itself."""

from __future__ import annotations

from pathlib import Path

from infra.dataset import Dataset, InputRef
from infra.store import Store
from stages.drawing.lineage import provenance
from stages.evaluate.export import ExportConfig
from stages.runner.contract import Job
from tests.stages.committed import dataset_of


def test_a_checkpoint_tells_its_training_and_all_that_came_before_it(store: Store, tmp_path: Path) -> None:
    def made(stage: str, **inputs: Dataset | InputRef) -> Dataset:
        references = {name: d if isinstance(d, InputRef) else d.manifest.reference() for name, d in inputs.items()}
        return dataset_of(store, stage, tmp_path / "nothing", references)

    (tmp_path / "nothing").mkdir()
    gone = InputRef(stage="train", fingerprint="0" * 24)
    select = made("select")
    codec = made("text-codec", captions=select)
    filtered = made("filter", images=select)
    encode = made("encode", shards=filtered, codec=codec)
    train = made("train", **{"data.little": encode, "init": gone})
    train.manifest.summary["step"] = 7
    train.manifest.code["git"] = "0123456789ab+"
    train.manifest.config["global_batch"] = 4

    job = Job(
        store, "export", "export", ExportConfig(weights="model"), {"checkpoint": train, "codec": codec}, {}, {}, recipe="mine"
    )
    told = provenance(job)
    assert {name: told[name] for name in ("recipe", "node", "stage", "step", "weights", "commit", "config")} == {
        "recipe": "mine", "node": "x-train", "stage": "train", "step": 7, "weights": "model", "commit": "0123456789ab+",
        "config": {"global_batch": 4},
    }  # fmt: skip
    prints = {d.manifest.stage: d.manifest.fingerprint for d in (select, codec, filtered, encode)}
    assert told["made_from"] == {"data.little": prints["encode"], "init": "0" * 24, "codec": prints["text-codec"]}
    names = [each["stage"] for each in told["datasets"]]
    assert sorted(names) == ["encode", "filter", "select", "text-codec", "train"]
    before = {"select": [], "text-codec": ["select"], "filter": ["select"], "encode": ["filter", "text-codec"], "train": []}
    for number, each in enumerate(told["datasets"]):
        assert set(before[each["stage"]]) <= set(names[:number])
        if each["stage"] == "train":
            assert each == {"stage": "train", "fingerprint": "0" * 24, "made_from": {}}  # no longer in the store
        else:
            assert each["fingerprint"] == prints[each["stage"]] and (each["rows_in"], each["rows_out"]) == (1, 1)
            assert set(each["made_from"].values()) == {prints[one] for one in before[each["stage"]]}


def test_an_evaluation_tells_every_figure_of_its_report_and_no_curve(store: Store, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    train, codec, evaluation = (
        dataset_of(store, stage, tmp_path / "nothing", {}) for stage in ("train", "text-codec", "evaluate")
    )

    def told(summary: dict) -> dict:
        evaluation.manifest.summary = summary
        inputs = {"checkpoint": train, "codec": codec, "evaluation": evaluation}
        return provenance(Job(store, "export", "export", ExportConfig(), inputs, {}, {}, recipe="mine"))["evaluation"]

    nested = {"prompts": 200, "preference": {"text_to_image": 0.75}, "validation_loss": {"train-256": [[1, 0.5]]}, "drawn": True}
    found = [{"name": "prompts", "value": 200}, {"name": "preference text_to_image", "value": 0.75}]
    assert told(nested) == {"fingerprint": evaluation.manifest.fingerprint, "figures": found}
    named = {"name": "fid", "value": 12.5, "better": "lower", "samples": 100, "note": "of fewer than 2,048 samples", "by": ""}
    assert told({"figures": [named], "seed": 0})["figures"] == [{name: value for name, value in named.items() if name != "by"}]
    without = Job(store, "export", "export", ExportConfig(), {"checkpoint": train, "codec": codec}, {}, {}, recipe="mine")
    assert "evaluation" not in provenance(without)
