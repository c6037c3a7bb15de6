"""YAML as recipes have it: what is written once, and what a person means by it.

    a key that a mapping has twice is an error: YAML forbids it, and the first one would go without a word
    keys are text: `256:` and `"256":` are one key
    only true and false are booleans: the language `no` is text, and a field that is a boolean still takes `no`
    1e-4 and 1e6 are numbers, and 0512 is 512
    1:30 and 2026-11-28 are text

All but the first two are YAML 1.2's rules, of which PyYAML knows 1.1's. Anchors, aliases and merge keys (`<<`) work as ever.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

TEXT, BOOLEAN, WHOLE, NUMBER, DATE = (f"tag:yaml.org,2002:{name}" for name in ("str", "bool", "int", "float", "timestamp"))
MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag not in (BOOLEAN, WHOLE, NUMBER, DATE)]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here rather than where values are made: there the keys of a merge have joined those that are written.
        node = super().compose_mapping_node(anchor)
        found: dict[str, int] = {}
        entries = []
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key is a list or a mapping; expected text", key.start_mark)
            if key.value in found:
                message = f"the key {key.value} was in line {found[key.value]} already; remove or rename one"
                raise yaml.MarkedYAMLError(None, None, message, key.start_mark)
            found[key.value] = line
            tag = MERGE if key.tag == MERGE else TEXT
            entries.append((yaml.ScalarNode(tag, key.value, key.start_mark, key.end_mark, key.style), value))
        node.value = entries
        return node


_Loader.add_implicit_resolver(BOOLEAN, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(WHOLE, re.compile("^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    NUMBER,
    re.compile(
        r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    written = loader.construct_scalar(node)
    return int(written, {"0o": 8, "0x": 16}.get(written[:2], 10))


_Loader.add_constructor(WHOLE, _whole)


class DocumentError(ValueError):
    """Text that is no such YAML; the message is one line, with the number of the line that is wrong."""


def parse(text: str) -> Any:
    """The value that a YAML document has.

    Raises:
        DocumentError: see the module's docstring.
    """
    try:
        return _unshared(yaml.load(text, _Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise DocumentError(f"{f'line {mark.line + 1}: ' if mark else ''}{' '.join(str(error.problem).split())}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise DocumentError(" ".join(str(error).split())) from None
    except RecursionError:
        raise DocumentError("it holds itself, by an alias, or is nested too deep") from None


def _unshared(value: Any) -> Any:
    """YAML's anchors give one mapping several places: a field that is set in one of them must not change in the others."""
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value
