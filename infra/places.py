"""What a configured cluster can see of this machine's files: nothing, but for folders that are said to be everywhere."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from infra.loopback import is_loopback
from infra.processes import ServerError
from infra.ray_cluster import configured_ray
from infra.ray_jobs import RayJobs, user_token

# Folders that every machine has at the same path, such as those of a shared file system or of the image; as PATH has them.
SHARED = "UNIDIFFUSER_SHARED"
FIX = f"or name its folder in {SHARED} if every machine has it there"


def elsewhere() -> str | None:
    """The address of the configured cluster, if work on it may be done by another machine than this one.

    A forwarded port and the head of a cluster are reached by this machine's own address.
    """
    address = configured_ray()
    if address is None or not is_loopback(address):
        return address
    try:
        here = RayJobs(address, user_token()).works_on([socket.gethostname()])
    except ServerError:
        # Whether the cluster answers at all is asked when it is needed.
        return None
    return None if here else address


def is_everywhere(path: str) -> bool:
    """Whether every machine has this file or folder, by what the user says.

    Example:
        >>> os.environ["UNIDIFFUSER_SHARED"] = "/shared:/models"
        >>> is_everywhere("/shared/runs"), is_everywhere("/sharedruns")
        (True, False)
    """
    folders = [Path(folder).resolve() for folder in os.environ.get(SHARED, "").split(os.pathsep) if folder]
    return any(Path(path).expanduser().resolve().is_relative_to(folder) for folder in folders)
