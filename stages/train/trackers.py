"""TensorBoard, trackio, Weights & Biases and MLflow as one thing: a run that takes the rows of a history, and says how far it is.

Each comes with its own package, an extra of the project by its name. Whom a tracker sends to, and with which key, its own
environment variables say, such as WANDB_API_KEY, WANDB_MODE=offline, MLFLOW_TRACKING_URI or TRACKIO_SPACE_ID. Unless these name a
server, it writes into a folder on the store.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from infra.store import Store, StoreError

Name = Literal["tensorboard", "trackio", "wandb", "mlflow"]


@dataclass(frozen=True)
class Place:
    """Whose rows they are, and where a tracker may write: `folder` is a path in the store, `key` tells the run from others."""

    store: Store
    folder: str
    recipe: str
    node: str
    key: str
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """A name for people, of which there is one in a recipe."""
        return f"{self.node}-{self.key[:8]}"

    def local(self, otherwise: str) -> Path:
        """The folder as one of this machine. Raises StoreError, with what to set instead, where the store is elsewhere."""
        if not self.store.local:
            raise StoreError(f"the store is not on this machine: set {otherwise}")
        path = Path(self.store.url(self.folder))
        path.mkdir(parents=True, exist_ok=True)
        return path


class Reached(NamedTuple):
    """Where in a run a row stands: a rollback takes steps once more, whose rows are later than those before."""

    rollbacks: int
    step: int


NOTHING = Reached(0, -1)


class Tracker(Protocol):
    """A run of one tracker; made anew for the same place, it goes on with the same run."""

    def __init__(self, place: Place) -> None: ...

    def reached(self, kind: str) -> Reached:
        """The last row of a kind that it holds; `NOTHING` for none."""
        ...

    def give_up(self, step: int) -> None:
        """The run went back: rows from this step on that it holds are of steps that are taken once more. It forgets them if it
        can; else it holds both, with other `rollbacks`."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Take a row of a kind that is later than all before; it stays when this process dies."""
        ...

    def close(self) -> None: ...


def named(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{kind}/{name}": value for name, value in values.items()}


class TensorBoard:
    def __init__(self, place: Place) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = place.store.url(f"{place.folder}/tensorboard/{place.name}")
        self.held = self._held()
        self.writer = SummaryWriter(self.folder)

    def _held(self) -> dict[str, Reached]:
        from tensorboard.backend.event_processing.directory_watcher import DirectoryDeletedError
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        # Of each tag, the newest event is all that is asked for, whatever was given up before it.
        events = EventAccumulator(self.folder, size_guidance={"scalars": 1}, purge_orphaned_data=False)
        try:
            events.Reload()
        except DirectoryDeletedError:
            return {}
        newest = {tag: events.Scalars(tag)[-1] for tag in events.Tags()["scalars"]}
        kinds = [tag.removesuffix("/loss") for tag in newest if tag.endswith("/loss")]
        backs = {kind: newest.get(f"{kind}/rollbacks") for kind in kinds}
        return {kind: Reached(int(back.value) if back else 0, newest[f"{kind}/loss"].step) for kind, back in backs.items()}

    def reached(self, kind: str) -> Reached:
        return self.held.get(kind, NOTHING)

    def give_up(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer.close()
        self.writer = SummaryWriter(self.folder, purge_step=step)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in named(kind, values).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class MLflow:
    def __init__(self, place: Place) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import RunStatus

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{place.local('MLFLOW_TRACKING_URI') / 'mlflow.db'}"
        self.client = MlflowClient(uri)
        experiment = self.client.get_experiment_by_name(place.recipe)
        number = experiment.experiment_id if experiment is not None else self.client.create_experiment(place.recipe)
        tag = "unidiffuser.run"
        found = self.client.search_runs([number], f"tags.`{tag}` = '{place.name}'", max_results=1)
        if found:
            self.run = found[0].info.run_id
            self.client.update_run(self.run, RunStatus.to_string(RunStatus.RUNNING))
        else:
            self.run = self.client.create_run(number, run_name=place.name, tags={tag: place.name}).info.run_id

    def reached(self, kind: str) -> Reached:
        backs = (metric.value for metric in self.client.get_metric_history(self.run, f"{kind}/rollbacks"))
        rows = [(metric.timestamp, metric.step) for metric in self.client.get_metric_history(self.run, f"{kind}/loss")]
        return Reached(int(max(backs, default=0)), max(rows)[1]) if rows else NOTHING

    def give_up(self, step: int) -> None: ...

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run, [Metric(name, value, now, step) for name, value in named(kind, values).items()])

    def close(self) -> None:
        self.client.set_terminated(self.run)


class Noted:
    """How far a run is that cannot be asked, as it may be offline: a file on the store, written after each row."""

    def __init__(self, place: Place, name: Name) -> None:
        self.store, self.path = place.store, f"{place.folder}/{name}-{place.name}.json"
        self.rows: dict[str, list[int]] = self.store.read_json(self.path) if self.store.exists(self.path) else {}

    def reached(self, kind: str) -> Reached:
        return Reached(*self.rows.get(kind, NOTHING))

    def give_up(self, step: int) -> None: ...

    def note(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self.rows[kind] = [int(values.get("rollbacks", 0)), step]
        self.store.write_json(self.path, self.rows)


class Wandb(Noted):
    def __init__(self, place: Place) -> None:
        import wandb

        super().__init__(place, "wandb")
        # What is in the folder is sent to the server, unless it is offline: there it is the run.
        folder = place.local("WANDB_DIR") if "WANDB_DIR" not in os.environ else None
        quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        self.run = wandb.init(
            project=place.recipe, id=f"{place.node}-{place.key}", name=place.name, dir=folder, resume="allow",
            config=dict(place.config), settings=quiet,
        )  # fmt: skip
        for kind in ("train", "validation"):
            self.run.define_metric(f"{kind}/*", step_metric="step")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **named(kind, values)})
        self.note(kind, step, values)

    def close(self) -> None:
        self.run.finish()


class Trackio(Noted):
    def __init__(self, place: Place) -> None:
        super().__init__(place, "trackio")
        if not {"TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & set(os.environ):
            # Its home otherwise is the user's cache; it is read when the package is imported.
            os.environ["TRACKIO_DIR"] = str(place.local("TRACKIO_SPACE_ID or TRACKIO_SERVER_URL") / "trackio")
        import trackio

        self.run = trackio.init(
            project=place.recipe, name=place.name, config=dict(place.config), resume="allow", embed=False, auto_log_gpu=False,
            auto_log_cpu=False,
        )  # fmt: skip

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log(named(kind, values), step=step)
        self.note(kind, step, values)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[Name, type[Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb, "mlflow": MLflow}


def not_installed(names: tuple[Name, ...]) -> str | None:
    """What is wrong with a choice of trackers, in a line: one whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            return f"track names {name}, which is not installed: pip install 'unidiffuser[{name}]'"
    return None
