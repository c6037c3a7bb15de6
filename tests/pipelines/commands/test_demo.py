"""The demo's recipe, from the shipped base and from scratch."""

from __future__ import annotations

from pipelines.commands.demo import FROM_SCRATCH, RECIPE
from stages.runner.recipe import load_recipe


def test_a_demo_from_scratch_takes_nothing_of_the_base() -> None:
    based, scratch = (load_recipe(RECIPE, changes).nodes for changes in ((), FROM_SCRATCH))
    fields = [("text-codec", "weights"), ("train-256", "weights"), ("evaluate", "before")]
    assert all(getattr(based[node].config, field) == "embedded://base" for node, field in fields)
    assert all(getattr(scratch[node].config, field) is None for node, field in fields)
    # As many as docs/results/demo.md tells of.
    steps = [sum(nodes[f"train-{size}"].config.steps for size in (256, 512)) for nodes in (based, scratch)]
    assert steps == [400, 1_700]
    for last in (based["train-512"].config, scratch["train-512"].config):
        assert last.schedule.decay_steps == last.steps
