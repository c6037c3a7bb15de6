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

from training.adapters import Adapters, is_adapter
from training.begin import ALL, begin, counts_on
from training.checkpoint import Checkpoint, TrainerState, read_state, write_checkpoint
from training.config import TrainConfig
from training.ema import Ema
from training.engine import compiled, initialise_engine
from training.history import Meter, Row
from training.job import Outcome, Source, TrainingError, TrainJob
from training.loader import Batch, Loader
from training.masters import Masters
from training.rates import Plateau, learning_rate, set_learning_rates
from training.weights import ForeignWeights
from unidiffuser.modalities import Modality, all_parts, resized
from unidiffuser.objective import JointObjective
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.uvit import UViT, UViTConfig

log = logging.getLogger(__name__)


def uvit_config(config: TrainConfig, modalities: tuple[Modality, ...]) -> UViTConfig:
    """The model's configuration for the shapes of the shards."""
    if (side := config.model.position_side) is not None:
        latent = next(part for part in all_parts(modalities) if part.is_grid)
        modalities = resized(modalities, {latent.name: (latent.shape[0], side, side)})
    sizes = config.model.model_dump(exclude={"patch", "position_side"})
    return UViTConfig(modalities=modalities, noise=config.noise, **sizes)


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
        ShardError, CheckpointError, WeightsMisfit: an input cannot be used.
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
        folder = fetched(job.resume)
        self.keep = job.keep if folder is None else ALL
        folder = folder if folder is not None else fetched(job.init_from)
        state = read_state(folder) if folder is not None else None
        self.begin = begin(state, self.keep, len(job.shards), self.config.global_batch)
        schedule = NoiseSchedule.of(self.config.noise).to(device)
        self.loader = Loader(
            self.config, job.shards, self.rank, self.world, _gathered, schedule.steps, self.begin.order_from, self.begin.growth
        )
        self.model_config = uvit_config(self.config, self.loader.modalities)
        self.objective = JointObjective(self.loader.modalities, schedule, self.config.objective.min_snr_gamma)
        self.parts = [part.name for modality in self.loader.modalities for part in modality.parts]
        self.meter = Meter(self.config.global_batch, self.loader.epochs, self.config.log_every)
        self.step, self.optimizer_steps, self.plateau = self.begin.step, 0, Plateau()
        self.adapters: Adapters | None = None
        self._start(folder)
        self.held_out = self._held_out(self.config.validation.samples)
        looks = self.config.schedule.decay == "plateau"
        if looks and int(self.loader.index.held.sum()) == 0:
            raise TrainingError("schedule.decay plateau looks at held-out rows, and there are none: raise validation.fraction")
        self.looked_at = self._held_out(self.config.schedule.look_samples) if looks else []

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective on timesteps and noise that the loader drew for each sample by its place."""
        data_type = batch.data_type if self.config.model.data_type_token else None
        return self.objective.loss(self.engine, batch.clean, batch.timesteps, batch.noise, data_type)

    def _start(self, folder: str | None) -> None:
        """Model, engine and moving average: new, with what is kept of a checkpoint, or from foreign weights."""
        torch.manual_seed(self.config.seed)
        model = UViT(self.model_config)
        saved = Checkpoint(folder, self.model_config) if folder is not None else None
        # What adapters are trained on is frozen, and so the same wherever a run goes on.
        foreign = fetched(self.job.weights) if saved is None or self.config.lora is not None else None
        weights = ForeignWeights(foreign, self.model_config) if foreign is not None else None
        if weights is not None:
            model.load_state_dict({name: weights.tensor(name) for name in weights.names()})
        elif saved is not None:
            model.load_state_dict({name: saved.tensor("model", name) for name in saved.names()})
        if self.config.lora is not None:
            if weights is None:
                raise TrainingError("lora trains adapters on given weights: name them in `weights`")
            self.adapters = Adapters(self.config.lora, weights)
            self.adapters.inject(model)
            if saved is not None:
                adapters = [name for name, _ in model.named_parameters() if is_adapter(name)]
                model.load_state_dict({name: saved.tensor("model", name) for name in adapters}, strict=False)
        if compiled(model, self.config, self.device):
            log.info("training with torch.compile")
        self.engine, self.precision = initialise_engine(model, self.config, self.world, self.device)
        self.masters = Masters(self.engine, self.config.zero_stage)
        if saved is not None:
            saved.restore_weights(self.masters)
        self.ema = Ema(self.masters, self.config.ema)
        if weights is not None and self.adapters is None:
            weights.restore(self.masters, self.ema)
        if saved is not None:
            self._take(saved)

    def _take(self, saved: Checkpoint) -> None:
        """What else is kept of a checkpoint; see `training.begin`."""
        if "order" in self.keep:
            rows = self.loader.rows_of(saved.state.growth[-1].parts)
            saved.check_same_order(self.config.global_batch, self.config.seed, rows)
        if "ema" in self.keep:
            saved.restore_average(self.masters, self.ema)
        if "schedule" in self.keep:
            self.plateau = saved.state.plateau
        if "optimizer" in self.keep:
            saved.restore_optimizer(self.masters)
            self.optimizer_steps = saved.state.optimizer_steps
        if counts_on(self.keep):
            saved.restore_history(self.meter)

    def run(self, stop_requested: Callable[[], bool], on_row: Callable[[Row], None]) -> Outcome:
        config, stopped = self.config, False
        if self.step == 0:
            self._validate(on_row)
        if config.steps == 0:
            # No step has made the optimizer's state yet.
            self.masters.set_state({kind: self.masters.empty() for kind in self.masters.state_kinds}, 0)
            self._checkpoint()
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
        schedule, drops, step = self.config.schedule, self.plateau.drops, self.step - self.begin.schedule_from
        set_learning_rates(self.masters.optimizer, step, schedule, drops)
        lr = learning_rate(step, self.config.optimizer.lr, schedule, drops)
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
                    f"step {self.step}: {name} is {value}; the last checkpoint is good: lower optimizer.lr or set gradient_clip, "
                    f"and go on from there with {self.job.fork}, or check the latents of this step"
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
                    batch = batches[number] if number < len(batches) else self.loader.batch(self.begin.order_from).split(1)[0]
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
            schedule_from=self.begin.schedule_from,
            order_from=self.begin.order_from,
            growth=list(self.begin.growth),
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
            write_checkpoint(folder, self.model_config, self.masters, self.ema, state, self.meter, self.adapters)
            if self.rank == 0:
                self.job.publish(str(folder), self.step, self.meter.rows[-1] if self.meter.rows else {})
                shutil.rmtree(folder, ignore_errors=True)
            dist.barrier()
