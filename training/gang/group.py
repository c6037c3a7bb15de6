"""The process group of a training's workers, as Ray Train makes it: their signs begin before it, and nobody waits for its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig

from training.gang.signs import begin

# Seconds that a collective operation waits. Greater than any step or checkpoint, as it is the last resort: who is dead or
# silent is found sooner, from the signs.
TIMEOUT = 900

_Torch: Any = TorchConfig().backend_cls


class _Group(_Torch):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(begin, backend_config.board)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Workers that wait for a dead one would be waited for; all are killed anyway."""


@dataclass
class GroupConfig(TorchConfig):
    """Ray Train's configuration of the group, and the board that its workers' signs go to."""

    board: Any = None
    timeout_s: int = TIMEOUT

    @property
    def backend_cls(self) -> Any:
        return _Group
