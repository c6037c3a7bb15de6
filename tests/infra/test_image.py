"""infra/Dockerfile without Docker: its steps run with a `uv` that only notes what it is asked for; the lock holds it all."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "infra" / "Dockerfile").read_text(encoding="utf-8")
# A package may have a version a Python.
PINS = re.findall(r"^([a-z0-9-]+)==([^ \\]+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
LOCKED = dict(PINS)


def instructions() -> list[tuple[str, str]]:
    """Each instruction with its argument; lines that go on are one, comments are none."""
    lines = [line for line in TEXT.splitlines() if not line.startswith("#")]
    whole = re.split(r"(?<!\\)\n", "\n".join(lines))
    return [(name, argument) for name, _, argument in (line.partition(" ") for line in whole if line.strip())]


def packages_step() -> str:
    (step,) = [argument for name, argument in instructions() if name == "RUN" and "--require-hashes --constraints" in argument]
    return step


def extras() -> list[str]:
    return re.findall(r"--extra ([a-z]+)", packages_step())


def test_the_base_has_an_exact_tag_and_a_digest_that_only_the_builder_knows() -> None:
    images = [argument for name, argument in instructions() if name == "FROM"]
    (outer,) = [image for image in images if "base" not in image.split()[0]]
    assert re.fullmatch(r"\w+:\d+\.\d+\.\d+-[\w-]+\$\{DIGEST\} AS base", outer), outer
    assert ("ARG", "DIGEST=") in instructions() and not re.search(r"sha256:[0-9a-f]{8}", TEXT)


def test_it_runs_as_a_numbered_user_that_is_not_root_and_has_what_deepspeed_and_kuberay_ask_for() -> None:
    names = [name for name, _ in instructions()]
    users = [argument for name, argument in instructions() if name == "USER"]
    assert users == ["1000"] and "ENTRYPOINT" not in names and "CMD" not in names
    assert "--uid 1000" in TEXT
    (system,) = [argument for name, argument in instructions() if name == "RUN" and "apt-get install" in argument]
    assert {"g++", "wget"} <= set(system.split()) and "ninja" in LOCKED


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment whose `uv` notes its arguments, a call a line, beside the files that the step finds."""
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "bin" / "uv"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\nprintf "%s " "$@" >> "{tmp_path}/asked"\necho >> "{tmp_path}/asked"\n')
    fake.chmod(0o755)
    yield {"PATH": f"{fake.parent}:{os.environ['PATH']}"}


def run_step(step: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", step], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_cuda_is_the_lock_as_it_stands_and_a_cpu_has_its_own_torch_of_the_same_version(
    tmp_path: Path, asked: dict[str, str]
) -> None:
    calls = {}
    for accelerator in ("cuda", "cpu"):
        result = run_step(packages_step(), tmp_path, {**asked, "ACCELERATOR": accelerator})
        assert result.returncode == 0, result.stderr
        calls[accelerator] = (tmp_path / "asked").read_text().splitlines()
        (tmp_path / "asked").unlink()
    (whole,) = calls["cuda"]
    assert whole.startswith("pip install --require-hashes --constraints requirements.lock --requirements pyproject.toml ")
    rest, torch = calls["cpu"]
    assert rest.startswith(whole.rstrip()) and "--excludes without" in rest
    assert (tmp_path / "without").read_text().split() == ["torch", "torchvision"]
    assert torch.split() == [
        "pip", "install", "--torch-backend", "cpu", "--no-deps",
        f"torch=={LOCKED['torch']}", f"torchvision=={LOCKED['torchvision']}",
    ]  # fmt: skip


def test_another_accelerator_is_refused_in_a_line(tmp_path: Path, asked: dict[str, str]) -> None:
    result = run_step(packages_step(), tmp_path, {**asked, "ACCELERATOR": "tpu"})
    assert (result.returncode, result.stderr) == (2, "ACCELERATOR=tpu: expected cuda or cpu\n")
    assert not (tmp_path / "asked").exists()


def installed() -> set[str]:
    """What the image's extras need, by the metadata of what is installed here, without what only other systems have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    told = [*project["dependencies"], *(line for extra in extras() for line in project["optional-dependencies"][extra])]
    waiting, found = [(Requirement(line), "") for line in told], set[tuple[str, str]]()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for own in ("", *requirement.extras):
            if (key := (canonicalize_name(requirement.name), own)) not in found:
                found.add(key)
                try:
                    waiting += [(Requirement(line), own) for line in requires(requirement.name) or ()]
                except PackageNotFoundError:
                    continue
    return {name for name, _ in found}


@pytest.mark.skipif(version("torch") != LOCKED["torch"], reason="other versions than the lock's need other packages")
def test_every_package_of_the_image_is_in_the_lock_and_none_that_only_develops() -> None:
    found = installed() - {"dataclasses"}  # which pyproject.toml overrides
    assert len(found) > 150 and found <= set(LOCKED), sorted(found - set(LOCKED))
    assert {"prefect-kubernetes", "prefect-docker", "deepspeed", "ray"} <= found
    assert not found & {"pytest", "ruff", "mypy", "moto", "playwright", "coverage", "zensical", "kubernetes-validate"}


@pytest.mark.slow
def test_the_real_uv_takes_the_step_and_gives_the_versions_of_the_lock(tmp_path: Path) -> None:
    """It asks the registry and installs nothing."""
    uv = shutil.which("uv") or next(iter(map(str, ROOT.glob(".uv/bin/uv"))), "")
    assert uv, "make setup brings one"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(tmp_path / "venv")], check=True)
    wrapper = tmp_path / "bin" / "uv"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nshift 2\nexec "{uv}" pip install --dry-run --python "{tmp_path}/venv/bin/python" "$@"\n')
    wrapper.chmod(0o755)
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {**os.environ, "PATH": f"{wrapper.parent}:{os.environ['PATH']}", "ACCELERATOR": "cuda"}
    result = run_step(packages_step(), tmp_path, environment)
    assert result.returncode == 0, result.stderr
    would = re.findall(r"^ \+ ([a-z0-9-]+)==(\S+)", result.stderr, re.MULTILINE)
    assert set(would) <= set(PINS) and len(would) > 150
    assert not set(dict(would)) & {"pytest", "ruff", "mypy", "moto", "playwright", "coverage", "zensical", "kubernetes-validate"}
