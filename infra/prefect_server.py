"""The embedded Prefect server, on loopback with its database and UI files in the state folder, and the worker beside it."""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path

from infra.loopback import open_url, warn_of_clear_text
from infra.processes import Server, ServerError, free_port, locked, recorded, running, spawn, stop, wait_until_ready
from infra.queries import without_user

START_SECONDS = 300.0
# How long a server of the user's own may take to answer, in seconds.
ANSWER_SECONDS = 8.0
# How often a flow says that it is alive; the least that Prefect takes.
HEARTBEAT_SECONDS = 30
# Where the embedded server signs a browser in, with the credential as the fragment: browsers send that part to no server.
SIGN_IN = "/sign-in"
WORKER = f"unidiffuser on {socket.gethostname()}"


def configured_api() -> str | None:
    """The Prefect API that the user named (PREFECT_API_URL), or None for the embedded server.

    Raises:
        ServerError: the address holds a password.
    """
    address = os.environ.get("PREFECT_API_URL") or None
    if address is not None and without_user(address) != address:
        raise ServerError(
            "PREFECT_API_URL holds a password, which would be shown; set PREFECT_API_AUTH_STRING=USER:PASSWORD instead"
        )
    return address


def check_api(api: str) -> None:
    """Ask a Prefect server of the user's own for its version, with the key that Prefect's client would send.

    Raises:
        ServerError: it does not answer, refuses the key, is older than the client here, or of another major version.
    """
    headers = {}
    if pair := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    elif key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{api.rstrip('/')}/admin/version", headers=headers)
    try:
        with open_url(request, timeout=ANSWER_SECONDS) as reply:
            theirs = str(json.loads(reply.read()))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            what = "refuses the key" if headers else "asks for a key, and there is none here"
            raise ServerError(
                f"the Prefect server at {api} {what}; set PREFECT_API_KEY, or PREFECT_API_AUTH_STRING, to a valid one"
            ) from None
        # A hosted one does not tell its version.
        return
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ServerError(f"no Prefect server answers at {api} ({reason}); start it, or unset PREFECT_API_URL") from None
    if headers:
        warn_of_clear_text(api, "the key of Prefect")
    ours = version("prefect")
    if _minor(theirs)[0] != _minor(ours)[0]:
        raise ServerError(
            f"the Prefect server at {api} is {theirs}, here it is {ours}; name a server of version {_minor(ours)[0]} in "
            "PREFECT_API_URL, or unset it"
        )
    if _minor(theirs) < _minor(ours):
        raise ServerError(
            f"the Prefect server at {api} is {theirs}, here it is {ours}; a server must not be older than its clients"
        )


def _minor(text: str) -> list[int]:
    return [int(part) for part in text.split(".")[:2]]


def credential(state: Path) -> str:
    """What the embedded server of a state folder asks for, as `user:password`; the same for as long as the folder is there.

    Workers, running flows and browsers keep it over a restart of the server. Only its owner can read it.
    """
    path = credential_file(state)
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    with locked(folder / "credential.lock"):
        if not path.exists():
            # A new file of mode 0600, which gets its name when it is whole.
            descriptor, part = tempfile.mkstemp(dir=folder)
            with os.fdopen(descriptor, "w") as file:
                file.write(f"unidiffuser:{secrets.token_urlsafe(32)}")
            os.replace(part, path)
    return path.read_text()


def credential_file(state: Path) -> Path:
    return state / "prefect" / "credential"


def prefect_environment(state: Path, address: str) -> dict[str, str]:
    """Settings for a client or server of the embedded kind; they leave the user's own ~/.prefect alone."""
    home = state / "prefect"
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_API_AUTH_STRING": credential(state),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # Without this, starting the server writes into site-packages.
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "ui"),
        # In memory, leases are lost with the server: runs that hold one die then, and slots of dead ones stay taken for ever.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # How soon a run that waits for another one of its recipe looks again; half a minute by default.
        "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
    }


def start_prefect(state: Path, wanted: int | None = None) -> Server:
    """The embedded server: the one that survived an earlier command if it answers, else a new one.

    A new one is still on its way up: `wait_for_prefect` before use.

    Args:
        wanted: the port, from now on; else the one that the server had last, if that is free.

    Raises:
        ServerError: another program has the wanted port, or the server is up on another one.
    """
    found, token = recorded("prefect", state), credential(state)
    if found is not None:
        # One of an older release lets everybody in.
        if found.token == token and answers(found.address):
            if wanted is not None and not found.address.endswith(f":{wanted}"):
                raise ServerError(f"the Prefect server is up at {found.address}; `unidiffuser down` first, or leave out --port")
            return found
        stop(found, state)
    port = _port(state, wanted)
    address = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        **prefect_environment(state, address),
        "PREFECT_SERVER_API_AUTH_STRING": token,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": address,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        # Whichever of its names the browser knows the server by, the UI asks that one.
        "PREFECT_SERVER_UI_API_URL": "/api",
        # Nothing here needs the types of all blocks that there are; to register them costs a second of every start, and to look
        # whether they have been, two more: every integration that is installed is imported for it.
        "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
        "PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
    }
    # -P: a folder `infra` where the command was given is not ours.
    command = [sys.executable, "-P", "-m", "infra.prefect_app", "127.0.0.1", str(port)]
    return spawn("prefect", command, environment, state, address=address, token=token)


def _port(state: Path, wanted: int | None) -> int:
    """A port that stays the same, so that bookmarks, workers and running flows find the server again.

    While another program has it, a server goes without: on any other port, and the next one tries again.
    """
    usual = usual_port(state)
    port = free_port(wanted or usual or 0)
    if wanted is not None and port != wanted:
        raise ServerError(f"port {wanted} is taken by another program; stop that one, or give another --port")
    if wanted is not None or usual is None:
        _port_file(state).write_text(str(port))
    return port


def usual_port(state: Path) -> int | None:
    """The port of the embedded server, from day to day; None before its first start."""
    file = _port_file(state)
    return int(file.read_text()) if file.exists() else None


def _port_file(state: Path) -> Path:
    return state / "prefect" / "port"


def wait_for_prefect(server: Server, state: Path) -> None:
    """Wait until the server answers.

    Raises:
        ServerError: it does not come up; the message holds the last line of its log.
    """
    wait_until_ready(server, lambda: answers(server.address), state, START_SECONDS)


def answers(address: str) -> bool:
    """Whether a Prefect server at `address` (without /api) is healthy."""
    try:
        with open_url(urllib.request.Request(f"{address}/api/health"), timeout=2) as reply:
            return bool(reply.status == 200)
    # Another program may have taken the port, and answer in a language of its own.
    except (OSError, HTTPException):
        return False


def start_worker(state: Path, address: str, pool: str) -> tuple[Server, bool]:
    """A worker that runs the flows of a process pool as child processes, and whether it is a new one.

    The one that an earlier command left is kept if it serves the same pool of the same API with the same credential. Flows that a
    dead one has left go on.
    """
    serves = f"{address}/v2/work-pools/work-pool/{pool}"
    found = running("worker", state)
    token = os.environ.get("PREFECT_API_AUTH_STRING")
    if found is not None:
        if found.address == serves and found.token == token:
            return found, False
        stop(found, state)
    environment = {
        **os.environ,
        "PREFECT_API_URL": f"{address}/api",
        # A flow looks for this machine's servers where this command did, whatever folder it runs in.
        "UNIDIFFUSER_STATE": str(state.parent.resolve()),
        # Look often, and take a run when its time has come, not before: one that waits for another would be taken in vain.
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_WORKER_PREFETCH_SECONDS": "1",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
    }
    command = [
        sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", WORKER,
    ]  # fmt: skip
    return spawn("worker", command, environment, state, address=serves, token=token), True
