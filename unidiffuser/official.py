"""A folder with the official files as an export folder, and back: uvit_v0.pth or uvit_v1.pth, autoencoder_kl.pth and
caption_decoder.pth.

They hold weights alone. The CLIP towers, the tokenizer of GPT-2, and the settings that no tensor shows (heads of GPT-2, groups
and scaling factor of the autoencoder) come from models named beside them, ``references.Encoders``.
"""

from __future__ import annotations

from pathlib import Path

import torch

from unidiffuser.convert import check_published_noise, from_official, to_official
from unidiffuser.convert_parts import codec_from_official, codec_to_official, vae_from_official, vae_to_official
from unidiffuser.encoders import ClipEncoder, ImageLatents
from unidiffuser.generation import UniDiffuser
from unidiffuser.references import Encoders, local_folder
from unidiffuser.tensors import named, read_tensors, where
from unidiffuser.text_decoder import TextCodec
from unidiffuser.weights import build, save_native

# Version 1 has the data-type token.
UVIT_FILES = {True: "uvit_v1.pth", False: "uvit_v0.pth"}
VAE_FILE, CODEC_FILE = "autoencoder_kl.pth", "caption_decoder.pth"


def uvit_file(folder: Path) -> Path | None:
    """The official U-ViT in a folder, version 1 before version 0; None where there is none."""
    return next((folder / name for name in UVIT_FILES.values() if (folder / name).is_file()), None)


def export_official(model: UniDiffuser, folder: Path) -> None:
    """Write the official files of ``model``; its CLIP towers are not among them.

    Raises:
        WeightsError: the model is not declared like the paper's, or was trained with another noise schedule.
    """
    config = model.uvit.config
    check_published_noise(config)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(to_official(model.uvit.state_dict(), config), folder / UVIT_FILES[config.data_type_token])
    torch.save(vae_to_official(model.vae.model.state_dict()), folder / VAE_FILE)
    torch.save(codec_to_official(model.text_codec.state_dict()), folder / CODEC_FILE)


def import_official(source: Path, folder: Path, encoders: Encoders, heads: int | None = None) -> None:
    """Write the official files ``source`` as the export folder ``folder``.

    Args:
        heads: attention heads of the U-ViT; width / 64 if None.

    Raises:
        FileNotFoundError: a file is missing, or a folder that ``encoders`` names. OSError: an unknown public name.
        WeightsError: tensors do not fit.
    """
    from diffusers import AutoencoderKL

    clip_text = ClipEncoder.load(encoders.text)
    file = uvit_file(source) or source / UVIT_FILES[True]
    uvit = read_tensors(file)
    with named(file):
        config, native = from_official(uvit, heads, clip_text.context_length)
    save_native(folder / "uvit", build(config, native, file))
    clip_text.save(folder / "clip_text")
    ClipEncoder.load(encoders.clip).save(folder / "clip_image")

    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(**where(local_folder(encoders.vae, "vae") or encoders.vae)))
    latent_width = config.modalities[1].parts[0].shape[1]
    codec = TextCodec.new(encoders.gpt2, clip_text.text_width, latent_width)
    for part, name, from_file in ((vae, VAE_FILE, vae_from_official), (codec, CODEC_FILE, codec_from_official)):
        tensors = read_tensors(source / name)
        with named(source / name):
            part.load_state_dict(from_file(tensors, part.state_dict()))
    ImageLatents(vae).save(str(folder / "vae"))
    codec.save(folder / "text_codec")
