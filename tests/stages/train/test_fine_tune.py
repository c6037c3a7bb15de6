"""The shipped recipe that fine-tunes published weights, from own images to an export, on small weights of the same layouts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniDiffuserPipeline
from peft import PeftModel

from infra.dataset import Dataset
from infra.store import Store
from stages.catalog import stage_class
from stages.runner.graph import plan
from stages.runner.recipe import RecipeError, load_recipe
from stages.runner.run import run_stage
from tests.unidiffuser.test_generation import export, noise_image  # noqa: F401
from training.loop import run
from unidiffuser.generation import UniDiffuser
from unidiffuser.layouts import convert, load_uvit
from unidiffuser.tensors import read_tensors
from unidiffuser.text_decoder import TextCodec
from unidiffuser.uvit import UViT, UViTConfig
from unidiffuser.weights import load_native, save_native

RECIPE = Path(__file__).parent.parent.parent.parent / "configs" / "fine-tune.yaml"
IMAGES = 24


@pytest.fixture(scope="module")
def published(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The official files of version 0 in `v0` and of version 1 in `v1`, a pipeline of diffusers, and the encoders beside them."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(export, folder / "export")
    convert(export, folder / "v0", "official")
    convert(export, folder / "pipeline", "diffusers")
    token = UViT(UViTConfig(**{**load_native(export / "uvit").config.model_dump(), "data_type_token": True}))
    for parameter in token.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_native(folder / "export" / "uvit", token)
    convert(folder / "export", folder / "v1", "official")
    (folder / "images").mkdir()
    for number in range(IMAGES):
        noise_image(number).save(folder / "images" / f"{number:02}.png")
        (folder / "images" / f"{number:02}.txt").write_text(f"picture {number} of a small panda")
    return folder


@pytest.fixture
def tune(
    published: Path, store: Store, in_process: None, alone: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Dataset]]:
    """(overrides) -> the datasets of all nodes of the recipe, made one after the other in this process."""

    def train(plan: Any, on_row: Callable[[Any], None]) -> Any:
        return run(plan(), torch.device("cpu"), on_row=on_row)

    monkeypatch.setattr("training.launch.train", train)

    def make(*overrides: str, version: str = "v1") -> dict[str, Dataset]:
        changes = [
            "name=tune",
            "encoders.clip=embedded", "encoders.text=embedded", "encoders.gpt2=embedded", f"encoders.vae={published}/export/vae",
            f"subsets.mine.folder.images=[{published}/images/*]", "subsets.mine.encode.size=32",
            "subsets.mine.filter={min_side: 32, clip_scores: false}",
            f"text-codec.weights={published}/{version}/caption_decoder.pth", "text-codec.latent_width=8", "text-codec.beams=1",
            f"train.tune.weights={published}/{version}/uvit_{version}.pth",
            "train.tune.model.width=32", "train.tune.model.depth=2", "train.tune.model.heads=2",
            "train.tune.steps=2", "train.tune.precision=fp32", "train.tune.validation.fraction=0.2",
        ]  # fmt: skip
        if version == "v0":
            changes += ["train.tune.model.data_type_token=false", "train.tune.data.data_type=null"]
        recipe = load_recipe(RECIPE, [*changes, *overrides])
        planned = plan(recipe, store)
        return {name: run_stage(node, store, stage_class(node.stage)) for name, node in planned.items()}

    return make


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b) and [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_from_own_images_and_published_weights_to_an_export(
    tune: Callable[..., dict[str, Dataset]], published: Path, tmp_path: Path, version: str
) -> None:
    before = {file: read_tensors(published / version / file) for file in (f"uvit_{version}.pth", "caption_decoder.pth")}
    untouched = tune("train.tune.steps=0", "export.layouts=[official]", version=version)
    exported = untouched["export"].fetch(tmp_path / "untouched")
    for file, tensors in before.items():
        assert_same(read_tensors(exported / "official" / file), tensors)
    assert untouched["mine-encode"].manifest.stats.rows_out == IMAGES
    assert untouched["text-codec"].manifest.summary["history"] == []

    made = tune(version=version)
    assert made["text-codec"].manifest.fingerprint == untouched["text-codec"].manifest.fingerprint
    folder = made["export"].fetch(tmp_path / "tuned")
    tuned = read_tensors(folder / "official" / f"uvit_{version}.pth")
    moved = [(tuned[name] - tensor).abs().max().item() for name, tensor in before[f"uvit_{version}.pth"].items()]
    assert 0 < max(moved) < 1e-5  # two steps of a warm-up to 1e-5
    picture = UniDiffuser.load(folder).generate("t2i", prompts="a small panda", steps=2)[0].image
    assert np.asarray(picture).shape == (32, 32, 3)
    pipeline = UniDiffuserPipeline.from_pretrained(folder / "diffusers")
    assert pipeline(prompt="a small panda", num_inference_steps=2, height=32, width=32).images[0].size == (32, 32)


def test_adapters_are_exported_merged_and_apart(tune: Callable[..., dict[str, Dataset]], published: Path, tmp_path: Path) -> None:
    made = tune("train.tune.lora={rank: 2}", "train.tune.optimizer.lr=0.1", "export.layouts=[]", version="v0")
    folder = made["export"].fetch(tmp_path / "export")
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    base = load_uvit(published / "v0" / "uvit_v0.pth", heads=2, text_tokens=16)
    merged, unmerged = load_native(folder / "uvit"), PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    x = {part.name: torch.randn(2, *part.shape) for modality in merged.config.modalities for part in modality.parts}
    with torch.no_grad():
        ours, theirs = (network(x, {"image": 300, "text": 700}) for network in (merged, unmerged))
        assert not torch.allclose(ours["latent"], load_uvit(published / "v0", 2, 16)(x, {"image": 300, "text": 700})["latent"])
    for part in ours:
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=1e-6)
    with pytest.raises(RecipeError, match="train.tune: lora trains adapters on given weights, and nothing else: name them in"):
        tune("train.tune.lora={}", "train.tune.weights=null")


def test_the_codec_may_come_from_a_pipeline_or_an_export_and_must_fit(
    tune: Callable[..., dict[str, Dataset]], published: Path, tmp_path: Path
) -> None:
    expected = dict(TextCodec.load(published / "export" / "text_codec").state_dict())
    for source in ("pipeline", "export"):
        made = tune("train.tune.steps=0", "export=null", f"text-codec.weights={published}/{source}")["text-codec"]
        assert_same(dict(TextCodec.load(made.fetch(tmp_path / source)).state_dict()), expected)
    for override, line in (
        ("text-codec.latent_width=9", r"caption_decoder.pth: set text-codec.latent_width: 8 \(now 9\)$"),
        (
            f"text-codec.weights={published}/images",
            ".*images: no text codec there; expected caption_decoder.pth",
        ),
        (f"text-codec.weights={published}/v1/uvit_v1.pth", "no encode_prefix.weight; this is no caption_decoder.pth$"),
        ("text-codec.weights=gone.pth", ".*gone.pth: no such file"),
    ):
        with pytest.raises(RecipeError, match=f"^text-codec.*{line}"):
            tune(override)
