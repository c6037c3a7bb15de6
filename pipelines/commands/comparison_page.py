"""A comparison as one HTML file that needs nothing else: no script, no address, pictures inside it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from pipelines.commands.brief import moment
from pipelines.commands.comparison import value_words
from pipelines.commands.paired_samples import Cell

# Pixels that a sample is wide at most, in the file.
SAMPLE = 256
# Figures of one eighth of the timesteps, which are many: they are folded.
FINE = re.compile(r"_t[1-8]$")

STYLE = """
:root { color-scheme: light; --a: #2f6fb0; --b: #c4572a; --ink: #22272e; --pale: #67707b; --line: #d8dde3; --back: #f5f7f9 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 60px; color: var(--ink); background: white;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 26px; margin: 0 0 14px } h2 { font-size: 19px; margin: 38px 0 8px; border-bottom: 2px solid var(--line) }
h3 { font-size: 15px; margin: 22px 0 6px } p { margin: 6px 0 } .pale { color: var(--pale) }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 14px }
.side { border-left: 5px solid; padding: 8px 14px; background: var(--back) } .side b { font-size: 17px }
.a { border-color: var(--a) } .b { border-color: var(--b) } .ia { color: var(--a) } .ib { color: var(--b) }
.glance { margin: 16px 0 0; padding-left: 20px } .glance li { margin: 3px 0 }
table { border-collapse: collapse; width: 100%; table-layout: fixed } th { text-align: left; font-weight: 600 }
th, td { padding: 5px 8px; border-bottom: 1px solid var(--line); vertical-align: top }
td.value { font-family: ui-monospace, monospace; font-size: 13px }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
tr.same td { color: var(--pale) } .bar { height: 5px; margin-top: 3px; border-radius: 2px } .bar.a { background: var(--a) }
.bar.b { background: var(--b) } details { margin: 6px 0 } summary { color: var(--pale); cursor: pointer }
.row { display: grid; grid-template-columns: 22px repeat(var(--columns), 1fr); gap: 8px; margin: 0 0 8px; align-items: start }
.row > b { align-self: center; font-size: 17px } figure { margin: 0 }
figure img { width: 100%; display: block; background: var(--back) }
figcaption { font-size: 12px; line-height: 1.35; color: var(--pale); margin-top: 3px } .curve { width: 100% }
@media (max-width: 640px) { .sides { grid-template-columns: 1fr } .row { grid-template-columns: 22px repeat(2, 1fr) } }
"""


def page(facts: Mapping[str, Any], curve: bytes | None, samples: Mapping[str, Sequence[Sequence[Cell]]]) -> str:
    """The whole file.

    Args:
        facts: of `comparison.compare`.
        curve: PNG of `compared_curves`.
        samples: of `paired_samples.draw`.
    """
    a, b = (facts[side]["name"] for side in ("a", "b"))
    parts = [
        f"<h1>{escape(a)} <span class=pale>against</span> {escape(b)}</h1>",
        f"<div class=sides>{_side('A', facts['a'])}{_side('B', facts['b'])}</div>",
        f"<ul class=glance>{''.join(f'<li>{escape(line)}</li>' for line in facts['glance'])}</ul>",
        _samples(samples),
        _figures(facts["figures"]),
        _curve(curve),
        _configuration(facts["nodes"]),
        _rows(facts["nodes"]),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
    title = f"<title>{escape(a)} against {escape(b)}</title>"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}{title}</head>\n<body>{"".join(parts)}</body></html>\n'


def _side(letter: str, side: Mapping[str, Any]) -> str:
    created = moment(side["created"]) if side["created"] else ""
    lines = [side["dataset"] or "", f"node {side['node']}" if side["node"] else "all nodes of a recipe", created]
    told = "".join(f"<div class=pale>{escape(line)}</div>" for line in lines if line)
    return f'<div class="side {letter.lower()}"><b class=i{letter.lower()}>{letter}</b> <b>{escape(side["name"])}</b>{told}</div>'


def _configuration(nodes: Iterable[Mapping[str, Any]]) -> str:
    parts, same, alone = ["<h2>Configuration</h2>"], list[str](), {"A": list[str](), "B": list[str]()}
    for node in nodes:
        if None in node["stage"]:
            alone["B" if node["stage"][0] is None else "A"].append(node["node"])
            continue
        if node["same"]:
            same.append(node["node"])
            continue
        parts.append(f"<h3>{escape(node['node'])}</h3>")
        rows = [(_words(field), *(_value(each) for each in both)) for field, both in node["differ"].items()]
        parts.append(
            _table(("field", "A", "B"), rows, "value") if rows else "<p>No field differs; what it was made from does.</p>"
        )
        if node["equal"]:
            rows = [(_words(field), _value(value)) for field, value in node["equal"].items()]
            parts.append(_folded(f"{len(rows)} fields are the same", _table(("field", "A and B"), rows, "value")))
    parts += [f"<p class=pale>Only {letter} has {escape(', '.join(names))}.</p>" for letter, names in alone.items() if names]
    if same:
        parts.append(f"<p class=pale>The same dataset on both sides: {escape(', '.join(same))}.</p>")
    return "".join(parts)


def _figures(figures: Mapping[str, Mapping[str, Sequence[Any]]]) -> str:
    parts = ["<h2>Figures</h2>"]
    for node, found in figures.items():
        coarse, fine = [
            {name: both for name, both in found.items() if bool(FINE.search(name)) == wanted} for wanted in (False, True)
        ]
        table = _measured(coarse) + (_folded(f"{len(fine)} figures of eighths of the timesteps", _measured(fine)) if fine else "")
        sides = [letter for letter, place in (("A", 0), ("B", 1)) if any(both[place] is not None for both in found.values())]
        whole = len(sides) == 2 or "evaluate" in node
        parts.append(f"<h3>{escape(node)}</h3>{table}" if whole else _folded(f"{node}, which only {sides[0]} has", table))
    return "".join(parts) if figures else f"{parts[0]}<p>Neither side has an evaluation or a training that the other lacks.</p>"


def _measured(found: Mapping[str, Sequence[Any]]) -> str:
    rows = []
    for name, (left, right) in found.items():
        change = "" if left is None or right is None else f"{right - left:+,}" if _whole(left, right) else f"{right - left:+.4g}"
        rows.append((_words(name), _number(left), _number(right), "the same" if left == right else change))
    return _table(("figure", "A", "B", "B minus A"), rows, "number")


def _rows(nodes: Iterable[Mapping[str, Any]]) -> str:
    counted = [node for node in nodes if any(each and each["in"] for each in node["rows"])]
    most = max((each["out"] for node in counted for each in node["rows"] if each), default=1) or 1
    rows = [
        (escape(node["node"]), *(_count(each, letter, most) for each, letter in zip(node["rows"], "ab", strict=True)))
        for node in counted
    ]
    return f"<h2>Rows</h2>{_table(('node', 'A', 'B'), rows)}" if rows else ""


def _count(rows: Mapping[str, Any] | None, letter: str, most: int) -> str:
    if rows is None:
        return ""
    dropped = sorted(rows["dropped"].items(), key=lambda item: (-item[1], item[0]))
    lost = "".join(f"<div class=pale>{number:,} {escape(_plain(reason))}</div>" for reason, number in dropped)
    bar = f'<div class="bar {letter}" style="width: {100 * rows["out"] / most:.1f}%"></div>'
    return f"{rows['out']:,} <span class=pale>of {rows['in']:,}</span>{bar}{lost}"


def _curve(curve: bytes | None) -> str:
    if curve is None:
        return ""
    return f'<h2>Learning curves</h2><img class=curve alt="losses of A and of B" src="{_uri(curve, "png")}">'


def _samples(samples: Mapping[str, Sequence[Sequence[Cell]]]) -> str:
    parts = ["<h2>Samples of the same seeds</h2>"]
    for task, (left, right) in samples.items():
        rows = _sheet_row("A", left) + _sheet_row("B", right)
        parts.append(f"<h3>{escape(task)}</h3>{rows}")
    return "".join(parts) if samples else ""


def _sheet_row(letter: str, cells: Sequence[Cell]) -> str:
    title = f"<b class=i{letter.lower()}>{letter}</b>"
    return f'<div class=row style="--columns: {len(cells)}">{title}{"".join(map(_cell, cells))}</div>'


def _cell(cell: Cell) -> str:
    picture, caption = cell
    if picture is None:
        return f"<figure><figcaption>{escape(caption)}</figcaption></figure>"
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((SAMPLE, SAMPLE))
    small.save(buffer, "PNG")
    return f'<figure><img alt="" src="{_uri(buffer.getvalue(), "png")}"><figcaption>{escape(caption)}</figcaption></figure>'


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML; those behind the first are of a kind. A and B have their colours."""
    titles = f"<th>{head[0]}</th>"
    for name in head[1:]:
        colour = f"i{name.lower()}" if name in ("A", "B") else ""
        titles += f'<th class="{kind} {colour}">{name}</th>'
    lines = "".join(
        f'<tr class="{"same" if row[-1] == "the same" else ""}"><td>{row[0]}</td>'
        + "".join(f'<td class="{kind}">{cell}</td>' for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{titles}</tr>{lines}</table>"


def _folded(title: str, inside: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def _words(field: str) -> str:
    """A dotted name that a narrow column can break after its dots."""
    return escape(field).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _value(value: Any) -> str:
    words = escape(value_words(value))
    return f"<span class=pale>{words}</span>" if value is None else words


def _whole(*values: Any) -> bool:
    return all(isinstance(value, int) for value in values)


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if _whole(value) else f"{value:.4g}"
