"""export: one folder that samples without the store, and the same model for diffusers beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import UniDiffuserPipeline

from infra.dataset import Dataset, verify
from infra.store import Store
from stages.evaluate.export import Export
from tests.stages.committed import dataset_of
from tests.unidiffuser.test_generation import export  # noqa: F401
from unidiffuser.generation import UniDiffuser
from unidiffuser.layouts import set_layout


@pytest.fixture
def exported(export: Path, store: Store, make: Callable[..., Dataset], in_process: None, tmp_path: Path) -> Dataset:  # noqa: F811
    """An export of a small network with the other parts of an export folder, for diffusers and in the official layout too."""
    (tmp_path / "train").mkdir()
    shutil.copy(export / "uvit" / "config.json", tmp_path / "train")
    for name in ("model", "ema"):
        shutil.copy(export / "uvit" / "model.safetensors", tmp_path / "train" / f"{name}.safetensors")
    inputs = {
        "checkpoint": dataset_of(store, "train", tmp_path / "train", {}),
        "codec": dataset_of(store, "text-codec", export / "text_codec", {}),
    }
    return make(Export, store, inputs, vae=str(export / "vae"), layouts=["diffusers", "official"])


def test_every_layout_is_there_whole_and_in_the_manifest(export: Path, exported: Dataset, tmp_path: Path) -> None:  # noqa: F811
    assert verify(exported) == []
    names = {entry.name for entry in exported.files}
    assert {
        "uvit/model.safetensors",
        "provenance.json",
        "README.md",
        "diffusers/model_index.json",
        "official/uvit_v0.pth",
    } <= names
    folder = exported.fetch(tmp_path / "folder")
    assert [set_layout(folder / name) for name in ("", "diffusers", "official")] == ["native", "diffusers", "official"]
    assert (folder / "uvit" / "model.safetensors").read_bytes() == (export / "uvit" / "model.safetensors").read_bytes()
    told = json.loads((folder / "provenance.json").read_text())
    checkpoint, codec = (exported.manifest.inputs[name].fingerprint for name in ("checkpoint", "codec"))
    assert (told["stage"], told["fingerprint"], told["recipe"], told["weights"]) == ("train", checkpoint, "test", "ema")
    assert told["made_from"] == {"codec": codec} and [each["fingerprint"] for each in told["datasets"]] == [codec]
    for layout in ("diffusers", "official"):
        assert json.loads((folder / layout / "provenance.json").read_text()) == told

    assert UniDiffuser.load(folder).generate("i", steps=2)[0].image is not None
    pipeline = UniDiffuserPipeline.from_pretrained(folder / "diffusers")
    assert pipeline(prompt="a lion", num_inference_steps=2, height=32, width=32).images[0].size == (32, 32)
