"""One group of workers under Ray Train, from its start to its end; what ends it without a fault of the program is `Lost`."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig

from infra.code import code_digest, other_code
from infra.ray_nodes import marked
from infra.scratch import held, sweep
from training.board import Heard, Reporter, new_board
from training.gang.ranks import end, last_words, on_machines, stacks
from training.gang.signs import HERE, Sign
from training.gang.silence import Silence
from training.history import Row
from training.job import Outcome, TrainingBug, TrainingError, TrainJob
from unidiffuser.memory import out_of_memory

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
# Seconds that a worker keeps to itself that others have gone: Ray Train tells of the first failure that it sees, and that of
# who has gone says more.
ECHO_SECONDS = 10.0
FATAL = re.compile(r"^Fatal Python error: (.+)$", re.MULTILINE)


class Lost(TrainingError):
    """A group has lost a worker or its network: what it did since its last checkpoint is done again by another group.

    `nodes` are those that had workers and do not answer.
    """

    def __init__(self, words: str, nodes: frozenset[str] = frozenset()) -> None:
        super().__init__(words)
        self.words, self.nodes = words, nodes

    def __reduce__(self) -> Any:
        return Lost, (self.words, self.nodes)


def is_echo(error: Exception) -> bool:
    """Whether an error says no more than that others do not answer."""
    import torch.distributed as dist

    words = str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in words or "NCCL" in words))


def _work(config: dict[str, Any]) -> Outcome:
    """What Ray Train runs in every worker; the process group and RANK, LOCAL_RANK, NODE_RANK are already there."""
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from training.loop import run

    if (why := other_code(config["code"], f"the machine {socket.gethostname()}")) is not None:
        raise TrainingError(why)
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // get_context().get_local_world_size()))
    reporter = Reporter(config["board"], get_context().get_world_rank())
    sweep()
    try:
        with held(Path(config["job"].work_folder)):
            return run(config["job"], device, reporter.stop_requested, reporter.add)
    except Exception as error:
        if (which := out_of_memory(error)) is not None:
            at_once = config["job"].config.worker_micro_batch
            raise TrainingError(f"{which} is not enough; lower micro_batch (now {at_once}) or the model") from error
        if not is_echo(error):
            raise
        HERE.broke_off(traceback.format_exc())
        time.sleep(ECHO_SECONDS)
        words = " ".join(str(error).split())
        raise Lost(f"rank {reporter.rank} lost its connection to the others: {words}") from error
    finally:
        reporter.close()


class Attempt:
    """A group that trains `job` with `workers` workers.

    Args:
        job: what to train, from where it is to go on.
        workers: how many.
        gpus: whether each has a GPU, or a CPU.
    """

    def __init__(self, job: TrainJob, workers: int, gpus: bool) -> None:
        self.job = replace(job, config=job.config.model_copy(update={"workers": workers}))
        self.board = new_board()
        self.silence = Silence(job.config.silent_after)
        self.heard: Heard = {}
        self.newest_row = 0
        self.verdict: str | None = None
        self.no_answer: frozenset[str] = frozenset()
        self.given_up: set[int] = set()
        self.trainer = self._trainer(gpus)

    def _trainer(self, gpus: bool) -> Any:
        from ray.train.torch import TorchTrainer

        from training.gang.group import GroupConfig

        # It would restart the workers in the middle of a run; here the driver does that, which knows the checkpoints, and a
        # process less starts sooner.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # A minute, the default, is too short for a busy laptop.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
        # A worker on a machine that is gone does not answer; ten minutes, the default, are too long.
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(self.job.config.silent_after)
        config = self.job.config
        return TorchTrainer(
            _work,  # type: ignore[arg-type]
            train_loop_config={"job": self.job, "board": self.board, "code": code_digest()},
            # A fixed number: of a range Ray Train would take any number, and the batch has to be divided by it.
            scaling_config=ScalingConfig(
                num_workers=config.most_workers,
                use_gpu=gpus,
                resources_per_worker={"GPU" if gpus else "CPU": 1, **marked(config.machines)},
            ),
            torch_config=GroupConfig(backend="nccl" if gpus else "gloo", board=self.board),
            run_config=RunConfig(  # type: ignore[call-arg]
                name="train",
                storage_path=os.path.join(self.job.work_folder, "ray"),
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),  # type: ignore[call-arg]
                worker_runtime_env={"env_vars": _environment(gpus, config.compile)},
            ),
        )

    @property
    def step(self) -> int:
        """Steps that all ranks have done, as far as is known; 0 before the first of this group."""
        # A row tells of a step of all ranks, and may come before the next sign of any.
        return max(self.newest_row, min((sign.step for sign, _ in self.heard.values()), default=0))

    @property
    def termed(self) -> list[Sign]:
        """The workers that got SIGTERM."""
        return [sign for sign, _ in self.heard.values() if sign.termed]

    def run(self, on_row: Callable[[Row], None], stop: Callable[[], bool]) -> Outcome:
        """Train to the end, or until `stop` says so.

        Raises:
            Lost: a worker died or fell silent, or the group stood still.
            TrainingError, TrainingBug: what the workers raised.
        """
        ended: list[Any] = []

        def fit() -> None:
            try:
                ended.append(self.trainer.fit())
            except BaseException as error:  # raised below, in the caller's thread
                ended.append(error)

        # In a thread of its own, so that this one is free for progress and for signals.
        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            self._read(on_row, stop())
            pids = {sign.pid for sign, _ in self.heard.values()}
            if pids != self.given_up and (found := self.silence.verdict(self.heard, time.monotonic())) is not None:
                self.verdict, self.given_up = found, pids
                self._give_up()
        self._read(on_row, False)
        told = ray.get(self.board.stacks.remote())
        ray.kill(self.board)
        result = ended[0]
        if isinstance(result, BaseException):
            raise self._failure(result, told)
        return result.return_value

    def _read(self, on_row: Callable[[Row], None], stop: bool) -> None:
        rows, self.heard = ray.get(self.board.read.remote(stop))
        for row in rows:
            self.newest_row = row["step"]
            on_row(row)

    def _signs(self) -> list[Sign]:
        return [sign for sign, _ in sorted(self.heard.values(), key=lambda found: found[0].rank)]

    def _give_up(self) -> None:
        """Say what every rank is doing, and kill them all: Ray Train then sees the end of the group."""
        assert self.verdict is not None
        log.warning("%s; the stacks of all ranks follow", self.verdict)
        signs = self._signs()
        found = on_machines(stacks, signs)
        for sign in signs:
            log.warning("%s: %s", sign, found.get(sign.rank, "its node does not answer"))
        self.no_answer = frozenset(sign.node for sign in signs if sign.rank not in found)
        on_machines(end, [sign for sign in signs if sign.rank in found])

    def _failure(self, error: BaseException, told_stacks: Mapping[int, str]) -> TrainingError:
        """What to raise for the end of a group.

        Args:
            told_stacks: of the ranks that were left when one was lost.
        """
        if self.verdict is not None:
            return _caused(Lost(self.verdict, self.no_answer), error)
        failures = dict(sorted(getattr(error, "worker_failures", {}).items()))
        found = failure_of(failures or {0: error})
        # Of those Ray Train tells that they do not answer, of others what they raised.
        dead = {rank for rank, failure in failures.items() if isinstance(_cause(failure), RayError)}
        if not isinstance(found, Lost) and not (dead and isinstance(found, TrainingBug)):
            return found
        signs = self._signs()
        traces = on_machines(last_words, signs)
        gone = [sign for sign in signs if sign.rank in dead or sign.rank not in traces]
        told = ", ".join(f"{sign} {_how_it_ended(traces.get(sign.rank), failures.get(sign.rank))}" for sign in gone)
        # The last sign may be a second old.
        after = f", after step {self.step}" if self.step else ""
        words = f"{told}{after}" if told else str(found)
        if told_stacks:
            log.warning("%s; the stacks of the ranks that answer follow", words)
            for sign in signs:
                if sign.rank in told_stacks:
                    log.warning("%s: %s", sign, told_stacks[sign.rank])
        return _caused(Lost(words, frozenset(sign.node for sign in signs if sign.rank not in traces)), error)


def _how_it_ended(trace: str | None, failure: BaseException | None) -> str:
    """What is known of the end of a process, from what it wrote of a fatal signal and what Ray tells of it."""
    if trace is None:
        return "is gone with its node, which does not answer"
    if (fatal := FATAL.search(trace)) is not None:
        return f"crashed ({fatal[1]})"
    if "low on memory" in str(failure):
        return "was killed by Ray, as its node is low on memory"
    return "was killed (SIGKILL, as by the kernel when memory is not enough)"


def _environment(gpus: bool, compile: bool) -> dict[str, str]:
    """Environment of the workers."""
    environment = {} if gpus else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if not compile:
        # DeepSpeed has functions decorated with torch.compile that we never call: without this they load Inductor.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment


def _cause(failure: BaseException) -> BaseException:
    """What a worker raised, or what came in place of its answer; also where it is Ray Train's controller that tells of it."""
    failure = getattr(failure, "controller_failure", failure)
    if isinstance(failure, RayTaskError):
        return failure.cause
    return getattr(failure, "_base_exc", getattr(failure, "health_check_failure", failure))


def failure_of(failures: dict[int, BaseException]) -> TrainingError:
    """The line that a user can act on: what the first worker raised that was not just the echo of another's end."""
    causes = {rank: _cause(failure) for rank, failure in failures.items()}
    for rank, cause in causes.items():
        if type(cause).__module__.startswith(("training.", "infra.")) and not isinstance(cause, Lost):
            return _caused(TrainingError(str(cause)), failures[rank])
        if isinstance(cause, (OSError, ValueError)) and not isinstance(cause, RayError):
            return _caused(TrainingBug(" ".join(str(cause).split())), failures[rank])
    rank, cause = next(iter(causes.items()))
    if isinstance(cause, Lost):
        return _caused(Lost(cause.words), failures[rank])
    words = " ".join(f"{type(cause).__name__}: {cause}".split())
    return _caused(TrainingBug(words), failures[rank])


def _caused(error: TrainingError, failure: BaseException) -> TrainingError:
    """With what Ray tells of a worker's failure, which is its traceback."""
    error.__cause__ = failure
    return error
