"""The process group of a training's workers, as Ray Train makes it: their signs begin before it, and nobody waits for its end.

The workers meet at the addresses that Ray knows them by. gloo would take what the machine's name stands for, which many systems
say is 127.0.1.1. On a Ray that is on loopback alone, so are the group's listeners; torch's own would be on every interface.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from psutil import net_if_addrs
from ray.exceptions import RayError
from ray.train.torch import TorchConfig

from training.gang.ranks import on_machines, stacks
from training.gang.signs import begin

# Seconds that a collective operation waits. Greater than any step or checkpoint, as it is the last resort: who is dead or
# silent is found sooner, from the signs.
TIMEOUT = 900
# Seconds since its last sign of life, up to which a worker is asked for its stacks: a node that is lost would be waited for.
FRESH = 5.0

_Torch: Any = TorchConfig().backend_cls
# The server at which the workers meet, in the process of rank 0 and for as long as that lives.
_meeting: list[Any] = []


class _Group(_Torch):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """As Ray Train's, which has torch choose where rank 0 listens."""
        import ray

        worker_group.execute(begin, backend_config.board)
        place = worker_group.execute_single(0, _open)
        workers = len(worker_group)
        told = (backend_config.backend, place, workers, backend_config.timeout_s)
        ray.get([worker_group.execute_single_async(rank, _join, rank, *told) for rank in range(workers)])

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Of a group that has lost a worker, ask the others for their stacks, since all are killed next. Workers that wait for a
        dead one would be waited for; nobody does."""
        import ray

        status = worker_group.get_latest_poll_status()
        errors = status.errors if status is not None else {}
        # Ray Train's own say that a worker does not answer; what a worker raised has another class.
        if not any(type(error).__module__.startswith("ray.train") for error in errors.values()):
            return
        board = backend_config.board
        with suppress(RayError):
            heard = ray.get(board.heard.remote()).values()
            asked = [sign for sign, age in heard if sign.rank not in errors and age < FRESH]
            ray.get(board.tell.remote(on_machines(stacks, asked)))


def _open() -> tuple[str, int]:
    """Begin to listen for the other workers; returns where."""
    import ray
    from torch.distributed import TCPStore

    host = ray.util.get_node_ip_address()
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.create_server((host if ip_address(host).is_loopback else "", 0), family=kind)
    port = server.getsockname()[1]
    # torch takes the server that its process has on a port already.
    own = TCPStore(
        host, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=server.detach(), use_libuv=True
    )
    _meeting.append(own)
    return host, port


def _join(rank: int, backend: str, place: tuple[str, int], workers: int, timeout: int) -> None:
    """Meet the other workers and make the group.

    Raises:
        Lost: they could not be met, as when one has died on its way.
    """
    import ray
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    from training.gang.attempt import Lost, is_echo

    host, port = place
    own = ray.util.get_node_ip_address()
    os.environ.update({"MASTER_ADDR": host, "MASTER_PORT": str(port), **interfaces(own)})
    _set_torch_distributed_env_vars()
    try:
        _setup_torch_process_group(backend, rank, workers, "env://", timeout)
    except RuntimeError as error:
        if not is_echo(error):
            raise
        words = " ".join(str(error).split())
        raise Lost(f"rank {rank} on {own} could not meet the others, of which rank 0 is on {host}: {words}") from error


def interfaces(own: str) -> dict[str, str]:
    """Variables by which gloo, and on loopback NCCL, use the interface of a machine's own address; what a user has set stays."""
    found = next((name for name, all_ in net_if_addrs().items() if any(own == each.address for each in all_)), None)
    if ip_address(own).is_loopback:
        # Any of 127.0.0.0/8 is answered there, and one alone is listed.
        found = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        return {"GLOO_SOCKET_IFNAME": found, "NCCL_SOCKET_IFNAME": found}
    return {} if found is None or "GLOO_SOCKET_IFNAME" in os.environ else {"GLOO_SOCKET_IFNAME": found}


@dataclass
class GroupConfig(TorchConfig):
    """Ray Train's configuration of the group, and the board that its workers' signs go to."""

    board: Any = None
    timeout_s: int = TIMEOUT

    @property
    def backend_cls(self) -> Any:
        return _Group
