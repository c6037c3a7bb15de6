"""An exported model in diffusers' own pipeline: the same start noise gives the same picture and text latent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UniDiffuserPipeline
from torch import nn

from tests.unidiffuser.test_generation import PROMPTS, export, model, noise_image  # noqa: F401
from unidiffuser.generation import UniDiffuser
from unidiffuser.pipeline_export import save_pipeline
from unidiffuser.sampling import NoiseSource, sample


class FromZero(nn.Module):
    """The network called as diffusers' pipeline calls it: with timesteps that count from 0, but 1000 for pure noise."""

    def __init__(self, network: nn.Module, drawn: str) -> None:
        super().__init__()
        self.network, self.drawn = network, drawn

    def forward(self, x, t):
        return self.network(x, {name: time - 1 if name == self.drawn else time for name, time in t.items()})


@pytest.fixture(scope="module")
def pipeline(model: UniDiffuser, tmp_path_factory: pytest.TempPathFactory) -> UniDiffuserPipeline:  # noqa: F811
    folder: Path = tmp_path_factory.mktemp("pipeline")
    save_pipeline(folder, model)
    loaded = UniDiffuserPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_text_to_image_gives_the_same_picture(model, pipeline):  # noqa: F811
    condition = {"text": model.text_codec.encode(model.clip_text.tokens(PROMPTS).clone()).detach()}
    modalities = model.uvit.config.modalities
    seeds, steps = [3, 4], 8
    ours = sample(FromZero(model.uvit, "image"), "t2i", modalities, 2, steps, 0.0, seeds, condition=condition)
    picture = model.vae.decode(ours["latent"]).permute(0, 2, 3, 1)

    start = NoiseSource(modalities, seeds, torch.device("cpu")).draw()
    pipeline.set_text_to_image_mode()
    theirs = pipeline(
        prompt=PROMPTS, vae_latents=start["latent"], clip_latents=start["clip"][:, None], guidance_scale=1.0,
        num_inference_steps=steps, height=32, width=32, output_type="np",
    ).images  # fmt: skip
    assert (picture / 255 - torch.from_numpy(theirs)).abs().max() < 1e-3 + 0.5 / 255  # ours is rounded to whole levels


def test_image_embeddings_and_captions_agree(model, pipeline):  # noqa: F811
    image = noise_image(5, (96, 96))
    pixels = pipeline.clip_image_processor(image, return_tensors="pt")
    with torch.no_grad():
        theirs = pipeline.image_encoder(**pixels).image_embeds
    torch.testing.assert_close(model.clip_image.image([image]), theirs, atol=2e-3, rtol=1e-2)

    hidden = model.clip_text.tokens(PROMPTS).clone()
    with torch.no_grad():
        torch.testing.assert_close(pipeline.text_decoder.encode(hidden), model.text_codec.encode(hidden))
        latent = model.text_codec.encode(hidden)
        prefix = pipeline.text_decoder.decode_prefix(latent)
        torch.testing.assert_close(prefix, model.text_codec.prefix(latent))
        out = pipeline.text_decoder.transformer(inputs_embeds=prefix).logits
        torch.testing.assert_close(out, model.text_codec.gpt2(inputs_embeds=prefix).logits, atol=1e-4, rtol=1e-4)
