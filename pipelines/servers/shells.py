"""What uses the servers that are up: other shells, by their variables, and systemd, which brings them back after a reboot."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path

from infra.prefect_server import credential_file
from infra.processes import running


def exports(state: Path, address: str) -> list[str]:
    """Lines for a shell whose `prefect`, `ray` and Python talk to the embedded servers; secrets stay in files of their owner."""
    lines = []
    prefect, ray = running("prefect", state), running("ray", state)
    if prefect is not None and prefect.address == address:
        lines.append(f"export PREFECT_API_URL={address}/api")
        lines.append(f"export PREFECT_API_AUTH_STRING=$(cat {shlex.quote(str(credential_file(state).resolve()))})")
    if ray is not None and ray.token is not None:
        lines.append(f"export RAY_ADDRESS={ray.address}")
        lines.append("export RAY_AUTH_MODE=token")
        lines.append(f"export RAY_AUTH_TOKEN_PATH={shlex.quote(str(_token_file(state, ray.token)))}")
    return lines


def _token_file(state: Path, token: str) -> Path:
    """A file of mode 0600 with Ray's token, which is another one after every start."""
    target = (state / "ray.token").resolve()
    descriptor, part = tempfile.mkstemp(dir=state)
    with os.fdopen(descriptor, "w") as file:
        file.write(token)
    os.replace(part, target)
    return target


def systemd_unit(store: str, pool: str, port: int | None) -> str:
    """A user unit that runs `unidiffuser up` when the machine starts, and `down` when it stops."""
    command = [str(Path(sys.executable).with_name("unidiffuser"))]
    up = [*command, "up", "--store", store, "--pool", pool, *(["--port", str(port)] if port else [])]
    down = [*command, "down", "--store", store]
    return f"""\
# Save it as ~/.config/systemd/user/unidiffuser.service, then:
#   systemctl --user enable --now unidiffuser
#   loginctl enable-linger    (or it starts when you log in, and not with the machine)
[Unit]
Description=unidiffuser: Prefect, a worker and Ray
After=network.target

[Service]
Type=oneshot
RemainAfterExit=yes
WorkingDirectory={_escaped(os.getcwd())}
ExecStart={_line(up)}
ExecStop={_line(down)}
TimeoutStartSec=600
TimeoutStopSec=180

[Install]
WantedBy=default.target
"""


def _line(words: list[str]) -> str:
    """A command as systemd reads it: quoted words, in which a dollar and a percent sign are doubled."""
    return " ".join(_quoted(word) for word in words)


def _quoted(word: str) -> str:
    text = _escaped(word).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{text}"' if text != word or " " in word else word


def _escaped(text: str) -> str:
    return text.replace("%", "%%")
