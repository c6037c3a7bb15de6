"""Autoencoder and text codec between their own names and those of the official files.

``autoencoder_kl.pth`` uses the names of latent-diffusion, our autoencoder those of diffusers; ``caption_decoder.pth`` has
``encode_prefix``, ``decode_prefix`` and ``gpt`` where the text codec has ``projection``, ``prefix`` and ``gpt2``. Tensors are
renamed, and attention weights of the autoencoder reshaped between linear layers and 1x1 convolutions: both ways are exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from unidiffuser.tensors import WeightsError

_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_CODEC = {"projection": "encode_prefix", "prefix": "decode_prefix", "gpt2": "gpt"}


def vae_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a diffusers AutoencoderKL under latent-diffusion's names."""
    levels = _levels(state, r"decoder\.up_blocks\.(\d+)\.")
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


def vae_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a latent-diffusion autoencoder under diffusers' names."""
    levels = _levels(state, r"decoder\.up\.(\d+)\.")
    attention = {official: own for own, official in _ATTENTION.items()}
    renamed = {}
    for name, tensor in state.items():
        new = name
        new = re.sub(r"mid\.block_(\d)\.", lambda m: f"mid_block.resnets.{int(m[1]) - 1}.", new)
        new = re.sub(r"down\.(\d+)\.block\.(\d+)\.", r"down_blocks.\1.resnets.\2.", new)
        new = re.sub(r"down\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0.", new)
        new = re.sub(r"up\.(\d+)\.block\.(\d+)\.", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.resnets.{m[2]}.", new)
        new = re.sub(r"up\.(\d+)\.upsample\.", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.upsamplers.0.", new)
        new = re.sub(r"coder\.norm_out\.", "coder.conv_norm_out.", new).replace("nin_shortcut", "conv_shortcut")
        if (match := re.match(r"(\w+)\.mid\.attn_1\.(\w+)\.(weight|bias)$", new)) is not None:
            new = f"{match[1]}.mid_block.attentions.0.{attention[match[2]]}.{match[3]}"
            tensor = tensor[..., 0, 0] if tensor.dim() == 4 else tensor
        renamed[new] = tensor
    return renamed


def _levels(state: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(match[1]) for name in state if (match := re.match(pattern, name)) is not None]
    if not found:
        raise WeightsError("not an autoencoder: no decoder levels among its tensors")
    return max(found) + 1


def codec_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a ``TextCodec`` under the names of caption_decoder.pth."""
    return {f"{_CODEC[head]}.{rest}": tensor for name, tensor in state.items() for head, rest in [name.split(".", 1)]}


def codec_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of caption_decoder.pth under the names of a ``TextCodec``; the causal masks that old files hold are left out."""
    own = {official: name for name, official in _CODEC.items()}
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")  # saved from a DataParallel model
        if re.search(r"\.attn\.(masked_)?bias$", name):
            continue
        head, _, rest = name.partition(".")
        if head not in own:
            raise WeightsError(f"{name}: not a tensor of a caption decoder")
        renamed[f"{own[head]}.{rest}"] = tensor
    return renamed
