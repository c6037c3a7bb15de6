"""Nothing of ours runs what others have written: no pickle is opened, and weights are read as tensors alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("pipelines", "stages", "training", "unidiffuser", "infra", "examples")
# Modules whose files can name code to run, and the one that speaks so with its own child through a pipe.
RUNNING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PIPE = "stages/shards/box.py"
# Calls that read such files, with what makes each of them harmless.
HARMLESS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", None),
    "numpy.load": ("allow_pickle", None),
}
NEVER = {"pd.read_pickle", "pandas.read_pickle", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system"}


def faults(path: str, source: str) -> Iterator[str]:
    """``FILE:LINE what`` for everything in a module that would run what a file says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if path != PIPE and RUNNING & {name.partition(".")[0] for name in named}:
                yield f"{path}:{node.lineno} imports {', '.join(named)}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in HARMLESS:
                setting, wanted = HARMLESS[called]
                if given.get(setting) != (str(wanted) if wanted is not None else None):
                    yield f"{path}:{node.lineno} calls {called} with {setting}={given.get(setting)}"
            elif called in NEVER or (called == "yaml.load" and "Loader" not in given and len(node.args) < 2):
                yield f"{path}:{node.lineno} calls {called}"


def test_no_module_runs_what_a_file_says() -> None:
    sources = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    found = [fault for path in sources for fault in faults(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))]
    assert found == [] and len(sources) > 200


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "pd.read_pickle(file)",
        "yaml.load(text)",
        "eval(text)",
    ],
)
def test_such_a_line_is_found(line: str) -> None:
    assert len(list(faults("stages/new.py", line))) == 1


def test_harmless_lines_are_none() -> None:
    for line in ("torch.load(file, weights_only=True)", "np.load(file)", "yaml.load(text, _Loader)", "model.eval()"):
        assert list(faults("stages/new.py", line)) == []
