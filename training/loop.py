"""The training loop of one worker: batches in, checkpoints out. Knows torch.distributed and DeepSpeed, not Ray.

The loss of step s is a function of the configuration, the shards and s; workers, micro-batches, ZeRO stage and interruptions
change it by rounding only (not at all when the number of workers and the micro-batch stay).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from training.adapters import Adapters, is_adapter
from training.begin import ALL, begin, counts_on
from training.checkpoint import Checkpoint, TrainerState, other_files, pieces_of, read_state, told_by_shares
from training.config import TrainConfig
from training.damage import Damage
from training.ema import Ema
from training.engine import compiled, initialise_engine, resolve_precision
from training.fetching import Fetching, agreed, gathered
from training.fitting import fitted
from training.guard import Guard, unless_finite
from training.history import Meter, Row, means
from training.job import Outcome, TrainingError, TrainJob
from training.loader import Batch, Loader, too_many_damaged
from training.losses import Losses, Sums
from training.masters import Masters
from training.profiling import Profile
from training.rates import Plateau, learning_rate, set_learning_rates
from training.rollback import Back, GoBack, go_back
from training.saving import NotFinite, Saver
from training.shares import share_name
from training.speed import gauges
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
    stop_requested: Callable[[int], bool] = lambda step: False,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Outcome:
    """Train in this worker; torch.distributed must be initialised. All workers call it with the same job.

    Args:
        device: of this worker.
        stop_requested: asked on every rank after every step, with the steps done; when one says true, all checkpoint and stop.
        on_row: gets every row of the history on rank 0.

    Raises:
        TrainingError: there was more damage than the configuration allows, or a checkpoint could not be written.
        ShardError, CheckpointError, WeightsMisfit: an input cannot be used.
    """
    back: Back | None = None
    while True:
        fetching = Fetching(job.work_folder)
        try:
            return _Run(job, device, fetching, back).run(stop_requested, on_row)
        except GoBack as error:
            back = error.back
            log.warning("%s", error)
        finally:
            fetching.remove()
        # The engine and its buffers hold each other.
        gc.collect()


class _Run:
    """Everything that one worker holds while it trains."""

    def __init__(self, job: TrainJob, device: torch.device, fetching: Fetching, back: Back | None) -> None:
        self.job, self.config, self.device, self.fetching = job, job.config, device, fetching
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        resume = job.resume
        if back is not None:
            at = f"{job.work_folder}/back-{back.step}"
            resume = None if back.step is None else partial(job.publish.fetch, back.step, at)
        folder = fetching(resume)
        self.keep = job.keep if folder is None else ALL
        folder = folder if folder is not None else fetching(job.init_from)
        state = read_state(folder) if folder is not None else None
        agreed(state.step if state is not None else 0)
        self.begin = begin(state, self.keep, len(job.shards), self.config.global_batch)
        self.damage, self.tries = Damage() if state is None or not counts_on(self.keep) else state.damage, 0
        if back is not None:
            self.begin, self.damage, self.tries = back.begin(self.begin), back.damage, back.tries
        schedule = NoiseSchedule.of(self.config.noise).to(device)
        self.loader = Loader(
            self.config, job.shards, self.rank, self.world, gathered, schedule.steps, self.begin.order_from, self.begin.growth,
            job.subsets, job.told,
        )  # fmt: skip
        self.model_config = uvit_config(self.config, self.loader.modalities)
        self.objective = JointObjective(self.loader.modalities, schedule, self.config.objective.min_snr_gamma)
        self.losses = Losses(self.objective, schedule.steps, device, self.loader.subsets)
        trained = self.model_config.model_copy(update={"modalities": self.loader.modalities})
        precision = resolve_precision(self.config.precision, device)
        self.config = fitted(self.config, precision == "bf16", trained.tokens, device)
        measured = gauges(trained, precision, device, self.world, self.config.lora is not None)
        self.meter = Meter(self.config.global_batch, self.loader.epochs, self.config.log_every, measured)
        self.step, self.optimizer_steps, self.plateau = self.begin.step, 0, Plateau()
        self.met, self.damaged_groups = 0, dict[int, str]()
        self.adapters: Adapters | None = None
        self.saver = Saver(job.publish)
        self._start(folder)
        self._say(state, back)
        self.held_out = self._held_out(self.config.validation.samples)
        looks = self.config.schedule.decay == "plateau"
        if looks and int(self.loader.index.held.sum()) == 0:
            raise TrainingError("schedule.decay plateau looks at held-out rows, and there are none: raise validation.fraction")
        self.looked_at = self._held_out(self.config.schedule.look_samples) if looks else []

    def _loss(self, batch: Batch, count: float) -> tuple[Tensor, Tensor]:
        """The objective on timesteps and noise that the loader drew for each sample by its place, and all that is told of it."""
        data_type = batch.data_type if self.config.model.data_type_token else None
        errors = self.objective.errors(self.engine, batch.clean, batch.timesteps, batch.noise, data_type)
        loss, parts = self.objective.mean(errors)
        return loss, self.losses.pack(loss, parts, errors, batch.timesteps, batch.subset, count)

    def _start(self, folder: str | None) -> None:
        """Model, engine and moving average: new, with what is kept of a checkpoint, or from foreign weights."""
        torch.manual_seed(self.config.seed)
        model = UViT(self.model_config)
        saved = Checkpoint(folder, self.model_config) if folder is not None else None
        # What adapters are trained on is frozen, and so the same wherever a run goes on.
        foreign = self.fetching(self.job.weights) if saved is None or self.config.lora is not None else None
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
                adapters = {name: tuple(tensor.shape) for name, tensor in model.named_parameters() if is_adapter(name)}
                saved.check_adapters(adapters)
                model.load_state_dict({name: saved.tensor("model", name) for name in adapters}, strict=False)
        if compiled(model, self.config, self.device):
            log.info("training with torch.compile")
        self.engine, self.precision = initialise_engine(model, self.config, self.world, self.device)
        self.guard = Guard(self.engine, self.config.zero_stage, self.config.gradient_clip, self._refuses)
        self.masters = Masters(self.engine, self.config.zero_stage)
        if saved is not None:
            saved.restore_weights(self.masters)
        self.ema = Ema(self.masters, self.config.ema)
        if weights is not None and self.adapters is None:
            weights.restore(self.masters, self.ema)
        if saved is not None:
            self._take(saved)
        if self.adapters is None:
            self.fetching.read()

    def _refuses(self, norm: float) -> bool:
        return self.damage.refuses(norm, self.config.damage)

    def _say(self, state: TrainerState | None, back: Back | None) -> None:
        """Say in the history that the run begins elsewhere than one would think."""
        newest = self.job.newest
        self.said: list[Row] = []
        if back is not None:
            self.said.append(self.meter.damage(self.step, back.said))
        elif newest is not None and state is not None and self.begin.step < newest:
            said = f"the checkpoint of step {newest} is damaged: goes on from that of step {state.step}"
            self.said.append(self.meter.damage(self.step, said))

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

    def run(self, stop_requested: Callable[[int], bool], on_row: Callable[[Row], None]) -> Outcome:
        config, stopped = self.config, False
        on_row = on_row if self.rank == 0 else lambda row: None
        for said in self.said:
            on_row(said)
        if self.step == 0:
            self._validate(on_row)
        if config.steps == 0:
            # No step has made the optimizer's state yet.
            self.masters.set_state({kind: self.masters.empty() for kind in self.masters.state_kinds}, 0)
            self._checkpoint()
        batches = self.loader.batches(self.step, config.steps)
        traced = self.job.traced if self.rank == 0 else None
        profile = Profile(config.profile, config.steps, self.device, self.job.work_folder, traced)
        self.meter.begin()
        try:
            for batch in self.meter.waited(batches):
                with profile.step(self.step + 1):
                    row, stopped = self._train_step(batch.to(self.device), stop_requested)
                if row is not None:
                    on_row(row)
                last = stopped or self.step == config.steps
                if self.step % config.validation.every == 0 or self.step == config.steps:
                    self._validate(on_row)
                if config.schedule.decay == "plateau" and self.step % config.schedule.look_every == 0:
                    self.plateau.look(self._mean_losses(self.looked_at)["loss"], config.schedule.patience)
                if self.step % config.checkpoint_every == 0 or last:
                    self._checkpoint()
                if stopped:
                    break
            with self.meter.waiting("checkpoint"):
                self.saver.finish()
        except NotFinite as error:
            raise self._back(str(error)) from error
        finally:
            batches.close()  # type: ignore[attr-defined]
            self.saver.close()
            profile.close()
        return Outcome(self.step, stopped and self.step < config.steps)

    def _train_step(self, batch: Batch, stop_requested: Callable[[int], bool]) -> tuple[Row | None, bool]:
        """One optimizer step; gives the row of the history when its interval is full, and whether to stop."""
        schedule, drops, step = self.config.schedule, self.plateau.drops, self.step - self.begin.schedule_from
        set_learning_rates(self.masters.optimizer, step, schedule, drops)
        lr = learning_rate(step, self.config.optimizer.lr, schedule, drops)
        micro_batches = batch.split(self.engine.train_micro_batch_size_per_gpu())
        totals = torch.zeros(3 + self.losses.size, device=self.device)
        for number, micro_batch in enumerate(micro_batches, 1):
            loss, told = self._loss(micro_batch, 1 / len(micro_batches))
            self.engine.backward(unless_finite(loss))
            if number == len(micro_batches):
                with self.meter.waiting("checkpoint"):
                    self.saver.seal()
            self.guard.step()
            totals[3:] += told
        self.step += 1
        totals[0] = stop_requested(self.step)
        totals[1], totals[2] = self.saver.ready(), len(self.loader.damaged)
        dist.all_reduce(totals)
        stop, written, groups, *numbers = totals.tolist()
        if written == self.world:
            with self.meter.waiting("checkpoint"):
                self.saver.commit()
        values, sums = self.losses.unpack(numbers, self.world)
        values, sums = self._counted({**values, "grad_norm": self.guard.norm}, sums)
        damage = self.damage.told() | self._damaged_groups(int(groups))
        # After steps that were skipped there would be no checkpoint: the next one that is not is waited for.
        return self.meter.step(self.step, lr, values, sums, damage), bool(stop) and not self.damage.in_a_row

    def _damaged_groups(self, met: int) -> dict[str, int]:
        """How many row groups are damaged, if any is; all workers must call it.

        Args:
            met: the sum of how many each worker has met; in another epoch another worker meets the same one.

        Raises:
            ShardError: more than are allowed.
        """
        if met != self.met:
            self.met = met
            self.damaged_groups = dict(pair for pairs in gathered(list(self.loader.damaged.items())) for pair in pairs)
            if len(self.damaged_groups) > self.config.damage.skip_damaged:
                raise too_many_damaged(self.config, len(self.damaged_groups), "; ".join(self.damaged_groups.values()))
        return {"damaged_groups": len(self.damaged_groups)} if self.damaged_groups else {}

    def _counted(self, values: dict[str, float], sums: Sums) -> tuple[dict[str, float], Sums]:
        """What a step gives to the history: nothing if it was skipped.

        Raises:
            GoBack: too many in a row were, or the last one was.
        """
        if self.guard.applied:
            self.tries = 0
            self.damage.applied(self.guard.norm)
            self.ema.update()
            self.optimizer_steps += 1
            return values, sums
        self.damage.skip(self.step, values["loss"], self.guard.norm)
        log.warning("skipped %s", self.damage.seen[-1])
        ends = self.step == self.config.steps
        if self.damage.in_a_row > self.config.damage.steps_in_a_row or ends:
            count = self.damage.in_a_row
            raise self._back(f"{count} steps in a row were skipped" if count > 1 else "a step was skipped")
        return {}, {}

    def _back(self, why: str) -> GoBack:
        """What to raise to go on from the last good checkpoint."""
        try:
            self.saver.finish()
        except NotFinite as error:
            why = f"{why}, and {error}"
        return go_back(self.job, self.step, self.begin, self.damage, self.tries, why)

    def _validate(self, on_row: Callable[[Row], None]) -> None:
        """Loss on the held-out samples with the weights as trained and with their average, the same samples, timesteps and noise
        every time."""
        if int(self.loader.index.held.sum()) == 0:
            return
        # Weights and average change places, so what is still to be written of them is copied first.
        with self.meter.waiting("checkpoint"):
            self.saver.seal()
        with self.meter.excluded():
            values = self._mean_losses(self.held_out)
            with self.masters.computing_with(self.ema.vectors):
                values |= {f"ema_{name}": value for name, value in self._mean_losses(self.held_out).items()}
        on_row(self.meter.validation(self.step, values | self.damage.told()))

    @torch.no_grad()
    def _mean_losses(self, batches: list[Batch]) -> dict[str, float]:
        """Mean losses over the batches of all workers."""
        with self.meter.excluded():
            self.engine.eval()
            totals = torch.zeros(1 + self.losses.size, device=self.device)
            rounds = torch.tensor([len(batches)], device=self.device)
            dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
            with torch.compiler.set_stance("force_eager"):
                for number in range(int(rounds)):
                    # With ZeRO 3 a forward pass is collective: who has run out of samples repeats one, and counts nothing.
                    batch = batches[number] if number < len(batches) else self.loader.batch(self.begin.order_from).split(1)[0]
                    _, told = self._loss(batch.to(self.device), len(batch))
                    if number < len(batches):
                        totals[0] += len(batch)
                        totals[1:] += told
            self.engine.train()
            dist.all_reduce(totals)
            count, *numbers = totals.tolist()
            values, sums = self.losses.unpack(numbers, count)
            return values | means(sums)

    def _held_out(self, samples: int) -> list[Batch]:
        """This worker's share of held-out rows, in batches that it computes at once."""
        batch = self.loader.validation(samples)
        return batch.split(self.config.worker_micro_batch) if batch else []

    def _checkpoint(self) -> None:
        """Begin a checkpoint, unless the last steps were skipped: it might be as bad as they are."""
        if self.damage.in_a_row:
            return
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
            optimizer=self.masters.state_kinds,
            plateau=self.plateau,
            damage=self.damage,
            workers=self.world,
            zero_stage=self.config.zero_stage,
            precision=self.precision,
        )
        with self.meter.waiting("checkpoint"):
            self.saver.begin(
                self.step,
                share_name(self.rank, self.world),
                pieces_of(self.masters, self.ema),
                told_by_shares(self.masters),
                other_files(self.model_config, self.masters, self.ema, state, self.meter, self.adapters),
                self.loader.rows,
                self.meter.rows[-1] if self.meter.rows else {},
            )
