"""Weights on disk: the native folder, and reading and loading that fails whole and by name.

A native folder holds ``config.json`` (a ``UViTConfig``) and ``model.safetensors``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unidiffuser.uvit import UViT, UViTConfig


class WeightsError(ValueError):
    """Weights that do not fit; the message names the file, the tensors and their shapes."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors, .pth, .pt or .bin file, on the CPU. Pickles are read with ``weights_only``.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is damaged, or holds something else than a flat dictionary of tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error
    except Exception as error:  # torch.load raises whatever the unpickler and the zip reader raise
        raise WeightsError(f"{path}: not a readable file of plain tensors ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: expected a dictionary of tensors, found {type(state).__name__}")
    return state


def load_checked(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Load ``state`` into ``module``, or nothing of it.

    Args:
        source: what to call the weights in an error, usually their path.

    Raises:
        WeightsError: tensors are missing, extra or wrongly shaped; it names up to eight of each, with shapes.
    """
    expected = module.state_dict()
    missing = [f"{name} {tuple(expected[name].shape)}" for name in expected if name not in state]
    extra = [f"{name} {tuple(state[name].shape)}" for name in state if name not in expected]
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for kind, names in (
            ("missing", missing),
            ("extra", extra),
            ("of another shape", wrong),
        )
        if names
    ]
    if problems:
        raise WeightsError(f"{source}: tensors {'; '.join(problems)}; nothing was loaded")
    module.load_state_dict(state)


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
