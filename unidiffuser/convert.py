"""U-ViT weights between the native, the official and diffusers' layouts.

Official is a single dictionary of tensors (``uvit_v0.pth``, ``uvit_v1.pth``); diffusers is a folder with ``config.json`` and
``diffusion_pytorch_model.safetensors``, as in the ``unet`` folder of a UniDiffuserPipeline. Tensors are renamed and cut, never
computed with, so every way there and back is exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unidiffuser.modalities import paper_modalities, token_order
from unidiffuser.tensors import WeightsError
from unidiffuser.uvit import UViTConfig

# Native name -> official name, of what is not the same in both: the ends of the network. Blocks are named alike.
_OFFICIAL = {
    "inputs.latent": "patch_embed.proj",
    "inputs.clip": "clip_img_embed",
    "inputs.text": "text_embed",
    "outputs.latent": "decoder_pred",
    "outputs.clip": "clip_img_out",
    "outputs.text": "text_out",
    "position": "pos_embed",
    "data_type_position": "pos_embed_token",
    "data_type_embedding": "token_embedding",
}
# Official name -> diffusers' name, of the ends of the network.
_DIFFUSERS = {
    "patch_embed.proj": "vae_img_in.proj",
    "clip_img_embed": "clip_img_in",
    "text_embed": "text_in",
    "decoder_pred": "vae_img_out",
    "norm": "transformer.norm_out",
    "pos_embed_token": "data_type_pos_embed_token",
    "token_embedding": "data_type_token_embedding",
}
# The same within a block; ``attn.qkv`` is cut into three.
_DIFFUSERS_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "norm2": "norm1",
    "norm3": "norm3",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_DIFFUSERS_SKIP = {"skip_linear": "skip.skip_linear", "norm1": "skip.norm"}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
# diffusers' transformer keeps a patch embedding that it never calls; from_pretrained misses it all the same.
_UNUSED = "transformer.pos_embed.proj"


def _rename(name: str, table: Mapping[str, str]) -> str:
    stem, _, leaf = name.rpartition(".")
    return table[name] if name in table else f"{table.get(stem, stem)}.{leaf}" if stem else name


def to_official(state: Mapping[str, Tensor], config: UViTConfig) -> dict[str, Tensor]:
    """Native tensors under their official names.

    Raises:
        WeightsError: the model is not declared like the paper's, so the official layout has no place for it.
    """
    _sizes(config)
    return {_rename(name, _OFFICIAL): tensor for name, tensor in state.items()}


def from_official(
    state: Mapping[str, Tensor], heads: int | None = None, text_tokens: int = 77
) -> tuple[UViTConfig, dict[str, Tensor]]:
    """Configuration and native tensors from official ones.

    Args:
        heads: attention heads, which no tensor shows; width / 64 if None.
        text_tokens: tokens of the text, which the position table cannot tell from the patches; a CLIP text has 77.

    Raises:
        WeightsError: tensors that give the sizes are missing, or the sizes do not add up.
    """
    table = {official: native for native, official in _OFFICIAL.items()}
    native = {_rename(name, table): tensor for name, tensor in state.items()}
    sizes = ("inputs.latent.weight", "position", "inputs.clip.weight", "inputs.text.weight", "mid_block.mlp.fc1.weight")
    if missing := [_rename(name, _OFFICIAL) for name in sizes if name not in native]:
        raise WeightsError(f"not a published U-ViT: {', '.join(missing)} missing, by which its sizes are told")
    try:
        width, channels, patch, _ = native["inputs.latent.weight"].shape
        tokens = native["position"].shape[1]
        clip, text, hidden = (native[name].shape[index] for name, index in zip(sizes[2:], (1, 1, 0), strict=True))
    except (IndexError, ValueError) as error:
        shapes = ", ".join(f"{_rename(name, _OFFICIAL)} {tuple(native[name].shape)}" for name in sizes)
        raise WeightsError(f"not a published U-ViT: one of {shapes} has another number of axes") from error
    side = math.isqrt(max(tokens - 3 - text_tokens, 0))
    if side < 1 or side * side != tokens - 3 - text_tokens:
        raise WeightsError(
            f"the position table has {tokens} rows; less 2 timesteps, 1 CLIP and {text_tokens} text tokens that is not a "
            "square of patches: name the CLIP of its captions, which tells the number of text tokens"
        )
    return UViTConfig(
        width=width,
        depth=2 * len({name.split(".")[1] for name in native if name.startswith("in_blocks.")}),
        heads=heads or width // 64,
        mlp_ratio=hidden / width,
        modalities=paper_modalities((channels, side * patch, side * patch), clip, (text_tokens, text), patch),
        data_type_token="data_type_embedding.weight" in native,
    ), native


def to_diffusers(state: Mapping[str, Tensor], config: UViTConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of diffusers' UniDiffuserModel from native tensors.

    Raises:
        WeightsError: the model is not declared like the paper's, or its latent is not square.
    """
    latent, clip, text = _sizes(config)
    if latent[1] != latent[2] or config.mlp_ratio != 4:
        raise WeightsError(f"diffusers holds square latents and an MLP ratio of 4, not {latent} and {config.mlp_ratio}")
    patch = next(part.patch for part in token_order(config.modalities) if part.is_grid)
    settings = {
        "_class_name": "UniDiffuserModel",
        "text_dim": text[1],
        "clip_img_dim": clip[0],
        "num_text_tokens": text[0],
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": latent[0],
        "out_channels": latent[0],
        "num_layers": config.depth,
        "sample_size": latent[1],
        "patch_size": patch,
        "activation_fn": "gelu",
        "block_type": "unidiffuser",
        "pre_layer_norm": False,
        "norm_type": "layer_norm",
        "use_timestep_embedding": False,
        "use_patch_pos_embed": False,
        "ff_final_dropout": True,
        "use_data_type_embedding": config.data_type_token,
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in to_official(state, config).items():
        tensors.update(_official_to_diffusers(name, tensor))
    for leaf in ("weight", "bias"):
        tensors[f"{_UNUSED}.{leaf}"] = tensors[f"vae_img_in.proj.{leaf}"].clone()
    return settings, tensors


def _official_to_diffusers(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if "_block" not in name.split(".")[0]:
        return {_rename(name, _DIFFUSERS): tensor}
    # in_blocks.3.attn.proj.weight -> (in_blocks.3., attn.proj, weight)
    words = name.split(".")
    start = 1 if words[0] == "mid_block" else 2
    prefix = "transformer.transformer_" + ".".join(words[:start]) + "."
    layer, leaf = ".".join(words[start:-1]), words[-1]
    if layer in _DIFFUSERS_SKIP:
        return {f"{prefix}{_DIFFUSERS_SKIP[layer]}.{leaf}": tensor}
    if words[0] == "out_blocks":
        prefix += "block."
    if layer == "attn.qkv":
        return {f"{prefix}{piece}.{leaf}": part.contiguous() for piece, part in zip(_QKV, tensor.chunk(3), strict=True)}
    if layer not in _DIFFUSERS_BLOCK:
        raise WeightsError(f"{name}: not a tensor of a U-ViT block")
    return {f"{prefix}{_DIFFUSERS_BLOCK[layer]}.{leaf}": tensor}


def from_diffusers(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[UViTConfig, dict[str, Tensor]]:
    """Configuration and native tensors from those of diffusers' UniDiffuserModel.

    Raises:
        WeightsError: it has another architecture than the published one, or tensors are missing.
    """
    published = {"block_type": "unidiffuser", "pre_layer_norm": False, "activation_fn": "gelu",
                 "use_timestep_embedding": False, "use_patch_pos_embed": False}  # fmt: skip
    for field, value in published.items():
        if settings.get(field, value) != value:
            raise WeightsError(f"config.json: {field} is {settings[field]!r}, the published U-ViT has {value!r}")
    official = _diffusers_to_official(state)
    return from_official(official, settings["num_attention_heads"], settings["num_text_tokens"])


def _diffusers_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ends = {diffusers: official for official, diffusers in _DIFFUSERS.items()}
    block = {diffusers: official for official, diffusers in (_DIFFUSERS_BLOCK | _DIFFUSERS_SKIP).items()}
    official = {}
    for name, tensor in state.items():
        if name.startswith(_UNUSED):
            continue
        head, separator, rest = name.partition("transformer.transformer_")
        if head or not separator:
            official[_rename(name, ends)] = tensor
            continue
        words = rest.split(".")
        start = 1 if words[0] == "mid_block" else 2
        prefix = ".".join(words[:start])
        layer, leaf = ".".join(words[start:-1]).removeprefix("block."), words[-1]
        if layer in _QKV[1:]:
            continue
        if layer == _QKV[0]:
            names = [name.replace(_QKV[0], piece) for piece in _QKV]
            absent = [piece for piece in names if piece not in state]
            if absent:
                raise WeightsError(f"tensors missing: {', '.join(absent)}")
            official[f"{prefix}.attn.qkv.{leaf}"] = torch.cat([state[piece] for piece in names])
        elif layer in block:
            official[f"{prefix}.{block[layer]}.{leaf}"] = tensor
        else:
            raise WeightsError(f"{name}: not a tensor of a UniDiffuserModel")
    return official


def _sizes(
    config: UViTConfig,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of latent, clip and text of a model declared like the paper's."""
    declared = {modality.name: {part.name: part.shape for part in modality.parts} for modality in config.modalities}
    names = [(name, list(parts)) for name, parts in declared.items()]
    if names != [("image", ["latent", "clip"]), ("text", ["text"])]:
        raise WeightsError(f"other layouts hold an image (latent, clip) and a text (text), this model has {names}")
    return (
        declared["image"]["latent"],
        declared["image"]["clip"],
        declared["text"]["text"],
    )


def save_diffusers(folder: Path | str, state: Mapping[str, Tensor], config: UViTConfig) -> None:
    """Write native tensors as a folder that ``UniDiffuserModel.from_pretrained`` reads."""
    settings, tensors = to_diffusers(state, config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(
        contiguous,
        folder / "diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
