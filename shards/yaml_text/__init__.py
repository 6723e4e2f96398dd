"""YAML from outside, with bounds on its length and on the values that it stands for: aliases and merges multiply."""

from __future__ import annotations

import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from shards.errors import InputError
from shards.files import open_regular

MAX_BYTES = 1 << 20
MAX_VALUES = 50_000
_LONGEST = 3000
"""Characters of one value: Python refuses to write out numbers of more digits."""
_DEEPEST = 50
"""Brackets within brackets: PyYAML's time grows with the square."""
_BEYOND = f"more than {MAX_VALUES:,} values"


def read_yaml_text(path: Path) -> str:
    """Return the text of a YAML file.

    Raises:
        InputError: it has more than `MAX_BYTES`.
        OSError: it cannot be read, or is not a regular file.
        UnicodeDecodeError: not UTF-8.
    """
    with open_regular(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES:,} bytes, refused")
    return data.decode()


def load_yaml(text: str, kind: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Return the value of a YAML text.

    Raises:
        yaml.YAMLError: not YAML, or more than `MAX_VALUES` values once aliases are followed.
        ValueError: an impossible date, or a number of thousands of digits.
        RecursionError: nested too deeply.
    """
    if sum(map(text.count, ",:\n[{")) > MAX_VALUES:
        raise yaml.YAMLError(_BEYOND)
    depth = accumulate(1 if bracket in "[{" else -1 for bracket in re.findall(r"[][{}]", text))
    if max(depth, default=0) > _DEEPEST:
        raise yaml.YAMLError("nested too deeply")
    loader = kind(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MAX_VALUES:
            raise yaml.YAMLError(_BEYOND)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _values(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """How many values a node stands for; infinitely many if it contains itself."""
    if isinstance(node, yaml.ScalarNode) and len(node.value) > _LONGEST:
        raise yaml.YAMLError(f"a value of more than {_LONGEST:,} characters")
    if node not in known:
        known[node] = float("inf")
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = inner if isinstance(node, yaml.SequenceNode) else [each for pair in inner for each in pair]
        known[node] = 1 + sum(_values(each, known) for each in pairs)
    return known[node]
