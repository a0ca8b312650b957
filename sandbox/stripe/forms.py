"""Stripe's form encoding, `a[b][0]=c`, decoded into nested dicts and lists of strings."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl

_KEY = re.compile(r"^([^\[\]]+)((?:\[[^\[\]]*\])*)$")
_PART = re.compile(r"\[([^\[\]]*)\]")

Nested = dict[str, Any]


def decode(text: str) -> Nested:
    """Nested dicts of strings; numeric keys stay dict keys until `schema` knows that a list is expected.

    Raises ValueError on a key that is not Stripe's bracket notation.
    """
    root: Nested = {}
    for key, value in parse_qsl(text, keep_blank_values=True, strict_parsing=False):
        match = _KEY.match(key)
        if match is None:
            raise ValueError(f"Invalid parameter name: {key}")
        parts = [match.group(1), *_PART.findall(match.group(2))]
        node: Any = root
        for part in parts[:-1]:
            node = node.setdefault(part or str(len(node)), {})
            if not isinstance(node, dict):
                raise ValueError(f"Parameter given both as a value and as a hash: {key}")  # noqa: TRY004 - the caller's data, one error class
        last = parts[-1]
        node[last or str(len(node))] = value
    return root


def as_list(value: Any) -> list[Any] | None:
    """The list that a dict with keys 0..n-1 stands for, else None."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and all(k.isdigit() for k in value):
        return [value[k] for k in sorted(value, key=int)]
    return None
