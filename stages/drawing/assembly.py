"""A checkpoint with its codec and encoders in one folder, which is what sampling needs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

from infra.dataset import Dataset
from infra.scratch import scratch_folder
from stages.drawing.lineage import provenance
from stages.runner.contract import Job
from unidiffuser.references import weights_digest


def encoder_digests(config: Any) -> dict[str, str]:
    """Digests of the three encoders that a sampler needs."""
    return {
        "vae": weights_digest(config.vae, "vae"),
        "clip": weights_digest(config.clip, "clip"),
        "text": weights_digest(config.text, "clip"),
    }


def assemble(job: Job, folder: Path) -> Path:
    """Put network, encoders and text codec of a job below `folder` in the layout of `unidiffuser.generation`, with their lineage.

    The job's inputs are `checkpoint` and `codec`; its config names the encoders and which weights to take.
    """
    from unidiffuser.provenance import write_provenance

    with scratch_folder() as scratch:
        checkpoint = job.inputs["checkpoint"].fetch(scratch)
        put_together(checkpoint, job.config.weights, job.inputs["codec"], job.config, folder)
    write_provenance(folder, provenance(job))
    return folder


def put_together(checkpoint: Path, weights: str, codec: Dataset, encoders: Any, folder: Path) -> Path:
    """The same for a checkpoint's own folder, of which `weights` (ema or model) are taken; `encoders` has vae, clip and text."""
    from training.shares import merge

    uvit = folder / "uvit"
    uvit.mkdir(parents=True)
    shutil.copyfile(checkpoint / "config.json", uvit / "config.json")
    merge(checkpoint, weights, uvit / "model.safetensors")
    linked = codec.fetch(folder / "text_codec.linked")
    shutil.copytree(linked, folder / "text_codec")
    shutil.rmtree(linked)
    _copy_encoder(folder / "vae", encoders.vae, "vae")
    _copy_encoder(folder / "clip_image", encoders.clip, "clip")
    _copy_encoder(folder / "clip_text", encoders.text, "clip")
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
