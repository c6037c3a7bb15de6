"""export: one folder with everything that sampling needs, loadable by `UniDiffuser.load` without the store or the recipe."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stages.contract import Job, Output, Phase, Records, Stage, StageConfig, Unit, UnitRecord
from stages.recipe import encoder
from unidiffuser.references import weights_digest


class ExportConfig(StageConfig):
    vae: str = encoder("embedded", "AutoencoderKL of the latents that the model was trained on")
    clip: str = encoder("embedded", "open_clip model of the image embeddings that the model was trained on")
    text: str = encoder("embedded", "open_clip model whose text tower gives the caption's hidden states")
    weights: str = Field("ema", pattern="^(ema|model)$", description="which weights: the moving average or the last")


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


class Exporter:
    """Writes the folder; the worker of the stage's single unit."""

    def __init__(self, job: Job):
        self.job = job

    def run(self, unit: Unit, out: Output) -> None:
        assemble(self.job, out.folder)
        manifest = self.job.inputs["checkpoint"].manifest
        facts = {
            "made_by": {name: d.manifest.reference().model_dump() for name, d in self.job.inputs.items()},
            "weights": self.job.config.weights,
            "training": manifest.config,
        }
        (out.folder / "export.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in sorted(out.folder.rglob("*")):
            if path.is_file():
                out.path(str(path.relative_to(out.folder)), rows=1)
        out.stats.rows_in = out.stats.rows_out = len(out.rows)


def plan_export(job: Job, _: Records) -> Iterator[Unit]:
    yield Unit("export", (), {})


class Export(Stage):
    """Folders uvit, vae, clip_image, clip_text, text_codec and export.json; its rows are files."""

    name = "export"
    version = 1
    Config = ExportConfig
    whole = frozenset({"checkpoint", "codec"})
    phases = (Phase("export", plan_export, worker=Exporter),)

    @classmethod
    def weights(cls, config: ExportConfig) -> dict[str, str]:
        return encoder_digests(config)

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        return {"file": "safetensors, JSON"}
