"""An export folder as a diffusers pipeline: ``UniDiffuserPipeline.from_pretrained`` loads what ``save_pipeline`` writes.

The autoencoder and GPT-2 are the same classes on both sides; the U-ViT and the text codec are renamed; the open_clip towers
become transformers' CLIP models, which compute the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unidiffuser.convert import save_diffusers
from unidiffuser.encoders import ClipEncoder
from unidiffuser.generation import UniDiffuser
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.solver import SAMPLERS, scheduler_settings
from unidiffuser.text_decoder import TextCodec
from unidiffuser.weights import WeightsError, load_checked

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


def save_pipeline(folder: Path | str, model: UniDiffuser) -> None:
    """Write ``model`` as a folder for ``UniDiffuserPipeline.from_pretrained``.

    Raises:
        WeightsError: the CLIP text tower has open_clip's own tokenizer, or something that transformers' CLIP has not.
    """
    from diffusers import UniDiffuserPipeline
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel
    from transformers import CLIPImageProcessor

    folder = Path(folder)
    save_diffusers(folder / "unet", model.uvit.state_dict(), model.uvit.config)
    preprocess = model.clip_image.model.visual.preprocess_cfg
    side = _image_size(model.clip_image)
    scheduler_class, settings = SAMPLERS["dpm++2m"]
    tokenizer = getattr(model.clip_text.tokenizer, "tokenizer", None)
    if tokenizer is None:
        raise WeightsError(f"{model.clip_text.ref}: only a text tower with a Hugging Face tokenizer can be exported")
    pipeline: Any = UniDiffuserPipeline(
        vae=model.vae.model,
        text_encoder=_text_encoder(model.clip_text),
        image_encoder=_image_encoder(model.clip_image),
        clip_image_processor=CLIPImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=list(preprocess["mean"]),
            image_std=list(preprocess["std"]),
        ),
        clip_tokenizer=tokenizer,
        text_decoder=_text_decoder(model.text_codec, model.clip_text.context_length),
        text_tokenizer=model.text_codec.tokenizer,
        unet=UniDiffuserModel.from_pretrained(folder / "unet"),
        scheduler=scheduler_class(**scheduler_settings(NoiseSchedule()), **settings),
    )
    pipeline.save_pretrained(folder)


def _image_size(clip: ClipEncoder) -> int:
    size = clip.model.visual.image_size
    return int(size[0] if isinstance(size, tuple | list) else size)


def _text_encoder(clip: ClipEncoder) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    text = clip.model.text
    block = text.transformer.resblocks[0]
    target = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=text.token_embedding.num_embeddings,
            max_position_embeddings=clip.context_length,
            bos_token_id=None,
            eos_token_id=clip.tokenizer.tokenizer.eos_token_id,
            pad_token_id=clip.tokenizer.tokenizer.pad_token_id,
            **_tower_settings(block, text.transformer.layers),
        )
    )
    state = _tower(text.state_dict(), _TEXT_ENDS)
    return _loaded(target, state, "text_model.", f"{clip.ref}: text tower")


def _image_encoder(clip: ClipEncoder) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    visual = clip.model.visual
    block = visual.transformer.resblocks[0]
    target = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            image_size=_image_size(clip),
            patch_size=visual.conv1.kernel_size[0],
            projection_dim=clip.embed_dim,
            **_tower_settings(block, visual.transformer.layers),
        )
    )
    state = _tower(visual.state_dict(), _IMAGE_ENDS)
    state = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    state["visual_projection.weight"] = visual.proj.T
    return _loaded(target, state, "", f"{clip.ref}: image tower")


def _tower_settings(block: Any, layers: int) -> dict[str, Any]:
    """What a transformers CLIP configuration needs to know of an open_clip tower."""
    return {
        "hidden_size": block.attn.embed_dim,
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": layers,
        "hidden_act": "quick_gelu" if type(block.mlp.gelu).__name__ == "QuickGELU" else "gelu",
    }


def _tower(state: dict[str, Tensor], ends: dict[str, str]) -> dict[str, Tensor]:
    """Tensors of an open_clip tower under the names of a transformers CLIP tower, projections left out."""
    renamed = {ends[name]: tensor for name, tensor in state.items() if name in ends}
    for name, tensor in state.items():
        if not name.startswith("transformer.resblocks."):
            continue
        number, layer = name.removeprefix("transformer.resblocks.").split(".", 1)
        stem, leaf = layer.rsplit(".", 1)
        prefix = f"encoder.layers.{number}."
        if stem == "attn":  # in_proj_weight or in_proj_bias: query, key and value on top of each other
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{prefix}self_attn.{letter}_proj.{leaf.removeprefix('in_proj_')}"] = piece
        elif stem in _LAYER:
            renamed[f"{prefix}{_LAYER[stem]}.{leaf}"] = tensor
        else:
            raise WeightsError(f"{name}: a layer that transformers' CLIP does not have")
    return renamed


def _loaded(target: nn.Module, state: dict[str, Tensor], prefix: str, source: str) -> nn.Module:
    # transformers has changed between having and not having this prefix.
    if prefix and any(name.startswith(prefix) for name in target.state_dict()):
        state = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    load_checked(target, {name: tensor.detach().float().clone() for name, tensor in state.items()}, source)
    return target.eval()


def _text_decoder(codec: TextCodec, length: int) -> nn.Module:
    from diffusers.pipelines.deprecated.unidiffuser.modeling_text_decoder import UniDiffuserTextDecoder

    gpt = codec.gpt2.config
    decoder = UniDiffuserTextDecoder(
        prefix_length=length,
        prefix_inner_dim=codec.text_width,
        prefix_hidden_dim=codec.latent_width,
        vocab_size=gpt.vocab_size,
        n_positions=gpt.n_positions,
        n_embd=gpt.n_embd,
        n_layer=gpt.n_layer,
        n_head=gpt.n_head,
        n_inner=gpt.n_inner,
        activation_function=gpt.activation_function,
        layer_norm_epsilon=gpt.layer_norm_epsilon,
    )
    names = {"projection": "encode_prefix", "prefix": "decode_prefix", "gpt2": "transformer"}
    state = {}
    for name, tensor in codec.state_dict().items():
        head, rest = name.split(".", 1)
        state[f"{names[head]}.{rest}"] = tensor.detach().to(torch.float32)
    load_checked(decoder, state, "text codec")
    # GPT-2 ties its head to its embedding, and diffusers' save_pretrained cannot write two names for one tensor.
    decoder.transformer.lm_head.weight = nn.Parameter(decoder.transformer.lm_head.weight.detach().clone())
    return decoder.eval()
