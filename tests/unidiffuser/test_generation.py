"""Prompts and pictures in, pictures and captions out, through an export folder of small parts."""

from __future__ import annotations

import io
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from unidiffuser.encoders import ClipEncoder, ImageLatents
from unidiffuser.generation import UniDiffuser
from unidiffuser.images import to_rgb, to_square
from unidiffuser.modalities import paper_modalities
from unidiffuser.references import EMBEDDED
from unidiffuser.text_decoder import TextCodec
from unidiffuser.uvit import UViT, UViTConfig
from unidiffuser.weights import save_native


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export folder with an untrained autoencoder, text codec and U-ViT, and the embedded CLIP."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("export")
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1,
    )  # fmt: skip
    ImageLatents(vae).save(str(folder / "vae"))
    for name in ("clip_image", "clip_text"):
        shutil.copytree(EMBEDDED / "clip", folder / name)
    clip = ClipEncoder.load("embedded")
    TextCodec.new("embedded", clip.text_width, 8).save(folder / "text_codec")
    modalities = paper_modalities((4, 8, 8), clip=clip.embed_dim, text=(clip.context_length, 8))
    model = UViT(UViTConfig(width=32, depth=2, heads=2, modalities=modalities, position_std=0.5))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_native(folder / "uvit", model)
    return folder


@pytest.fixture(scope="module")
def model(export: Path) -> UniDiffuser:
    return UniDiffuser.load(export)


def noise_image(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PROMPTS = ["a small panda", "a large red apple on a blue background"]
REQUESTS = {
    "t2i": ({"prompts": PROMPTS}, True, False, 4),
    "i2t": ({"images": [noise_image(0), noise_image(1)]}, False, True, 4),
    "joint": ({}, True, True, 2),
    "i": ({}, True, False, 2),
    "t": ({}, False, True, 2),
    "i2t2i": ({"images": [noise_image(0), noise_image(1)]}, True, True, 4),
    "t2i2t": ({"prompts": PROMPTS}, True, True, 4),
    "gibbs": ({"prompts": PROMPTS}, True, True, 4),
    "interpolate": ({"images": [noise_image(0), noise_image(1)]}, True, True, 2),
}


@pytest.mark.parametrize("task", REQUESTS)
def test_every_task_returns_what_it_draws_for_every_input(model, task):
    inputs, has_image, has_caption, results = REQUESTS[task]
    drawn = model.generate(task, **inputs, count=2, steps=3, guidance=1.0, beams=1)
    assert [result.seed for result in drawn] == ([0, 0] if task == "interpolate" else list(range(results)))
    assert [result.source for result in drawn] == ([0, 0, 1, 1] if results == 4 else [0, 0])
    for result in drawn:
        assert isinstance(result.image, Image.Image) == has_image
        assert isinstance(result.caption, str) == has_caption
        assert result.image is None or (result.image.size == (32, 32) and result.image.mode == "RGB")


def test_batch_size_changes_nothing_and_seeds_do(model):
    def draw(**settings):
        drawn = model.generate("t2i", prompts=PROMPTS, count=2, steps=4, guidance=2.0, **settings)
        return np.stack([np.asarray(result.image, dtype=int) for result in drawn])

    whole = draw(batch=4)
    assert np.abs(whole - draw(batch=1)).max() <= 1
    assert np.abs(whole - draw(seeds=[0, 9, 2, 3]))[[0, 2, 3]].max() <= 1
    assert np.abs(whole[1] - draw(seeds=[0, 9, 2, 3])[1]).max() > 1


@pytest.mark.parametrize(("task", "rows"), [("t2i", 2), ("joint", 3), ("i", 1)])
def test_guidance_costs_rows_of_one_call_and_no_further_call(model, task, rows):
    sizes = []
    hook = model.uvit.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0]["latent"])))
    inputs = {"prompts": PROMPTS} if task == "t2i" else {"count": 2}
    model.generate(task, **inputs, steps=5, guidance=3.0, beams=1)
    hook.remove()
    assert sizes == [2 * rows] * 5


def test_another_size_is_drawn_with_interpolated_positions(model):
    assert model.size == 32
    assert model.generate("joint", steps=2, size=48, beams=1)[0].image.size == (48, 48)
    with pytest.raises(ValueError, match="multiple of 8"):
        model.generate("joint", steps=2, size=50)


def test_the_network_is_given_the_encoded_inputs(model, monkeypatch):
    seen = {}

    def record(uvit, task, modalities, batch, steps, guidance, seeds, sampler, condition, *rest, **more):
        seen.update(condition)
        return {"text": torch.zeros(len(seeds), model.clip_text.context_length, 8)}

    monkeypatch.setattr("unidiffuser.generation.sample", record)
    image = noise_image(3, (32, 32))
    model.generate("i2t", images=[image], beams=1)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latent = model.vae.model.encode(pixels).latent_dist.mean * model.vae.scaling_factor
    torch.testing.assert_close(seen["latent"], latent, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen["clip"], model.clip_image.image([image]), atol=1e-5, rtol=1e-5)
    model.generate("t2i2t", prompts=PROMPTS[:1], beams=1)
    projection = model.text_codec.projection
    with torch.no_grad():
        expected = model.clip_text.tokens(PROMPTS[:1]) @ projection.weight.T + projection.bias
    torch.testing.assert_close(seen["text"], expected)


def test_empty_long_and_foreign_prompts_work_and_say_what_was_cut(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate("t2i", prompts=["", PROMPTS[1]], steps=1)
    long = " ".join(["a small panda on the left of a pink background"] * 8)
    with pytest.warns(UserWarning, match=f"more than the {model.clip_text.context_length} tokens") as caught:
        model.generate("t2i", prompts=[long], steps=1)
    kept = str(caught[0].message).split("cut after: ")[1].strip("'")
    assert long.startswith(kept) and 4 < len(kept.split()) < model.clip_text.context_length
    assert len(model.generate("t2i", prompts=["ein großer roter Apfel"], steps=1)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(model.generate("t2i", prompts=["一只熊猫"], steps=1)) == 1
    with pytest.warns(UserWarning, match="cut after: '一只熊猫"):  # no spaces to cut at
        model.generate("t2i", prompts=["一只熊猫" * 20], steps=1)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"task": "t2v"}, "no task named 't2v'"),
        ({"task": "t2i"}, "t2i takes prompts"),
        ({"task": "i2t", "prompts": PROMPTS}, "i2t takes images"),
        ({"task": "joint", "prompts": PROMPTS}, "joint takes neither"),
        ({"task": "interpolate", "images": [noise_image(0)]}, "takes two images, not 1"),
        (
            {"task": "interpolate", "images": [noise_image(0)] * 2, "sampler": "dpm++2m-sde"},
            r"interpolate takes a sampler that adds no noise \(dpm.*, ddim, era\), not dpm\+\+2m-sde",
        ),
        ({"task": "t2i", "prompts": PROMPTS, "seeds": [1]}, "2 results need 2 seeds, not 1"),
        ({"task": "joint", "sampler": "euler"}, "no sampler named 'euler'; there are dpm"),
        ({"task": "joint", "condition_t": 5}, "condition_t goes with t2i and i2t, not with joint"),
        ({"task": "t2i", "prompts": PROMPTS, "condition_t": -1}, "condition_t must be in 0 .. 1000, not -1"),
        ({"task": "joint", "guidance_interval": (5, 1001)}, "guidance_interval must be two timesteps in 0 .. 1000"),
        ({"task": "gibbs", "prompts": PROMPTS, "images": [noise_image(0)]}, "gibbs starts from prompts or from images"),
    ],
)
def test_wrong_requests_are_named(model, request_, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**request_, steps=1)


def test_an_incomplete_folder_is_named(export, tmp_path):
    for name in ("uvit", "text_codec"):
        shutil.copytree(export / name, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="not an export folder, it lacks vae, clip_image, clip_text"):
        UniDiffuser.load(tmp_path)


def reopened(image: Image.Image, kind: str, **settings) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return Image.open(file)


def test_images_of_every_kind_become_the_rgb_that_one_sees():
    red = Image.new("RGB", (6, 4), (255, 0, 0))
    assert to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    half = to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 128))).getpixel((0, 0))
    assert half == pytest.approx((255, 127, 127), abs=1)
    assert to_rgb(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(reopened(red.convert("CMYK"), "JPEG")).getpixel((0, 0)) == pytest.approx((255, 0, 0), abs=3)

    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 255, 9, 9, 9])
    assert to_rgb(reopened(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)

    grey = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert [to_rgb(reopened(grey, "PNG")).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    dark = Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint16))
    assert [to_rgb(dark).getpixel((x, 0))[0] for x in range(3)] == [0, 0, 1]
    for top in (1, 255):
        floats = Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32) * top)
        assert [to_rgb(reopened(floats, "TIFF")).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    assert to_rgb(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("L", (2, 2), 77)).getpixel((0, 0)) == (77, 77, 77)

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert to_rgb(reopened(red, "JPEG", exif=exif)).size == (4, 6)

    green = Image.new("RGB", (6, 4), (0, 255, 0))
    animated = reopened(red, "GIF", save_all=True, append_images=[green])
    animated.seek(1)
    assert to_rgb(animated).getpixel((0, 0)) == (255, 0, 0)
    moving = reopened(red, "WEBP", save_all=True, append_images=[green], lossless=True)
    moving.seek(1)
    assert to_rgb(moving).getpixel((0, 0)) == (255, 0, 0)


def test_to_square_takes_the_middle():
    image = Image.new("RGB", (90, 30), (0, 0, 0))
    image.paste((255, 255, 255), (30, 0, 60, 30))
    assert np.asarray(to_square(image, 30)).min() == 255


def test_the_transparent_level_of_a_grey_picture_of_16_bits_becomes_white():
    grey = Image.fromarray(np.array([[0, 1000, 65535]], dtype=np.uint16))
    for clear, seen in ((0, [255, 4, 255]), (1000, [0, 255, 255]), (1001, [0, 4, 255])):
        shown = to_rgb(reopened(grey, "PNG", transparency=clear))
        assert [shown.getpixel((x, 0)) for x in range(3)] == [(level,) * 3 for level in seen]


def test_pictures_are_taken_as_one_sees_them(model, monkeypatch):
    def record(uvit, task, modalities, batch, steps, guidance, seeds, sampler, condition, *rest, **more):
        seen.update(condition)
        return {"text": torch.zeros(len(seeds), model.clip_text.context_length, 8)}

    def given(image: Image.Image) -> np.ndarray:
        model.generate("i2t", images=[image], beams=1)
        return torch.cat([seen["latent"].flatten(), seen["clip"].flatten()]).numpy()

    seen = {}
    monkeypatch.setattr("unidiffuser.generation.sample", record)

    upright = noise_image(7)
    stored, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert np.array_equal(given(reopened(stored, "PNG", exif=exif)), given(upright))
    assert not np.array_equal(given(stored), given(upright))

    half = Image.new("L", upright.size, 255)
    half.paste(0, (0, 0, 20, 32))
    clear, backed = upright.copy(), upright.copy()
    clear.putalpha(half)
    backed.paste((255, 255, 255), (0, 0, 20, 32))
    assert np.array_equal(given(clear), given(backed))
    assert not np.array_equal(given(backed), given(upright))
