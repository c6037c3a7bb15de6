"""The training loop of one worker: batches in, checkpoints out. Knows torch.distributed and DeepSpeed, not Ray.

The loss of step s is a function of the configuration, the shards and s; workers, micro-batches, ZeRO stage and interruptions
change it by rounding only (not at all when the number of workers and the micro-batch stay).
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from training.checkpoint import Checkpoint, TrainerState, write_checkpoint
from training.config import TrainConfig
from training.ema import Ema
from training.engine import compiled, initialise_engine
from training.history import Meter, Row
from training.job import Outcome, Source, TrainingError, TrainJob
from training.loader import Batch, Loader
from training.masters import Masters
from training.rates import Plateau, learning_rate
from unidiffuser.modalities import Modality
from unidiffuser.objective import JointObjective
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.uvit import UViT, UViTConfig

log = logging.getLogger(__name__)


def uvit_config(config: TrainConfig, modalities: tuple[Modality, ...]) -> UViTConfig:
    """The model's configuration for the shapes of the shards."""
    return UViTConfig(modalities=modalities, noise=config.noise, **config.model.model_dump(exclude={"patch"}))


def run(
    job: TrainJob,
    device: torch.device,
    stop_requested: Callable[[], bool] = lambda: False,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Outcome:
    """Train in this worker; torch.distributed must be initialised. All workers call it with the same job.

    Args:
        device: of this worker.
        stop_requested: asked on rank 0 after every step; when true, all workers checkpoint and stop.
        on_row: gets every row of the history on rank 0.

    Raises:
        TrainingError: the loss is not finite.
        ShardError, CheckpointError: an input cannot be used.
    """
    return _Run(job, device).run(stop_requested, on_row)


def _gathered(found: list) -> list[list]:
    everybody: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everybody, found)
    return everybody


def fetched(source: Source) -> str | None:
    """The local folder of a source; a function is called by the first worker of every machine, the others wait for it."""
    if not callable(source):
        return source
    local, node = int(os.environ.get("LOCAL_RANK", dist.get_rank())), int(os.environ.get("NODE_RANK", 0))
    mine = [(node, source())] if local == 0 else []
    folders = dict(pair for pairs in _gathered(mine) for pair in pairs)
    return folders[node]


class _Run:
    """Everything that one worker holds while it trains."""

    def __init__(self, job: TrainJob, device: torch.device) -> None:
        self.job, self.config, self.device = job, job.config, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        schedule = NoiseSchedule.of(self.config.noise).to(device)
        self.loader = Loader(self.config, job.shards, self.rank, self.world, _gathered, schedule.steps)
        self.model_config = uvit_config(self.config, self.loader.modalities)
        self.objective = JointObjective(self.loader.modalities, schedule, self.config.objective.min_snr_gamma)
        self.parts = [part.name for modality in self.loader.modalities for part in modality.parts]
        self.meter = Meter(self.config.global_batch, self.loader.rows, self.config.log_every)
        self.step, self.optimizer_steps, self.plateau = 0, 0, Plateau()
        self._start()
        self.held_out = self._held_out(self.config.validation.samples)
        looks = self.config.schedule.decay == "plateau"
        if looks and int(self.loader.index.held.sum()) == 0:
            raise TrainingError("schedule.decay plateau looks at held-out rows, and there are none: raise validation.fraction")
        self.looked_at = self._held_out(self.config.schedule.look_samples) if looks else []

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective on timesteps and noise that the loader drew for each sample by its place."""
        return self.objective.loss(self.engine, batch.clean, batch.timesteps, batch.noise)

    def _start(self) -> None:
        """Model, engine, moving average and counters: new, resumed, or from another run's checkpoint."""
        torch.manual_seed(self.config.seed)
        model = UViT(self.model_config)
        folder = fetched(self.job.resume)
        resumed = folder is not None
        folder = folder if resumed else fetched(self.job.init_from)
        saved = Checkpoint(folder, self.model_config) if folder is not None else None
        if saved is not None:
            model.load_state_dict({name: saved.tensor("model", name) for name in saved.names()})
        if compiled(model, self.config, self.device):
            log.info("training with torch.compile")
        self.engine, self.precision = initialise_engine(model, self.config, self.world, self.device)
        self.masters = Masters(self.engine, self.config.zero_stage)
        self.ema = Ema(self.masters, self.config.ema)
        if saved is None:
            return
        saved.restore_weights(self.masters)
        if resumed or self.config.ema.start == "carry":
            saved.restore_ema(self.masters, self.ema)
        if resumed:
            self.plateau = saved.state.plateau
            saved.check_same_run(self.config.global_batch, self.config.seed, self.loader.rows)
            saved.restore_history(self.meter)
            self.step = saved.state.step
        if resumed or self.job.init_optimizer:
            saved.restore_optimizer(self.masters)
            self.optimizer_steps = saved.state.optimizer_steps

    def run(self, stop_requested: Callable[[], bool], on_row: Callable[[Row], None]) -> Outcome:
        config, stopped = self.config, False
        if self.step == 0:
            self._validate(on_row)
        batches = self.loader.batches(self.step, config.steps)
        for batch in batches:
            row, stopped = self._train_step(batch.to(self.device), stop_requested)
            if row is not None and self.rank == 0:
                on_row(row)
            last = stopped or self.step == config.steps
            if self.step % config.validation.every == 0 or self.step == config.steps:
                self._validate(on_row)
            if config.schedule.decay == "plateau" and self.step % config.schedule.look_every == 0:
                self.plateau.look(self._mean_losses(self.looked_at)["loss"], config.schedule.patience)
            if self.step % config.checkpoint_every == 0 or last:
                self._checkpoint()
            if stopped:
                batches.close()  # type: ignore[attr-defined]
                break
        return Outcome(self.step, self.meter.rows[-1] if self.meter.rows else {}, stopped and self.step < config.steps)

    def _train_step(self, batch: Batch, stop_requested: Callable[[], bool]) -> tuple[Row | None, bool]:
        """One optimizer step; gives the row of the history when its interval is full, and whether to stop."""
        schedule, drops = self.config.schedule, self.plateau.drops
        for group in self.masters.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, group["initial_lr"], schedule, drops)
        lr = learning_rate(self.step, self.config.optimizer.lr, schedule, drops)
        micro_batches = batch.split(self.engine.train_micro_batch_size_per_gpu())
        totals = torch.zeros(2 + len(self.parts), device=self.device)
        for micro_batch in micro_batches:
            loss, parts = self._loss(micro_batch)
            self.engine.backward(loss)
            self.engine.step()
            totals[1:] += torch.stack([loss.detach(), *(parts[name] for name in self.parts)]) / len(micro_batches)
        self.ema.update()
        self.step += 1
        self.optimizer_steps += 1
        totals[0] = self.rank == 0 and stop_requested()
        dist.all_reduce(totals)
        stop, *losses = totals.tolist()
        values = dict(zip(self._loss_names(), (value / self.world for value in losses), strict=True))
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            values["grad_norm"] = float(norm)
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"step {self.step}: {name} is {value}; the last checkpoint is good: lower optimizer.lr, set gradient_clip, "
                    "or check the latents of this step"
                )
        return self.meter.step(self.step, lr, values), bool(stop)

    def _loss_names(self) -> list[str]:
        return ["loss", *(f"loss_{name}" for name in self.parts)]

    def _validate(self, on_row: Callable[[Row], None]) -> None:
        """Loss on the held-out samples with the weights as trained, the same samples, timesteps and noise every time."""
        if int(self.loader.index.held.sum()) == 0:
            return
        row = self.meter.validation(self.step, self._mean_losses(self.held_out))
        if self.rank == 0:
            on_row(row)

    @torch.no_grad()
    def _mean_losses(self, batches: list[Batch]) -> dict[str, float]:
        """Mean losses over the batches of all workers."""
        with self.meter.excluded():
            self.engine.eval()
            totals = torch.zeros(2 + len(self.parts), device=self.device)
            rounds = torch.tensor([len(batches)], device=self.device)
            dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
            with torch.compiler.set_stance("force_eager"):
                for number in range(int(rounds)):
                    # With ZeRO 3 a forward pass is collective: who has run out of samples repeats one, and counts nothing.
                    batch = batches[number] if number < len(batches) else self.loader.batch(0).split(1)[0]
                    loss, parts = self._loss(batch.to(self.device))
                    if number < len(batches):
                        totals[0] += len(batch)
                        totals[1:] += torch.stack([loss, *(parts[name] for name in self.parts)]) * len(batch)
            self.engine.train()
            dist.all_reduce(totals)
            count, *losses = totals.tolist()
            return {name: value / count for name, value in zip(self._loss_names(), losses, strict=True)}

    def _held_out(self, samples: int) -> list[Batch]:
        """This worker's share of the first held-out rows, in batches that it computes at once."""
        batch = self.loader.validation(samples)
        return batch.split(self.config.micro_batch or len(batch)) if batch else []

    def _checkpoint(self) -> None:
        """Write a checkpoint, hand it to `publish` on rank 0, and wait until that is done."""
        folder = Path(self.job.work_folder) / f"step-{self.step:08d}"
        state = TrainerState(
            step=self.step,
            optimizer_steps=self.optimizer_steps,
            ema_updates=self.ema.updates,
            global_batch=self.config.global_batch,
            seed=self.config.seed,
            rows=self.loader.rows,
            pending=self.meter.pending,
            pending_steps=self.meter.pending_steps,
            optimizer=self.masters.state_kinds,
            plateau=self.plateau,
            workers=self.world,
            zero_stage=self.config.zero_stage,
            precision=self.precision,
        )
        with self.meter.excluded():
            if self.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            write_checkpoint(folder, self.model_config, self.masters, self.ema, state, self.meter)
            if self.rank == 0:
                self.job.publish(str(folder), self.step, self.meter.rows[-1] if self.meter.rows else {})
                shutil.rmtree(folder, ignore_errors=True)
            dist.barrier()
