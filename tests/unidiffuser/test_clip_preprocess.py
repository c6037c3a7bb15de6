"""How a CLIP sees pictures, against open_clip's own transform; and that what is cut off is never made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.nn.functional import cosine_similarity

from unidiffuser.clip_preprocess import Preprocess
from unidiffuser.encoders import ClipEncoder
from unidiffuser.references import EMBEDDED
from unidiffuser.tensors import WeightsError

MEAN_AND_STD = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def picture(width: int, height: int) -> Image.Image:
    """Waves of three colours, smooth as photographs are."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = np.stack([np.sin(9 * x), np.cos(7 * y), np.sin(5 * (x + y))], axis=-1)
    return Image.fromarray((127.5 + 127 * waves).astype(np.uint8))


def clip_with(folder: Path, **preprocess: object) -> Path:
    """The embedded CLIP with other settings of preprocessing."""
    shutil.copytree(EMBEDDED / "clip", folder)
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["preprocess_cfg"] |= preprocess
    file.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [48, (40, 56), (56, 40)])
def test_pixels_are_those_of_open_clips_transform(mode, interpolation, size):
    told = {"size": size, "resize_mode": mode, "interpolation": interpolation, "fill_color": 77, **MEAN_AND_STD}
    transform, ours = image_transform_v2(PreprocessCfg(**told), is_train=False), Preprocess.read(told, "a CLIP")
    for shape in ((200, 90), (90, 200), (48, 48), (20, 30), (131, 129)):
        wanted = transform(picture(*shape))
        seen = ours.normalised(ours.pixels([picture(*shape)]))[0]
        assert seen.shape == wanted.shape
        levels = (seen - wanted).abs() * torch.tensor(MEAN_AND_STD["std"])[:, None, None] * 255
        assert levels.max() < 2.5, shape


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_embeddings_are_those_of_open_clips_transform(mode, tmp_path):
    clip = ClipEncoder.load(str(clip_with(tmp_path / "clip", resize_mode=mode, fill_color=255, interpolation="bilinear")))
    pixels = np.zeros((100, 400, 3), np.uint8)
    pixels[:, :150, 0] = pixels[:, 150:250, 1] = pixels[:, 250:, 2] = 255
    wide = Image.fromarray(pixels)
    transform = image_transform_v2(PreprocessCfg(**clip.model.visual.preprocess_cfg), is_train=False)
    wanted = clip.model.encode_image(transform(wide)[None])
    assert cosine_similarity(clip.image([wide]), wanted).item() > 0.9999


def test_a_saved_model_sees_as_it_did(tmp_path):
    told = {"resize_mode": "longest", "fill_color": 200, "interpolation": "bilinear"}
    first = ClipEncoder.load(str(clip_with(tmp_path / "clip", **told)))
    first.save(tmp_path / "saved")
    again = ClipEncoder.load(str(tmp_path / "saved"))
    assert again.preprocess == first.preprocess
    assert {name: getattr(again.preprocess, name) for name in told} == told


@pytest.mark.parametrize("shape", [(500, 1), (1, 10_000)])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_nothing_larger_than_what_is_seen_is_made_of_a_thin_picture(shape, mode, monkeypatch):
    made, resize = [], Image.Image.resize

    def recorded(image: Image.Image, size: tuple[int, int], *rest: object, **more: object) -> Image.Image:
        made.append(size)
        return resize(image, size, *rest, **more)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    seen = Preprocess.read({"size": 224, "resize_mode": mode}, "a CLIP").pixels([picture(*shape)])
    assert seen.shape == (1, 3, 224, 224)
    assert all(max(size) <= 224 for size in made)


def test_the_middle_of_a_strip_is_what_is_seen():
    strip = np.zeros((1, 501, 3), np.uint8)
    strip[0, 240:261] = (10, 200, 30)
    seen = Preprocess.read({"size": 64}, "a CLIP").pixels([Image.fromarray(strip)])
    assert torch.equal(seen[0, :, 0, 0], torch.tensor([10, 200, 30], dtype=torch.uint8))
    assert (seen == seen[:, :, :1, :1]).all()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"resize_mode": "stretch"}, "resize_mode 'stretch'"),
        ({"interpolation": "nearest"}, "interpolation 'nearest'"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"std": [0.5, 0.5, 0]}, "std"),
        ({"fill_color": 300}, "fill_color 300"),
        ({"mode": "L"}, "mode 'L'"),
        ({"crop_pct": 0.9}, "crop_pct"),
    ],
)
def test_what_open_clip_does_not_know_is_refused_by_name(told, message, tmp_path):
    folder = clip_with(tmp_path / "clip", **told)
    with pytest.raises(WeightsError, match=message) as error:
        ClipEncoder.load(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
