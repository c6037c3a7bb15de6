"""`python -m website`: see the package's docstring."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from website.pages import DOCS, ROOT, SiteError

SITE = ROOT / "runs" / "site"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m website", description="Build the site, check it, and run what it says.")
    actions = parser.add_subparsers(dest="action", required=True)
    building = actions.add_parser("build", help="the pages as HTML that needs no network, with every link checked")
    building.add_argument("--out", type=Path, default=SITE, help="a folder, which is emptied")
    walking = actions.add_parser("walk", help="run the commands of pages in a clone of their own, and the notebook")
    walking.add_argument("pages", nargs="*", help="such as README.md#on-your-own-data; all, in their order, when none is named")
    walking.add_argument("--fresh", action="store_true", help="install in the clone, as a stranger does")
    walking.add_argument("--json", type=Path, help="keep what ran and how long it took here")
    actions.add_parser("leaderboard", help="docs/results/leaderboard.md from the results beside it")
    actions.add_parser("llms", help="llms.txt, the list of pages for machines that read")
    arguments = parser.parse_args()
    try:
        return {"build": _build, "walk": _walk, "leaderboard": _leaderboard, "llms": _llms}[arguments.action](arguments)
    except SiteError as error:
        print(error, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode


def _build(arguments: argparse.Namespace) -> int:
    from website.build import build
    from website.links import broken

    html = build(arguments.out)
    found = broken(html)
    print("\n".join(found) or f"{html / 'index.html'}")
    return int(bool(found))


def _walk(arguments: argparse.Namespace) -> int:
    from website.walk import walk

    return walk(arguments.pages, arguments.fresh, arguments.json)


def _leaderboard(_: argparse.Namespace) -> int:
    from website.leaderboard import PAGE, enter, page

    (DOCS / "results" / PAGE).write_text(page(enter(DOCS / "results")), encoding="utf-8")
    return 0


def _llms(_: argparse.Namespace) -> int:
    from website.build import gathered
    from website.llms import listing

    (ROOT / "llms.txt").write_text(listing(gathered(), repository=True), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
