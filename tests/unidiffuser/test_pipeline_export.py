"""An exported model in diffusers' own pipeline: the same start noise gives the same picture and text latent."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UniDiffuserPipeline
from torch import nn

from tests.unidiffuser.test_generation import PROMPTS, noise_image
from unidiffuser.encoders import ClipEncoder
from unidiffuser.generation import UniDiffuser
from unidiffuser.layouts import write_set
from unidiffuser.modalities import paper_modalities
from unidiffuser.noise import NoiseConfig
from unidiffuser.references import EMBEDDED
from unidiffuser.sampling import NoiseSource, sample
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.text_decoder import TextCodec
from unidiffuser.uvit import UViT, UViTConfig
from unidiffuser.weights import save_native

PIXELS = 128


class FromZero(nn.Module):
    """The network called as diffusers' pipeline calls it: with timesteps that count from 0, but 1000 for pure noise."""

    def __init__(self, network: nn.Module, drawn: str) -> None:
        super().__init__()
        self.network, self.drawn = network, drawn

    def forward(self, x, t, data_type=None):
        return self.network(x, {name: time - 1 if name == self.drawn else time for name, time in t.items()}, data_type)


BOTH_VERSIONS = pytest.mark.parametrize("folder", ["v0", "v1"], indirect=True)
VERSION_0 = pytest.mark.parametrize("folder", ["v0"], indirect=True)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export folder as the demo's, with the embedded autoencoder, CLIP and GPT-2; U-ViT and projections are untrained.

    That of version 1 has a noise schedule of its own, which the pipeline must take over.
    """
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("export")
    for name, kind in (("vae", "vae"), ("clip_image", "clip"), ("clip_text", "clip")):
        shutil.copytree(EMBEDDED / kind, folder / name)
    clip = ClipEncoder.load("embedded")
    TextCodec.new("embedded", clip.text_width, 32).save(folder / "text_codec")
    latent = (8, PIXELS // 64, PIXELS // 64)
    modalities = paper_modalities(latent, clip=clip.embed_dim, text=(clip.context_length, 32))
    noise = NoiseConfig(beta_start=0.005, beta_end=0.02) if request.param == "v1" else NoiseConfig()
    network = UViT(UViTConfig(width=64, depth=2, heads=2, modalities=modalities, position_std=0.5, noise=noise,
                             data_type_token=request.param == "v1"))  # fmt: skip
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_native(folder / "uvit", network)
    write_set(folder, folder / "diffusers", "diffusers")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> UniDiffuser:
    return UniDiffuser.load(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> UniDiffuserPipeline:
    loaded = UniDiffuserPipeline.from_pretrained(folder / "diffusers")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@BOTH_VERSIONS
def test_text_to_image_gives_the_same_picture(model, pipeline):
    condition = {"text": model.text_codec.encode(model.clip_text.tokens(PROMPTS).clone()).detach()}
    modalities = model.uvit.config.modalities
    seeds, steps = [3, 4], 8
    kind = 1 if model.uvit.config.data_type_token else None  # the pipeline's own default
    schedule = NoiseSchedule.of(model.uvit.config.noise)
    ours = sample(
        FromZero(model.uvit, "image"), "t2i", modalities, 2, steps, 0.0, seeds, "dpm++2m", condition, data_type=kind,
        schedule=schedule,
    )  # fmt: skip
    latent = ours["latent"] / model.vae.scaling_factor
    with torch.no_grad():
        picture = model.vae.model.decode(latent).sample.div(2).add(0.5).clamp(0, 1).permute(0, 2, 3, 1)

    start = NoiseSource(modalities, seeds, torch.device("cpu")).draw()
    pipeline.set_text_to_image_mode()
    theirs = pipeline(
        prompt=PROMPTS, vae_latents=start["latent"], clip_latents=start["clip"][:, None], guidance_scale=1.0,
        num_inference_steps=steps, height=PIXELS, width=PIXELS, output_type="np",
    ).images  # fmt: skip
    theirs = torch.from_numpy(theirs)
    assert (picture - theirs).abs().max() < 1e-3
    assert theirs.std() > 0.05 and (theirs[0] - theirs[1]).abs().max() > 0.05, "the pictures must show something"
    rounded = model.vae.decode(ours["latent"]).permute(0, 2, 3, 1) / 255
    assert (rounded - theirs).abs().max() < 1e-3 + 0.5 / 255


@VERSION_0
def test_image_embeddings_and_captions_agree(model, pipeline):
    image = noise_image(5, (96, 96))
    pixels = pipeline.clip_image_processor(image, return_tensors="pt")
    with torch.no_grad():
        theirs = pipeline.image_encoder(**pixels).image_embeds
    torch.testing.assert_close(model.clip_image.image([image]), theirs, atol=2e-3, rtol=1e-2)

    hidden = model.clip_text.tokens(PROMPTS).clone()
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(PROMPTS, torch.device("cpu"), 1, False)
        torch.testing.assert_close(embeds, hidden, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(pipeline.text_decoder.encode(hidden), model.text_codec.encode(hidden))
        latent = model.text_codec.encode(hidden)
        prefix = pipeline.text_decoder.decode_prefix(latent)
        torch.testing.assert_close(prefix, model.text_codec.prefix(latent))
        out = pipeline.text_decoder.transformer(inputs_embeds=prefix).logits
        torch.testing.assert_close(out, model.text_codec.gpt2(inputs_embeds=prefix).logits, atol=1e-4, rtol=1e-4)


@VERSION_0
def test_every_mode_of_the_pipeline_runs_even_when_no_caption_ends(pipeline):
    """Its beam search goes on for 67 tokens behind the 16 of the latent: more than the 64 positions of the embedded GPT-2."""
    decoder = pipeline.text_decoder
    assert decoder.config.n_positions >= 16 + 67
    tokens, lengths = decoder.generate_captions(torch.randn(1, 16, 32), eos_token_id=-1, device="cpu")
    assert tokens.shape == (1, 67) and lengths.tolist() == [67]
    pipeline.set_joint_mode()
    drawn = pipeline(num_inference_steps=2, height=PIXELS, width=PIXELS)
    assert drawn.images[0].size == (PIXELS, PIXELS) and isinstance(drawn.text[0], str)
    pipeline.set_image_to_text_mode()
    assert isinstance(pipeline(image=noise_image(1, (PIXELS, PIXELS)), num_inference_steps=2).text[0], str)


@VERSION_0
def test_the_same_model_gives_the_same_files(folder, tmp_path):
    def digests(where: Path) -> dict[str, str]:
        files = [path for path in where.rglob("*") if path.is_file()]
        return {str(path.relative_to(where)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    copy = shutil.copytree(folder, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("diffusers"))
    write_set(copy, tmp_path / "again", "diffusers")
    assert digests(tmp_path / "again") == digests(folder / "diffusers")
