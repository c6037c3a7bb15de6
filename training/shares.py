"""How the numbers of a checkpoint lie in files: a share a worker, each a safetensors file of pieces of flattened parameters.

    share-00000-of-00002.safetensors    pieces (n,) fp32 under KIND/NAME@START: n numbers of the flattened parameter from START on

KIND is `model`, `ema` or a tensor that the optimizer keeps. The pieces of all shares together are every number once; the metadata
of each share holds the shapes of all parameters. So any number of workers, with any ZeRO stage, reads the ranges that it needs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# Numbers of a tensor that are written at once.
CHUNK = 2**21
Shapes = Mapping[str, Sequence[int]]


class DamagedShare(ValueError):
    """Shares that cannot be read, or are not all there; the message names the file."""


def share_name(rank: int, world: int) -> str:
    return f"share-{rank:05d}-of-{world:05d}.safetensors"


def key_of(kind: str, name: str, start: int) -> str:
    """
    >>> key_of("ema", "norm.bias", 8)
    'ema/norm.bias@8'
    """
    return f"{kind}/{name}@{start}"


def header(tensors: Iterable[tuple[str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file of fp32 tensors begins with; the numbers follow in this order, without gaps.

    Args:
        tensors: name and shape of each.
    """
    told: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in tensors:
        start, end = end, end + 4 * torch.Size(shape).numel()
        told[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Piece(NamedTuple):
    """A piece in a file: the file's number, its key there, where it starts in the flattened parameter, and its length."""

    file: int
    key: str
    start: int
    length: int


class Shares:
    """The shares of a checkpoint, opened for reading.

    Raises:
        DamagedShare: a file is missing or no safetensors file, or the pieces are not every number once.
    """

    def __init__(self, folder: str | Path) -> None:
        self.paths = sorted(Path(folder).glob("share-*.safetensors"))
        if not self.paths or self.paths[-1].name != share_name(len(self.paths) - 1, len(self.paths)):
            raise DamagedShare(f"{folder}: {len(self.paths)} shares are there, and not all; is this a checkpoint folder?")
        self.shapes: dict[str, torch.Size] = {}
        self._files: list[Any] = []
        self._pieces: dict[str, dict[str, list[_Piece]]] = {}
        for number, path in enumerate(self.paths):
            try:
                self._open(number, path)
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                raise DamagedShare(f"{path}: cannot be read ({error})") from error
        for kind, names in self._pieces.items():
            for name, pieces in names.items():
                self._check(kind, name, sorted(pieces, key=lambda piece: piece.start))

    def _open(self, number: int, path: Path) -> None:
        file = safe_open(path, framework="pt")
        self._files.append(file)
        self.shapes = {name: torch.Size(shape) for name, shape in json.loads(file.metadata()["shapes"]).items()}
        for key in file.keys():  # noqa: SIM118
            kind, _, rest = key.partition("/")
            name, _, start = rest.rpartition("@")
            (length,) = file.get_slice(key).get_shape()
            self._pieces.setdefault(kind, {}).setdefault(name, []).append(_Piece(number, key, int(start), length))

    def _check(self, kind: str, name: str, pieces: list[_Piece]) -> None:
        end = 0
        for piece in pieces:
            if piece.start != end:
                raise DamagedShare(f"{self.paths[piece.file]}: {kind} of {name} has {piece.start} after {end}")
            end += piece.length
        if end != self.shapes[name].numel():
            raise DamagedShare(f"{self.paths[0].parent}: {kind} of {name} ends at {end} of {self.shapes[name].numel()}")
        self._pieces[kind][name] = pieces

    @property
    def kinds(self) -> list[str]:
        """Of the numbers that there are: model, ema and what the optimizer keeps."""
        return list(self._pieces)

    def names(self, kind: str) -> list[str]:
        """The parameters of which there is this kind, in the order of the model."""
        return [name for name in self.shapes if name in self._pieces.get(kind, {})]

    def read(self, kind: str, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """Numbers of a flattened parameter, (length,); all of them by default.

        Raises:
            DamagedShare: there is no such parameter.
        """
        if name not in self._pieces.get(kind, {}):
            raise DamagedShare(f"{self.paths[0].parent}: has no {kind} of {name}")
        end = self.shapes[name].numel() if length is None else start + length
        parts = []
        for piece in self._pieces[kind][name]:
            first, last = max(start, piece.start), min(end, piece.start + piece.length)
            if first < last:
                parts.append(self._files[piece.file].get_slice(piece.key)[first - piece.start : last - piece.start])
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole parameter in its shape."""
        return self.read(kind, name).view(self.shapes[name])

    def write_merged(self, kind: str, write: Callable[[memoryview], Any]) -> None:
        """Write all parameters of a kind as one safetensors file, some numbers at a time."""
        names = self.names(kind)
        write(memoryview(header([(name, self.shapes[name]) for name in names], {})))
        for name in names:
            for start, length in chunks(self.shapes[name].numel()):
                write(bytes_of(self.read(kind, name, start, length)))


def chunks(length: int) -> Iterator[tuple[int, int]]:
    """Starts and lengths of the pieces in which so many numbers are written."""
    for start in range(0, length, CHUNK):
        yield start, min(CHUNK, length - start)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.numpy().data.cast("B")


def merge(folder: str | Path, kind: str, target: str | Path) -> Path:
    """Write the `kind` (model or ema) of a checkpoint as one safetensors file with whole tensors, which sampling takes.

    Raises:
        DamagedShare: a share cannot be read.
    """
    whole = Path(folder, f"{kind}.safetensors")
    if whole.exists():
        # Of a run with adapters.
        shutil.copyfile(whole, target)
        return Path(target)
    shares = Shares(folder)
    with open(target, "wb") as file:
        shares.write_merged(kind, file.write)
    return Path(target)
