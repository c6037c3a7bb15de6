"""``python -m infra.hashed``: sha256 of local files in a process of its own, for Python opens small files one after the other.

In comes a JSON list of paths. Out comes ``[digests, null]``, or ``[[], [number, errno, text]]`` of a file that cannot be read. It
imports nothing that takes time.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys

Answer = tuple[list[str], tuple[int, OSError] | None]


def hashed(paths: list[str]) -> Answer:
    """Hex digests of files; or the number of one that cannot be read, and why."""
    found = []
    for number, path in enumerate(paths):
        try:
            with open(path, "rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            return [], (number, error)
    return found, None


def hashed_apart(paths: list[str]) -> Answer:
    """`hashed` in another process."""
    command = [sys.executable, "-m", __spec__.name]
    done = subprocess.run(command, input=json.dumps(paths), stdout=subprocess.PIPE, text=True, check=True)
    digests, refused = json.loads(done.stdout)
    return digests, (refused[0], OSError(*refused[1:], paths[refused[0]])) if refused else None


if __name__ == "__main__":
    # Ctrl-C ends it without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _digests, _refused = hashed(json.load(sys.stdin))
    print(json.dumps([_digests, _refused and [_refused[0], _refused[1].errno, _refused[1].strerror]]))
