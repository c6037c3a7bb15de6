"""The native folder of a U-ViT: ``config.json`` (a ``UViTConfig``) and ``model.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from unidiffuser.tensors import WeightsError, check_tensors, read_tensors
from unidiffuser.uvit import UViT, UViTConfig


def save_native(folder: Path | str, model: UViT) -> None:
    """Write ``model`` as a native folder, which is made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(model.config.model_dump_json(indent=2) + "\n")


def load_native(folder: Path | str) -> UViT:
    """The model of a native folder, on the CPU, in evaluation mode, in the type of its weights: the widest if they have several.

    Raises:
        FileNotFoundError: config.json or model.safetensors is missing.
        WeightsError: the configuration or the tensors do not fit.
    """
    model = read_native(folder)
    types = {parameter.dtype for parameter in model.parameters()}
    if len(types) == 1:
        return model
    # Those of 8 bits fit into any other, and torch does not promote them.
    return model.to(reduce(torch.promote_types, (kind for kind in types if kind.itemsize > 1), torch.float16))


def read_native(folder: Path | str) -> UViT:
    """The same with every tensor in its own type, for another layout: a model of several types may not compute."""
    return build(read_config(folder), read_tensors(Path(folder, "model.safetensors")), folder)


def read_config(folder: Path | str) -> UViTConfig:
    """The configuration of a native folder.

    Raises:
        FileNotFoundError, WeightsError: see ``load_native``.
    """
    file = Path(folder, "config.json")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; a native folder holds config.json and model.safetensors")
    try:
        return UViTConfig.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise WeightsError(f"{file}: {field}: {first['msg']}") from error


def build(config: UViTConfig, state: Mapping[str, Tensor], source: object) -> UViT:
    """A model in evaluation mode with copies of the given weights, each in its own type.

    Raises:
        WeightsError: the tensors do not fit the configuration.
    """
    with torch.device("meta"):
        model = UViT(config)
    check_tensors(model.state_dict(), state, source)
    # Copies: what was read may be pages of a file, or share memory.
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()
