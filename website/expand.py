"""What the build puts into a page: the code that a link names, formulas as MathML, and links that lead to pages of the site."""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from latex2mathml.converter import convert

from website.pages import ROOT, Page, SiteError

FENCE = re.compile(r"^ *(`{3,}|~{3,})")
# A line that is nothing but a link to a Python file: `[UViT.forward](../unidiffuser/uvit.py)`.
CODE_LINE = re.compile(r"^\[`?([\w.]+)`?\]\(([^)#]+\.py)\)$")
BLOCK = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\w$])")
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def expanded(page: Page, places: Mapping[str, str]) -> str:
    """The text of a page as the site's generator takes it.

    Args:
        places: path from the repository's root -> path in the site, for every file that has a page or is copied.

    Raises:
        SiteError: a link leads nowhere, or names code that is not there.
    """
    lines = page.text.split("\n")
    text = "\n".join(_code(page, line) for line in lines)
    text = outside_code(text, formulas)
    return outside_code(text, lambda part: LINK.sub(lambda found: found[1] + _target(page, found[2], places) + found[3], part))


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Change a text except for its fenced code and its `code` in lines."""
    parts: list[str] = []
    plain: list[str] = []
    fence = ""

    def flush() -> None:
        pieces = re.split(r"(`[^`\n]+`)", "\n".join(plain))
        # A formula or link may stand around code in a line, so what is changed sees the code as a mark.
        codes = pieces[1::2]
        marked = "".join(piece if number % 2 == 0 else f"\0{number // 2}\0" for number, piece in enumerate(pieces))
        parts.append(re.sub("\0(\\d+)\0", lambda found: codes[int(found[1])], change(marked)))
        plain.clear()

    for line in text.split("\n"):
        found = FENCE.match(line)
        if fence:
            parts[-1] += "\n" + line
            if found and found[1].startswith(fence) and line.strip() == found[1]:
                fence = ""
        elif found:
            if plain:
                flush()
            fence = found[1]
            parts.append(line)
        else:
            plain.append(line)
    if plain:
        flush()
    return "\n".join(parts)


def _code(page: Page, line: str) -> str:
    found = CODE_LINE.match(line)
    if found is None:
        return line
    name, target = found[1], posixpath.normpath(posixpath.join(posixpath.dirname(page.source), found[2]))
    code, number = source_of(ROOT / target, name, page.source)
    return f'```python title="{target}, line {number}"\n{code}\n```'


def source_of(path: Path, name: str, page: str) -> tuple[str, int]:
    """The source of a function, class, method or constant of a file, as it stands there, and the line where it begins.

    Raises:
        SiteError: there is no such file, or nothing of that name in it; `page` names it.
    """
    if not path.is_file():
        raise SiteError(f"{page}: no file {path.relative_to(ROOT)}")
    text = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        inner = next((each for each in getattr(node, "body", ()) if part in _names(each)), None)
        if inner is None:
            raise SiteError(f"{page}: {path.relative_to(ROOT)} has no {name}")
        node = inner
    segment = ast.get_source_segment(text, node, padded=True)
    decorators = getattr(node, "decorator_list", [])
    assert segment is not None
    lines = segment.split("\n")
    first = getattr(node, "lineno", 1)
    indent = len(lines[0]) - len(lines[0].lstrip())
    head = [text.split("\n")[each.lineno - 1] for each in decorators]
    return "\n".join(line[indent:] for line in [*head, *lines]), first - len(head)


def _names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def formulas(text: str) -> str:
    """LaTeX between `$$` lines and between `$` as MathML, which browsers draw without any script."""
    blocks = BLOCK.sub(lambda found: f'<div class="formula">{convert(found[1], display="block")}</div>', text)
    return INLINE.sub(lambda found: convert(found[1]), blocks)


def _target(page: Page, link: str, places: Mapping[str, str]) -> str:
    if re.match(r"[a-z]+:|#", link):
        return link
    path, hash_, anchor = link.partition("#")
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(page.source), path))
    if wanted not in places:
        raise SiteError(f"{page.source}: the link {link} leads to no file of the repository")
    return posixpath.relpath(places[wanted], posixpath.dirname(page.path) or ".") + hash_ + anchor


def linked(page: Page) -> set[str]:
    """Paths from the repository's root that a page's links name, but for those of code that is put in."""
    found = set[str]()

    def look(text: str) -> str:
        for _, link, _ in LINK.findall(text):
            if not re.match(r"[a-z]+:|#", link):
                found.add(posixpath.normpath(posixpath.join(posixpath.dirname(page.source), link.partition("#")[0])))
        return text

    outside_code("\n".join(line for line in page.text.split("\n") if not CODE_LINE.match(line)), look)
    return found
