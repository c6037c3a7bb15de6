"""A text codec that was trained elsewhere, taken as it is: caption_decoder.pth, or that of a pipeline of diffusers or an export.

Whoever goes on from published weights of the U-ViT needs the codec that made their text latents: another one's mean nothing to
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.external import local_or_url
from infra.listing import NothingFound, OutsideError, readable
from infra.queries import opened, place, unmarked
from stages.runner.contract import StageError

if TYPE_CHECKING:
    from unidiffuser.text_decoder import TextCodec

OFFICIAL = "caption_decoder.pth"
# Of text_decoder/config.json: the width of CLIP's text states, and of the latent.
DIFFUSERS_FIELDS = ("prefix_inner_dim", "prefix_hidden_dim")
# A folder that holds one -> the folders below it that are read.
FOLDERS = {"text_codec": ("text_codec",), "text_decoder": ("text_decoder", "text_tokenizer")}


def codec_files(weights: str) -> list[str]:
    """The files of the codec at a path or URL.

    Raises:
        OutsideError: there is none, or the place cannot be looked at.
    """
    with readable(weights):
        fs, path = place(weights)
        folder, found = path.rstrip("/"), list[str]()
        if fs.isfile(path):
            found = [path]
        elif not fs.isdir(path):
            raise NothingFound(weights)
        elif fs.isfile(f"{folder}/{OFFICIAL}"):
            found = [f"{folder}/{OFFICIAL}"]
        else:
            parts = next((below for name, below in FOLDERS.items() if fs.isdir(f"{folder}/{name}")), ())
            found = [file for part in parts for file in fs.find(f"{folder}/{part}")]
    if not found:
        raise OutsideError(weights, f"no text codec there; expected {OFFICIAL}, or a folder with it, text_codec or text_decoder")
    return [local_or_url(fs, file) for file in found]


def check_codec(config: Any, files: Mapping[str, str]) -> None:
    """Hold a codec's widths against the recipe's; reads no values.

    Raises:
        StageError: it cannot be read, or its widths are others; the line says what would make them fit.
    """
    from unidiffuser.clip_settings import clip_settings
    from unidiffuser.tensors import WeightsError

    try:
        where, (text_width, latent_width) = _widths(files)
        have = clip_settings(config.text)["text_cfg"]["width"]
    except (WeightsError, OSError, ValueError, KeyError) as error:
        raise StageError(f"the text codec of {config.weights}: {' '.join(str(error).split())}") from error
    if latent_width != config.latent_width:
        raise StageError(f"{where}: set text-codec.latent_width: {latent_width} (now {config.latent_width})")
    if text_width != have:
        raise StageError(
            f"{where}: reads captions of a CLIP with {text_width} numbers a token, encoders.text {config.text} has {have}: name "
            "the one that it was trained with"
        )


def _widths(files: Mapping[str, str]) -> tuple[str, tuple[int, int]]:
    """The file that tells them; the width of CLIP's text states, and of the latent."""
    from unidiffuser.tensors import WeightsError, read_shapes

    for name, fields in (("codec.json", ("text_width", "latent_width")), ("text_decoder/config.json", DIFFUSERS_FIELDS)):
        for address in files:
            if address.endswith(f"/{name}"):
                with opened(address) as file:
                    told = json.load(file)
                return address, (int(told[fields[0]]), int(told[fields[1]]))
    address = next(iter(files))
    with opened(address) as file:
        shapes = read_shapes(file, unmarked(address))
    weight = next((tensor for name, tensor in shapes.items() if name.endswith("encode_prefix.weight")), None)
    if weight is None or weight.dim() != 2:
        raise WeightsError(f"{address}: no encode_prefix.weight; this is no {OFFICIAL}")
    return address, (weight.shape[1], weight.shape[0])


def load_codec(folder: Path, gpt2: str, text_width: int, latent_width: int) -> TextCodec:
    """The codec of a file, or of a folder that holds one.

    Args:
        gpt2: the GPT-2 whose tokenizer and settings an official file leaves out.

    Raises:
        FileNotFoundError, WeightsError: a file is missing, damaged, or does not fit.
    """
    from unidiffuser.convert_parts import codec_from_official
    from unidiffuser.pipeline_import import pipeline_codec
    from unidiffuser.tensors import named, read_tensors
    from unidiffuser.text_decoder import TextCodec

    if (folder / "text_codec").is_dir():
        return TextCodec.load(folder / "text_codec")
    if (folder / "text_decoder").is_dir():
        return pipeline_codec(folder)
    file = folder / OFFICIAL if folder.is_dir() else folder
    codec = TextCodec.new(gpt2, text_width, latent_width)
    tensors = read_tensors(file)
    with named(file):
        codec.load_state_dict(codec_from_official(tensors, codec.state_dict()))
    return codec.eval()
