"""CLIP towers between open_clip and transformers, which compute the same under other names.

A pipeline of diffusers holds the image tower of one CLIP and the text tower, without its projection, of another. Back in
open_clip's layout each is a CLIP whose other tower is 1 wide, which counts as none; see ``encoders.ClipEncoder``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from unidiffuser.clip_preprocess import INTERPOLATIONS
from unidiffuser.encoders import ClipEncoder
from unidiffuser.imports import import_open_clip
from unidiffuser.tensors import WeightsError, load_checked

_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_TEXT_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_IMAGE_ENDS = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_OPEN_CLIP_BLOCK, _TRANSFORMERS_BLOCK = "transformer.resblocks.", "encoder.layers."
# The tower that is not there, as small as open_clip makes one.
_NO_IMAGE_TOWER = {"layers": 1, "width": 1, "head_width": 1, "image_size": 1, "patch_size": 1}
_NO_TEXT_TOWER = {"layers": 1, "width": 1, "heads": 1, "context_length": 1, "vocab_size": 1}


def clip_tokenizer(context_length: int = 77) -> Any:
    """transformers' CLIPTokenizer with the vocabulary that open_clip ships: that of every CLIP of OpenAI, offline.

    Token ids equal open_clip's, but that open_clip repairs a text beforehand (ftfy: curly quotes become straight ones, ligatures
    letters; HTML entities), and that Python knows a Greek final sigma when it makes letters small.
    """
    import_open_clip()
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    own = SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return CLIPTokenizer(
        vocab={special.get(token, token): number for token, number in own.encoder.items()},
        merges=sorted(own.bpe_ranks, key=own.bpe_ranks.__getitem__),
        model_max_length=context_length,
    )


def text_tower(clip: ClipEncoder, tokenizer: Any) -> nn.Module:
    """The text tower as a transformers CLIPTextModel.

    Raises:
        WeightsError: it has something that transformers' CLIP does not have.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    text = clip.model.text
    if text.attn_mask is None:
        raise WeightsError(f"{clip.ref}: text tower without a causal mask, which transformers' CLIP always has")
    told = {name: clip.settings["text_cfg"].get(name) for name in ("tokenizer_kwargs", "tokenizer_mode")}
    if extra := [f"{name} {value}" for name, value in told.items() if value]:
        raise WeightsError(f"{clip.ref}: text tower with {', '.join(extra)}, which a tokenizer of transformers does not have")
    target = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=text.token_embedding.num_embeddings,
            max_position_embeddings=clip.context_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **_tower_settings(text.transformer.resblocks),
        )
    )
    state = _to_transformers(text.state_dict(), _TEXT_ENDS, "text_projection", f"{clip.ref}: text tower")
    if any(name.startswith("text_model.") for name in target.state_dict()):
        # transformers has changed between having and not having this prefix.
        state = {f"text_model.{name}": tensor for name, tensor in state.items()}
    load_checked(target, state, f"{clip.ref}: text tower")
    return target.eval()


def image_tower(clip: ClipEncoder) -> nn.Module:
    """The image tower as a transformers CLIPVisionModelWithProjection.

    Raises:
        WeightsError: it has something that transformers' CLIP does not have.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    visual = clip.model.visual
    if clip.settings["vision_cfg"].get("timm_model_name"):
        raise WeightsError(f"{clip.ref}: image tower of timm, which transformers' CLIP is not")
    if visual.pool_type != "tok" or visual.final_ln_after_pool:
        raise WeightsError(f"{clip.ref}: image tower with pool_type {visual.pool_type}, transformers' CLIP takes the class token")
    target = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            image_size=image_side(clip),
            patch_size=visual.conv1.kernel_size[0],
            projection_dim=clip.embed_dim,
            **_tower_settings(visual.transformer.resblocks),
        )
    )
    state = _to_transformers(visual.state_dict(), _IMAGE_ENDS, "proj", f"{clip.ref}: image tower")
    state = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    state["visual_projection.weight"] = visual.proj.detach().float().T.contiguous()
    load_checked(target, state, f"{clip.ref}: image tower")
    return target.eval()


def image_side(clip: ClipEncoder) -> int:
    """Pixels a side of the square pictures that the image tower takes.

    Raises:
        WeightsError: they are no squares.
    """
    height, width = clip.preprocess.size
    if height != width:
        raise WeightsError(f"{clip.ref}: pictures of {width} x {height} pixels, transformers' CLIP takes squares")
    return height


def image_processor(clip: ClipEncoder) -> Any:
    """The preprocessing of pictures as a transformers CLIPImageProcessor.

    Raises:
        WeightsError: it does something that this processor does not do.
    """
    from transformers import CLIPImageProcessor

    told, side = clip.preprocess, image_side(clip)
    if told.resize_mode == "longest":
        raise WeightsError(f"{clip.ref}: resize_mode longest, which transformers' CLIPImageProcessor does not have")
    square = {"height": side, "width": side}
    middle = told.resize_mode == "shortest"
    return CLIPImageProcessor(
        size={"shortest_edge": side} if middle else square,
        crop_size=square,
        do_center_crop=middle,
        resample=INTERPOLATIONS[told.interpolation],
        image_mean=list(told.mean),
        image_std=list(told.std),
    )


def _tower_settings(blocks: Any) -> dict[str, Any]:
    """What a transformers CLIP configuration needs to know of an open_clip tower."""
    block = blocks[0]
    activation = block.mlp.gelu
    exact = getattr(activation, "approximate", "none") == "none"
    if not exact:
        raise WeightsError("an approximated GELU, which transformers' CLIP computes in another way")
    return {
        "hidden_size": block.attn.embed_dim,
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(blocks),
        "hidden_act": "quick_gelu" if type(activation).__name__ == "QuickGELU" else "gelu",
        "layer_norm_eps": block.ln_1.eps,
    }


def _to_transformers(state: Mapping[str, Tensor], ends: Mapping[str, str], projection: str, source: str) -> dict[str, Tensor]:
    """Tensors of an open_clip tower under the names of a transformers CLIP tower, in fp32, its projection left out."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensor = tensor.detach().float().clone()
        if name in ends:
            renamed[ends[name]] = tensor
            continue
        number, _, layer = name.removeprefix(_OPEN_CLIP_BLOCK).partition(".")
        stem, _, leaf = layer.rpartition(".")
        prefix = f"{_TRANSFORMERS_BLOCK}{number}."
        if stem == "attn":  # in_proj_weight or in_proj_bias: query, key and value on top of each other
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{prefix}self_attn.{letter}_proj.{leaf.removeprefix('in_proj_')}"] = piece.contiguous()
        elif stem in _LAYER and name.startswith(_OPEN_CLIP_BLOCK):
            renamed[f"{prefix}{_LAYER[stem]}.{leaf}"] = tensor
        elif name != projection:
            raise WeightsError(f"{source}: {name}: a tensor that transformers' CLIP does not have")
    return renamed


def write_text_tower(folder: Path, model: Any, tokenizer: Any, source: str) -> None:
    """Write a transformers CLIPTextModel and its tokenizer as a folder for ``ClipEncoder``, with this tower alone.

    Raises:
        WeightsError: it has something that open_clip's tower does not have.
    """
    config = model.config
    text = {
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "pool_type": "eos",
        "eos_id": tokenizer.eos_token_id,
        "proj_type": "none",
        # Any name: open_clip takes the tokenizer that lies in the folder.
        "hf_tokenizer_name": "tokenizer",
        **_layers(config, source),
    }
    settings = {"embed_dim": config.hidden_size, "vision_cfg": _NO_IMAGE_TOWER, "text_cfg": text, **_activation(config, source)}
    state = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    _write(folder, settings, {}, "text", _from_transformers(state, _TEXT_ENDS), source)
    tokenizer.save_pretrained(folder)


def write_image_tower(folder: Path, model: Any, processor: Any, source: str) -> None:
    """Write a transformers CLIPVisionModelWithProjection as a folder for ``ClipEncoder``, with this tower alone.

    Args:
        processor: its CLIPImageProcessor, which knows how pictures are prepared.

    Raises:
        WeightsError: it has something that open_clip's tower, or its preprocessing, does not have.
    """
    config = model.config
    vision = {
        "width": config.hidden_size,
        "head_width": config.hidden_size // config.num_attention_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        **_layers(config, source),
    }
    settings = {"embed_dim": config.projection_dim, "vision_cfg": vision, "text_cfg": _NO_TEXT_TOWER}
    preprocess = _preprocess_cfg(processor.to_dict(), config.image_size, source)
    state = {name.removeprefix("vision_model."): tensor for name, tensor in model.state_dict().items()}
    state["proj"] = state.pop("visual_projection.weight").T.contiguous()
    settings |= _activation(config, source)
    _write(folder, settings, preprocess, "visual", _from_transformers(state, _IMAGE_ENDS), source)


def _preprocess_cfg(told: Mapping[str, Any], side: int, source: str) -> dict[str, Any]:
    """open_clip's settings of what a CLIPImageProcessor does before a tower that takes ``side`` x ``side`` pixels."""
    square = {"height": side, "width": side}
    wanted = {"do_resize": True, "do_rescale": True, "do_normalize": True}
    wrong = [f"{name} {told.get(name)!r}" for name, value in wanted.items() if told.get(name) != value]
    if abs(told["rescale_factor"] * 255 - 1) > 1e-6:
        wrong.append(f"rescale_factor {told['rescale_factor']}")
    size, crop = told["size"], told["crop_size"] if told["do_center_crop"] else None
    if size == {"shortest_edge": side} and crop == square:
        mode = "shortest"
    elif size == square and crop in (None, square):
        mode = "squash"
    else:
        wrong.append(f"size {size} and crop_size {crop}, for an image_size of {side}")
        mode = ""
    names = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}
    if told["resample"] not in names:
        wrong.append(f"resample {told['resample']!r}")
    if wrong:
        raise WeightsError(f"{source}: its image processor has {', '.join(wrong)}, which open_clip's preprocessing does not have")
    mean_and_std = {"mean": list(told["image_mean"]), "std": list(told["image_std"])}
    return mean_and_std | {"interpolation": names[told["resample"]], "resize_mode": mode}


def _layers(config: Any, source: str) -> dict[str, Any]:
    if config.layer_norm_eps != 1e-5:
        raise WeightsError(f"{source}: layer_norm_eps is {config.layer_norm_eps}, open_clip's towers have 1e-05")
    return {"layers": config.num_hidden_layers, "mlp_ratio": config.intermediate_size / config.hidden_size}


def _activation(config: Any, source: str) -> dict[str, Any]:
    if config.hidden_act not in ("gelu", "quick_gelu"):
        raise WeightsError(f"{source}: hidden_act is {config.hidden_act!r}, open_clip's towers have gelu or quick_gelu")
    return {"quick_gelu": config.hidden_act == "quick_gelu"}


def _write(
    folder: Path, settings: Mapping[str, Any], preprocess: Mapping[str, Any], tower: str, state: Mapping[str, Tensor], source: str
) -> None:
    import_open_clip()
    from open_clip.model import CustomTextCLIP

    model = CustomTextCLIP(**settings)
    load_checked(getattr(model, tower), state, source)
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if not name.startswith(f"{tower}.") and tensor.dim():
            tensor.zero_()
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": {**settings, "custom_text": True}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "open_clip_model.safetensors")


def _from_transformers(state: Mapping[str, Tensor], ends: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of a transformers CLIP tower under open_clip's names; what has no place keeps its name, for ``load_checked``."""
    own_ends = {theirs: own for own, theirs in ends.items()}
    own_layers = {theirs: own for own, theirs in _LAYER.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(_TRANSFORMERS_BLOCK):
            renamed[own_ends.get(name, name)] = tensor
            continue
        number, _, layer = name.removeprefix(_TRANSFORMERS_BLOCK).partition(".")
        stem, _, leaf = layer.rpartition(".")
        prefix = f"{_OPEN_CLIP_BLOCK}{number}."
        if stem == "self_attn.q_proj":
            pieces = [state.get(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
            if all(piece is not None for piece in pieces):
                renamed[f"{prefix}attn.in_proj_{leaf}"] = torch.cat([piece for piece in pieces if piece is not None])
        elif stem not in ("self_attn.k_proj", "self_attn.v_proj"):
            renamed[f"{prefix}{own_layers.get(stem, stem)}.{leaf}"] = tensor
    return renamed
