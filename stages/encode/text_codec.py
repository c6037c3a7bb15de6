"""text-codec: the projection of CLIP's text states to the text latent, and the GPT-2 that turns latents back into captions.

Trained on caption reconstruction before the U-ViT and frozen from then on (arXiv 2303.06555, section 4.1 and appendix).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from infra.dataset import FileEntry
from infra.external import fetch_outside
from infra.scratch import scratch_folder
from stages.encode.pinned import check_codec, codec_files, load_codec
from stages.runner.contract import Job, NodeConfig, Output, Phase, Records, Stage, StageError, Unit, UnitRecord, single_trainer
from stages.runner.recipe import encoder, external_file
from stages.runner.run import emit_progress, time_left
from stages.shards.tables import read_table
from unidiffuser.references import weights_digest

if TYPE_CHECKING:
    from training.single import SingleTraining
    from unidiffuser.encoders import ClipEncoder
    from unidiffuser.text_decoder import TextCodec

log = logging.getLogger("stages")
# Captions whose latents say how far the latent is from unit scale.
STANDARDISED_ON = 512


class TextCodecConfig(NodeConfig):
    text: str = encoder("embedded", "open_clip model whose text tower gives the caption's hidden states")
    gpt2: str = encoder("embedded", "GPT-2 that the decoder starts from")
    weights: str | None = external_file(
        None,
        "a codec to take as it is instead of training one: caption_decoder.pth, or a folder with that, of diffusers' UniDiffuser "
        "or of an export; a path or URL, or embedded://base, which is shipped with this package",
    )
    latent_width: int = Field(64, ge=1, description="numbers a text token has in the U-ViT; the paper's is 64")
    max_captions: int = Field(2_000_000, ge=1, description="captions to train on at most, the first of the selection")
    steps: int = Field(20_000, ge=1, description="optimizer steps at most")
    batch: int = Field(64, ge=1, description="captions a step")
    lr: float = Field(2e-4, gt=0, description="AdamW learning rate; falls to zero over the steps on a cosine")
    warmup_steps: int = Field(200, ge=0, description="steps over which the learning rate rises")
    weight_decay: float = Field(0.03, ge=0, description="AdamW weight decay")
    noise: float = Field(0.0, ge=0, description="noise on the latent while training, in its standard deviations")
    validation_captions: int = Field(200, ge=1, description="held-out captions for BLEU-4")
    validate_every: int = Field(1000, ge=1, description="steps between validations")
    patience: int = Field(3, ge=1, description="validations without a better BLEU-4 after which training stops")
    enough_bleu: float = Field(1.0, gt=0, le=1, description="BLEU-4 (0 to 1) at which training stops early")
    beams: int = Field(5, ge=1, description="beams of the reported BLEU-4; 1 decodes greedily")
    seed: int = Field(0, description="order of the captions and start of the new layers")


def held_out(captions: Iterable[str], count: int) -> tuple[list[str], list[str]]:
    """The captions that validation keeps, and those to train on: distinct, in the order of their hashes.

    Kept are the `count` captions with the smallest hashes, a tenth of all at most. The order of the rows does not matter, and a
    caption that is added moves one other at most from one part to the other.
    """
    distinct = sorted(set(captions), key=lambda caption: hashlib.sha256(caption.encode()).digest())
    kept = min(count, max(1, len(distinct) // 10))
    return distinct[:kept], distinct[kept:]


def bleu4(clip: ClipEncoder, codec: TextCodec, captions: Sequence[str], batch: int, beams: int) -> float:
    """Corpus BLEU-4 between captions and what the decoder makes of their latents, from 0 to 1 (sacrebleu)."""
    from sacrebleu.metrics import BLEU

    codec.eval()
    decoded: list[str] = []
    for start in range(0, len(captions), batch):
        hidden = clip.tokens(captions[start : start + batch]).clone()
        decoded += codec.decode(codec.encode(hidden), beams=beams)
    return BLEU().corpus_score(decoded, [list(captions)]).score / 100


class Trainer:
    """Trains one codec; the worker of the stage's single unit."""

    def __init__(self, job: Job):
        import torch

        from unidiffuser.encoders import ClipEncoder
        from unidiffuser.text_decoder import TextCodec

        self.job, self.config = job, job.config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.clip = ClipEncoder.load(self.config.text, self.device)
        torch.manual_seed(self.config.seed)
        widths = (self.config.gpt2, self.clip.text_width, self.config.latent_width)
        codec = TextCodec.new(*widths) if self.config.weights is None else self.taken(*widths)
        self.codec = codec.to(self.device)

    def taken(self, gpt2: str, text_width: int, latent_width: int) -> TextCodec:
        """The codec that the recipe names."""
        from unidiffuser.tensors import WeightsError

        with scratch_folder() as folder:
            try:
                place = fetch_outside(self.job.lists["weights"], self.config.weights, self.job.store, folder)
                return load_codec(place, gpt2, text_width, latent_width)
            except (WeightsError, OSError) as error:
                raise StageError(f"{self.job.node}: {error}") from None

    def run(self, unit: Unit, out: Output) -> None:
        captions = list(self.captions())
        held, train = held_out(captions, self.config.validation_captions)
        distinct = len(held) + len(train)
        if not held or not train:
            raise StageError(f"{self.job.node}: {distinct} distinct captions are too few; select more rows")
        out.stats.rows_in = len(captions)
        out.stats.drop("duplicate_caption", len(captions) - distinct)
        out.stats.rows_out = distinct
        history = self.train(train, held) if self.config.weights is None else []
        best = self.bleu(held, self.config.beams)
        out.notes |= {"bleu4": round(best, 4), "beams": self.config.beams, "held_out": len(held), "history": history}
        log.info("%s: BLEU-4 %.3f on %d held-out captions, %d beams", self.job.node, best, len(held), self.config.beams)
        self.codec.save(out.folder)
        for path in sorted(out.folder.rglob("*")):
            if path.is_file():
                out.path(str(path.relative_to(out.folder)))

    def captions(self) -> Iterator[str]:
        """The first captions of the selection, in its order."""
        left = self.config.max_captions
        for entry in tables(self.job):
            if left <= 0:
                return
            column = read_table(self.job, entry.path, ["caption"])["caption"].drop_null().to_pylist()[:left]
            left -= len(column)
            yield from column

    def train(self, train: list[str], held: list[str]) -> list[dict[str, float]]:
        """Reconstruct captions until BLEU-4 on the held-out ones stops rising; returns the history of validations.

        The best weights are kept, not the last. The latent is brought to unit scale afterwards, as it lies over captions drawn
        at random, since the diffusion's noise schedule assumes it.
        """
        import torch

        config = self.config
        order = torch.Generator().manual_seed(config.seed)

        def loss_at(step: int) -> tuple[Any, dict[str, float]]:
            picks = torch.randint(len(train), (min(config.batch, len(train)),), generator=order).tolist()
            batch = [train[i] for i in picks]
            self.codec.train()
            return self.codec.loss(self.codec.encode(self.clip.tokens(batch).clone()), batch, config.noise), {}

        best, state, waited, history, losses = -1.0, None, 0, [], []
        start = last_word = time.monotonic()
        for step, loss, _ in self.training().run(loss_at, config.steps):
            losses.append(loss)
            if time.monotonic() - last_word > 5:
                rate = step / (time.monotonic() - start)
                more = {"loss": round(losses[-1], 4), "steps_per_s": round(rate, 2), **time_left(config.steps - step, rate)}
                emit_progress(self.job.node, "train", step, config.steps, "steps", more)
                last_word = time.monotonic()
            if step % config.validate_every and step != config.steps:
                continue
            bleu = self.bleu(held, beams=1)
            history.append({"step": step, "loss": round(sum(losses) / len(losses), 5), "bleu4": round(bleu, 4)})
            log.info("%s: step %d loss %.4f BLEU-4 %.3f", self.job.node, step, history[-1]["loss"], bleu)
            losses.clear()
            waited += 1
            if bleu > best:
                best, waited = bleu, 0
                state = {name: value.detach().clone() for name, value in self.codec.state_dict().items()}
            if waited >= config.patience or bleu >= config.enough_bleu:
                break
        assert state is not None
        self.codec.load_state_dict(state)
        self.codec.eval()
        some = torch.randperm(len(train), generator=order)[:STANDARDISED_ON].tolist()
        self.codec.standardise(self.clip.tokens([train[i] for i in some]))
        return history

    def training(self) -> SingleTraining:
        """AdamW on the codec, whose learning rate falls to zero over the steps."""
        from training.optimizers.adamw import AdamW
        from training.rates import ScheduleConfig
        from training.single import SingleTraining

        config = self.config
        optimizer = AdamW(lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.999)).build(self.codec.named_parameters())
        warmup = min(config.warmup_steps, config.steps - 1)
        schedule = ScheduleConfig(warmup_steps=warmup, decay="cosine", decay_steps=config.steps)
        return SingleTraining(self.codec, [optimizer], schedule, clip=0)

    def bleu(self, captions: list[str], beams: int) -> float:
        return bleu4(self.clip, self.codec, captions, self.config.batch, beams)


def tables(job: Job) -> list[FileEntry]:
    """The files that hold captions; a folder's dataset has its images in others beside them."""
    return [entry for entry in job.inputs["captions"].files if entry.name.endswith(".parquet")]


def plan_training(job: Job, _: Records) -> list[Unit]:
    """One unit: the captions are small, and the codec is one model."""
    entries = tables(job)
    digests = (*(entry.sha256 for entry in entries), *sorted(job.lists.get("weights", {}).values()))
    return [Unit("codec", digests, rows=sum(entry.rows for entry in entries))]


class TextCodecStage(Stage):
    """One dataset: codec.json, codec.safetensors and the GPT-2 folder that `TextCodec.load` reads."""

    name = "text-codec"
    version = 5
    Config = TextCodecConfig
    phases = (Phase("train", plan_training, worker=Trainer, resources=single_trainer, memory=("batch",)),)

    @classmethod
    def weights(cls, config: TextCodecConfig) -> dict[str, str]:
        return {"text": weights_digest(config.text, "clip"), "gpt2": weights_digest(config.gpt2, "gpt2")}

    @classmethod
    def lists(cls, config: TextCodecConfig) -> dict[str, list[str]]:
        return {} if config.weights is None else {"weights": codec_files(config.weights)}

    @classmethod
    def check(cls, config: TextCodecConfig, sources: Mapping[str, str], lists: Mapping[str, Mapping[str, str]]) -> None:
        if "weights" in lists:
            check_codec(config, lists["weights"])

    @classmethod
    def bytes_needed(cls, job: Job) -> int:
        return 2 * 2**30

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        return {"caption": "string", "latent": f"({job.config.latent_width} numbers a token)"}

    @classmethod
    def summary(cls, job: Job, records: Records) -> dict[str, Any]:
        return records["train"][0].notes
