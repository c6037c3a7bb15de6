"""Autoencoder, CLIP and their references, against the libraries that they wrap and against what the eye would say."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from examples.little_web.compose import Scene, all_scenes, caption, render
from unidiffuser.encoders import ClipEncoder, ImageLatents, sample_latent
from unidiffuser.references import COMMITS, EMBEDDED, Encoders, local_folder, weights_digest
from unidiffuser.tensors import where


def pictures(count: int, px: int) -> torch.Tensor:
    held = [scene for scene in all_scenes() if scene.held_out]
    arrays = [np.asarray(render(scene, px)) for scene in random.Random(1).sample(held, count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def vae() -> ImageLatents:
    return ImageLatents.load("embedded")


@pytest.fixture(scope="module")
def clip() -> ClipEncoder:
    return ClipEncoder.load("embedded")


def test_moments_are_what_diffusers_says(vae: ImageLatents) -> None:
    from diffusers import AutoencoderKL

    images = pictures(2, 128)
    posterior = AutoencoderKL.from_pretrained(EMBEDDED / "vae").float().encode(images / 127.5 - 1).latent_dist
    moments = vae.moments(images)
    assert moments.dtype == torch.float32
    assert moments.shape[1:] == (2 * vae.channels, 2, 2)
    mean, logvar = moments.chunk(2, dim=1)
    assert torch.allclose(mean, posterior.mean, atol=1e-3)
    assert torch.allclose(logvar, posterior.logvar, atol=1e-3)


def test_a_latent_is_drawn_with_the_moments_spread_and_scaled() -> None:
    moments = torch.cat([torch.full((1, 1, 64, 64), 3.0), torch.full((1, 1, 64, 64), 2 * np.log(0.5))], dim=1)
    z = sample_latent(moments, 0.2, torch.Generator().manual_seed(0))
    assert z.mean().item() == pytest.approx(0.6, abs=0.01)
    assert z.std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(z, sample_latent(moments, 0.2, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("px", "tokens"), [(256, 4), (512, 16)])
def test_pictures_survive_the_autoencoder(vae: ImageLatents, px: int, tokens: int) -> None:
    images = pictures(4, px)
    moments = vae.moments(images)
    channels, height, width = vae.latent_shape(px)
    assert moments.shape == (4, 2 * channels, height, width)
    assert height * width // 4 == tokens
    z = vae.sample_latent(moments, torch.Generator().manual_seed(0))
    assert 0.7 < z.std() < 1.4
    again = vae.decode(z)
    assert again.dtype == torch.uint8 and again.shape == images.shape
    error = (again.float() - images.float()).square().mean((1, 2, 3))
    assert (10 * torch.log10(255**2 / error)).mean() > 20
    flat = (images.float() - images.float().mean((2, 3), keepdim=True)).square().mean((1, 2, 3))
    assert (error < flat).all() and error.mean() < 0.5 * flat.mean(), "the drawings must come back, not the background alone"


def test_images_and_sizes_that_do_not_fit_are_refused(vae: ImageLatents) -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        vae.latent_shape(250)
    with pytest.raises(TypeError, match="uint8"):
        vae.moments(torch.rand(1, 3, 64, 64))


def test_hidden_states_lead_to_the_pooled_embedding(clip: ClipEncoder) -> None:
    texts = ["a small panda on the left of a pink background", "a large lion at the top, on a plain blue background"]
    hidden = clip.tokens(texts)
    assert hidden.shape == (2, clip.context_length, clip.text_width)
    ends = [len(clip.tokenizer.tokenizer(text).input_ids) - 1 for text in texts]
    pooled = hidden[torch.arange(2), ends] @ clip.model.text.text_projection
    assert torch.allclose(pooled, clip.text(texts), atol=1e-4)
    assert torch.allclose(hidden[:1], clip.tokens(texts[:1]), atol=1e-4)


def test_every_caption_of_the_little_web_fits_the_context(clip: ClipEncoder) -> None:
    texts = [caption(scene, random.Random(seed)) for scene in all_scenes() for seed in range(3)]
    longest = max(len(ids) for ids in clip.tokenizer.tokenizer(texts).input_ids)
    assert longest <= clip.context_length <= 32


def test_pil_and_tensor_pictures_embed_alike_and_as_open_clip_does(clip: ClipEncoder) -> None:
    from open_clip import image_transform

    images = pictures(3, 256)
    as_pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    settings = clip.model.visual.preprocess_cfg
    transform = image_transform(settings["size"], is_train=False, mean=settings["mean"], std=settings["std"])
    expected = clip.model.encode_image(torch.stack([transform(picture) for picture in as_pil]))
    assert clip.image(images).shape == (3, clip.embed_dim)
    assert torch.allclose(clip.image(images), clip.image(as_pil), atol=1e-4)
    assert cosine_similarity(clip.image(images), expected).min() > 0.999


def test_clip_prefers_the_caption_of_a_held_out_picture(clip: ClipEncoder) -> None:
    rng = random.Random(2)
    held = rng.sample([scene for scene in all_scenes() if scene.held_out], 100)
    image = clip.image([render(scene, 256) for scene in held])
    text = clip.text([caption(scene, rng) for scene in held])
    own, other = cosine_similarity(image, text), cosine_similarity(image, text.roll(1, 0))
    assert (own > other).float().mean() >= 0.95


def test_clip_sees_every_part(clip: ClipEncoder) -> None:
    scene = Scene("red car", "large", "left", "white")
    image = clip.image([render(scene, 256)])
    own = "a large red car on the left of a white background"
    others = [own.replace(*change) for change in (("car", "balloon"), ("large", "small"), ("left", "right"), ("white", "blue"))]
    similarity = cosine_similarity(image, clip.text([own, *others]))
    assert (similarity[0] > similarity[1:]).all()


def test_a_public_model_is_written_as_a_folder_that_loads_offline(tmp_path: Path) -> None:
    """With random weights: what counts is that architecture, weights, preprocessing and tokenizer come back."""
    torch.manual_seed(0)
    model, settings = open_clip.create_model("ViT-S-32", force_custom_text=True), open_clip.get_model_config("ViT-S-32")
    public = ClipEncoder(model, open_clip.get_tokenizer("ViT-S-32"), "ViT-S-32/none", settings)
    public.save(tmp_path)
    local = ClipEncoder.load(str(tmp_path))
    pictures = torch.randint(0, 256, (2, 3, 250, 200), dtype=torch.uint8)
    assert torch.equal(public.image(pictures), local.image(pictures))
    assert torch.equal(public.tokens(["a red apple"]), local.tokens(["a red apple"]))


def test_a_digest_follows_contents_and_names(tmp_path: Path) -> None:
    copy = shutil.copytree(EMBEDDED / "vae", tmp_path / "copy")
    assert weights_digest(str(copy), "vae") == weights_digest("embedded", "vae") != weights_digest("embedded", "clip")
    weights = copy / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\1")
    assert weights_digest(str(copy), "vae") != weights_digest("embedded", "vae")


def test_a_public_name_counts_by_its_commit_and_is_loaded_at_it() -> None:
    """Of the published model's parts it is known."""
    name, commits = "stabilityai/sd-vae-ft-ema", ("c" * 40, "d" * 40)
    pinned = [f"{name}@{commit}" for commit in commits]
    assert len({weights_digest(ref, "vae") for ref in (*pinned, "stabilityai/sd-vae-ft-mse")}) == 3
    assert [where(ref) for ref in pinned] == [{"pretrained_model_name_or_path": name, "revision": commit} for commit in commits]
    with pytest.raises(FileNotFoundError, match=f"^{name}: what a public name means can change; write {name}@COMMIT, the 40"):
        weights_digest(name, "vae")
    for ref, kind in zip(("vae", "clip", "text", "gpt2"), ("vae", "clip", "clip", "gpt2"), strict=True):
        published = getattr(Encoders(), ref)
        assert weights_digest(published, kind) == weights_digest(f"{published}@{COMMITS[published]}", kind)


def test_references_are_torch_free() -> None:
    code = "import sys, unidiffuser.references as r; r.weights_digest('embedded'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_without_the_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="open_clip_config.json"):
        local_folder(str(tmp_path), "clip")
    with pytest.raises(FileNotFoundError, match="config.json"):
        ImageLatents.load(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="MODEL/WEIGHTS"):
        ClipEncoder.load("ViT-B-32")


def test_the_embedded_weights_stay_small() -> None:
    sizes = {path.relative_to(EMBEDDED): path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()}
    base = sum(size for path, size in sizes.items() if path.parts[0] == "base")
    assert base <= 8e6 and sum(sizes.values()) - base <= 16e6


def test_whoever_loads_a_clip_leaves_nothing_of_other_libraries_and_may_still_import_them(tmp_path: Path):
    code = (
        "import os, sys, unidiffuser.encoders as e; e.ClipEncoder.load()\n"
        "if 'wandb' in sys.modules or os.listdir(os.environ['TMPDIR']): sys.exit(1)\n"
        "import wandb; sys.exit(not hasattr(wandb, 'init'))"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False).returncode == 0
