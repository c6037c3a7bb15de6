"""Writes checkpoints while training goes on: every worker its own share, in a thread, one checkpoint at a time.

A checkpoint is the state between two optimizer steps, and nothing changes it before the next one: the forward and backward passes
of a step only read. So the thread writes from the state itself at first. When the optimizer is about to step, what is not yet
written is copied at once, which is all that a worker ever stands still for, and the thread goes on with the copy.

Workers tell each other that their shares are written by one number more in what they add up after every step anyway. Then rank 0
commits the record, without which no share counts. Numbers that are not finite are found while they are written; then there
is no record.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from training.job import Keeper, TrainingError, Written
from training.shares import bytes_of, chunks, header
from training.threads import beside

Piece = tuple[str, Tensor]
Files = list[Written]


class NotFinite(TrainingError):
    """A checkpoint that was not kept because some of its numbers are not finite."""


class Held:
    """The numbers of a share as they were when it was made, in pieces that are taken one after the other by another thread.

    Args:
        tensors: flat fp32 vectors; nobody may change them before `seal`.
        room: gives pinned or plain memory for so many numbers.
    """

    def __init__(self, tensors: Sequence[Tensor], room: Callable[[int], Tensor]) -> None:
        self.views = [tensor.narrow(0, start, length) for tensor in tensors for start, length in chunks(len(tensor))]
        self._room, self._lock, self._taken, self._sealed = room, threading.Lock(), 0, False
        # With an offloaded optimizer some are here and some on the GPU.
        self._cuda = any(view.is_cuda for view in self.views)
        if self._cuda:
            self._stream, self._made = torch.cuda.Stream(), torch.cuda.Event()
            self._made.record()

    def seal(self) -> None:
        """Copy what has not been taken, after which the tensors may change."""
        with self._lock:
            if self._sealed:
                return
            self._sealed = True
            left = self.views[self._taken :]
            room, start = self._room(sum(map(len, left))), 0
            for number, view in enumerate(left, self._taken):
                copy = room.narrow(0, start, len(view))
                copy.copy_(view, non_blocking=True)
                self.views[number], start = copy, start + len(view)
            if self._cuda:
                torch.cuda.current_stream().synchronize()

    def taken(self) -> Iterator[Tensor]:
        """Each piece, in memory that the next one reuses."""
        if not self.views:
            return
        memory = torch.empty(max(map(len, self.views)), pin_memory=self._cuda)
        for number in range(len(self.views)):
            with self._lock:
                view = self.views[number]
                piece = memory.narrow(0, 0, len(view))
                if view.is_cuda:
                    # Not behind the step that is being computed.
                    with torch.cuda.stream(self._stream):
                        self._stream.wait_event(self._made)
                        piece.copy_(view, non_blocking=True)
                    self._stream.synchronize()
                else:
                    # numpy copies with this thread alone; torch would wake those of the training step.
                    np.copyto(piece.numpy(), view.numpy())
                self._taken = number + 1
            yield piece


def finite(numbers: np.ndarray) -> bool:
    """Whether all of them are; the sum tells so in a fraction of the time, unless it alone is too great."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(numbers.sum()) or np.isfinite(numbers).all())


@dataclass
class _Flight:
    """A checkpoint that is on its way."""

    step: int
    rows: int
    metrics: dict[str, Any]
    held: Held
    share: Future[Files] | None
    commit: Future[None] | None = None


class Saver:
    """The checkpoints of one worker; all workers call the same methods in the same order, but for `seal` and `ready`."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self._thread = beside(1, "checkpoint")
        self._flight: _Flight | None = None
        self._memory = torch.empty(0)

    def begin(
        self,
        step: int,
        name: str,
        pieces: Sequence[Piece],
        metadata: dict[str, str],
        more: Callable[[], Iterator[tuple[str, Iterator[bytes]]]],
        rows: int,
        metrics: dict[str, Any],
    ) -> None:
        """Begin a checkpoint; waits for the one before.

        Args:
            name: of this worker's share.
            pieces: key and flat tensor of each piece of it, which stays as it is until `seal`.
            metadata: of the share.
            more: gives further files by name, piece by piece; called by the thread, on rank 0.
            rows: that the training reads.
            metrics: newest row of the history.
        """
        self.finish()
        held = Held([tensor for _, tensor in pieces], self._room)
        head = header([(key, (len(tensor),)) for key, tensor in pieces], metadata)

        def write() -> Files:
            with self.keeper.writing(step, name) as file:
                file.write(memoryview(head))
                for piece in held.taken():
                    if not finite(piece.numpy()):
                        raise NotFinite(f"step {step}: weights, averages or the optimizer's numbers are not finite")
                    file.write(bytes_of(piece))
            files = [Written(name, file.size, file.sha256)]
            for other, parts in more() if dist.get_rank() == 0 else ():
                with self.keeper.writing(step, other) as file:
                    for part in parts:
                        file.write(part)
                files.append(Written(other, file.size, file.sha256))
            return files

        self._flight = _Flight(step, rows, metrics, held, self._thread.submit(write))

    def _room(self, numbers: int) -> Tensor:
        """Memory for what is copied, which the next checkpoint uses again."""
        if len(self._memory) < numbers:
            cuda = torch.cuda.is_available()
            self._memory = torch.empty(numbers, pin_memory=cuda)
        return self._memory

    def seal(self) -> None:
        """The state is about to change: copy what is not written yet."""
        if self._flight is not None:
            self._flight.held.seal()

    def ready(self) -> bool:
        """Whether this worker's share is written, or has failed, and waits for the others'."""
        return self._flight is not None and self._flight.share is not None and self._flight.share.done()

    def commit(self) -> None:
        """Commit what all workers have written; waits for it.

        Raises:
            NotFinite: numbers of a share are not finite.
            TrainingError: a worker could not write its share.
        """
        flight = self._flight
        assert flight is not None and flight.share is not None
        files, error = _outcome(flight.share)
        flight.share = None
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, (files, error))
        if errors := [error for _, error in everybody if error is not None]:
            self._flight = None
            raise errors[0]
        if dist.get_rank() == 0:
            written = [file for files, _ in everybody for file in files]
            flight.commit = self._thread.submit(self.keeper.commit, flight.step, written, flight.rows, flight.metrics)

    def finish(self) -> None:
        """Wait until the last checkpoint counts, if there is one on its way.

        Raises: as `commit`.
        """
        if self._flight is None:
            return
        if self._flight.share is not None:
            self.commit()
        flight, self._flight = self._flight, None
        error = [_outcome(flight.commit)[1] if flight.commit is not None else None]
        dist.broadcast_object_list(error, src=0)
        if error[0] is not None:
            raise error[0]

    def close(self) -> None:
        """Let go of the thread; what is on its way is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _outcome(future: Future[Any]) -> tuple[Any, Exception | None]:
    """What it gave, or what went wrong in a form that every worker can be sent."""
    try:
        return future.result(), None
    except TrainingError as error:
        return None, error
    except Exception as error:
        words = str(error) if type(error).__module__.startswith(("infra.", "stages.")) else f"{type(error).__name__}: {error}"
        return None, TrainingError(f"a checkpoint could not be written: {' '.join(words.split())}")
