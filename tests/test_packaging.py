"""What people install: the wheel holds what the commands look for, and `make` names the Python that is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from pipelines.commands import demo
from unidiffuser.references import EMBEDDED

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    with ZipFile(built) as archive:
        return archive.namelist()


def test_a_wheel_holds_every_module_and_all_that_is_read_beside_them(wheel: list[str]) -> None:
    rooms = ("pipelines", "stages", "training", "unidiffuser", "infra", "examples")
    modules = {str(path.relative_to(ROOT)) for room in rooms for path in (ROOT / room).rglob("*.py")}
    assert len(modules) > 150 and modules <= set(wheel)
    encoders = {str(path.relative_to(ROOT)) for path in EMBEDDED.rglob("*") if path.is_file()}
    assert {str(demo.RECIPE.relative_to(ROOT)), "stages/runner/versions.json", *encoders} <= set(wheel)
    assert not [name for name in wheel if name.startswith(("tests/", "benchmarks/", "docs/"))]


def test_make_names_the_python_that_is_missing_in_a_line(tmp_path: Path) -> None:
    make, shell = shutil.which("make"), shutil.which("sh")
    assert make and shell
    (tmp_path / "sh").symlink_to(shell)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    for target in ("demo", "test"):
        result = subprocess.run(
            [make, target], cwd=tmp_path, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
        )
        assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
        assert "no Python 3.11 or 3.12 here: install python3.11 and python3.11-venv" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"Makefile", "requirements.lock", "pyproject.toml", "sh"}


SKIPPED = """
import pytest

def test_one(): pass

@pytest.mark.skipif(True, reason="no Chromium is installed")
@pytest.mark.parametrize("page", [1, 2])
def test_page(page): pass
"""


def test_a_run_without_a_browser_says_so_in_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_unconfigure\n")
    (tmp_path / "test_pages.py").write_text(SKIPPED)

    def last_line(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        result = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
        return result.stdout.splitlines()[-1]

    said = last_line()
    assert said.startswith("2 browser tests were skipped") and "`apt-get install chromium`" in said
    assert "browser" not in last_line("-k", "one")
