"""Which mutants: cosmic-ray's operators at places of the code that runs, one operator a place, drawn by a seed."""

from __future__ import annotations

import ast
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_item import MutationSpec

Position = tuple[int, int]


def annotated(source: str) -> list[tuple[Position, Position]]:
    """Where type annotations stand. They are strings that nothing evaluates, but for pydantic's fields."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(node.returns)
        elif isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
    return [((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in found if n is not None]


def places(file: Path, source: str) -> Iterator[tuple[Position, list[MutationSpec]]]:
    """The places of a file where an operator applies, with all that do."""
    ignored = annotated(source)
    by_place: dict[Position, list[MutationSpec]] = defaultdict(list)
    for item in _all_work_items([file], {}):
        mutation = item.mutations[0]
        if not any(start <= mutation.start_pos < end for start, end in ignored):
            by_place[mutation.start_pos].append(mutation)
    yield from sorted(by_place.items())


def sample(root: Path, rooms: tuple[str, ...], count: int, seed: int) -> list[MutationSpec]:
    """`count` mutants that Python can compile, each at a place of its own, in the order of their files and lines."""
    everywhere = []
    for room in rooms:
        for path in sorted((root / room).rglob("*.py")):
            everywhere += [mutations for _, mutations in places(path, path.read_text(encoding="utf-8"))]
    generator = random.Random(seed)
    generator.shuffle(everywhere)
    chosen: list[MutationSpec] = []
    for mutations in everywhere:
        if len(chosen) == count:
            break
        mutation = generator.choice(mutations)
        if _compiles(mutation):
            chosen.append(mutation)
    return sorted(chosen, key=lambda mutation: (str(mutation.module_path), mutation.start_pos))


def _compiles(mutation: MutationSpec) -> bool:
    try:
        compile(mutated(mutation, mutation.module_path.read_text(encoding="utf-8")), "mutant", "exec")
    except (SyntaxError, AttributeError):  # the second from cosmic-ray, of an exception with a dotted name
        return False
    return True


def mutated(mutation: MutationSpec, source: str) -> str:
    """The file's text with the fault in it."""
    operator = get_operator(mutation.operator_name)(**mutation.operator_args)
    return mutate_code(source, operator, mutation.occurrence)
