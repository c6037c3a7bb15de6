"""Where a training may start besides another training: weights in the official, diffusers' or our own layout, here or on a store.

They are told apart by what is there (see `unidiffuser.layouts`), count by their content, and are held against the recipe before
anything runs. Workers get them as a native folder, each machine once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.external import fetch_outside, local_or_url
from infra.listing import NothingFound, OutsideError, readable
from infra.queries import file_name, opened, place, unmarked
from infra.store import Store
from stages.runner.contract import StageError
from training.config import TrainConfig

if TYPE_CHECKING:
    from unidiffuser.uvit import UViTConfig

LONE = (".pth", ".pt", ".bin", ".safetensors")
# What lies beside config.json, in the order in which it is looked for.
BESIDE_CONFIG = ("model.safetensors", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
OFFICIAL = ("uvit_v1.pth", "uvit_v0.pth")
EXPECTED = (
    "no U-ViT there; expected a file of tensors such as uvit_v1.pth or .safetensors, a folder with uvit_v1.pth or uvit_v0.pth, "
    "or one that holds config.json and its weights, itself or in uvit or unet"
)


def files_of(weights: str) -> list[str]:
    """The files of the U-ViT at a path or URL: one of tensors, and config.json before it where it is in a folder with one.

    Raises:
        OutsideError: there is none, or the place cannot be looked at.
    """
    with readable(weights):
        fs, path = place(weights)
        if fs.isfile(path):
            found = [path] if file_name(local_or_url(fs, path)).endswith(LONE) else []
        elif fs.isdir(path):
            found = _in_folder(fs, path.rstrip("/"))
        else:
            raise NothingFound(weights)
    if not found:
        raise OutsideError(weights, EXPECTED)
    return [local_or_url(fs, file) for file in found]


def is_lone_file(address: str) -> bool:
    """Whether there is a file of tensors at a path or URL.

    Raises:
        OutsideError: the place cannot be looked at.
    """
    if not address.endswith(LONE):
        return False
    with readable(address):
        fs, path = place(address)
        return bool(fs.isfile(path))


def _in_folder(fs: Any, folder: str) -> list[str]:
    for below in (folder, f"{folder}/uvit", f"{folder}/unet"):
        if fs.isfile(f"{below}/config.json"):
            tensors = next((f"{below}/{name}" for name in BESIDE_CONFIG if fs.isfile(f"{below}/{name}")), None)
            if tensors is not None:
                return [f"{below}/config.json", tensors]
    return next(([f"{folder}/{name}"] for name in OFFICIAL if fs.isfile(f"{folder}/{name}")), [])


@contextmanager
def _failing_as(kind: type[Exception]) -> Iterator[None]:
    """What reading weights raises, as one line of an error of this kind."""
    from unidiffuser.tensors import WeightsError

    try:
        yield
    except (WeightsError, OSError, ValueError) as error:
        raise kind(" ".join(str(error).split())) from error


def _parts(files: Mapping[str, str]) -> tuple[str | None, str]:
    """The settings, if there are any, and the tensors."""
    settings = next((address for address in files if address.endswith("/config.json")), None)
    return settings, next(address for address in files if address != settings)


def check_network(config: TrainConfig, files: Mapping[str, str], text: str) -> None:
    """Hold weights against the network of a recipe; reads their shapes alone.

    Args:
        files: address -> digest.
        text: the CLIP of the captions.

    Raises:
        StageError: they cannot be read, or are of another network; the line says what would make them fit.
    """
    from training.weights import fields_to_set

    saved = described(config, files, text)
    settings, tensors = _parts(files)
    # A lone file does not tell its heads.
    told = ("width", "depth") if settings is None else ("width", "depth", "heads")
    if wrong := fields_to_set(saved, config.model, told):
        raise StageError(f"{tensors}: weights of another model: {'; '.join(wrong)}")


def check_data(config: TrainConfig, files: Mapping[str, str], text: str, encode: Any, latent_width: int | None) -> None:
    """Hold weights against the data that will be encoded, as far as that can be told before.

    Args:
        encode: names the encoders as `vae`, `clip` and `text`.
        latent_width: numbers of a text token, where that is known.

    Raises:
        StageError: they take other data; the line says which encoder would make them fit.
    """
    from training.weights import part_to_change

    saved = described(config, files, text)
    theirs = {part.name: part.shape for modality in saved.modalities for part in modality.parts}
    for name, shape in made_by(encode, latent_width).items():
        if name in theirs and theirs[name][: len(shape)] != shape:
            phrase = part_to_change(name, theirs[name][: len(shape)], shape)
            raise StageError(f"{_parts(files)[1]}: weights of another model: {phrase}")


def made_by(encode: Any, latent_width: int | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the parts that encoders will make, of a latent its channels, as far as they are known. Arguments as `check_data`.

    Raises:
        StageError: what tells them cannot be read.
    """
    from unidiffuser.clip_settings import clip_settings, context_length
    from unidiffuser.references import local_folder
    from unidiffuser.tensors import read_settings

    with _failing_as(StageError):
        made: dict[str, tuple[int, ...]] = {"clip": (clip_settings(encode.clip)["embed_dim"],)}
        if latent_width is not None:
            made["text"] = (context_length(encode.text), latent_width)
        if (folder := local_folder(encode.vae, "vae")) is not None:
            made["latent"] = (read_settings(folder / "config.json")["latent_channels"],)
    return made


def described(config: TrainConfig, files: Mapping[str, str], text: str) -> UViTConfig:
    """The configuration that weights tell; a lone file takes its heads from the recipe, and its text's tokens from the CLIP.

    Raises:
        StageError: they cannot be read, or their tensors do not fit together.
    """
    import torch

    from unidiffuser.clip_settings import context_length
    from unidiffuser.convert import from_diffusers, from_tensors
    from unidiffuser.tensors import check_tensors, named, read_shapes
    from unidiffuser.uvit import UViT, UViTConfig

    settings, tensors = _parts(files)
    with _failing_as(StageError):
        with opened(tensors) as file:
            shapes = read_shapes(file, unmarked(tensors))
        if settings is None:
            widths = (tensor.shape[0] for name, tensor in shapes.items() if name.endswith("norm.weight"))
            # What is wrong with the width is said by whoever compares it.
            heads = config.model.heads if next(widths, 0) % config.model.heads == 0 else 1
            with named(tensors):
                return from_tensors(shapes, heads, context_length(text))[0]
        with opened(settings) as file, named(settings):
            told = json.load(file)
            if "modalities" not in told:
                return from_diffusers(told, shapes)[0]
            saved = UViTConfig.model_validate(told)
        with torch.device("meta"):
            check_tensors(UViT(saved).state_dict(), shapes, tensors)
        return saved


@dataclass(frozen=True)
class Start:
    """Gives the weights as a native folder, on each machine that trains.

    Attributes:
        weights: where they lie, as the recipe says.
        files: address -> digest, as they were when the run was planned.
        heads: attention heads, which a lone file does not tell.
        text: the CLIP of the captions, whose number of tokens a lone file does not tell.
        folder: a local folder to make them in.
    """

    store: Store
    weights: str
    files: Mapping[str, str]
    heads: int
    text: str
    folder: str

    def __call__(self) -> str:
        """Raises TrainingError when they are not what they were, cannot be read, or are not finite."""
        from training.job import TrainingError
        from unidiffuser.clip_settings import context_length
        from unidiffuser.layouts import load_uvit
        from unidiffuser.weights import save_native

        with _failing_as(TrainingError):
            fetched = fetch_outside(self.files, self.weights, self.store, Path(self.folder, "fetched"))
            model = load_uvit(fetched, self.heads, context_length(self.text))
        # On a machine of its own it would stay for good.
        shutil.rmtree(Path(self.folder, "fetched"), ignore_errors=True)
        if wrong := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
            raise TrainingError(f"{self.weights}: {len(wrong)} tensors are not finite, {wrong[0]} first; take other weights")
        save_native(Path(self.folder, "native"), model)
        return str(Path(self.folder, "native"))
