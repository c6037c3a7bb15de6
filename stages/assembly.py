"""A checkpoint with its codec and encoders in one folder, which is what sampling needs: for evaluate and export."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from stages.contract import Job
from unidiffuser.references import weights_digest


def encoder_digests(config: Any) -> dict[str, str]:
    """Digests of the three encoders that a sampler needs."""
    return {
        "vae": weights_digest(config.vae, "vae"),
        "clip": weights_digest(config.clip, "clip"),
        "text": weights_digest(config.text, "clip"),
    }


def assemble(job: Job, folder: Path) -> Path:
    """Put network, encoders and text codec of a job below `folder` in the layout of `unidiffuser.generation`.

    The job's inputs are `checkpoint` and `codec`; its config names the encoders and which weights to take.
    """
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = job.inputs["checkpoint"].fetch(Path(scratch))
        uvit = folder / "uvit"
        uvit.mkdir(parents=True)
        shutil.copyfile(checkpoint / "config.json", uvit / "config.json")
        shutil.copyfile(checkpoint / f"{job.config.weights}.safetensors", uvit / "model.safetensors")
    codec = job.inputs["codec"].fetch(folder / "text_codec.linked")
    shutil.copytree(codec, folder / "text_codec")
    shutil.rmtree(codec)
    _copy_encoder(folder / "vae", job.config.vae, "vae")
    _copy_encoder(folder / "clip_image", job.config.clip, "clip")
    _copy_encoder(folder / "clip_text", job.config.text, "clip")
    return folder


def _copy_encoder(target: Path, ref: str, kind: Literal["vae", "clip"]) -> None:
    """Copy an encoder's folder; one that goes by a public name is loaded and written out."""
    from unidiffuser.encoders import ClipEncoder, ImageLatents
    from unidiffuser.references import local_folder

    source = local_folder(ref, kind)
    if source is not None:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.md"))
    else:
        (ImageLatents if kind == "vae" else ClipEncoder).load(ref).save(str(target))
