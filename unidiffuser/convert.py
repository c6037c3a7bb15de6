"""U-ViT weights between the native, the official and diffusers' layouts.

Official is a single dictionary of tensors (``uvit_v0.pth``, ``uvit_v1.pth``); diffusers is a folder with ``config.json`` and
``diffusion_pytorch_model.safetensors``, as in the ``unet`` folder of a UniDiffuserPipeline. Tensors are renamed and cut, never
computed with, so every way there and back is exact. What is read is compared with what a model of those sizes has in that layout,
so what is wrong with a file is said in the file's own names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from unidiffuser.modalities import paper_modalities, token_order
from unidiffuser.noise import NoiseConfig
from unidiffuser.tensors import WeightsError, check_tensors
from unidiffuser.uvit import UViT, UViTConfig

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
_NATIVE = {official: native for native, official in _OFFICIAL.items()}
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
        WeightsError: the model is not declared like the paper's, or its latent is not square.
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
        WeightsError: tensors are missing, extra or wrongly shaped, or the sizes that they tell do not add up.
    """
    config = _told(state, lambda name: name, heads, text_tokens)
    native = _empty(config)
    check_tensors(to_official(native, config), state, "U-ViT")
    return config, {name: state[_rename(name, _OFFICIAL)] for name in native}


def from_tensors(
    state: Mapping[str, Tensor], heads: int | None = None, text_tokens: int = 77
) -> tuple[UViTConfig, dict[str, Tensor]]:
    """The same from the tensors of a lone file, in the names of any layout.

    Raises:
        WeightsError: see ``from_official``.
    """
    if "inputs.latent.weight" in state:
        config = _told(state, lambda name: _rename(name, _NATIVE), heads, text_tokens)
        check_tensors(_empty(config), state, "U-ViT")
        return config, dict(state)
    if "vae_img_in.proj.weight" in state:
        config = _told(state, lambda name: _diffusers_names(name)[0], heads, text_tokens)
        return config, _joined(state, config)
    return from_official(state, heads, text_tokens)


def _told(state: Mapping[str, Tensor], own: Callable[[str], str], heads: int | None, text_tokens: int) -> UViTConfig:
    """The sizes that tensors tell.

    Args:
        own: official name -> name in ``state``.

    Raises:
        WeightsError: those that tell them are missing, or the sizes do not add up.
    """
    axes = {"patch_embed.proj.weight": 4, "pos_embed": 3, "clip_img_embed.weight": 2, "text_embed.weight": 2,
            "mid_block.mlp.fc1.weight": 2}  # fmt: skip
    sizes = {own(name): count for name, count in axes.items()}
    if missing := [name for name in sizes if name not in state]:
        raise WeightsError(f"not a published U-ViT: {', '.join(missing)} missing, by which its sizes are told")
    shapes = {name: tuple(state[name].shape) for name in sizes}
    if wrong := [f"{name} {shapes[name]}" for name, axes in sizes.items() if len(shapes[name]) != axes or 0 in shapes[name]]:
        raise WeightsError(f"not a published U-ViT: {', '.join(wrong)}: another number of axes, or an empty one")
    (width, channels, patch, _), (_, tokens, _), (_, clip), (_, text), (hidden, _) = shapes.values()
    if heads is None and width % 64 or width % (heads or 64):
        raise WeightsError(
            f"a width of {width} is no multiple of {heads or 64}: give the number of attention heads, which no tensor shows, to "
            "`unidiffuser convert SRC DST --to native --heads N`, and use what that writes"
        )
    side, table = math.isqrt(max(tokens - 3 - text_tokens, 0)), own("pos_embed")
    if side < 1 or side * side != tokens - 3 - text_tokens:
        raise WeightsError(
            f"{table} {shapes[table]}: the position table has {tokens} rows; less 2 timesteps, 1 CLIP and {text_tokens} "
            "text tokens that is not a square of patches: name the CLIP of its captions, which tells the number of text tokens"
        )
    return _config(
        latent=(channels, side * patch, side * patch), clip=clip, text=(text_tokens, text), patch=patch, width=width,
        depth=2 * len({match[1] for name in state if (match := re.search(r"(?:in|out)_blocks\.(\d+)\.", name))}),
        heads=heads or width // 64, mlp_ratio=hidden / width, data_type_token=own("token_embedding.weight") in state,
    )  # fmt: skip


def to_diffusers(state: Mapping[str, Tensor], config: UViTConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of diffusers' UniDiffuserModel from native tensors.

    Raises:
        WeightsError: the model is not declared like the paper's, or its latent is not square, or its MLP ratio not 4.
    """
    latent, clip, text = _sizes(config)
    if config.mlp_ratio != 4:
        raise WeightsError(f"diffusers holds an MLP ratio of 4, not {config.mlp_ratio}")
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
        names = _diffusers_names(name)
        tensors.update(zip(names, (piece.contiguous() for piece in tensor.chunk(len(names))), strict=True))
    for leaf in ("weight", "bias"):
        tensors[f"{_UNUSED}.{leaf}"] = tensors[f"vae_img_in.proj.{leaf}"].clone()
    return settings, tensors


def _diffusers_names(name: str) -> list[str]:
    """The tensor, or the three, that diffusers has for an official one."""
    if "_block" not in name.split(".")[0]:
        return [_rename(name, _DIFFUSERS)]
    # in_blocks.3.attn.proj.weight -> (in_blocks.3., attn.proj, weight)
    words = name.split(".")
    start = 1 if words[0] == "mid_block" else 2
    prefix = "transformer.transformer_" + ".".join(words[:start]) + "."
    layer, leaf = ".".join(words[start:-1]), words[-1]
    if layer in _DIFFUSERS_SKIP:
        return [f"{prefix}{_DIFFUSERS_SKIP[layer]}.{leaf}"]
    if words[0] == "out_blocks":
        prefix += "block."
    return [f"{prefix}{piece}.{leaf}" for piece in (_QKV if layer == "attn.qkv" else (_DIFFUSERS_BLOCK[layer],))]


def from_diffusers(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[UViTConfig, dict[str, Tensor]]:
    """Configuration and native tensors from those of diffusers' UniDiffuserModel.

    Raises:
        WeightsError: it has another architecture than the published one, or tensors are missing, extra or wrongly shaped.
    """
    published = {"block_type": "unidiffuser", "pre_layer_norm": False, "activation_fn": "gelu", "norm_type": "layer_norm",
                 "norm_elementwise_affine": True, "use_timestep_embedding": False, "use_patch_pos_embed": False,
                 "attention_bias": False, "cross_attention_dim": None, "only_cross_attention": False,
                 "num_vector_embeds": None, "num_embeds_ada_norm": None}  # fmt: skip
    for field, value in published.items():
        if settings.get(field, value) != value:
            raise WeightsError(f"config.json: {field} is {settings[field]!r}, the published U-ViT has {value!r}")
    names = ("num_attention_heads", "attention_head_dim", "num_layers", "in_channels", "sample_size", "patch_size",
             "clip_img_dim", "num_text_tokens", "text_dim")  # fmt: skip
    if wrong := [f"{name} is {settings.get(name)!r}" for name in names if type(settings.get(name)) is not int]:
        raise WeightsError(f"config.json: {', '.join(wrong)}, expected a whole number")
    heads, head_width, depth, channels, side, patch, clip, text_tokens, text = (settings[name] for name in names)
    config = _config(
        latent=(channels, side, side), clip=clip, text=(text_tokens, text), patch=patch, width=heads * head_width, depth=depth,
        heads=heads, mlp_ratio=4, data_type_token=bool(settings.get("use_data_type_embedding", False)),
    )  # fmt: skip
    return config, _joined(state, config)


def _joined(state: Mapping[str, Tensor], config: UViTConfig) -> dict[str, Tensor]:
    """Native tensors from those of diffusers, which has three for one.

    Raises:
        WeightsError: tensors are missing, extra or wrongly shaped.
    """
    native = _empty(config)
    read = {name: tensor for name, tensor in state.items() if not name.startswith(_UNUSED)}
    expected = {name: tensor for name, tensor in to_diffusers(native, config)[1].items() if not name.startswith(_UNUSED)}
    check_tensors(expected, read, "U-ViT")
    pieces = {name: [read[piece] for piece in _diffusers_names(_rename(name, _OFFICIAL))] for name in native}
    return {name: torch.cat(found) if len(found) > 1 else found[0] for name, found in pieces.items()}


def _config(latent: tuple[int, int, int], clip: int, text: tuple[int, int], patch: int, **sizes: Any) -> UViTConfig:
    try:
        return UViTConfig(modalities=paper_modalities(latent, clip, text, patch), **sizes)
    except ValidationError as error:
        raise WeightsError(f"sizes that no U-ViT has: {error.errors()[0]['msg']}") from error


def _empty(config: UViTConfig) -> dict[str, Tensor]:
    """Native tensors without values."""
    with torch.device("meta"):
        return UViT(config).state_dict()


def check_published_noise(config: UViTConfig) -> None:
    """Refuse a model whose noise schedule a layout cannot tell, which takes the published one for granted.

    Raises:
        WeightsError: the model was trained with another one.
    """
    if config.noise != NoiseConfig():
        raise WeightsError(
            f"it was trained with noise from {config.noise.beta_start} to {config.noise.beta_end}, which no other layout tells; "
            "keep it native, or write a whole set as diffusers"
        )


def _sizes(config: UViTConfig) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of latent, clip and text of a model declared like the paper's."""
    declared = {modality.name: {part.name: part.shape for part in modality.parts} for modality in config.modalities}
    names = [(name, list(parts)) for name, parts in declared.items()]
    if names != [("image", ["latent", "clip"]), ("text", ["text"])]:
        raise WeightsError(f"other layouts hold an image (latent, clip) and a text (text), this model has {names}")
    latent, clip, text = declared["image"]["latent"], declared["image"]["clip"], declared["text"]["text"]
    if latent[1] != latent[2]:
        # Their position tables do not tell rows from columns.
        raise WeightsError(f"other layouts hold square latents, not {latent}")
    return latent, clip, text


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
