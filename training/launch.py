"""Starts a training run on Ray: a gang of workers under Ray Train, watched from the driver.

Ray must be initialised. A run that dies is not started again here: the caller does that, and `TrainJob.resume` finds the
newest checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig

from training.board import Board, Reporter
from training.history import Row
from training.job import Outcome, TrainingBug, TrainingError, TrainJob
from unidiffuser.memory import out_of_memory

POLL_SECONDS = 0.5


def _work(config: dict[str, Any]) -> Outcome:
    """What Ray Train runs in every worker; the process group and RANK, LOCAL_RANK, NODE_RANK are already there."""
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from training.loop import run

    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // get_context().get_local_world_size()))
    reporter = Reporter(config["board"])
    try:
        return run(config["job"], device, reporter.stop_requested, reporter.add)
    except Exception as error:
        if (which := out_of_memory(error)) is None:
            raise
        told = config["job"].config
        at_once = told.micro_batch or told.worker_batch
        raise TrainingError(f"{which} is not enough; lower micro_batch (now {at_once}) or the model") from error
    finally:
        reporter.close()


@contextmanager
def _sigterm_sets(event: threading.Event) -> Iterator[None]:
    """Take SIGTERM as a request, while here; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def train(job: TrainJob, on_row: Callable[[Row], None] = lambda row: None, stop: threading.Event | None = None) -> Outcome:
    """Train with `job.config.workers` workers, on GPUs when the cluster has them, and wait for the end.

    SIGTERM, or setting `stop`, makes the workers write a checkpoint after the step that they are in and come to an end.

    Args:
        job: what to train; its `publish` runs in the worker of rank 0.
        on_row: called in this process with every row of the history, within a second or so.
        stop: the caller's own request to stop.

    Returns:
        How the run ended; `stopped` is true when it was asked to stop before its last step.

    Raises:
        TrainingError: the workers failed, with the first worker's reason, or the cluster is too small.
        TrainingBug: they failed in a way that may be a fault of the program; it is caused by the worker's traceback.

    Example:
        >>> outcome = train(TrainJob(config, shards, "/tmp/work", publish), on_row=print)  # doctest: +SKIP
    """
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = ray.cluster_resources()
    gpus = resources.get("GPU", 0) > 0
    have = int(resources.get("GPU" if gpus else "CPU", 0))
    if have < job.config.workers:
        kind = "GPUs" if gpus else "CPUs"
        raise TrainingError(f"workers is {job.config.workers}, but the Ray cluster has {have} {kind}; lower workers")

    # It would restart the workers in the middle of a run; here the caller resumes, and a process less starts sooner.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # A minute, the default, is too short for a busy laptop.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    requested = stop or threading.Event()
    board = Board.remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        _work,  # type: ignore[arg-type]
        train_loop_config={"job": job, "board": board},
        scaling_config=ScalingConfig(num_workers=job.config.workers, use_gpu=gpus),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(  # type: ignore[call-arg]
            name="train",
            storage_path=os.path.join(job.work_folder, "ray"),
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),  # type: ignore[call-arg]
            worker_runtime_env={"env_vars": _environment(gpus, job.config.compile)},
        ),
    )
    ended: list[Any] = []

    def fit() -> None:
        try:
            ended.append(trainer.fit())
        except BaseException as error:  # raised below, in the caller's thread
            ended.append(error)

    # In a thread of its own, so that this one is free for progress and for signals.
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    with _sigterm_sets(requested):
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            for row in ray.get(board.read.remote(requested.is_set())):
                on_row(row)
    for row in ray.get(board.read.remote(False)):
        on_row(row)
    ray.kill(board)
    result = ended[0]
    if isinstance(result, BaseException):
        raise _failure(result)
    return result.return_value


def _environment(gpus: bool, compile: bool) -> dict[str, str]:
    """Environment of the workers."""
    environment = {} if gpus else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if not compile:
        # DeepSpeed has functions decorated with torch.compile that we never call: without this they load Inductor.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment


def _failure(error: BaseException) -> TrainingError:
    """The line that a user can act on: what the first worker raised that was not just the echo of another's end."""
    failures = [failure for _, failure in sorted(getattr(error, "worker_failures", {}).items())] or [error]
    causes = [getattr(failure, "_base_exc", failure) for failure in failures]
    for failure, cause in zip(failures, causes, strict=True):
        if type(cause).__module__.startswith(("training.", "infra.")):
            return _caused(TrainingError(str(cause)), failure)
        if isinstance(cause, (OSError, ValueError)):
            return _caused(TrainingBug(str(cause)), failure)
    words = " ".join(f"{type(causes[0]).__name__}: {causes[0]}".split())
    return _caused(TrainingBug(words), failures[0])


def _caused(error: TrainingError, failure: BaseException) -> TrainingError:
    """With what Ray tells of a worker's failure, which is its traceback."""
    error.__cause__ = failure
    return error
