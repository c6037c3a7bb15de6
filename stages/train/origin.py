"""Where a training begins: from nothing, from another run's step, or from a step of its own that another configuration reached.

A run goes on from the newest step of its own chain, whatever its length and rhythm (`stages.runner.chain`). Where it has none,
because a field, an input or the code is another, this decides:

- Only the data is another, and every shard of before is in it: it goes on from the newest step with all that it had. The epoch
  that is under way ends first, so every old row is read in it; all after it are of all rows, old and new (`training.order`). New
  shards come behind the old ones. With `growth_steps` it goes so many steps further than it was, if `steps` are done.
- The training that it began from has gone on: it goes on likewise from its own newest step, and takes nothing of those steps.
- `from` names itself: it begins from that.
- Else, where the node has steps, it is refused: nobody throws them away unawares.
- `from` names another: it begins from that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator

from infra.dataset import Dataset, find
from infra.queries import file_name
from stages.runner.chain import unit_key
from stages.runner.contract import Job, Stage, StageError, UnitRecord, digest_of, operational, result_fields
from stages.runner.graph import Planned, changed_fields
from stages.runner.keys import outside_digests
from stages.runner.ledger import Entry, Head, Ledger, Parent, Start
from stages.runner.recipe import DATASET
from stages.train.fits import (
    MODEL_FILE,
    STATE_FILE,
    TELLING,
    WROTE,
    json_of,
    other_network,
    other_optimizer,
    other_parts,
    outside,
    told_by,
    why_not,
)
from stages.train.order import ORDER_FILE, ORDER_STAYS, order_of, other_order, shards
from training.begin import ALL, Kept, counts_on
from training.config import Section

# Fields that say how far a training goes, not what it is.
LENGTH = frozenset({"steps", "growth_steps"})


class Origin(Section):
    """What a training begins from."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    run: str = operational(
        ..., "a training of this recipe, also this one itself; a dataset by its fingerprint; or the folder of a checkpoint"
    )
    step: int | Literal["newest"] = Field("newest", description="the step to begin from; of another run, the newest is its last")
    keep: tuple[Kept, ...] = Field(
        ("weights", "ema"),
        description="what is taken over: weights; optimizer (its state), ema, schedule (the learning rate goes on at its step), "
        "order (rows, timesteps and noise go on at their place). With schedule or order, the count of steps goes on",
    )

    @field_validator("step")
    @classmethod
    def _counted(cls, step: int | str) -> int | str:
        if isinstance(step, int) and step < 1:
            raise ValueError("a step that is kept is 1 at least")
        return step

    @field_validator("keep")
    @classmethod
    def _with_weights(cls, keep: tuple[Kept, ...]) -> tuple[Kept, ...]:
        if "weights" not in keep:
            raise ValueError("without the weights nothing else fits; add weights")
        return tuple(kind for kind in ALL if kind in keep)

    @property
    def folder(self) -> str | None:
        """The address of the folder that it names."""
        return self.run if "/" in self.run and not DATASET.fullmatch(self.run) else None

    @property
    def dataset(self) -> str | None:
        """The fingerprint, or its first characters, of the dataset that it names."""
        return self.run if DATASET.fullmatch(self.run) else None


def begins(stage: type[Stage], job: Job, planned: Planned, ledger: Ledger) -> Start:
    """Where a chain of this plan begins, as the module says.

    Raises:
        StageError: what it is to begin from is not there, does not fit, or steps would be left behind unawares.
        KeyError: an input that decides is not made yet.
    """
    origin: Origin | None = job.config.origin
    itself = origin is not None and "init" not in planned.inputs and not planned.sources
    root = None if itself else root_of(planned)
    head = ledger.head(job)
    if head is None and ledger.damaged and not planned.generation:
        # A step of another training may be damaged too, in which case an older one of that is taken.
        if origin is None or replace(ledger, damaged=frozenset()).head(job) is not None:
            damaged = f"no step to go on from is whole ({', '.join(sorted(ledger.damaged))})"
            raise StageError(f"{job.node}: {damaged}: begin anew with --force {job.node}")
    if head is not None and not planned.generation and (parent := _grown(stage, job, planned, head)) is not None:
        return Start(parent, head.entry.root if root is None else root)
    if itself and origin is not None:
        found = head if head is None or origin.step == "newest" else ledger.at(job, origin.step, head)
        if head is None or found is None:
            step = "step" if origin.step == "newest" else f"step {origin.step}"
            raise StageError(f"{job.node}: from: no {'whole ' if ledger.damaged else ''}{step} of it is there; {_those(head)}")
        changed, old = _changes(stage, job, planned, found), found.entry.config
        parent = _parent(job, planned, found.entry.key, found.step, planned.name, found.record, changed, old=old)
        return Start(parent, found.entry.root)
    if head is not None and not planned.generation:
        raise StageError(_refusal(stage, job, planned, head))
    return Start(_elsewhere(job, planned, ledger) if origin is not None else None, root or "")


def root_of(planned: Planned) -> str:
    """What a line of chains was begun from, other than from itself."""
    return _root(planned, planned.inputs)


def _root(planned: Planned, inputs: Mapping[str, Any]) -> str:
    told = result_fields(planned.config)["from"]
    return digest_of([told, _references(inputs, data=False), outside_digests(planned)])


def _references(inputs: Mapping[str, Any], data: bool) -> dict[str, str]:
    return {name: reference.fingerprint for name, reference in inputs.items() if name.startswith("data.") == data}


def _grown(stage: type[Stage], job: Job, planned: Planned, head: Head) -> Parent | None:
    """The newest step, if its training is this one with less data, or begun from the same training before it went further, or
    just this one, begun by force with another length."""
    before = head.entry
    if before.version != stage.version or changed_fields(before.config, job.config, LENGTH):
        return None
    # A fork of itself has the root of what it has forked.
    if job.config.origin is None or "init" in planned.inputs or planned.sources:
        if before.root not in ("", _root(planned, before.inputs)):
            return None
    changed, why, anew = list[str](), list[str](), ""
    if _references(before.inputs, data=False) != _references(planned.inputs, data=False):
        if (further := _further(job, planned, before)) is None:
            return None
        changed.append(further)
        why.append(f"what it began from has another step ({further})")
        anew = f", or begin anew from there with --force {job.node}"
    if _references(before.inputs, data=True) != _references(planned.inputs, data=True):
        old, new = order_of(job.store, head.record)["shards"], [shard.digest for shard in shards(job, planned.inputs)]
        if Counter(old) - Counter(new):
            return None
        changed.append(f"data: {len(old)} -> {len(new)} shards")
        why.append("its data has grown" if len(new) > len(old) else "its data was made again, with the same shards")
    if changed and head.step >= job.config.steps and not job.config.growth_steps:
        raise StageError(
            f"{job.node}: {' and '.join(why)}, and step {head.step} of {job.config.steps} is done; raise steps to go on, or "
            f"set growth_steps to go so many further each time{anew}"
        )
    return Parent(
        node=job.node, chain=before.key, step=head.step, begins=head.step, keep=ALL, changed=tuple(changed), grown=bool(changed)
    )  # fmt: skip


def _further(job: Job, planned: Planned, before: Entry) -> str | None:
    """In words, that what a chain was begun from is the same training at another step; None when it is another.

    Raises:
        KeyError: it is not made yet.
    """
    then = before.inputs.get("init")
    if then is None or "init" not in planned.inputs or (was := find(job.store, then.stage, then.fingerprint)) is None:
        return None
    now: Dataset = job.inputs["init"]
    (old, _, first), (chain, _, last) = (dataset.files[0].unit.rpartition("-") for dataset in (was, now))
    began = now.manifest.summary.get("began")
    while chain != old and began is not None and began["keep"] == list(ALL) and (began["grown"] or not began["changed"]):
        chain, record = began["chain"], job.unit_done(unit_key(began["chain"], began["step"]))
        began = record.notes.get("began") if record is not None else None
    return f"from: step {int(first)} -> {int(last)} of {now.manifest.node}" if chain == old else None


def end(config: Any, parent: Parent | None) -> int:
    """The step that a training goes to."""
    if parent is not None and parent.grown and config.growth_steps:
        return max(config.steps, parent.step + config.growth_steps)
    return int(config.steps)


def _elsewhere(job: Job, planned: Planned, ledger: Ledger) -> Parent:
    """The step of another run that is named; in place of its last, if that is damaged, the newest one before it that is whole."""
    origin: Origin = job.config.origin
    if origin.folder is not None:
        names = {file_name(address) for address in planned.sources}
        told = {name: outside(job, planned.sources, name) for name in TELLING if name in names}
        try:
            step: int = told[STATE_FILE]["step"]
            trained = told_by(told)
        except KeyError as error:
            # One that gets out says that an input is not made yet.
            raise StageError(f"{job.node}: from: {origin.folder}: its JSON files tell no {error.args[0]}; {WROTE}") from None
        if origin.step not in ("newest", step):
            raise StageError(f"{job.node}: from: {origin.folder} is a checkpoint of step {step}, not {origin.step}")
        return _parent(job, planned, "", step, origin.folder, old=trained)
    dataset: Dataset = job.inputs["init"]
    chain, _, last = dataset.files[0].unit.rpartition("-")
    there = ledger.whole(job, chain)
    step = int(last) if origin.step == "newest" else origin.step
    damaged = unit_key(chain, step) in ledger.damaged
    if damaged and origin.step == "newest":
        step = max((before for before in there if before < step), default=step)
    if (record := there.get(step)) is None:
        why = "damaged; name another with `step`" if damaged else "not there"
        those = ", ".join(map(str, there)) or "none"
        raise StageError(f"{job.node}: from: step {step} of {origin.run} is {why}; those that are: {those}")
    old = dataset.manifest.config
    changed = changed_fields(old, job.config, LENGTH)
    return _parent(job, planned, chain, step, dataset.manifest.node, record, changed, old=old)


def _parent(
    job: Job,
    planned: Planned,
    chain: str,
    step: int,
    node: str,
    record: UnitRecord | None = None,
    changed: Sequence[str] = (),
    *,
    old: Mapping[str, Any],
) -> Parent:
    """The step to begin from, once it is clear that what is kept of it can go on.

    Args:
        record: of the step, unless that is a folder's.
        old: the configuration of its training, as far as that is known.
    """
    keep = job.config.origin.keep
    order = order_of(job.store, record) if record is not None else outside(job, planned.sources, ORDER_FILE)
    if (why := why_not(old, result_fields(job.config), keep)) is not None:
        raise StageError(f"{job.node}: {why}")

    def model() -> dict[str, Any]:
        return json_of(job.store, record, MODEL_FILE) if record is not None else outside(job, planned.sources, MODEL_FILE)

    if (why := other_parts(job, model)) is not None:
        raise StageError(f"{job.node}: from: {why}")
    if "order" in keep and (lost := other_order(job, planned, order)):
        raise StageError(f"{job.node}: {ORDER_STAYS.format(lost[0])}")
    # That it begins elsewhere is said already.
    elsewise = tuple(line for line in changed if not line.startswith("from"))
    return Parent(node=node, chain=chain, step=step, begins=step if counts_on(keep) else 0, keep=keep, changed=elsewise)


def _refusal(stage: type[Stage], job: Job, planned: Planned, head: Head) -> str:
    changed = _changes(stage, job, planned, head) or ["files from outside are others"]
    line = f"{job.node}: would begin at step 0; {head.step} steps are there ({'; '.join(changed)})"
    old, new, anew = head.entry.config, result_fields(job.config), f"begin anew with --force {job.node}"
    if (other := other_network(old, new)) is not None:
        return f"{line}; {other.what} cannot go on from them: {other.mend and f'{other.mend}, or '}{anew}"
    if (why := other_parts(job, lambda: json_of(job.store, head.record, MODEL_FILE))) is not None:
        return f"{line}; their model is of other data: {why}, or {anew}"
    try:
        keeps_order = not other_order(job, planned, order_of(job.store, head.record))
    except KeyError:
        keeps_order = True
    keeps = {"order": keeps_order, "optimizer": other_optimizer(old, new) is None}
    keep = [kind for kind in ALL if keeps.get(kind, True)]
    return f"{line}: fork with `{fork(job.node, keep)}`, or {anew}"


def fork(node: str, keep: Any = ALL) -> str:
    """What a person writes to go on from the newest step with another value."""
    return f"from: {{run: {node}, step: newest, keep: [{', '.join(keep)}]}}"


def _those(head: Head | None) -> str:
    return "leave `from` out" if head is None else f"the newest is {head.step}"


def _changes(stage: type[Stage], job: Job, planned: Planned, head: Head) -> list[str]:
    """What a chain has otherwise than the one that is planned."""
    lines = changed_fields(head.entry.config, job.config, LENGTH)
    if head.entry.version != stage.version:
        lines.append(f"stage version {head.entry.version} -> {stage.version}")
    for name in sorted({*head.entry.inputs, *planned.inputs}):
        if head.entry.inputs.get(name) != planned.inputs.get(name):
            lines.append(f"input {name} is another dataset")
    return lines
