"""The embedded Prefect server: on loopback, with its database and UI files in the state folder, for as long as a command runs."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from infra.processes import Server, free_port, recorded, spawn, stop, wait_until_ready

START_SECONDS = 300.0


def configured_api() -> str | None:
    """The Prefect API that the user named (PREFECT_API_URL), or None for the embedded server."""
    return os.environ.get("PREFECT_API_URL") or None


def prefect_environment(state: Path, address: str) -> dict[str, str]:
    """Settings for a client or server of the embedded kind; they leave the user's own ~/.prefect alone."""
    home = state / "prefect"
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # Without this, starting the server writes into site-packages.
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "ui"),
    }


def start_prefect(state: Path) -> Server:
    """The embedded server: the one that survived an earlier command if it answers, else a new one on a free port.

    A new one is still on its way up: `wait_for_prefect` before use.
    """
    found = recorded("prefect", state)
    if found is not None:
        if answers(found.address):
            return found
        stop(found, state)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    # Blocks are a feature that nothing here uses; registering them costs a second of every start.
    environment = {**os.environ, **prefect_environment(state, address), "PREFECT_API_BLOCKS_REGISTER_ON_START": "false"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    (state / "prefect").mkdir(parents=True, exist_ok=True)
    return spawn("prefect", command, environment, state, address=address)


def wait_for_prefect(server: Server, state: Path) -> None:
    """Wait until the server answers.

    Raises:
        ServerError: it does not come up; the message holds the last line of its log.
    """
    wait_until_ready(server, lambda: answers(server.address), state, START_SECONDS)


def answers(address: str) -> bool:
    """Whether a Prefect server at `address` (without /api) is healthy."""
    try:
        with urllib.request.urlopen(f"{address}/api/health", timeout=2) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False
