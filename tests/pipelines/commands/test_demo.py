"""The demo's recipe, from the shipped base and from scratch."""

from __future__ import annotations

from pipelines.commands.demo import FROM_SCRATCH, RECIPE
from stages.runner.recipe import load_recipe


def test_a_demo_from_scratch_takes_nothing_of_the_base() -> None:
    based, scratch = (load_recipe(RECIPE, changes).nodes for changes in ((), FROM_SCRATCH))
    fields = [("text-codec", "weights"), ("train-256", "weights"), ("evaluate", "before")]
    assert all(getattr(based[node].config, field) == "embedded://base" for node, field in fields)
    assert all(getattr(scratch[node].config, field) is None for node, field in fields)
    for node in ("train-256", "train-512"):
        assert scratch[node].config.steps > based[node].config.steps
    for last in (based["train-512"].config, scratch["train-512"].config):
        assert last.schedule.decay_steps == last.steps
