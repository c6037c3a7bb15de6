"""A trace of some steps by torch's profiler: what ran when, on every thread and on the GPU, and how much memory it took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field

from training.section import Section

if TYPE_CHECKING:
    import torch


class ProfileConfig(Section):
    """Which steps are traced, of the first worker; profiling slows them down."""

    model_config = ConfigDict(validate_by_alias=True, validate_by_name=True)

    begin: int = Field(alias="from", ge=1, description="The first step that is traced; the first steps of a run are its slowest.")
    steps: int = Field(3, ge=1, le=100, description="How many are traced; a step makes some megabytes.")


class Profile:
    """Traces the steps that a configuration names, and hands over one file, which chrome://tracing and Perfetto open.

    Args:
        config: None for no trace.
        end: the last step of the run.
        device: of this worker.
        folder: for the file, until `done` has taken it.
        done: called with the file's path; None for no trace.
    """

    def __init__(
        self,
        config: ProfileConfig | None,
        end: int,
        device: torch.device,
        folder: str | Path,
        done: Callable[[str], None] | None,
    ) -> None:
        self.device, self.folder, self.done = device, Path(folder), done
        self.first, self.last = 0, 0
        if config is not None and done is not None:
            self.first, self.last = config.begin, min(config.begin + config.steps - 1, end)
        self.running: torch.profiler.profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step of this number, counted from 1."""
        from torch.profiler import ProfilerActivity, profile

        if number == self.first:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self.running = profile(activities=activities, profile_memory=True)
            self.running.start()
        yield
        if number == self.last and self.running is not None and self.done is not None:
            self.running.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / f"steps-{self.first:08d}-{self.last:08d}.json.gz"
            self.running.export_chrome_trace(str(file))
            self.running = None
            self.done(str(file))

    def close(self) -> None:
        """The run ends or goes back: a trace that is not whole is given up, which would grow otherwise."""
        if self.running is not None:
            self.running.stop()
            self.running = None
