"""The rooms' rules: which may import which, and that a stage's code does not change without a new version."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from stages.catalog import STAGES
from stages.runner import versions

ROOT = Path(__file__).parent.parent
BELOW = {
    "pipelines": {"stages", "training", "unidiffuser", "infra", "examples"},
    "stages": {"training", "unidiffuser", "infra", "examples"},
    "training": {"unidiffuser", "infra"},
    "unidiffuser": set(),
    "infra": set(),
    "examples": {"training", "unidiffuser", "infra"},
}
STAGE_FOLDERS = {"select", "download", "folder", "filter", "encode", "train", "evaluate", "world"}
FORBIDDEN = {
    "stages": {"prefect"},
    "training": {"prefect"},
    "unidiffuser": {"ray", "prefect", "deepspeed"},
    "infra": {"torch"},
}


# Inside the stages' room: which folders a folder may import besides itself. The catalog is names, not stages.
PARTS = {
    "runner": {"catalog"},
    "shards": {"runner"},
    "drawing": {"shards", "runner"},
    "measuring": {"shards", "drawing", "runner", "catalog"},
    **dict.fromkeys(STAGE_FOLDERS, {"shards", "drawing", "measuring", "runner"}),
}


def modules_imported(path: Path) -> set[str]:
    """Dotted names of what a file imports anywhere, functions included; of ``from a import b`` both ``a`` and ``a.b``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, functions included."""
    return {name.split(".")[0] for name in modules_imported(path)}


@pytest.mark.parametrize("room", BELOW)
def test_imports_point_downwards(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        wrong = imported(path) & ((BELOW.keys() - BELOW[room] - {room}) | FORBIDDEN.get(room, set()))
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_every_folder_of_the_stages_has_its_arrows():
    folders = {path.parent.name for path in (ROOT / "stages").glob("*/*.py")}
    assert folders == PARTS.keys()
    assert {reference.split(".")[1] for reference in STAGES.values()} == STAGE_FOLDERS


@pytest.mark.parametrize("part", PARTS)
def test_a_stage_imports_no_other_stage(part):
    others = {path.stem for path in (ROOT / "stages").iterdir()} - {"__init__", part} - PARTS[part]
    for path in (ROOT / "stages" / part).rglob("*.py"):
        wrong = {name.split(".")[1] for name in modules_imported(path) if name.startswith("stages.")} & others
        assert not wrong, f"{path.relative_to(ROOT)} imports stages.{', stages.'.join(sorted(wrong))}"


def _modules(*folder: str) -> Iterable[Path]:
    return ROOT.joinpath(*folder).glob("[!_]*.py")


def test_commands_import_no_prefect():
    """Not even through what they import: a hit, `status` or `sample` must not pay a second for it."""
    names = [
        f"pipelines.{folder}.{path.stem}" for folder in ("cli", "commands", "planning") for path in _modules("pipelines", folder)
    ]
    assert names
    code = f"import sys, {', '.join(names)}; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_ray_only_launches_in_the_training_room():
    users = [path.name for path in (ROOT / "training").glob("*.py") if "ray" in imported(path)]
    assert sorted(users) == ["board.py", "launch.py"]


def test_stage_code_does_not_change_without_a_new_version():
    assert versions.problems() == []


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of select's sources, which `versions` then looks at."""
    copy = tmp_path / "project"
    for path in versions.sources("select"):
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text(encoding="utf-8"))
    monkeypatch.setattr(versions, "ROOT", copy)
    return copy


def test_a_change_of_code_is_noticed_and_one_of_comments_is_not(project):
    before = versions.code_digest("select")
    stage = project / "stages" / "select" / "stage.py"
    original = stage.read_text()
    stage.write_text("# a comment\n" + original)
    assert versions.code_digest("select") == before
    stage.write_text(original + "\nCHANGED = 1\n")
    assert versions.code_digest("select") != before


def test_a_waiver_keeps_the_version_and_is_written_down_with_its_reason(tmp_path, monkeypatch, capsys):
    record = tmp_path / "versions.json"
    record.write_text(versions.RECORD.read_text(encoding="utf-8"), encoding="utf-8")
    known = json.loads(record.read_text(encoding="utf-8"))
    known["select"]["digest"] = "0" * 64
    record.write_text(json.dumps(known), encoding="utf-8")
    monkeypatch.setattr(versions, "RECORD", record)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["versions", *arguments])
        return versions.main()

    assert run() == 1 and "select" in capsys.readouterr().out
    assert run("--waive", "select", "a loop was unrolled") == 0 and capsys.readouterr().out == ""
    found = json.loads(record.read_text(encoding="utf-8"))
    assert found["select"]["version"] == known["select"]["version"]
    assert found["select"]["waivers"] == [*known["select"]["waivers"], "a loop was unrolled"]


def test_code_that_only_moves_keeps_its_digest(project):
    before = versions.code_digest("select")
    (project / "stages" / "a_first_room").mkdir()
    (project / "stages" / "select" / "presets.py").rename(project / "stages" / "a_first_room" / "thresholds.py")
    stage = project / "stages" / "select" / "stage.py"
    stage.write_text(stage.read_text().replace("from stages.select.presets import", "from stages.a_first_room.thresholds import"))
    assert project / "stages" / "a_first_room" / "thresholds.py" in versions.sources("select")
    assert versions.code_digest("select") == before


def test_the_sources_of_a_stage_include_what_it_imports():
    names = {str(path.relative_to(ROOT)) for path in versions.sources("train")}
    assert {"stages/train/stage.py", "training/loop.py", "unidiffuser/uvit.py", "unidiffuser/objective.py"} <= names
    assert not [name for name in names if name.startswith(versions.MACHINERY)]
