"""Names of pretrained weights: what a reference in a recipe stands for, and a digest of what it stands for.

A reference is "embedded" (the small weights in `unidiffuser/embedded/`), a local folder, or a public name: of diffusers
("stabilityai/sd-vae-ft-mse") for the autoencoder, of open_clip ("ViT-B-32/openai") for CLIP, of transformers ("gpt2") for
the text decoder. This module imports neither torch nor the model libraries, so that a dataset's fingerprint costs nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["vae", "clip", "gpt2", "judge"]
EMBEDDED = Path(__file__).parent / "embedded"
_EXPECTED: dict[str, str] = {
    "vae": "config.json", "clip": "open_clip_config.json", "gpt2": "config.json", "judge": "judge.safetensors"
}  # fmt: skip


@dataclass(frozen=True)
class Encoders:
    """References of all that stands around a U-ViT; the defaults are the published model's."""

    vae: str = "stabilityai/sd-vae-ft-mse"
    clip: str = "ViT-B-32/openai"
    text: str = "ViT-L-14/openai"
    gpt2: str = "gpt2"


def local_folder(ref: str, kind: Kind) -> Path | None:
    """The folder that a reference stands for, or None for a public name.

    Raises:
        FileNotFoundError: the reference looks like a path, or is "embedded", and holds no such model.
    """
    folder = EMBEDDED / kind if ref == "embedded" else Path(ref).expanduser()
    if (folder / _EXPECTED[kind]).is_file():
        return folder
    if ref == "embedded":
        raise FileNotFoundError(f"{folder} has no {_EXPECTED[kind]}: `make encoders` trains the embedded weights")
    if folder.is_dir() or ref.startswith(("/", "./", "../", "~")):
        raise FileNotFoundError(f"{ref}: expected a folder with {_EXPECTED[kind]} ({kind}), or a public model name")
    return None


def weights_digest(ref: str, kind: Kind | None = None) -> str:
    """SHA-256 over the names and contents of the files that a reference stands for, as hex.

    A public name is its own digest (the hash of the name): nothing is downloaded here.

    Args:
        kind: what is referred to; None for all embedded weights together.
    Raises:
        FileNotFoundError: see `local_folder`.
    """
    folder = EMBEDDED if kind is None and ref == "embedded" else local_folder(ref, kind or "vae")
    digest = hashlib.sha256()
    if folder is None:
        digest.update(f"public name {ref}".encode())
        return digest.hexdigest()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
