"""Settings of other layouts that travel with their weights: kept on the way there and back, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessor

from tests.unidiffuser.test_clip_preprocess import clip_with, picture
from tests.unidiffuser.test_generation import export  # noqa: F401
from unidiffuser.clip_towers import image_processor, image_tower, write_image_tower
from unidiffuser.encoders import ClipEncoder
from unidiffuser.layouts import convert, load_uvit
from unidiffuser.pipeline_import import import_pipeline
from unidiffuser.tensors import WeightsError


@pytest.fixture(scope="module")
def pipeline(export, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("foreign") / "pipeline"
    convert(export, folder, "diffusers")
    return folder


def changed(folder: Path, file: str, **settings: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    "told",
    [{"resize_mode": "squash", "interpolation": "bilinear"}, {"resize_mode": "shortest", "mean": [0.1, 0.2, 0.3]}],
)
def test_preprocessing_goes_there_and_back(told, tmp_path):
    clip = ClipEncoder.load(str(clip_with(tmp_path / "clip", **told)))
    image_processor(clip).save_pretrained(tmp_path / "processor")
    theirs = CLIPImageProcessor.from_pretrained(tmp_path / "processor")
    seen = theirs(picture(200, 120), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, clip._preprocess([picture(200, 120)]), atol=0.03, rtol=0)
    write_image_tower(tmp_path / "back", image_tower(clip), theirs, "a pipeline")
    back = ClipEncoder.load(str(tmp_path / "back"))
    assert (back.preprocess.resize_mode, back.preprocess.interpolation) == (
        clip.preprocess.resize_mode,
        clip.preprocess.interpolation,
    )
    torch.testing.assert_close(back.image([picture(200, 120)]), clip.image([picture(200, 120)]))


def test_bars_are_nothing_that_transformers_has(tmp_path):
    clip = ClipEncoder.load(str(clip_with(tmp_path / "clip", resize_mode="longest")))
    with pytest.raises(WeightsError, match=f"{clip.ref}: resize_mode longest"):
        image_processor(clip)


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction_type 'v_prediction', not 'epsilon'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule 'linear', not 'scaled_linear'"),
        ("scheduler/scheduler_config.json", {"beta_end": 2}, "beta_end"),
        ("clip_image_processor/preprocessor_config.json", {"do_normalize": False}, "do_normalize False"),
        ("clip_image_processor/preprocessor_config.json", {"resample": 0}, "resample"),
        ("clip_image_processor/preprocessor_config.json", {"size": {"shortest_edge": 300}}, "for an image_size of 96"),
        ("image_encoder/config.json", {"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"),
        ("image_encoder/config.json", {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ("unet/config.json", {"norm_type": "ada_norm"}, "norm_type is 'ada_norm'"),
        ("vae/config.json", {"shift_factor": 0.5}, "shift_factor 0.5"),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(pipeline, file, settings, message, tmp_path):
    folder = changed(shutil.copytree(pipeline, tmp_path / "pipeline"), file, **settings)
    with pytest.raises(WeightsError, match=message) as error:
        convert(folder, tmp_path / "back", "native")
    assert str(folder / file.split("/")[0]).removesuffix("clip_image_processor") in str(error.value)
    assert not (tmp_path / "back").exists()


def test_another_pipeline_of_diffusers_is_refused_by_its_name(pipeline, tmp_path):
    folder = changed(shutil.copytree(pipeline, tmp_path / "pipeline"), "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(WeightsError, match=f"{folder}: a StableDiffusionPipeline, expected a UniDiffuserPipeline"):
        import_pipeline(folder, tmp_path / "back")


def test_a_text_decoder_without_the_projection_of_the_latent_is_refused(pipeline, tmp_path):
    folder = changed(shutil.copytree(pipeline, tmp_path / "pipeline"), "text_decoder/config.json", prefix_hidden_dim=None)
    with pytest.raises(WeightsError, match="text_decoder: has no projection of the text latent"):
        convert(folder, tmp_path / "back", "native")


def test_a_file_that_comes_to_be_there_meanwhile_is_kept(export, tmp_path, monkeypatch):  # noqa: F811
    target = tmp_path / "uvit.pth"

    def late(*arguments: Any) -> Any:
        target.write_bytes(b"somebody else's")
        return load_uvit(*arguments)

    monkeypatch.setattr("unidiffuser.layouts.load_uvit", late)
    with pytest.raises(FileExistsError, match="uvit.pth exists: choose another name"):
        convert(export / "uvit", target, "official")
    assert target.read_bytes() == b"somebody else's" and list(tmp_path.iterdir()) == [target]
