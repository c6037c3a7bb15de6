"""``python -m infra.audit UV LOCK FOLDER``: what is known against the packages of a lock file, and the list of them all.

A list of parts in CycloneDX is written to FOLDER/sbom.cdx.json first. Then pip-audit asks the advisories of the package index.
Each tool has an environment of its own. An index that has no advisories, as many mirrors, says of every package that nothing is
known: so a release of which much is known is asked for first, and nothing that cannot be asked counts as clean.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

AUDIT = ("pip-audit>=2.9,<3", "pip-audit")
PARTS = ("cyclonedx-bom>=7,<8", "cyclonedx-py")
# Advisories of it are years old and stay.
KNOWN_BAD = "urllib3==1.24.1"


class Unknown(Exception):
    """The advisories could not be asked, or a tool failed; the message is what it said last."""


def run(uv: str, tool: tuple[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    package, command = tool
    return subprocess.run([uv, "tool", "run", "--from", package, command, *arguments], capture_output=True, text=True)


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode} and said nothing"]
    return re.sub(r"^ERROR:[\w.]+:", "", lines[-1])


def advisories(uv: str, requirements: Path, *settings: str) -> dict[str, list[str]]:
    """``NAME VERSION`` -> the advisories of each package that a file pins, those without any included.

    Raises:
        Unknown: not every package could be asked about.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        common = ("--strict", "--disable-pip", "--progress-spinner", "off", "--format", "json", "--output", str(answer))
        # It ends with 1 when it finds something, and when it fails.
        done = run(uv, AUDIT, *common, *settings, "--requirement", str(requirements))
        if not answer.is_file():
            raise Unknown(last_words(done))
        packages: list[dict[str, Any]] = json.loads(answer.read_text())["dependencies"]
    if skipped := [str(package["name"]) for package in packages if "vulns" not in package]:
        raise Unknown(f"{', '.join(skipped)} could not be asked about")
    return {f"{each['name']} {each['version']}": [told["id"] for told in each["vulns"]] for each in packages}


def check_answers(uv: str) -> None:
    """Whether the advisories answer at all.

    Raises:
        Unknown: they know nothing of a release of which much is known.
    """
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder, "known.txt")
        known.write_text(f"{KNOWN_BAD}\n")
        if not any(advisories(uv, known, "--no-deps").values()):
            raise Unknown(f"they know nothing of {KNOWN_BAD}, of which much is known")


def write_parts(uv: str, lock: Path, target: Path) -> None:
    """The packages of a lock file with their digests, in CycloneDX.

    Raises:
        Unknown: the tool failed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    done = run(uv, PARTS, "requirements", str(lock), "--output-format", "JSON", "--output-file", str(target))
    if done.returncode:
        raise Unknown(last_words(done))


def main(arguments: Sequence[str]) -> int:
    uv, lock, folder = arguments
    target = Path(folder, "sbom.cdx.json")
    try:
        write_parts(uv, Path(lock), target)
        print(f"{target}: the packages of {lock}")
    except Unknown as error:
        print(f"error: no list of parts: {error}", file=sys.stderr)
        return 1
    try:
        check_answers(uv)
        found = advisories(uv, Path(lock), "--require-hashes")
    except Unknown as error:
        print(f"error: nothing was audited, for the advisories cannot be asked: {error}", file=sys.stderr)
        return 1
    for package, told in found.items():
        if told:
            print(f"{package}: {', '.join(told)}")
    bad = sum(bool(told) for told in found.values())
    print(f"{len(found)} packages, {bad} with advisories")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
