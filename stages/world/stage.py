"""world: pictures and captions of a world whose every distribution is known, as latents that train reads.

    codec     one unit: the picture codec, a small autoencoder, trained and then frozen
    latents   a unit per few thousand pairs: rendered, said in words, and encoded; and the codec again, for who draws

The n-th row shows what point n of a scrambled Sobol sequence says: scene and phrasing are its third and fourth number. A training
that reads the rows as written, with timesteps `sobol`, takes the first two of the same point for the timesteps. So every stretch
of steps has close to its share of each scene at each pair of timesteps, epoch after epoch where the rows are a power of two.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.runner.contract import Job, NodeConfig, Output, Phase, Records, Stage, Unit, UnitRecord, single_trainer
from stages.runner.run import emit_progress
from stages.shards.latents import binaries
from stages.shards.tables import write_table

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from examples.shapes.autoencoder import Autoencoder

ROW_GROUP = 1024
SHARD_ROWS = 16 * ROW_GROUP
LATENT_SIDE, CAPTION_WORDS = 8, 7
# Of a row: fp16 moments, twice 8 channels, and a caption, each word one out of 21.
ROW_BYTES = 2 * (16 * LATENT_SIDE**2 + CAPTION_WORDS * 21) + 100
CODEC = "codec.safetensors"


class WorldConfig(NodeConfig):
    rows: int = Field(262_144, ge=1, description="pairs, each a picture of its own; a power of two keeps the proportions")
    draws: Literal["sobol", "random"] = Field(
        "sobol", description="how scenes are drawn: every stretch of rows has close to its share of each, or independently"
    )
    codec_steps: int = Field(1500, ge=1, description="training steps of the picture codec")
    seed: int = Field(0, ge=0, lt=2**31, description="decides the pairs")

    @property
    def latent_side(self) -> int:
        """Side of the latents."""
        return LATENT_SIDE


class CodecTrainer:
    """Trains the picture codec; the worker of the single unit."""

    def __init__(self, job: Job):
        self.job = job

    def run(self, unit: Unit, out: Output) -> None:
        import torch
        from safetensors.torch import save_file

        from examples.shapes.pretraining import fit

        started, cores = time.monotonic(), time.process_time()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        steps = self.job.config.codec_steps

        def say(step: int, loss: float) -> None:
            if step % 100 == 0 or step == steps:
                emit_progress(self.job.node, "codec", step, steps, "steps", {"loss": round(loss, 4)})

        codec = fit(device, steps, say)
        save_file({name: value.cpu().contiguous() for name, value in codec.state_dict().items()}, out.path(CODEC))
        out.stats.rows_in = self.job.config.rows
        out.notes |= {
            "steps": steps,
            "parameters": sum(value.numel() for value in codec.parameters()),
            "minutes": round((time.monotonic() - started) / 60, 3),
            "core_minutes": round((time.process_time() - cores) / 60, 3),
        }


class Renderer:
    """Makes shards of pairs; the codec is loaded once."""

    def __init__(self, job: Job):
        self.job = job
        self.codec: Autoencoder | None = None

    def run(self, unit: Unit, out: Output) -> None:
        import pyarrow as pa
        from safetensors.torch import load

        from examples.shapes.autoencoder import Autoencoder

        if self.codec is None:
            with self.job.store.open(unit.payload["codec"]) as file:
                self.codec = Autoencoder.of(load(file.read()))
        start, stop = unit.payload["start"], unit.payload["stop"]
        groups = [self.pairs(first, min(first + ROW_GROUP, stop)) for first in range(start, stop, ROW_GROUP)]
        write_table(pa.concat_tables(groups), out.path(f"{unit.name}.parquet", stop - start), ROW_GROUP)
        out.stats.rows_out = stop - start

    def pairs(self, first: int, last: int) -> pa.Table:
        """One row group: the pairs `first` to `last` - 1."""
        import numpy as np
        import pyarrow as pa

        from examples.shapes.codec import encode_captions
        from examples.shapes.pictures import render
        from examples.shapes.world import caption, scene_at

        assert self.codec is not None
        rng = np.random.default_rng([self.job.config.seed, first])
        points = self.points(first, last)
        scenes = [scene_at(point) for point in points[:, 0]]
        captions = [caption(scene, point) for scene, point in zip(scenes, points[:, 1], strict=True)]
        latents = self.codec.encode(np.stack([render(scene, rng) for scene in scenes])).numpy()
        # The codec has no variance: the network sees its means, and none of the noise that it was trained with.
        moments = np.concatenate([latents, np.full_like(latents, -30)], 1).astype(np.float16)
        text = encode_captions(captions).numpy().astype(np.float16)
        facts = {"scaling_factor": 1.0, "moments": list(moments.shape[1:]), "text": list(text.shape[1:])}
        columns = {
            "key": pa.array([f"{row:09d}" for row in range(first, last)]),
            "caption": pa.array(captions),
            "moments": binaries(moments),
            "text": binaries(text),
        }
        return pa.table(columns).replace_schema_metadata({"unidiffuser": json.dumps(facts, sort_keys=True)})

    def points(self, first: int, last: int) -> np.ndarray:
        """What decides scene and phrasing of each pair, (n, 2) in 0 .. 1."""
        import numpy as np
        import torch

        if self.job.config.draws == "random":
            return np.random.default_rng([self.job.config.seed, first, 1]).random((last - first, 2))
        engine = torch.quasirandom.SobolEngine(4, scramble=True, seed=self.job.config.seed)
        return engine.fast_forward(first).draw(last - first, dtype=torch.float64)[:, 2:].numpy()


def plan_codec(job: Job, _: Records) -> list[Unit]:
    return [Unit("codec", ())]


def plan_shards(job: Job, records: Records) -> Iterator[Unit]:
    """The codec as it is, and shards of pairs."""
    (codec,) = records["codec"]
    yield Unit("codec", (), shared=codec.key)
    entry, rows = codec.file(CODEC), job.config.rows
    for number, start in enumerate(range(0, rows, SHARD_ROWS)):
        stop = min(start + SHARD_ROWS, rows)
        yield Unit(f"{number:05d}", (entry.sha256,), {"codec": entry.path, "start": start, "stop": stop}, stop - start)


class World(Stage):
    """codec.safetensors, and latents in Parquet without a column `clip`."""

    name = "world"
    version = 1
    Config = WorldConfig
    phases = (
        Phase("codec", plan_codec, worker=CodecTrainer, resources=single_trainer),
        Phase("latents", plan_shards, worker=Renderer),
    )

    @classmethod
    def bytes_needed(cls, job: Job) -> int:
        return int(job.config.rows * ROW_BYTES)

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        return {"key": "string", "caption": "string", "moments": "(16, 8, 8) fp16", "text": "(7, 21) fp16"}

    @classmethod
    def summary(cls, job: Job, records: Records) -> dict[str, Any]:
        (codec,), (_, *shards) = records["codec"], records["latents"]
        # As if one core had made them, one after the other.
        return {"codec": codec.notes, "latents": {"minutes": round(sum(shard.seconds for shard in shards) / 60, 3)}}
