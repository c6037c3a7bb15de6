"""Measures the shipped encoders on held-out scenes, and writes their model card."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from examples.encoders.captions import loss_of, scenes
from examples.little_web.compose import BACKGROUNDS, DRAWINGS, PLACES, SIZES, Scene, caption, render
from examples.little_web.judge import Judge, agreement
from unidiffuser.encoders import ClipEncoder, ImageLatents
from unidiffuser.images import to_pil
from unidiffuser.text_decoder import TextCodec

SCENES = 96


def images_of(batch: list[Scene], px: int) -> torch.Tensor:
    """Scenes as (B, 3, px, px) uint8."""
    return torch.from_numpy(np.stack([np.asarray(render(scene, px)) for scene in batch])).permute(0, 3, 1, 2).contiguous()


def autoencoder_quality(folder: str = "embedded") -> dict[str, float]:
    """At 256 and 512 pixels, PSNR in dB of what the mean of the latents decodes to, and how often the judge finds all four in it
    and in what latents with noise of a fifth of their deviation decode to; at 512, mean and deviation of the scaled latents."""
    vae, judge, found = ImageLatents.load(folder), Judge.load(), dict[str, float]()
    chosen = scenes(held_out=True)[: SCENES * 4 : 4]
    for px in (256, 512):
        images = images_of(chosen, px)
        moments = torch.cat([vae.moments(part) for part in images.split(8)])
        clean = vae.scaling_factor * moments.chunk(2, 1)[0]
        noise = 0.2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        for name, z in (("", clean), ("noisy_", clean + noise)):
            again = torch.cat([vae.decode(part) for part in z.split(8)])
            errors = (again.float() - images.float()).square().mean((1, 2, 3)).clamp_min(1e-3)
            found[f"{name}psnr_{px}"] = (10 * torch.log10(255**2 / errors)).mean().item()
            found[f"{name}all_four_{px}"] = agreement(judge.read(to_pil(again)), chosen)["all_four"]
    return found | {"latent_mean": clean.mean().item(), "latent_deviation": clean.std().item()}


def judge_quality() -> dict[str, float]:
    """How often the judge is right about each part, and about all four, of every held-out scene in a variation of it."""
    rng = random.Random(0)
    held = [replace(scene, variation=rng.randrange(1, 2**31)) for scene in scenes(held_out=True)]
    return agreement(Judge.load().read([render(scene, 256) for scene in held]), held)


def clip_quality(folder: str = "embedded") -> dict[str, float]:
    """How often the caption of a held-out scene is nearer to its picture than another: of a random held-out scene, and of a
    scene that differs in one part only; and top-1 retrieval among all held-out scenes measured."""
    clip, rng = ClipEncoder.load(folder), random.Random(0)
    held = scenes(held_out=True)
    image = normalize(clip.image(images_of(held, 256)), dim=-1)
    text = normalize(clip.text([caption(scene, rng) for scene in held]), dim=-1)
    similarity = image @ text.T
    own = similarity.diagonal()
    others = torch.tensor([rng.choice([j for j in range(len(held)) if j != i]) for i in range(len(held))])
    found = {
        "random_pairs": (own > similarity[torch.arange(len(held)), others]).float().mean().item(),
        "retrieval_top1": (similarity.argmax(1) == torch.arange(len(held))).float().mean().item(),
    }
    parts = {"drawing": list(DRAWINGS), "size": list(SIZES), "place": list(PLACES), "background": list(BACKGROUNDS)}
    for name, values in parts.items():
        changes: list[dict[str, Any]] = [{name: rng.choice([v for v in values if v != getattr(s, name)])} for s in held]
        changed = [replace(scene, **change) for scene, change in zip(held, changes, strict=True)]
        wrong = normalize(clip.text([caption(scene, rng) for scene in changed]), dim=-1)
        found[f"other_{name}"] = (own > (image * wrong).sum(-1)).float().mean().item()
    return found


def gpt2_quality(folder: str = "embedded") -> dict[str, float]:
    """Perplexity a token on captions of held-out scenes."""
    codec, rng = TextCodec.new(folder, 1, 1).eval(), random.Random(0)
    with torch.no_grad():
        loss = loss_of(codec.gpt2, codec.tokenizer, [caption(scene, rng) for scene in scenes(held_out=True)])
    return {"perplexity": math.exp(loss.item())}


def reconstructions(path: Path, px: int = 256, folder: str = "embedded") -> None:
    """A sheet of held-out scenes (odd rows) and their reconstructions (even rows)."""
    vae, rows = ImageLatents.load(folder), []
    for start in (0, 1):
        images = images_of(scenes(held_out=True)[start::47][:8], px)
        rows += [images, vae.decode(vae.scaling_factor * vae.moments(images).chunk(2, 1)[0])]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path)


def model_card(path: Path) -> None:
    """Measure everything and write MODEL_CARD.md."""
    vae, clip, gpt2, judge = autoencoder_quality(), clip_quality(), gpt2_quality(), judge_quality()
    held, seen = len(scenes(held_out=True)), len(scenes(held_out=False))
    kinds = ("vae", "clip", "gpt2", "judge")
    size = sum(file.stat().st_size for kind in kinds for file in (path.parent / kind).rglob("*") if file.is_file()) / 1e6
    latent = ", ".join(f"{vae[name]:.2f}" for name in ("latent_mean", "latent_deviation"))
    text = f"""# Model card: the embedded encoders

Small weights of the real classes, so that the whole pipeline runs on a laptop: diffusers' `AutoencoderKL` (`vae/`), an
open_clip model with its tokenizer (`clip/`), and a transformers GPT-2 with the same vocabulary (`gpt2/`); beside them a judge,
which says what a picture shows (`judge/`). {size:.1f} MB in all, safetensors in half precision. They know the little web of
`examples/little_web` and nothing else: for any other data name real encoders in the recipe (a Stable Diffusion autoencoder,
ViT-B/32, ViT-L/14, GPT-2).

- **Data.** Scenes that `examples/little_web/compose.py` draws: {len(DRAWINGS)} OpenMoji drawings, {len(SIZES)} sizes,
  {len(PLACES)} places, {len(BACKGROUNDS)} backgrounds, and captions in words. The autoencoder also sees other OpenMoji
  drawings. No picture or text from the web or of a person. {held} of the {held + seen} combinations are held out of the
  training of CLIP, GPT-2 and the judge, and the numbers below are measured on them; the autoencoder has seen all, and more.
- **Licence.** The drawings are by OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0; so are these weights,
  which are made from them. The code is Apache-2.0.
- **How made.** `make encoders`, on 2 CPU cores; losses, sizes and schedules are in `examples/encoders/`.

| what | measured on held-out scenes | |
|---|---|---|
| autoencoder, 64x reduction | PSNR at 256 px | {vae["psnr_256"]:.1f} dB |
| | PSNR at 512 px | {vae["psnr_512"]:.1f} dB |
| | the judge finds all four in what it decodes at 256 px | {vae["all_four_256"]:.1%} |
| | ... at 512 px | {vae["all_four_512"]:.1%} |
| | ... at 512 px, from latents with noise of a fifth of their deviation | {vae["noisy_all_four_512"]:.1%} |
| | scaled latent at 512 px: mean, deviation | {latent} |
| CLIP | own caption nearer than that of another scene | {clip["random_pairs"]:.1%} |
| | ... than one with another drawing | {clip["other_drawing"]:.1%} |
| | ... another background | {clip["other_background"]:.1%} |
| | ... another place | {clip["other_place"]:.1%} |
| | ... another size | {clip["other_size"]:.1%} |
| | top-1 caption among {held} | {clip["retrieval_top1"]:.1%} |
| GPT-2 | perplexity a token of captions | {gpt2["perplexity"]:.2f} |
| judge | all four right of a real picture | {judge["all_four"]:.1%} |
"""
    path.write_text(text, encoding="utf-8")
