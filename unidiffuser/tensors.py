"""Tensors from files into modules: reading and loading that fails whole and by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unidiffuser.references import public_name

# The greatest header of a safetensors file that its library reads, in bytes; and the types there.
MOST_HEADER = 100_000_000
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# Old GPT-2 files hold their causal masks, which are no weights.
_MASK = re.compile(r"\.attn\.(masked_)?bias$")


class WeightsError(ValueError):
    """Weights that do not fit; the message names the file, the tensors and their shapes."""


class NotFinite(ArithmeticError):
    """A network computed infinities or what is no number; the message says which, and in which arithmetic."""


@contextmanager
def reading(source: Path | None) -> Iterator[None]:
    """What a library raises that cannot read a file or a folder, as a ``WeightsError`` that names it.

    An ``OSError`` names it itself. None is a public name, of which everything is raised as it is.
    """
    try:
        yield
    except Exception as error:  # parsers and modules raise whatever they like
        if source is None or isinstance(error, OSError | WeightsError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise WeightsError(f"{source}: damaged, or of another kind ({reason[:300]}); fetch or write it again") from error


@contextmanager
def named(source: object) -> Iterator[None]:
    """Put ``source`` in front of a ``WeightsError`` that does not name it."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error


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
        raise WeightsError(f"{path}: not a readable safetensors file ({error}); fetch or write it again") from error
    except Exception as error:  # torch.load raises whatever the unpickler and the zip reader raise
        reason = type(error).__name__
        raise WeightsError(f"{path}: not a readable file of plain tensors ({reason}); fetch or write it again") from error
    flat = isinstance(state, dict) and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    if not flat:
        raise WeightsError(f"{path}: expected a dictionary of tensors, found {type(state).__name__}")
    return state


def read_shapes(file: BinaryIO, name: str) -> dict[str, Tensor]:
    """The tensors of a file of weights without their values, on the meta device; reads next to nothing of it.

    Args:
        file: open at its start; one that can be looked into anywhere.
        name: its path or URL, which tells its kind as for ``read_tensors``.

    Raises:
        WeightsError: see ``read_tensors``.
    """
    try:
        if name.endswith(".safetensors"):
            size = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(size)) if 0 < size <= MOST_HEADER else {}
            described = {tensor: entry for tensor, entry in head.items() if tensor != "__metadata__"}
            state = {tensor: (entry["shape"], _TYPES[entry["dtype"]]) for tensor, entry in described.items()}
        else:
            with FakeTensorMode():
                found = torch.load(file, map_location="cpu", weights_only=True)
            state = {tensor: (value.shape, value.dtype) for tensor, value in found.items()}
    except Exception as error:  # parsers and the unpickler raise whatever they like
        reason = type(error).__name__
        raise WeightsError(f"{name}: not a readable file of plain tensors ({reason}); fetch or write it again") from error
    if not state:
        raise WeightsError(f"{name}: holds no tensors; fetch or write it again")
    return {tensor: torch.empty(shape, dtype=kind, device="meta") for tensor, (shape, kind) in state.items()}


def read_settings(file: Path) -> dict[str, Any]:
    """The settings of a JSON file that lies beside weights.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; a checkpoint of this layout has it")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file}: not readable as JSON ({error}); fetch or write it again") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{file}: expected a mapping, found {type(settings).__name__}")
    return settings


def without_masks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of GPT-2 that are weights."""
    return {name: tensor for name, tensor in state.items() if not _MASK.search(name)}


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: object) -> None:
    """Compare the tensors of a file, by name and shape, with those that it should hold.

    Args:
        expected: tensors with the wanted names and shapes; their values do not matter (they may be on the meta device).
        source: what to call the weights in an error, usually their path.

    Raises:
        WeightsError: tensors are missing, extra, wrongly shaped or of whole numbers; it names up to eight of each, with shapes.
    """
    missing = [f"{name} {tuple(expected[name].shape)}" for name in expected if name not in found]
    extra = [f"{name} {tuple(found[name].shape)}" for name in found if name not in expected]
    wrong = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    whole = [
        f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in found.items()
        if name in expected and expected[name].is_floating_point() and not tensor.is_floating_point()
    ]
    _complain(source, {"missing": missing, "extra": extra, "of another shape": wrong, "of whole numbers": whole})


def load_checked(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Load ``state`` into ``module``, or nothing of it.

    Raises:
        WeightsError: see ``check_tensors``.
    """
    check_tensors(module.state_dict(), state, source)
    module.load_state_dict(state)


def pretrained(model_class: Any, source: Path | str, **settings: Any) -> Any:
    """A model of diffusers or transformers, whole or not at all.

    Args:
        source: a folder as a ``Path``, which is read offline, or a public name, with or without a commit.
        settings: of ``from_pretrained``.

    Raises:
        OSError: an unknown public name, or a file is missing.
        WeightsError: a file is damaged, or as ``check_tensors``.
    """
    folder = source if isinstance(source, Path) else None
    if folder is not None:
        read_settings(folder / "config.json")
    settings |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        with reading(folder):
            model, info = model_class.from_pretrained(**where(source), **settings)
    except (WeightsError, OSError):
        _stored(folder)  # says which file it is, if one of them cannot be read
        raise
    _check_loading(model, info, source, folder)
    return model


def where(source: Path | str) -> dict[str, Any]:
    """What ``from_pretrained`` takes for a folder, which is read offline, or for a public name."""
    if isinstance(source, Path):
        return {"pretrained_model_name_or_path": str(source), "local_files_only": True}
    name, commit = public_name(source)
    return {"pretrained_model_name_or_path": name, "revision": commit or "main"}


def _stored(folder: Path | None) -> dict[str, Tensor]:
    """All tensors in the files of weights of a folder."""
    if folder is None:
        return {}
    files = sorted(folder.glob("*model*.safetensors")) or sorted(folder.glob("*model*.bin"))
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def _check_loading(model: Any, info: Mapping[str, Any], source: object, folder: Path | None) -> None:
    """``check_tensors`` from what ``from_pretrained`` says of the loading, which leaves out the shapes of extra tensors."""
    expected = model.state_dict()
    missing = [f"{name} {tuple(expected[name].shape)}" for name in sorted(info["missing_keys"])]
    unexpected = [name for name in sorted(info["unexpected_keys"]) if not _MASK.search(name)]
    stored = _stored(folder) if unexpected else {}
    # The libraries may have cut a prefix off.
    in_file = {name: min((own for own in stored if f".{own}".endswith(f".{name}")), key=len, default="") for name in unexpected}
    extra = [f"{name} {tuple(stored[own].shape)}" if own else name for name, own in in_file.items()]
    wrong = [f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in sorted(info["mismatched_keys"])]
    _complain(source, {"missing": missing, "extra": extra, "of another shape": wrong})


def _complain(source: object, found: Mapping[str, list[str]]) -> None:
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for kind, names in found.items()
        if names
    ]
    if problems:
        raise WeightsError(f"{source}: tensors {'; '.join(problems)}; nothing was loaded")
