"""`import unidiffuser` as a person uses it in a notebook: one prompt, one picture, whatever form it has."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import unidiffuser
from tests.unidiffuser.test_generation import export, model, noise_image  # noqa: F401
from unidiffuser.generation import UniDiffuser
from unidiffuser.layouts import convert
from unidiffuser.pictures import as_pictures
from unidiffuser.references import EMBEDDED

ROOT = Path(__file__).parent.parent.parent
CAPTIONS = ["a small panda", "a large red apple on a blue background"]


def test_importing_the_package_is_cheap_and_its_names_are_there():
    code = "import sys, unidiffuser; unidiffuser.__version__; sys.exit(bool({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert unidiffuser.UniDiffuser is UniDiffuser and unidiffuser.__version__ == version("unidiffuser")
    assert all(getattr(unidiffuser, name) for name in dir(unidiffuser))
    with pytest.raises(AttributeError, match="module 'unidiffuser' has no attribute 'Unidiffuser'"):
        unidiffuser.Unidiffuser  # noqa: B018


def test_the_example_of_the_readme_runs(export, tmp_path, monkeypatch, capsys):  # noqa: F811
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## In a notebook")[2]
    (example,) = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    assert "EXPORT" in example
    monkeypatch.chdir(tmp_path)
    exec(compile(example.replace("EXPORT", str(export)), "README.md", "exec"), {})  # noqa: S102
    assert Image.open("apple.png").size == (32, 32)
    assert capsys.readouterr().out.strip()


def test_one_picture_is_one_in_every_form(tmp_path):
    image = noise_image(0)
    image.save(tmp_path / "one.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for given in (image, tmp_path / "one.png", str(tmp_path / "one.png"), array, tensor, [image], array[None], (array,)):
        (picture,) = as_pictures(given)
        assert np.array_equal(np.asarray(picture), array)
    several = as_pictures([image, tensor, tmp_path / "one.png", np.stack([array, array])])
    assert len(several) == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"a picture is an array \(H, W, 3\) of uint8 values 0..255, not \(3, 8, 8\) uint8"),
        (np.zeros((8, 8, 3), np.float32), r"not \(8, 8, 3\) float32"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"a picture is a tensor \(3, H, W\) of uint8 values"),
        (np.zeros((8, 8), np.uint8), r"not \(8, 8\) uint8"),
        (__file__, r"test_library.py: not a picture that can be read \(not_an_image\)"),
    ],
)
def test_what_is_no_picture_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        as_pictures(given)


def test_a_prompt_may_be_one_string_and_a_picture_one_picture(model, tmp_path):  # noqa: F811
    noise_image(0).save(tmp_path / "one.png")
    few = {"steps": 2, "beams": 1}
    for one, several in (
        (model.generate("t2i", CAPTIONS[0], **few), model.generate("t2i", [CAPTIONS[0]], **few)),
        (model.generate("i2t", images=tmp_path / "one.png", **few), model.generate("i2t", images=[noise_image(0)], **few)),
    ):
        assert len(one) == 1 and one[0].caption == several[0].caption
        assert one[0].image is None or np.array_equal(np.asarray(one[0].image), np.asarray(several[0].image))
    with pytest.raises(FileNotFoundError, match="none.png"):
        model.generate("i2t", images="none.png")


def test_what_is_encoded_is_decoded_again(model):  # noqa: F811
    images = [noise_image(0, (32, 32)), noise_image(1, (32, 32))]
    parts = model.encode(images, CAPTIONS)
    clip = model.clip_text
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "latent": (2, 4, 8, 8), "clip": (2, clip.embed_dim), "text": (2, clip.context_length, 8),
    }  # fmt: skip
    assert all(part.dtype == torch.float32 for part in parts.values())
    pictures, captions = model.decode(parts, beams=1)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        mean = model.vae.model.encode(pixels).latent_dist.mean
        theirs = model.vae.model.decode(mean).sample.add(1).mul(127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert [image.size for image in pictures] == [(32, 32)] * 2
    assert np.abs(np.stack([np.asarray(image, float) for image in pictures]) - theirs).max() <= 1
    assert captions == model.text_codec.decode(parts["text"], 1)
    assert model.encode(captions=CAPTIONS[0]).keys() == {"text"} and model.decode({"latent": parts["latent"]})[1] == []
    assert model.encode(images[0], size=48)["latent"].shape == (1, 4, 12, 12)


def test_a_score_is_the_cosine_that_open_clip_gives(model, export, tmp_path):  # noqa: F811
    images = [noise_image(0, (64, 64)), noise_image(1, (64, 64))]
    folder = f"local-dir:{EMBEDDED / 'clip'}"
    theirs, preprocess = open_clip.create_model_from_pretrained(folder)
    with torch.no_grad():
        seen = theirs.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
        read = theirs.encode_text(open_clip.get_tokenizer(folder)(CAPTIONS), normalize=True)
    torch.testing.assert_close(model.score(images, CAPTIONS), (seen * read).sum(1), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(model.score(images[0], CAPTIONS), (seen[:1] * read).sum(1), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="2 pictures and 3 captions: give as many of both, or one of either"):
        model.score(images, [*CAPTIONS, "a lion"])
    convert(export, tmp_path / "pipeline", "diffusers")
    with pytest.raises(ValueError, match="has no text tower: name a whole CLIP model"):
        UniDiffuser.load(tmp_path / "pipeline").score(images[0], CAPTIONS[0])


@pytest.mark.parametrize(("task", "draws"), [("t2i", 1), ("i2t2i", 2)])
def test_a_callback_sees_every_step_and_can_end_the_draw(model, task, draws):  # noqa: F811
    inputs = {"prompts": CAPTIONS[0]} if task == "t2i" else {"images": noise_image(0)}
    seen, shapes, timesteps = [], set(), []

    def look(step, timestep, latents):
        seen.append(step)
        timesteps.append(timestep)
        shapes.add(tuple(sorted((name, tuple(part.shape)) for name, part in latents.items())))

    called = []
    hook = model.uvit.register_forward_hook(lambda *_: called.append(1))
    (result,) = model.generate(task, **inputs, steps=3, beams=1, callback=look)
    hook.remove()
    assert seen == [0, 1, 2] * draws and len(called) == len(seen)
    assert timesteps == [1000, 667, 334] * draws  # evenly from T to 1, where the result is taken
    assert (("clip", (1, model.clip_image.embed_dim)), ("latent", (1, 4, 8, 8))) in shapes and len(shapes) == draws
    (plain,) = model.generate(task, **inputs, steps=3, beams=1)
    assert np.array_equal(np.asarray(result.image), np.asarray(plain.image))

    def enough(step, timestep, latents):
        raise StopIteration

    with pytest.raises(StopIteration):
        model.generate(task, **inputs, steps=3, callback=enough)


def test_the_model_moves_as_a_whole(export):  # noqa: F811
    moved = UniDiffuser.load(export).to(torch.bfloat16)
    loaded = UniDiffuser.load(export, dtype=torch.bfloat16)
    one, other = (each.generate("t2i2t", CAPTIONS[0], steps=2, beams=1)[0] for each in (moved, loaded))
    assert one.caption == other.caption and np.array_equal(np.asarray(one.image), np.asarray(other.image))
    kinds = [module.model.parameters() for module in (moved.vae, moved.clip_image, moved.clip_text)]
    assert {parameter.dtype for each in kinds for parameter in each} == {torch.bfloat16}
    away = moved.to("meta")
    modules = (away.uvit, away.text_codec, away.vae.model, away.clip_image.model, away.clip_text.model)
    assert {parameter.device.type for module in modules for parameter in module.parameters()} == {"meta"}
    assert away.device == torch.device("meta")


@pytest.mark.parametrize("to", ["official", "diffusers"])
def test_every_layout_loads(export, to, tmp_path):  # noqa: F811
    convert(export, tmp_path / to, to)
    here = unidiffuser.Encoders(
        vae=str(export / "vae"), clip=str(export / "clip_image"), text=str(export / "clip_text"), gpt2="embedded"
    )
    loaded = UniDiffuser.load(tmp_path / to, encoders=here, heads=2 if to == "official" else None)
    few = {"steps": 2, "beams": 1}
    one, other = (each.generate("t2i", CAPTIONS[0], **few)[0].image for each in (loaded, UniDiffuser.load(export)))
    assert np.array_equal(np.asarray(one), np.asarray(other))
