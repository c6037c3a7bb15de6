"""A pipeline of diffusers as an export folder: what ``UniDiffuserPipeline.save_pretrained`` wrote, ``UniDiffuser.load`` reads.

All tensors of the pipeline come back to the last bit. What it never had stays away: the text tower of the image CLIP, and the
image tower and the text projection of the text CLIP, which sampling does not use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unidiffuser.clip_towers import write_image_tower, write_text_tower
from unidiffuser.convert import from_diffusers
from unidiffuser.convert_parts import codec_renamed
from unidiffuser.encoders import ImageLatents
from unidiffuser.noise import NoiseConfig
from unidiffuser.pipeline_export import CODEC_NAMES, GPT2_FIELDS, POSITIONS, forget_paths
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.solver import scheduler_settings
from unidiffuser.tensors import WeightsError, named, pretrained, read_settings, read_tensors, reading, without_masks
from unidiffuser.text_decoder import EOS, TextCodec
from unidiffuser.uvit import UViT
from unidiffuser.weights import build, save_native

PIPELINE = "UniDiffuserPipeline"


def import_pipeline(source: Path, folder: Path) -> None:
    """Write the pipeline ``source`` as the export folder ``folder``.

    Raises:
        FileNotFoundError: a part of the pipeline is missing.
        WeightsError: it is no UniDiffuserPipeline, or its tensors do not fit.
    """
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPTextModel, CLIPVisionModelWithProjection

    index = read_settings(source / "model_index.json")
    if index.get("_class_name") != PIPELINE:
        raise WeightsError(f"{source}: a {index.get('_class_name')}, expected a {PIPELINE}")
    save_native(folder / "uvit", load_unet(source / "unet", _noise(source / "scheduler" / "scheduler_config.json")))
    read_settings(source / "vae" / "config.json")
    ImageLatents.load(str(source / "vae")).save(str(folder / "vae"))
    forget_paths(folder / "vae")
    images, texts = source / "image_encoder", source / "text_encoder"
    write_image_tower(
        folder / "clip_image",
        pretrained(CLIPVisionModelWithProjection, images, dtype=torch.float32),
        _without_tensors(CLIPImageProcessor, source / "clip_image_processor"),
        str(images),
    )
    tokenizer = _without_tensors(AutoTokenizer, source / "clip_tokenizer")
    text_encoder = pretrained(CLIPTextModel, texts, dtype=torch.float32)
    write_text_tower(folder / "clip_text", text_encoder, tokenizer, str(texts))
    pipeline_codec(source).save(folder / "text_codec")


def _noise(file: Path) -> NoiseConfig:
    """The schedule that the pipeline names, with which the network was trained; the published one where it names none.

    Raises:
        WeightsError: it has another form than is sampled here.
    """
    if not file.is_file():
        return NoiseConfig()
    told, names = read_settings(file), ("num_train_timesteps", "beta_schedule", "prediction_type")
    settings = scheduler_settings(NoiseSchedule())
    own = {**{name: settings[name] for name in names}, "trained_betas": None}
    if wrong := [f"{name} {told[name]!r}, not {value!r}" for name, value in own.items() if told.get(name, value) != value]:
        raise WeightsError(f"{file}: {'; '.join(wrong)}: another noise schedule than UniDiffuser's, which is not supported")
    with reading(file):
        return NoiseConfig.model_validate({name: told[name] for name in NoiseConfig.model_fields if name in told})


def load_unet(folder: Path, noise: NoiseConfig | None = None) -> UViT:
    """The U-ViT of a folder of diffusers' UniDiffuserModel, in evaluation mode.

    Args:
        noise: the schedule that it was trained with, which such a folder does not tell; the published one if None.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        WeightsError: it has another architecture than the published one, or tensors do not fit.
    """
    settings, state = read_settings(folder / "config.json"), _weights(folder)
    with named(folder):
        config, native = from_diffusers(settings, state)
    return build(config.model_copy(update={"noise": noise or NoiseConfig()}), native, folder)


def _weights(folder: Path) -> dict[str, Tensor]:
    files = [folder / f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin")]
    return read_tensors(next((file for file in files if file.is_file()), files[0]))


def _without_tensors(part_class: Any, folder: Path) -> Any:
    """A tokenizer, or what prepares pictures."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: not found; a pipeline of diffusers has it, fetch or write it again")
    with reading(folder):
        return part_class.from_pretrained(folder, local_files_only=True)


def pipeline_codec(source: Path) -> TextCodec:
    """The text codec of the pipeline ``source``.

    Raises:
        FileNotFoundError, WeightsError: see ``import_pipeline``.
    """
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = source / "text_decoder"
    config, state = read_settings(folder / "config.json"), without_masks(_weights(folder))
    if not config.get("prefix_hidden_dim") or not config.get("prefix_inner_dim"):
        raise WeightsError(
            f"{folder}: has no projection of the text latent (prefix_inner_dim, prefix_hidden_dim), the published one has"
        )
    _strip_unreached(config, state)
    tokenizer = _without_tensors(AutoTokenizer, source / "text_tokenizer")
    if EOS not in tokenizer.get_vocab():
        raise WeightsError(f"{source / 'text_tokenizer'}: has no token {EOS}")
    with reading(folder / "config.json"):
        gpt2 = GPT2LMHeadModel(GPT2Config(**{name: config[name] for name in GPT2_FIELDS if name in config}))
        codec = TextCodec(gpt2, tokenizer, config["prefix_inner_dim"], config["prefix_hidden_dim"])
    own = codec.state_dict()
    names = {name: f"{CODEC_NAMES[head]}.{rest}" for name in own for head, rest in [name.split(".", 1)]}
    codec.load_state_dict(codec_renamed(state, names, own, folder))
    return codec.eval()


def _strip_unreached(config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Cut off the rows of zeros that ``save_pipeline`` put behind the positions of a small GPT-2."""
    if (place := state.get(POSITIONS)) is None or place.dim() != 2:
        return
    reached = place.any(dim=1).nonzero()
    used = int(reached.max()) + 1 if len(reached) else len(place)
    config["n_positions"], state[POSITIONS] = used, place[:used].contiguous()
