"""A job keeps to what its run was planned with: files that come later are the next run's, another installation is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.dataset import find
from infra.external import resolve
from infra.queries import QUERIES, with_query
from infra.store import Store
from stages.__main__ import main
from stages.runner.graph import outside_of, plan, read_outside
from stages.runner.recipe import load_recipe
from tests.pipelines.conftest import ROWS, write_metadata
from tests.stages.hostile_web import hostile_web


def test_files_that_come_after_the_plan_are_the_next_runs(
    tmp_path: Path, store: Store, in_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("stages.__main__.connect_ray", lambda: None)
    write_metadata(tmp_path / "metadata" / "part-0.parquet")
    (tmp_path / "blocked.txt").write_text("http://pictures.example/3.png\n")
    recipe = tmp_path / "grows.yaml"
    select = "{metadata: [metadata/*.parquet], deny: [blocked.txt], deny_by: url}"
    recipe.write_text(f"name: grows\nsubsets:\n  a: {{select: {select}}}\n")
    early = plan(load_recipe(recipe), store)
    outside = tmp_path / "outside.parquet"
    outside.write_bytes(outside_of(early))
    assert outside_of(plan(load_recipe(recipe), store, outside=read_outside(outside.read_bytes()))) == outside_of(early)

    write_metadata(tmp_path / "metadata" / "part-1.parquet", first=ROWS)
    fingerprint = early["a-select"].fingerprint
    arguments = [str(recipe), "a-select", "--store", store.root, "--expect", fingerprint]
    assert main(arguments) == 1
    refusal = capsys.readouterr().out.strip()
    assert f"planned as {fingerprint}, but here its fingerprint is" in refusal and "\n" not in refusal
    assert main([*arguments, "--outside", str(outside)]) == 0
    made = find(store, "select", fingerprint)
    assert made is not None and made.manifest.stats.rows_in == ROWS


def test_a_web_address_means_itself_and_a_path_may_mean_several_files(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(QUERIES, "{}")
    for name in ("part-1.txt", "part-2.txt", "part-10.txt"):
        (tmp_path / name).write_text(name)
    assert [Path(path).name for path in resolve([f"{tmp_path}/part-?.txt"], store)] == ["part-1.txt", "part-2.txt"]
    with hostile_web() as place:
        addresses = [f"http://{place}/{name}" for name in ("list.txt?a=1&b[]=2", "list.txt?policy=*", "list.txt")]
        found = resolve(addresses, store)
        assert {with_query(name) for name in found} == set(addresses) and not any("?" in name for name in found)
        with pytest.raises(FileNotFoundError, match="status-404"):
            resolve([f"http://{place}/status-404?b[]=2"], store)
