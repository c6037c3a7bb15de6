"""export: one folder with everything that sampling needs, loadable by `UniDiffuser.load` without the store or the recipe."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from infra.dataset import fetch_files
from infra.scratch import scratch_folder
from stages.drawing.assembly import assemble, encoder_digests
from stages.runner.contract import Job, NodeConfig, Output, Phase, Records, Stage, Unit, UnitRecord
from stages.runner.recipe import encoder


class ExportConfig(NodeConfig):
    vae: str = encoder("embedded", "AutoencoderKL of the latents that the model was trained on")
    clip: str = encoder("embedded", "open_clip model of the image embeddings that the model was trained on")
    text: str = encoder("embedded", "open_clip model whose text tower gives the caption's hidden states")
    weights: str = Field("ema", pattern="^(ema|model)$", description="which weights: the moving average or the last")
    layouts: list[Literal["diffusers", "official"]] = Field(
        [], description="layouts to write beside the native one, each into a folder of its name"
    )


class Exporter:
    """Writes the folder; the worker of the stage's single unit."""

    def __init__(self, job: Job):
        self.job = job

    def run(self, unit: Unit, out: Output) -> None:
        from unidiffuser.layouts import write_set

        assemble(self.job, out.folder)
        self.adapter(out.folder / "adapter")
        for layout in self.job.config.layouts:
            write_set(out.folder, out.folder / layout, layout)
        for path in sorted(out.folder.rglob("*")):
            if path.is_file():
                out.path(str(path.relative_to(out.folder)), rows=1)
        out.stats.rows_in = out.stats.rows_out = len(out.rows)

    def adapter(self, folder: Path) -> None:
        """Write the adapter of a training with `lora` in peft's form: the network beside it has it merged in."""
        sources = {"adapter_config.json": "adapter_config.json"}
        sources[f"adapter_{self.job.config.weights}.safetensors"] = "adapter_model.safetensors"
        entries = [entry for entry in self.job.inputs["checkpoint"].files if entry.name in sources]
        if not entries:
            return
        folder.mkdir()
        with scratch_folder() as scratch:
            fetched = fetch_files(self.job.store, entries, scratch)
            for source, target in sources.items():
                shutil.copyfile(fetched / source, folder / target)


def plan_export(job: Job, _: Records) -> Iterator[Unit]:
    yield Unit("export", (), {})


class Export(Stage):
    """Folders uvit, vae, clip_image, clip_text and text_codec, provenance.json, a model card, a folder a layout, and the adapter
    of a training with `lora`; its rows are files. What an evaluation of the checkpoint found stands in provenance and card."""

    name = "export"
    version = 5
    Config = ExportConfig
    whole = frozenset({"checkpoint", "codec", "evaluation"})
    phases = (Phase("export", plan_export, worker=Exporter),)

    @classmethod
    def weights(cls, config: ExportConfig) -> dict[str, str]:
        return encoder_digests(config)

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        return {"file": "safetensors, JSON"}
