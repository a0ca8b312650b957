"""Rows of the core's dataclasses as columns, and back: whatever fields they have or will have.

Integers, enums, bools and floats become columns; everything else (a topology, GPU indices) a code into a list of the
distinct values. A field that a record does not know takes its default, one that the code no longer knows is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import IntEnum
from functools import cache
from operator import attrgetter
from typing import Any, Final, get_type_hints

import numpy as np

from scheduler.core import types
from scheduler.packed import Columns

_CODES: Final = ":codes"
_hints = cache(get_type_hints)


def to_table(kind: type, rows: Sequence[Any]) -> tuple[Columns, dict[str, list[Any]]]:
    """Columns [len(rows)] by field, and the distinct values of coded fields as JSON."""
    names = [f.name for f in fields(kind)]
    hints = _hints(kind)
    columns: Columns = {}
    values: dict[str, list[Any]] = {}
    turned = list(zip(*map(attrgetter(*names), rows), strict=True)) if rows else [()] * len(names)
    for name, column in zip(names, turned, strict=True):
        hint = hints[name]
        if isinstance(hint, type) and issubclass(hint, int):
            columns[name] = np.fromiter(column, np.int64, len(rows))
        elif hint is float:
            columns[name] = np.fromiter(column, np.float64, len(rows))
        else:
            codes: dict[Any, int] = {}
            columns[name + _CODES] = np.fromiter((codes.setdefault(v, len(codes)) for v in column), np.int64, len(rows))
            values[name] = [plain(v) for v in codes]
    return columns, values


def from_table(kind: type, columns: Columns, values: dict[str, list[Any]]) -> list[Any]:
    """The rows. Fields unknown to `kind` are left out, missing ones take their default; TypeError without one."""
    hints = _hints(kind)
    found: dict[str, list[Any]] = {}
    for f in fields(kind):
        hint = hints[f.name]
        if f.name in columns:
            numbers = columns[f.name].tolist()
            cast = isinstance(hint, type) and (issubclass(hint, IntEnum) or hint is bool)
            found[f.name] = [hint(n) for n in numbers] if cast else numbers
        elif f.name in values:
            known = [restored(v) for v in values[f.name]]
            found[f.name] = [known[code] for code in columns[f.name + _CODES].tolist()]
        elif f.default is MISSING and f.default_factory is MISSING:
            raise TypeError(f"{kind.__name__}.{f.name}: not in the record, and it has no default")
    names = list(found)
    return [kind(**dict(zip(names, row, strict=True))) for row in zip(*found.values(), strict=True)]


def plain(value: Any) -> Any:
    """A value of the core's types as JSON; TypeError for any other."""
    if isinstance(value, IntEnum):
        return {"$": type(value).__name__, "v": int(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {"$": type(value).__name__, "f": {f.name: plain(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, tuple):
        name = type(value).__name__ if hasattr(value, "_fields") else "tuple"
        return {"$": name, "t": [plain(v) for v in value]}
    if isinstance(value, frozenset):
        return {"$": "frozenset", "t": sorted((plain(v) for v in value), key=repr)}
    raise TypeError(f"{type(value).__name__}: not a value that a record keeps")


def restored(value: Any) -> Any:
    """The value again. Fields that its type no longer has are left out."""
    if not isinstance(value, dict):
        return value
    name = value["$"]
    if name in {"tuple", "frozenset"}:
        parts = [restored(v) for v in value["t"]]
        return tuple(parts) if name == "tuple" else frozenset(parts)
    kind = getattr(types, name)
    if "v" in value:
        return kind(value["v"])
    if "t" in value:
        return kind(*(restored(v) for v in value["t"]))
    known = {f.name for f in fields(kind)}
    return kind(**{k: restored(v) for k, v in value["f"].items() if k in known})
