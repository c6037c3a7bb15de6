"""The native folder of a U-ViT: ``config.json`` (a ``UViTConfig``) and ``model.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from unidiffuser.tensors import WeightsError, load_checked, read_tensors
from unidiffuser.uvit import UViT, UViTConfig


def save_native(folder: Path | str, model: UViT) -> None:
    """Write ``model`` as a native folder, which is made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(model.config.model_dump_json(indent=2) + "\n")


def load_native(folder: Path | str) -> UViT:
    """The model of a native folder, on the CPU, in the type of its weights, in evaluation mode.

    Raises:
        FileNotFoundError: config.json or model.safetensors is missing.
        WeightsError: the configuration or the tensors do not fit.
    """
    folder = Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; a native folder holds config.json and model.safetensors")
    try:
        config = UViTConfig.model_validate_json(file.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise WeightsError(f"{file}: {field}: {first['msg']}") from error
    return build(config, read_tensors(folder / "model.safetensors"), folder)


def build(config: UViTConfig, state: Mapping[str, Tensor], source: object) -> UViT:
    """A model in evaluation mode with the given weights, in their type.

    Raises:
        WeightsError: the tensors do not fit the configuration.
    """
    with torch.device("meta"):
        model = UViT(config)
    model = model.to_empty(device="cpu")
    if (position := state.get("position")) is not None:
        model = model.to(position.dtype)
    load_checked(model, state, source)
    return model.eval()
