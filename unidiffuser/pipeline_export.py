"""An export folder as a diffusers pipeline: ``UniDiffuserPipeline.from_pretrained`` loads what ``save_pipeline`` writes.

The autoencoder and GPT-2 are the same classes on both sides; the U-ViT and the text codec are renamed; the open_clip towers
become transformers' CLIP models, which compute the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unidiffuser.clip_towers import clip_tokenizer, image_processor, image_tower, text_tower
from unidiffuser.convert import to_diffusers
from unidiffuser.encoders import ClipEncoder
from unidiffuser.generation import UniDiffuser
from unidiffuser.imports import import_open_clip
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.solver import SAMPLERS
from unidiffuser.tensors import WeightsError, load_checked
from unidiffuser.text_decoder import TextCodec

# Tokens that diffusers' text decoder may write behind its prefix, as long as one of its beams has not ended. A GPT-2 with fewer
# positions gets rows of zeros for them, which are never reached by a caption that ends; `pipeline_import` cuts them off again.
_WRITES_AT_MOST = 67
POSITIONS = "transformer.transformer.wpe.weight"
# Names of the text codec's parts in diffusers' UniDiffuserTextDecoder, and the fields of a GPT-2 that this one's config has.
CODEC_NAMES = {"projection": "encode_prefix", "prefix": "decode_prefix", "gpt2": "transformer"}
GPT2_FIELDS = (
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "layer_norm_epsilon", "initializer_range", "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
)  # fmt: skip


def save_pipeline(folder: Path | str, model: UniDiffuser) -> None:
    """Write ``model`` as a folder for ``UniDiffuserPipeline.from_pretrained``.

    Raises:
        WeightsError: the model is not declared like the paper's, or a CLIP tower has something that transformers' has not.
    """
    from diffusers import UniDiffuserPipeline
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel

    folder = Path(folder)
    unet_settings, unet_tensors = to_diffusers(model.uvit.state_dict(), model.uvit.config)
    with torch.device("meta"):
        unet = UniDiffuserModel.from_config(unet_settings)
    unet.load_state_dict(unet_tensors, assign=True)  # every tensor in its own type, which from_pretrained would change
    tokenizer = _tokenizer(model.clip_text)
    pipeline: Any = UniDiffuserPipeline(
        vae=model.vae.model,
        text_encoder=text_tower(model.clip_text, tokenizer),
        image_encoder=image_tower(model.clip_image),
        clip_image_processor=image_processor(model.clip_image),
        clip_tokenizer=tokenizer,
        text_decoder=_text_decoder(model.text_codec, model.clip_text.context_length),
        text_tokenizer=model.text_codec.tokenizer,
        unet=unet,
        scheduler=SAMPLERS["dpm++2m"](NoiseSchedule.of(model.uvit.config.noise), ()),
    )
    pipeline.save_pretrained(folder)
    forget_paths(folder)


def forget_paths(folder: Path) -> None:
    """diffusers writes down where a part was loaded from: a temporary folder, and another one each time."""
    for file in folder.rglob("*.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tokenizer(clip: ClipEncoder) -> Any:
    import_open_clip()
    from open_clip.tokenizer import SimpleTokenizer

    if type(clip.tokenizer) is SimpleTokenizer:
        return clip_tokenizer(clip.context_length)
    tokenizer = getattr(clip.tokenizer, "tokenizer", None)
    if tokenizer is None:
        raise WeightsError(f"{clip.ref}: its tokenizer is neither CLIP's own nor one of transformers")
    tokenizer.model_max_length = clip.context_length
    return tokenizer


def _text_decoder(codec: TextCodec, length: int) -> nn.Module:
    from diffusers.pipelines.deprecated.unidiffuser.modeling_text_decoder import UniDiffuserTextDecoder

    gpt = codec.gpt2.config
    if not gpt.tie_word_embeddings:
        raise WeightsError("text codec: its GPT-2 has a head of its own (tie_word_embeddings false), that of diffusers has none")
    decoder = UniDiffuserTextDecoder(
        prefix_length=length,
        prefix_inner_dim=codec.text_width,
        prefix_hidden_dim=codec.latent_width,
        **{name: getattr(gpt, name) for name in GPT2_FIELDS} | {"n_positions": max(gpt.n_positions, length + _WRITES_AT_MOST)},
    )
    state = {}
    for name, tensor in codec.state_dict().items():
        head, rest = name.split(".", 1)
        state[f"{CODEC_NAMES[head]}.{rest}"] = tensor.detach().float()
    place = state[POSITIONS]
    state[POSITIONS] = torch.cat([place, place.new_zeros(decoder.config.n_positions - len(place), place.shape[1])])
    load_checked(decoder, state, "text codec")
    # GPT-2 ties its head to its embedding, and diffusers' save_pretrained cannot write two names for one tensor.
    decoder.transformer.lm_head.weight = nn.Parameter(decoder.transformer.lm_head.weight.detach().clone())
    return decoder.eval()
