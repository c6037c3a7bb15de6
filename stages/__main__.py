"""``python -m stages RECIPE NODE --store STORE``: make one node's dataset. This is what a Ray job runs; it also runs by hand."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from importlib.metadata import version

import fsspec

from infra.code import code_digest, other_code
from infra.commit import git_commit
from infra.dataset import Dataset, find, point
from infra.nearest import nearest
from infra.queries import QUERIES, said
from infra.ray_cluster import PATIENT, start_ray_here
from infra.store import Store, StoreError
from infra.store_access import check_seen
from stages.catalog import stage_class
from stages.runner.contract import Bug, StageError, in_words
from stages.runner.graph import Outside, Planned, plan, read_outside
from stages.runner.recipe import Recipe, RecipeError, load_recipe
from stages.runner.run import describe_drops, run_stage

log = logging.getLogger("stages")

# Ray sets it for the driver of a job.
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def run_node(recipe: Recipe, node: str, store: Store, outside: Outside | None = None, expected: str | None = None) -> Dataset:
    """Plan a recipe and run one node of it; Ray is started only when there is something to do.

    Args:
        outside: the files from outside the store that count; None looks for them now.
        expected: the fingerprint that whoever asks for the node has planned.

    Raises:
        RecipeError, StageError, StoreError: with one line that says what to do.
    """
    if node not in recipe.nodes:
        raise RecipeError(f"{node}: the recipe {recipe.name} has no such node{nearest(node, recipe.nodes)}")
    planned = plan(recipe, store, outside=outside)[node]
    if expected is not None and planned.fingerprint != expected:
        raise StageError(
            f"{node}: planned as {expected}, but here its fingerprint is {planned.fingerprint}: this machine's unidiffuser "
            f"({version('unidiffuser')}) or weights are not those of the command; install the same on both"
        )
    dataset = find(store, planned.stage, planned.fingerprint)
    if dataset is None:
        connect_ray()
        log.info("%s: every machine runs the code %s, commit %s", node, code_digest(), git_commit() or "unknown")
        dataset = run_stage(planned, store, stage_class(planned.stage))
    point(store, recipe.name, node, dataset.manifest.reference())
    report(planned, dataset)
    return dataset


def connect_ray() -> None:
    """Join the cluster that RAY_ADDRESS names (a Ray job has it set), or start Ray on this machine alone."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # As many CPUs as this process may use, where that is known: a job of Slurm has a part of the machine.
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        start_ray_here(num_cpus=cpus, log_to_driver=True)
        return
    import ray

    if ray.is_initialized():
        return
    # Ray's workers are nice to other programs by default, and starve beside them on a small machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # A job's workers have the job's environment; those of a driver that joins by hand would lack what opens signed addresses.
    own = PATIENT | {name: value for name, value in os.environ.items() if name == QUERIES}
    ray.init(address=address, log_to_driver=True, runtime_env=None if JOB in os.environ else {"env_vars": own})


def report(planned: Planned, dataset: Dataset) -> None:
    stats = dataset.manifest.stats
    word = "reused" if planned.state == "hit" else "made"
    log.info(
        "%s: %s %s: %d rows in, %d out (%s)", planned.name, word, planned.fingerprint, stats.rows_in, stats.rows_out,
        describe_drops(stats),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stages", description=__doc__)
    parser.add_argument("recipe", help="recipe file (YAML), path or fsspec URL")
    parser.add_argument("node", help="node to make, such as laion-filter")
    parser.add_argument("--store", default=os.environ.get("UNIDIFFUSER_STORE", "runs"), help="folder or fsspec URL")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a field of the recipe")
    parser.add_argument("--outside", metavar="FILE", help="files from outside that an earlier plan found; else looked for now")
    parser.add_argument("--expect", metavar="FINGERPRINT", help="fail if the node would get another one here")
    parser.add_argument("--code", metavar="DIGEST", help="fail if the code here is another one")
    parser.add_argument("--debug", action="store_true", help="show the traceback of any error, not of bugs alone")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
    try:
        if options.code and (why := other_code(options.code, "the cluster")) is not None:
            raise StageError(f"{options.node}: {why}")
        store = Store(options.store)
        if JOB in os.environ:
            check_seen(store)
        outside = None
        if options.outside:
            with fsspec.open(options.outside, "rb") as file:
                outside = read_outside(file.read())
        run_node(load_recipe(options.recipe, options.set), options.node, store, outside, options.expect)
    except RecipeError as error:
        return _fail(error, str(error), 2, options.debug)
    except Bug as error:
        return _fail(error, str(error), 1, True)
    except (StageError, StoreError, OSError) as error:
        return _fail(error, str(error), 1, options.debug)
    except Exception as error:
        return _fail(error, f"{options.node}: {in_words(error)}", 1, True)
    return 0


def _fail(error: Exception, line: str, code: int, traced: bool) -> int:
    """The error's line comes last: whoever follows the log takes it for the reason."""
    if traced:
        print(said("".join(traceback.format_exception(error))), end="")
    print(said(f"error: {line}"), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
