"""Small U-ViTs for the synthetic latents, in every layout that published weights come in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.training.synthetic import CLIP, MOMENTS, TEXT
from unidiffuser.convert import save_diffusers, to_diffusers, to_official
from unidiffuser.modalities import paper_modalities
from unidiffuser.uvit import UViT, UViTConfig
from unidiffuser.weights import save_native

LAYOUTS = (
    "uvit.pth", "official", "diffusers", "export", "native",
    "official.safetensors", "native.safetensors", "diffusers.safetensors",
)  # fmt: skip


def published(data_type_token: bool = False, side: int = MOMENTS[1], **sizes: int) -> UViT:
    """A network of random weights, none of which is as training starts it."""
    modalities = paper_modalities((MOMENTS[0] // 2, side, side), CLIP[0], TEXT, 2)
    torch.manual_seed(3)
    model = UViT(
        UViTConfig(**{"width": 16, "depth": 2, "heads": 2, **sizes}, modalities=modalities, data_type_token=data_type_token)
    )
    for name, parameter in model.named_parameters():
        norm = name.rpartition(".")[0].endswith(("norm", "norm1", "norm2", "norm3")) and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(norm), std=0.1)
    if data_type_token:
        torch.nn.init.normal_(model.data_type_embedding.weight, std=5.0)
    return model.eval()


def write(model: UViT, folder: Path, layout: str) -> Path:
    """The model in a layout below a new folder; gives the path that a recipe names."""
    place, config, state = folder / layout, model.config, model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    name = "uvit_v1.pth" if config.data_type_token else "uvit_v0.pth"
    if layout == "uvit.pth":
        torch.save(to_official(state, config), folder / name)
        return folder / name
    if layout == "official":
        place.mkdir()
        torch.save(to_official(state, config), place / name)
    elif layout == "diffusers":
        save_diffusers(place / "unet", state, config)
    elif layout == "export":
        save_native(place / "uvit", model)
    elif layout == "native":
        save_native(place, model)
    else:
        named = {"official": to_official(state, config), "native": state, "diffusers": to_diffusers(state, config)[1]}
        save_file({key: tensor.contiguous() for key, tensor in named[place.stem].items()}, place)
    return place


def clip_of(folder: Path, tokens: int = TEXT[0], numbers: int = CLIP[0]) -> str:
    """A CLIP's settings, which is all that is asked of it before a training."""
    folder.mkdir(parents=True)
    settings = {"embed_dim": numbers, "vision_cfg": {"image_size": 32}, "text_cfg": {"context_length": tokens, "width": 8}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": {}}))
    return str(folder)
