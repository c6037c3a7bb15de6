"""`python -m examples.little_web FOLDER`: build a little web there if there is none, and serve it until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from examples.little_web.build import build
from examples.little_web.server import LittleWeb


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.little_web", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    parser.add_argument("--rows", type=int, default=1000, help="links to make, where the folder has none yet")
    arguments = parser.parse_args()
    if not (arguments.folder / "held_out.parquet").is_file():
        build(arguments.folder, rows=arguments.rows)
    with LittleWeb(arguments.folder, arguments.port) as web:
        print(f"http://{web.address} serves {arguments.folder}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
