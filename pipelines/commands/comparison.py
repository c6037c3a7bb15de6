"""What differs between two sides: configuration, data, rows and figures, as JSON; curves and samples are drawn from the sides."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.commands.brief import short
from pipelines.commands.sides import Made, Side
from stages.catalog import STAGES

Pair = tuple[Made | None, Made | None]
DIGEST = re.compile(r"[0-9a-f]{24,}")
# How many of the files from outside that differ are named.
FILES = 20
# What the first lines name: fields of a node, figures, and characters of two values.
NAMED, FIGURES, SHORT = 4, 8, 60


def compare(one: Side, other: Side) -> dict[str, Any]:
    """All that is told of two sides; whatever is `[a, b]` has that of A and that of B, None where it has none."""
    pairs = paired(one, other)
    nodes, measured = [_node(name, pair) for name, pair in pairs.items()], figures(pairs)
    return {"a": _side(one), "b": _side(other), "glance": _glance(nodes, measured), "nodes": nodes, "figures": measured}


def _glance(nodes: list[dict[str, Any]], measured: Mapping[str, Mapping[str, list[Any]]]) -> list[str]:
    """A few lines for somebody who reads no further."""
    other, same = [node for node in nodes if not node["same"]], [node["node"] for node in nodes if node["same"]]
    if not other:
        return ["Both sides are the same datasets."]
    lines = [
        f"{node['node']}: {', '.join(_change(field, both) for field, both in list(node['differ'].items())[:NAMED])}"
        + (f" and {len(node['differ']) - NAMED} more" if len(node["differ"]) > NAMED else "")
        for node in other
        if node["differ"]
    ]
    lines = lines or ["No field of the configuration differs."]
    for letter, side in (("A", 1), ("B", 0)):
        if alone := [node["node"] for node in other if node["datasets"][side] is None and node["stage"][side] is None]:
            lines.append(f"Only {letter} has {', '.join(alone)}.")
    lines += [f"The same datasets: {', '.join(same)}."] if same else []
    told = [(name, both) for node, found in measured.items() if "train" not in node for name, both in found.items()]
    changed = [f"{name} {both[0]:.4g} → {both[1]:.4g}" for name, both in told if None not in both and both[0] != both[1]]
    return [*lines, f"Measured, A → B: {', '.join(changed[:FIGURES])}."] if changed else lines


def _change(field: str, both: list[Any]) -> str:
    left, right = map(value_words, both)
    return f"{field} {left} → {right}" if len(left) + len(right) < SHORT else field


def value_words(value: Any) -> str:
    """A value of a field as a person reads it; a digest by its first characters."""
    if value is None:
        return "not set"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return short(text) if DIGEST.fullmatch(text) else text


def _side(side: Side) -> dict[str, Any]:
    head = side.made[side.head] if side.head is not None else None
    return {
        "name": side.name,
        "node": side.head,
        "dataset": f"{head.stage}/{head.fingerprint}" if head is not None and head.fingerprint else None,
        "created": head.created if head is not None else max((one.created or "" for one in side.made.values()), default=None),
        "checkpoint": side.checkpoint,
    }


def paired(one: Side, other: Side) -> dict[str, Pair]:
    """Datasets of both sides that answer to each other, in the order of their stages: nodes of one name, and what is compared."""
    left, right, pairs = dict(one.made), dict(other.made), dict[str, Pair]()
    heads = (one.head, other.head)
    if heads[0] is not None and heads[1] is not None and heads[0] != heads[1]:
        pairs[f"{heads[0]} / {heads[1]}"] = (left.pop(heads[0]), right.pop(heads[1]))
    both = {node: (left.get(node), right.get(node)) for node in [*left, *(node for node in right if node not in left)]}
    order = {stage: place for place, stage in enumerate(STAGES)}

    def place(pair: Pair) -> int:
        return max(order.get(each.stage, len(order)) for each in pair if each is not None)

    # Of one stage, what is compared comes last.
    return dict(sorted([*both.items(), *pairs.items()], key=lambda item: place(item[1])))


def _node(name: str, pair: Pair) -> dict[str, Any]:
    a, b = pair
    left, right = (_fields(each) if each is not None else {} for each in pair)
    fields = {field: [left.get(field), right.get(field)] for field in [*left, *(field for field in right if field not in left)]}
    whole = a is not None and b is not None
    return {
        "node": name,
        "stage": [each.stage if each is not None else None for each in pair],
        "datasets": [each.fingerprint or None if each is not None else None for each in pair],
        "same": _same(pair),
        "differ": {field: both for field, both in fields.items() if whole and both[0] != both[1]},
        "equal": {field: both[0] for field, both in fields.items() if whole and both[0] == both[1]},
        "rows": [_rows(each) for each in pair],
    }


def _fields(made: Made) -> dict[str, Any]:
    """Every value of the configuration by its dotted name, and what else decided the result: code and files from outside."""
    code = {name: value for name, value in made.code.items() if name in ("stage_version", "git")}
    told = dict(leaves(made.config)) | {f"code: {name}": value for name, value in code.items()}
    names = sorted(made.sources)
    told |= {f"file: {name.rsplit('/', 1)[-1]}": made.sources[name][:12] for name in names[:FILES]}
    told |= {f"weights: {name}": digest for name, digest in made.weights.items()}
    return told | ({"files": len(names)} if names else {})


def _rows(made: Made | None) -> dict[str, Any] | None:
    return None if made is None else {"in": made.rows_in, "out": made.rows_out, "dropped": made.dropped}


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """What nested JSON objects hold, under dotted names; a list is one value.

    Example:
        >>> dict(leaves({"data": {"subsets": ["a"], "where": None}}))
        {'data.subsets': ['a'], 'data.where': None}
    """
    if isinstance(value, Mapping) and value:
        for name, each in value.items():
            yield from leaves(each, f"{place}.{name}" if place else str(name))
    elif place:
        yield place, value


def figures(pairs: Mapping[str, Pair]) -> dict[str, dict[str, list[Any]]]:
    """The numbers that were measured, by node, of evaluations first; what both sides have in common measures nothing."""
    told = {}
    different = {name: pair for name, pair in _together(pairs).items() if not _same(pair)}
    for name, pair in sorted(different.items(), key=lambda item: not _judges(item[1])):
        left, right = (_figures(each) if each is not None else {} for each in pair)
        names = [*left, *(figure for figure in right if figure not in left)]
        if names:
            told[name] = {figure: [left.get(figure), right.get(figure)] for figure in names}
    return told


def _judges(pair: Pair) -> bool:
    return any(each is not None and each.stage == "evaluate" for each in pair)


def _same(pair: Pair) -> bool:
    a, b = pair
    if a is None or b is None or not a.fingerprint or a.fingerprint != b.fingerprint:
        return False
    # The files of a folder may have been changed since they were written.
    return a.dataset is not None or b.dataset is not None or (a.weights, a.summary) == (b.weights, b.summary)


def _together(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The pairs, in which the only evaluation of A and the only one of B are one, whatever their nodes are called."""
    lone = {name: pair for name, pair in pairs.items() if _judges(pair)}
    left, right = [[name for name, pair in lone.items() if pair[side] is not None] for side in (0, 1)]
    if len(left) != 1 or len(right) != 1 or left == right:
        return dict(pairs)
    rest = {name: pair for name, pair in pairs.items() if name not in lone}
    return {**rest, f"{left[0]} / {right[0]}": (pairs[left[0]][0], pairs[right[0]][1])}


def _figures(made: Made) -> dict[str, float]:
    """What `_measured` finds in an evaluation, in its JSON files or in what a folder tells of it; and in a training's metrics."""
    if made.stage == "evaluate" and made.dataset is not None:
        files = [entry for entry in made.dataset.files if entry.name.endswith(".json")]
        read = [json.loads(made.dataset.store.read(entry.path)) for entry in files]
        return dict(pair for each in read for pair in _measured(each))
    if made.stage == "evaluate":
        return dict(_measured(made.summary))
    return dict(_measured(made.summary.get("metrics", {}))) if made.stage == "train" else {}


def _measured(told: Any) -> Iterator[tuple[str, float]]:
    """The numbers of nested JSON by their dotted names, and the values of lists of figures, each with its `name` and `value`."""
    for name, value in leaves(told):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value
        for each in value if isinstance(value, list) else ():
            if isinstance(each, Mapping) and {"name", "value"} <= each.keys():
                yield f"{each['name']} ({each['by']})" if each.get("by") else str(each["name"]), each["value"]


def histories(side: Side) -> dict[str, list[dict[str, Any]]]:
    """The training histories of a side, by node; of a folder there are none."""
    found = {}
    for name, made in side.made.items():
        for entry in made.dataset.files if made.dataset is not None and made.stage == "train" else ():
            if entry.name == "history.jsonl":
                found[name] = [json.loads(line) for line in side.store.read(entry.path).decode().splitlines()]
    return found
