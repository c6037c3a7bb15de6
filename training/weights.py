"""Weights of a model that was trained elsewhere, as what a run starts from: no optimizer, no average, no history.

They lie in a native folder of `unidiffuser.weights`; layouts of other programs are turned into one before. The moving average
starts at the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from training.config import ModelConfig
from training.ema import Ema
from training.masters import Masters
from unidiffuser.modalities import token_order
from unidiffuser.uvit import UViTConfig, resize_positions
from unidiffuser.weights import read_config

MAKERS = {"latent": "the autoencoder", "clip": "the CLIP of pictures", "text": "the CLIP of captions and the text codec"}


class WeightsMisfit(ValueError):
    """Weights of another model than is trained; the message says what would make them fit."""


class ForeignWeights:
    """A native folder opened for reading, for a model whose grids may have other sizes.

    Args:
        folder: config.json and model.safetensors.
        model: configuration of the model that will take the weights.

    Raises:
        WeightsMisfit: the two differ in more than the sizes of their grids.
    """

    def __init__(self, folder: str | Path, model: UViTConfig) -> None:
        self.file, self.model = Path(folder, "model.safetensors"), model
        self.saved = read_config(folder)
        if wrong := parts_to_change(self.saved, model):
            raise WeightsMisfit(f"the weights that it starts from are of another model: {'; '.join(wrong)}")
        try:
            self.tensor("position")
        except ValueError as error:
            raise WeightsMisfit(f"the weights that it starts from are of another model: {error}") from error

    def names(self) -> list[str]:
        """Names of the tensors of the model."""
        with safe_open(self.file, framework="pt") as file:
            return list(file.keys())

    def tensor(self, name: str) -> Tensor:
        """One tensor in fp32; the position table in this run's size."""
        with safe_open(self.file, framework="pt") as file:
            tensor = file.get_tensor(name).float()
        return resize_positions({name: tensor}, self.saved, self.model)[name] if name == "position" else tensor

    def restore(self, masters: Masters, ema: Ema) -> None:
        """Set master weights and moving average, which an engine in half precision has rounded."""
        for vectors in (masters.vectors, ema.vectors):
            masters.scatter(lambda name, start, length: self.tensor(name).view(-1).narrow(0, start, length), vectors)


def fields_to_set(saved: UViTConfig, model: ModelConfig, told: tuple[str, ...]) -> list[str]:
    """What to write into the configuration so that the network is the one that was saved, a phrase a field.

    Args:
        told: those of width, depth and heads that the saved weights tell.
    """
    theirs = {name: getattr(saved, name) for name in (*told, "data_type_token")}
    theirs["patch"] = next((part.patch for part in token_order(saved.modalities) if part.is_grid), model.patch)
    found = [
        f"set model.{name}: {str(value).lower()} (now {str(getattr(model, name)).lower()})"
        for name, value in theirs.items()
        if value != getattr(model, name)
    ]
    if saved.data_type_token != model.data_type_token:
        found.append("data.data_type goes with that" if saved.data_type_token else "leave out data.data_type")
    if saved.mlp_ratio != 4:
        found.append(f"its MLPs are {saved.mlp_ratio:g} times as wide as its tokens, and only 4 times can be trained")
    return found


def parts_to_change(saved: UViTConfig, model: UViTConfig) -> list[str]:
    """Which parts of the data have another shape than in the model that was saved, grids but for their sides; a phrase a part."""
    theirs, ours = (
        {part.name: part.shape[:1] if part.is_grid else part.shape for part in token_order(config.modalities)}
        for config in (saved, model)
    )
    return shapes_to_change(theirs, ours)


def shapes_to_change(theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]]) -> list[str]:
    """As `parts_to_change`, of shapes by part, of a grid its channels alone."""
    if sorted(theirs) != sorted(ours):
        return [f"it models {', '.join(theirs)}, and the latents hold {', '.join(ours)}"]
    return [part_to_change(name, shape, ours[name]) for name, shape in theirs.items() if shape != ours[name]]


def part_to_change(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> str:
    """The phrase for a part: (channels) of a latent, (numbers) of an embedding, or (tokens, numbers) of a text."""
    there, here = (" x ".join(map(str, shape)) for shape in (theirs, ours))
    of = "channels" if name == "latent" else "numbers"
    return f"its {name} has {there} {of}, the data's {here}: encode with {MAKERS[name]} that it was trained with"
