"""Autoencoder and text codec between their own names and those of the official files.

``autoencoder_kl.pth`` uses the names of latent-diffusion, our autoencoder those of diffusers; ``caption_decoder.pth`` has
``encode_prefix``, ``decode_prefix`` and ``gpt`` where the text codec has ``projection``, ``prefix`` and ``gpt2``. Tensors are
renamed, and attention weights of the autoencoder reshaped between linear layers and 1x1 convolutions: both ways are exact.
What is read is compared with what the official file of such a model holds, so that errors name the file's own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from unidiffuser.tensors import WeightsError, check_tensors, without_masks

_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_CODEC = {"projection": "encode_prefix", "prefix": "decode_prefix", "gpt2": "gpt"}


def vae_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a diffusers AutoencoderKL under latent-diffusion's names."""
    levels = len({match[1] for name in state if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", name))})
    renamed = {}
    for name, tensor in state.items():
        new = name
        new = re.sub(r"mid_block\.resnets\.(\d+)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", new)
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)\.", r"down.\1.block.\2.", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", new)
        # latent-diffusion counts the decoder's levels from the finest.
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}.", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", new)
        new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if (match := re.match(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)$", new)) is not None:
            new = f"{match[1]}.mid.attn_1.{_ATTENTION[match[2]]}.{match[3]}"
            tensor = tensor[..., None, None] if tensor.dim() == 2 else tensor
        renamed[new] = tensor
    return renamed


def vae_from_official(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a latent-diffusion autoencoder under diffusers' names.

    Args:
        like: those of a diffusers AutoencoderKL of the same sizes; their values do not matter.

    Raises:
        WeightsError: tensors are missing, extra or wrongly shaped.
    """
    expected = vae_to_official(like)
    check_tensors(expected, state, "autoencoder")
    return {own: state[official].reshape(like[own].shape) for own, official in zip(like, expected, strict=True)}


def codec_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a ``TextCodec`` under the names of caption_decoder.pth."""
    return {f"{_CODEC[head]}.{rest}": tensor for name, tensor in state.items() for head, rest in [name.split(".", 1)]}


def codec_from_official(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of caption_decoder.pth under the names of a ``TextCodec``; the causal masks that old files hold are left out.

    Args:
        like: those of a ``TextCodec`` of the same sizes; their values do not matter.

    Raises:
        WeightsError: tensors are missing, extra or wrongly shaped, or GPT-2's head is another than its embedding.
    """
    state = without_masks(state)
    prefix = "module." if any(name.startswith("module.") for name in state) else ""  # saved from a DataParallel model
    names = dict(zip(like, (f"{prefix}{name}" for name in codec_to_official(like)), strict=True))
    return codec_renamed(state, names, like, "caption decoder")


def codec_renamed(
    state: Mapping[str, Tensor], names: Mapping[str, str], like: Mapping[str, Tensor], source: object
) -> dict[str, Tensor]:
    """Tensors of a ``TextCodec`` that have other ``names`` in a file, checked.

    Raises:
        WeightsError: see ``codec_from_official``.
    """
    check_tensors({theirs: like[own] for own, theirs in names.items()}, state, source)
    embedding, head = names["gpt2.transformer.wte.weight"], names["gpt2.lm_head.weight"]
    if not torch.equal(state[embedding], state[head]):
        raise WeightsError(f"{source}: {head} differs from {embedding}, GPT-2 has one tensor for both; nothing was loaded")
    return {own: state[theirs] for own, theirs in names.items()}
