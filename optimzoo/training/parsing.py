"""YAML as people mean it, and dotted keys into it."""

import re
from typing import Any

import yaml

from optimzoo.training.errors import UserError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's plain scalars: `1e-3` is a number, `off` is a word."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.rsplit(":", 1)[-1] not in ("bool", "float", "timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_FLOAT = re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


LONGEST = 1 << 20  # characters: a recipe has a thousand
MOST = 10_000  # values, those that aliases repeat counted every time
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


def parse(text: str, source: str) -> Any:
    """YAML as plain data: no tags that name types, no keys twice, and no more of it than a person could have meant."""
    if len(text) > LONGEST:
        raise UserError(f"{source}: {len(text):,} characters are no recipe")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > MOST:
            raise yaml.MarkedYAMLError(problem=f"its aliases repeat more than {MOST:,} values")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        words = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{source}{where}: not valid YAML: {words}") from error
    except RecursionError as error:
        raise UserError(f"{source}: not valid YAML: its values are nested too deeply") from error
    except (ValueError, OverflowError) as error:  # a number that Python does not take, half of a character
        raise UserError(f"{source}: not valid YAML: {error}") from error


def _count(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """The values below a node, every alias with all that it stands for; refuses what is no plain data."""
    if node in known:
        if known[node] == 0:
            raise yaml.MarkedYAMLError(problem="a value holds itself", problem_mark=node.start_mark)
        return known[node]
    if node.tag not in _PLAIN:
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag!r} is no plain value", problem_mark=node.start_mark)
    known[node] = 0
    below: list[yaml.Node] = []
    if isinstance(node, yaml.ScalarNode):
        node.value.encode()
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    else:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
        below = [part for pair in node.value for part in pair]
    known[node] = 1 + sum(_count(part, known) for part in below)
    return known[node]


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` in nested dictionaries."""
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"{key}: {section!r} is a value, not a section")
        values = inner
    values[last] = value


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result
