"""Many columns in few bytes: what a recorded cycle is kept as.

    data = pack(columns, notes, base)        # columns: {name: array}, notes: JSON; base: columns of another record, or None
    columns, notes = unpack(data, base)

A column is stored as the smallest integers that hold it; beside a base as what differs from it (nothing, a few places, or a
difference in every place). Rows of a table are aligned to the base's by a key first (`align`), so that one that comes or
goes does not move the others. All of it is then deflated. Layout: 4 bytes of magic, the length of a JSON head, head, columns.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[Any]
Columns = dict[str, Column]
MAGIC: Final = b"TRC1"
LEVEL: Final = (
    1  # of zlib: columns shrink by their layout, a harder level costs ten times the time for a tenth of the size
)
SPARSE: Final = 8  # fewer than one place in eight differs: places and values
_SMALL: Final = tuple(np.dtype(f"<i{size}") for size in (1, 2, 4, 8))


class UnreadableError(ValueError):
    """Not a record, of an unknown layout, or without the base that it was made against."""


def pack(columns: Mapping[str, Column], notes: Any, base: Mapping[str, Column] | None = None) -> bytes:
    """Bytes of the columns (integers, bools or floats of any shape) and of JSON notes."""
    head, parts = [], []
    for name, column in columns.items():
        old = None if base is None else base.get(name)
        how, blobs = _column(column, old)
        head.append([name, column.dtype.str, list(column.shape), how, [[b.dtype.str, len(b)] for b in blobs]])
        parts += [np.ascontiguousarray(b).tobytes() for b in blobs]
    text = json.dumps({"columns": head, "notes": notes, "based": base is not None}, separators=(",", ":")).encode()
    return MAGIC + zlib.compress(b"".join([len(text).to_bytes(4, "little"), text, *parts]), LEVEL)


def unpack(data: bytes, base: Mapping[str, Column] | None = None) -> tuple[Columns, Any]:
    """What was packed. UnreadableError for other bytes, or when the base is missing."""
    data = bytes(data)
    if data[:4] != MAGIC:
        raise UnreadableError(f"no record: begins with {data[:4]!r}")
    try:
        body = zlib.decompress(data[4:])
    except zlib.error as error:
        raise UnreadableError(f"damaged: {error}") from error
    size = int.from_bytes(body[:4], "little")
    head = json.loads(body[4 : 4 + size])
    if head["based"] and base is None:
        raise UnreadableError("made against another record, which is not given")
    at, columns = 4 + size, {}
    for name, dtype, shape, how, blobs in head["columns"]:
        arrays = []
        for kind, count in blobs:
            arrays.append(np.frombuffer(body, kind, count, at))
            at += arrays[-1].nbytes
        columns[name] = _restored(how, arrays, None if base is None else base.get(name), np.dtype(dtype), tuple(shape))
    return columns, head["notes"]


def small(column: Column) -> Column:
    """The same integers in the smallest type that holds them."""
    if column.dtype.kind == "b":
        return column.astype(np.int8)
    if column.dtype.kind not in "iu" or not column.size:
        return column
    low, high = int(column.min()), int(column.max())
    for dtype in _SMALL:
        info = np.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return column.astype(dtype)
    return column


def align(keys: Column, old: Column) -> Column:
    """For each key its place in `old` (unique), or -1; int64 [len(keys)]."""
    order = np.argsort(old, kind="stable")
    if not len(old):
        return np.full(len(keys), -1, np.int64)
    at = np.minimum(np.searchsorted(old[order], keys), len(old) - 1)
    places: Column = np.where(old[order[at]] == keys, order[at], -1)
    return places.astype(np.int64)


def taken(columns: Mapping[str, Column], places: Column) -> Columns:
    """Rows of a table in another order; zero where there is none (-1)."""
    out = {}
    for name, column in columns.items():
        rows = column[places] if len(column) else np.zeros((len(places), *column.shape[1:]), column.dtype)
        rows[places < 0] = 0
        out[name] = rows
    return out


def _column(column: Column, old: Column | None) -> tuple[str, list[Column]]:
    if old is column:
        return "same", []
    flat = column.reshape(-1)
    if old is None or old.shape != column.shape or old.dtype != column.dtype:
        return "all", [small(flat)]
    before = old.reshape(-1)
    changed = np.flatnonzero(flat != before)
    if not len(changed):
        return "same", []
    if len(changed) * SPARSE < len(flat) or column.dtype.kind not in "iu":
        return "some", [small(np.diff(changed, prepend=0)), small(flat[changed])]
    return "plus", [small(flat.astype(np.int64) - before)]


def _restored(
    how: str, arrays: list[Column], old: Column | None, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> Column:
    if how == "all":
        return arrays[0].astype(dtype).reshape(shape)
    if old is None or old.shape != shape:
        raise UnreadableError("made against another record than the one given")
    flat = old.reshape(-1).copy()
    if how == "some":
        flat[np.cumsum(arrays[0].astype(np.int64))] = arrays[1].astype(dtype)
    elif how == "plus":
        flat = (flat.astype(np.int64) + arrays[0]).astype(dtype)
    return flat.astype(dtype, copy=False).reshape(shape)
