"""Names of pretrained weights: what a reference in a recipe stands for, and a digest of what it stands for.

A reference is "embedded" (the small weights in `unidiffuser/embedded/`), a local folder, or a public name: of diffusers
("stabilityai/sd-vae-ft-mse") for the autoencoder, of open_clip ("ViT-B-32/openai") for CLIP, of transformers ("gpt2") for
the text decoder. What a public name means can change on the hub, so it has the commit there behind it, ``NAME@COMMIT``; those of
the published model have theirs here. This module imports neither torch nor the model libraries, so that a dataset's fingerprint
costs nothing.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["vae", "clip", "gpt2", "judge"]
EMBEDDED = Path(__file__).parent / "embedded"
_EXPECTED: dict[str, str] = {
    "vae": "config.json", "clip": "open_clip_config.json", "gpt2": "config.json", "judge": "judge.safetensors"
}  # fmt: skip
# The commits on the hub of what the published model is made of, and of the CLIP that its evaluation asks.
COMMITS = {
    "stabilityai/sd-vae-ft-mse": "31f26fdeee1355a5c34592e401dd41e45d25a493",
    "ViT-B-32/openai": "a6f597a30f7b82c51704746581f9a4e41421e878",
    "ViT-L-14/openai": "18d0535469bb561bf468d76c1d73aa35156c922b",
    "ViT-L-14-336/openai": "81e38efc4637de5023b10e75a7f9bd1c6fa6b010",
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
}
_COMMIT = re.compile(r"(.+)@([0-9a-f]{40})")


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


def public_name(ref: str) -> tuple[str, str | None]:
    """The name and the commit of a reference that is neither a folder nor "embedded"; None means the newest."""
    if (told := _COMMIT.fullmatch(ref)) is not None:
        return told[1], told[2]
    return ref, COMMITS.get(ref)


def weights_digest(ref: str, kind: Kind | None = None) -> str:
    """SHA-256 over the names and contents of the files that a reference stands for, as hex.

    A public name counts by its commit: nothing is downloaded here.

    Args:
        kind: what is referred to; None for all embedded weights together.
    Raises:
        FileNotFoundError: a public name without a commit; or see `local_folder`.
    """
    folder = EMBEDDED if kind is None and ref == "embedded" else local_folder(ref, kind or "vae")
    digest = hashlib.sha256()
    if folder is None:
        name, commit = public_name(ref)
        if commit is None:
            raise FileNotFoundError(
                f"{ref}: what a public name means can change; write {name}@COMMIT, the 40 digits of its commit on the hub"
            )
        digest.update(f"public name {name}@{commit}".encode())
        return digest.hexdigest()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
