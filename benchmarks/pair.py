"""One set of random weights as an export folder of this project and as a pipeline folder of diffusers.

Random weights cost the same as trained ones, but for one thing: an untrained caption decoder ends its captions nowhere or
anywhere (and diffusers' fails on captions of different lengths). So its position table is made to ask for the end of the
caption after a given number of tokens, on both sides alike.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import diffusers
import open_clip
import torch
import transformers
from diffusers import AutoencoderKL, UniDiffuserPipeline
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from unidiffuser.encoders import ClipEncoder, ImageLatents
from unidiffuser.generation import UniDiffuser
from unidiffuser.modalities import paper_modalities
from unidiffuser.pipeline_export import save_pipeline
from unidiffuser.references import EMBEDDED
from unidiffuser.text_decoder import TextCodec
from unidiffuser.uvit import UViT, UViTConfig
from unidiffuser.weights import save_native

_REDUCTION = 8


@dataclass(frozen=True)
class Sizes:
    """Sizes of the pair. The CLIP towers are small ones: they run once, and cost next to nothing on both sides.

    Attributes:
        width, depth: of the U-ViT; heads are 64 wide.
        pixels: side of the pictures; the autoencoder reduces them 8 times, patches are 2 x 2.
        text_tokens: tokens of a caption's latent.
        autoencoder: channels of the finest resolution; the default is Stable Diffusion's.
        decoder: width of the caption decoder, with a head and a layer for every 64; the default is GPT-2's.
        caption: tokens after which a caption ends.
    """

    width: int = 512
    depth: int = 8
    pixels: int = 128
    text_tokens: int = 77
    autoencoder: int = 128
    decoder: int = 768
    caption: int = 12


def build(folder: Path, sizes: Sizes) -> None:
    """Write ``folder/ours`` and ``folder/diffusers``."""
    silence()
    torch.manual_seed(0)
    ours = folder / "ours"
    channels = sizes.autoencoder
    ImageLatents(
        AutoencoderKL(
            latent_channels=4,
            block_out_channels=(channels, 2 * channels, 4 * channels, 4 * channels),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    ).save(str(ours / "vae"))
    _clip(ours / "clip_image", sizes)
    clip = ClipEncoder.load(str(ours / "clip_image"))
    shutil.copytree(ours / "clip_image", ours / "clip_text")
    _codec(clip.text_width, sizes).save(ours / "text_codec")
    side = sizes.pixels // _REDUCTION
    modalities = paper_modalities((4, side, side), clip=clip.embed_dim, text=(sizes.text_tokens, 64))
    config = UViTConfig(width=sizes.width, depth=sizes.depth, heads=sizes.width // 64, modalities=modalities)
    save_native(ours / "uvit", UViT(config))
    save_pipeline(folder / "diffusers", UniDiffuser.load(ours))


def _clip(folder: Path, sizes: Sizes) -> None:
    """The embedded CLIP's declaration and tokenizer, with captions and embeddings of the wanted sizes."""
    shutil.copytree(EMBEDDED / "clip", folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 512
    config["model_cfg"]["text_cfg"]["context_length"] = sizes.text_tokens
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "open_clip_model.safetensors").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": sizes.text_tokens}))
    model = open_clip.create_model(f"local-dir:{folder.resolve()}", force_custom_text=True, load_weights=False)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def _codec(text_width: int, sizes: Sizes) -> TextCodec:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "gpt2", local_files_only=True)
    layers = max(1, sizes.decoder // 64)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        n_embd=sizes.decoder,
        n_layer=layers,
        n_head=layers,
        n_positions=2 * sizes.text_tokens,
    )
    codec = TextCodec(GPT2LMHeadModel(config), tokenizer, text_width, latent_width=64)
    words, places = codec.gpt2.transformer.wte.weight, codec.gpt2.transformer.wpe.weight
    last = sizes.text_tokens + sizes.caption - 1
    with torch.no_grad():
        words[codec.eos] *= 4 / words[codec.eos].norm()
        places[:last] -= words[codec.eos]
        places[last:] += 100 * words[codec.eos]
    return codec


def silence() -> None:
    """No warnings of random weights and of a deprecated pipeline, and no progress bars."""
    for logging in (transformers.utils.logging, diffusers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    getLogger().setLevel(ERROR)
    warnings.simplefilter("ignore")


def load_ours(folder: Path, device: torch.device) -> UniDiffuser:
    """This project's side of the pair, in fp32."""
    silence()
    return UniDiffuser.load(folder / "ours", device)


def load_peer(folder: Path, device: torch.device) -> Any:  # a pipeline declares its parts at run time
    """diffusers' side of the pair, in fp32."""
    silence()
    pipeline = UniDiffuserPipeline.from_pretrained(folder / "diffusers").to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def differences(ours: UniDiffuser, peer: Any) -> dict[str, float]:
    """How far apart the two sides' outputs for the same inputs are, relative to the greatest output.

    ``network``: one denoising call, all three outputs; ``picture``: a decoded latent; ``caption``: the decoder's logits.
    """
    generator = torch.Generator().manual_seed(0)
    x = {part.name: torch.randn(2, *part.shape, generator=generator).to(ours.device) for part in ours.uvit.parts}
    predicted = ours.uvit(x, {"image": 300, "text": 700})
    latent, clip, text = peer.unet(x["latent"], x["clip"][:, None], x["text"], timestep_img=300, timestep_text=700)
    noise = {"latent": latent, "clip": clip[:, 0], "text": text}
    prefix = peer.text_decoder.decode_prefix(x["text"])
    logits = peer.text_decoder.transformer(inputs_embeds=prefix).logits
    return {
        "network": max(_apart(predicted[name], noise[name]) for name in noise),
        "picture": _apart(ours.vae.model.decode(x["latent"]).sample, peer.vae.decode(x["latent"]).sample),
        "caption": _apart(ours.text_codec.gpt2(inputs_embeds=ours.text_codec.prefix(x["text"])).logits, logits),
    }


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
