"""Checkpoints on disk in any of three layouts: recognised by what is there, converted into another.

native    a folder with config.json and model.safetensors; or an export folder, which has it as ``uvit`` beside the encoders
official  a .pth file; or a folder with uvit_v0.pth or uvit_v1.pth
diffusers a folder of a UniDiffuserModel, or of a pipeline, which has it as ``unet``
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch

from unidiffuser.convert import from_diffusers, from_official, save_diffusers, to_official
from unidiffuser.convert_parts import codec_to_official, vae_to_official
from unidiffuser.uvit import UViT
from unidiffuser.weights import WeightsError, build, load_native, read_tensors, save_native

Layout = Literal["native", "official", "diffusers"]
_OFFICIAL_FILES = ("uvit_v1.pth", "uvit_v0.pth")


def load_uvit(source: Path | str, heads: int | None = None, text_tokens: int = 77) -> UViT:
    """The U-ViT of a checkpoint in any layout, in evaluation mode.

    Args:
        heads: attention heads of an official file, if not width / 64; the other layouts say it themselves.
        text_tokens: text tokens of an official file.

    Raises:
        FileNotFoundError: there is nothing at ``source``, or nothing that is known.
        WeightsError: it is damaged, or does not fit together.
    """
    source = Path(source)
    if source.is_file():
        return build(*from_official(read_tensors(source), heads, text_tokens), source)
    for folder in (source, source / "uvit", source / "unet"):
        if not (folder / "config.json").is_file():
            continue
        settings = json.loads((folder / "config.json").read_text())
        if "modalities" in settings:
            return load_native(folder)
        if settings.get("_class_name") == "UniDiffuserModel":
            files = [folder / f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin")]
            file = next((file for file in files if file.is_file()), files[0])
            return build(*from_diffusers(settings, read_tensors(file)), folder)
    for name in _OFFICIAL_FILES:
        if (source / name).is_file():
            return load_uvit(source / name, heads, text_tokens)
    raise FileNotFoundError(
        f"{source}: no U-ViT found; expected a .pth file, or a folder with uvit/config.json, unet/config.json, "
        "config.json or uvit_v1.pth"
    )


def convert(source: Path | str, target: Path | str, to: Layout, heads: int | None = None, text_tokens: int = 77) -> None:
    """Write the checkpoint ``source`` as ``target`` in another layout.

    A lone U-ViT becomes a lone U-ViT: a native folder, a .pth file, or a folder with ``unet``. An export folder becomes a
    pipeline of diffusers, or a folder with the official uvit, autoencoder_kl and caption_decoder files.

    Raises:
        FileNotFoundError, WeightsError: see ``load_uvit``.
        FileExistsError: there is something at ``target``.
    """
    source, target = Path(source), Path(target)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists: choose another name, or remove it")
    if (source / "uvit").is_dir() and (source / "text_codec").is_dir() and to != "native":
        _convert_export(source, target, to)
        return
    model = load_uvit(source, heads, text_tokens)
    if to == "native":
        save_native(target, model)
    elif to == "diffusers":
        save_diffusers(target / "unet", model.state_dict(), model.config)
    else:
        if target.suffix != ".pth":
            raise WeightsError(f"{target}: an official U-ViT is a file, give a name that ends in .pth")
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(to_official(model.state_dict(), model.config), target)


def _convert_export(source: Path, target: Path, to: Layout) -> None:
    # Imported here: they load transformers and open_clip, which a lone U-ViT does not need.
    from unidiffuser.generation import UniDiffuser
    from unidiffuser.pipeline_export import save_pipeline

    model = UniDiffuser.load(source)
    if to == "diffusers":
        save_pipeline(target, model)
        return
    target.mkdir(parents=True, exist_ok=True)
    name = _OFFICIAL_FILES[0] if model.uvit.config.data_type_token else _OFFICIAL_FILES[1]
    torch.save(to_official(model.uvit.state_dict(), model.uvit.config), target / name)
    torch.save(vae_to_official(model.vae.model.state_dict()), target / "autoencoder_kl.pth")
    torch.save(codec_to_official(model.text_codec.state_dict()), target / "caption_decoder.pth")
