"""A cell's hosts as columns, read in one statement, kept by the process, and brought up to date from the rows that changed.

`marketplace_host.changed_in` is the transaction that last changed what the scheduler reads of a row (a trigger writes it).
What an earlier reading could not see is what its own `pg_current_snapshot()` says it could not see: a transaction that was
open then and commits later is read again, whatever numbers were drawn in between. A host that leaves the cell moves
`Cell.layout`, and the cell is read anew.

Nothing is kept of what a transaction has itself written: it may yet be undone. Columns are never written in place, so that
an earlier snapshot stays what it was; columns without a change are shared.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np

from marketplace import arrays
from scheduler.core.types import I32, I64, MAX_GPUS, HostFlag

KEPT_CELLS: Final = 16  # of a process; 100,000 hosts are about 40 MiB
_STATE_FLAG: Final = {
    "active": 0,
    "draining": int(HostFlag.DRAINING),
    "maintenance": int(HostFlag.MAINTENANCE),
    "lost": int(HostFlag.UNREACHABLE),
}
_RETIRED: Final = 1 << 20  # beside DRAINING: a row that leaves the columns
# A host that drains by a named hour still takes what ends before it (`leaves`); without one it takes nothing.
_FLAGS: Final = (
    f"{int(HostFlag.SCHEDULABLE)} | CASE WHEN state = 'draining' AND leaves_at IS NOT NULL THEN 0 ELSE CASE state "
    + " ".join(f"WHEN '{state}' THEN {flag}" for state, flag in _STATE_FLAG.items())
    + f" ELSE {_RETIRED | int(HostFlag.DRAINING)} END END | CASE power_state WHEN 'off' THEN {int(HostFlag.OFF)} ELSE 0 END"
)
# Column -> (SQL, dtype). In the dtypes of `Fleet`, so that a reading without reservations takes them as they are.
_SCALARS: Final[dict[str, tuple[str, Any]]] = {
    "host_id": ("id", np.int64),
    "cpu_free": ("vcpu_free", np.int64),
    "ram_free": ("ram_free", np.int64),
    "nvme_free": ("nvme_free", np.int64),
    "cpu_total": ("vcpu_milli", np.int64),
    "ram_total": ("ram_mib", np.int64),
    "nvme_total": ("nvme_gib", np.int64),
    "vram_total": ("vram_mib", np.int32),
    "model_id": ("gpu_model_id", np.int64),
    "node_id": ("power_node_id", np.int64),
    "gpu_count": ("gpu_count", np.int32),
    "site": ("site_id", np.int32),
    "pool": ("coalesce(listing_id, 0)", np.int64),
    "flags": (_FLAGS, np.int32),
    "standby_w": ("standby_w", np.int32),
    "parked_w": ("parked_w", np.int32),
    "base_w": ("base_w", np.int32),
    "gpu_min_w": ("gpu_min_w", np.int32),
    "gpu_max_w": ("gpu_max_w", np.int32),
    "gpu_most_w": ("least(gpu_max_w, call_gpu_w)", np.int32),  # lower for a call of the grid
    "reserved_w": ("reserved_w", np.int64),
    "cap_control": ("cap_control::int", np.int8),
    "cpu_only": ("cpu_only_active", np.int32),
    "leaves": (
        "CASE WHEN state = 'draining' THEN coalesce(floor(extract(epoch FROM leaves_at)), 0) ELSE 0 END",
        np.int64,
    ),
}
_MATRICES: Final[dict[str, tuple[str, Any]]] = {
    "gpu_free": (arrays.padded("gpu_free"), np.int32),
    "vram_free": (arrays.padded("vram_free"), np.int32),
    "nvlink": (arrays.padded("nvlink_domains", "-1", "smallint"), np.int16),
}
_BETWEEN: Final = "\x1f"  # no taint has it: they are shown and typed
_STRANGE: Final = (
    62  # the bit of taints beyond the 62nd, and of those that came after a plan was made: nobody tolerates it
)
_AGGREGATES: Final = ", ".join(
    (
        *(f"array_agg(({sql})::bigint)" for sql, _ in _SCALARS.values()),
        *(f"string_agg({sql}, '')" for sql, _ in _MATRICES.values()),
        "array_agg(leaf)",
        "array_agg(spine)",
        f"array_agg(array_to_string(taints, '{_BETWEEN}'))",
    )
)
_HEAD: Final = """
SELECT pg_current_snapshot()::text, pg_snapshot_xmin(pg_current_snapshot())::text::bigint,
  pg_snapshot_xmax(pg_current_snapshot())::text::bigint, pg_current_xact_id_if_assigned() IS NOT NULL,
  (SELECT oid::text FROM pg_database WHERE datname = current_database()) || pg_postmaster_start_time()::text,
  (SELECT layout FROM marketplace_cell WHERE id = %(cell)s)
"""
_ALL: Final = "SELECT * FROM marketplace_host WHERE cell_id = %(cell)s AND state <> 'retired' ORDER BY id"
_CHANGED: Final = """
SELECT * FROM marketplace_host WHERE cell_id = %(cell)s AND changed_in >= %(xmin)s AND changed_in < %(xmax)s
  AND NOT pg_visible_in_snapshot(changed_in::text::xid8, %(seen)s::pg_snapshot) ORDER BY id
"""
_LOCKED: Final = "SELECT * FROM marketplace_host WHERE id = ANY(%(ids)s) ORDER BY id FOR NO KEY UPDATE"


class Moment(NamedTuple):
    """What a reading could see: PostgreSQL's own snapshot, on which server, and the cell's layout."""

    snapshot: str
    xmin: int
    xmax: int
    writing: bool  # the transaction has written something: what it sees may yet be undone
    server: str
    layout: int


class Names:
    """Small integers for leaves and spines, and bits for taints, the same for a name as long as it lives. A host that names no
    leaf is a domain of its own.
    """

    def __init__(self) -> None:
        self._fabric: dict[tuple[int, str], int] = {}
        self.taints: dict[str, int] = {}
        self._lock = threading.Lock()

    def fabric(self, sites: I64, names: list[str], host_ids: I64) -> I32:
        known = self._fabric
        out = np.empty(len(names), np.int32)
        with self._lock:
            for i, (site, name, host) in enumerate(zip(sites.tolist(), names, host_ids.tolist(), strict=True)):
                key = (site, name) if name else (-1, str(host))
                number = known.get(key)
                if number is None:
                    number = known[key] = len(known)
                out[i] = number
        return out

    def masks(self, joined: list[str]) -> I64:
        """Bit masks of each host's taints."""
        of = {"": 0}
        with self._lock:
            for text in dict.fromkeys(joined):
                for name in filter(None, text.split(_BETWEEN)):
                    bit = self.taints.setdefault(name, min(len(self.taints), _STRANGE))
                    of[text] = of.get(text, 0) | 1 << bit
        return np.array([of[text] for text in joined], np.int64)


@dataclass(frozen=True)
class Hosts:
    """A cell's hosts in id order: columns by the names of `Fleet` and of this module, [H] or [H, 16]."""

    columns: dict[str, Any]
    names: Names

    def __len__(self) -> int:
        return len(self.columns["host_id"])

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def position(self, host_ids: Any) -> I64:
        """Rows of these hosts; KeyError for one that is not here."""
        wanted = np.asarray(host_ids, np.int64)
        at = np.searchsorted(self["host_id"], wanted)
        if len(wanted) and (not len(self) or at.max() >= len(self) or (self["host_id"][at] != wanted).any()):
            raise KeyError("a host is not of this cell")
        return at.astype(np.int64)

    @cached_property
    def id_list(self) -> list[int]:
        """The ids as plain integers; not to be changed."""
        return self["host_id"].tolist()

    @cached_property
    def models(self) -> tuple[dict[int, int], I32]:
        """GPU model id -> position in the models mask, and each host's position (-1 without GPUs)."""
        ids, inverse = np.unique(self["model_id"], return_inverse=True)
        place = np.minimum(np.arange(len(ids)), 62).astype(np.int32)
        of = {int(pk): int(place[i]) for i, pk in enumerate(ids) if i < 63}
        return of, np.where(self["gpu_count"] > 0, place[inverse], -1).astype(np.int32)

    @cached_property
    def sites(self) -> tuple[I64, I64]:
        """The sites' ids, and the position of each host's site among them."""
        ids, inverse = np.unique(self["site"], return_inverse=True)
        return ids.astype(np.int64), inverse

    def nodes(self, node_ids: I64) -> I32:
        """Each host's position among `node_ids`; remembered for the next reading with the same nodes."""
        known = self.__dict__.get("_nodes")
        if known is None or not np.array_equal(known[0], node_ids):
            order = np.argsort(node_ids, kind="stable")
            at = order[np.searchsorted(node_ids, self["node_id"], sorter=order)] if len(self) else np.zeros(0)
            known = self.__dict__["_nodes"] = (node_ids, at.astype(np.int32))
        return known[1]

    def updated(self, rows: Hosts) -> Hosts:
        """With these rows in place of their older forms; retired ones gone. Columns that stay the same are shared."""
        if not len(rows):
            return self
        ids, gone = rows["host_id"], rows["flags"] & _RETIRED > 0
        at = np.searchsorted(self["host_id"], ids)
        known = np.zeros(len(ids), bool)
        inside = at < len(self)
        known[inside] = self["host_id"][at[inside]] == ids[inside]
        if gone.any() or not known.all():
            keep = np.ones(len(self), bool)
            keep[at[known]] = False
            order = np.argsort(np.concatenate([self["host_id"][keep], ids[~gone]]), kind="stable")
            return Hosts(
                {
                    name: np.concatenate([column[keep], rows[name][~gone]])[order]
                    for name, column in self.columns.items()
                },
                self.names,
            )
        made: dict[str, Any] = {}
        for name, column in self.columns.items():
            if (column[at] == rows[name]).all():
                made[name] = column
            else:
                made[name] = column.copy()
                made[name][at] = rows[name]
        return self._shared(Hosts(made, self.names))

    def _shared(self, later: Hosts) -> Hosts:
        """Hand on what was worked out from columns that have not changed."""
        for name, sources in _WORKED_OUT:
            if name in self.__dict__ and all(later[s] is self[s] for s in sources):
                later.__dict__[name] = self.__dict__[name]
        return later


# What `Hosts` remembers, and of which columns it is made.
_WORKED_OUT: Final = (
    ("id_list", ("host_id",)), ("models", ("model_id", "gpu_count")), ("sites", ("site",)), ("_nodes", ("node_id",)),
)  # fmt: skip


@dataclass(frozen=True)
class _Kept:
    """A reading; `taints`: how many names of taints there were when the cell was last read anew."""

    moment: Moment
    hosts: Hosts
    taints: int

    @property
    def worn(self) -> bool:
        """Taints of the past have used up the bits: reading anew gives those of today theirs."""
        return self.taints <= _STRANGE < len(self.hosts.names.taints)


_kept: OrderedDict[int, _Kept] = OrderedDict()


def read(cell_id: int) -> Hosts:
    """The cell's hosts as the running transaction sees them, retired ones left out.

    One statement, so that the rows and what they are a reading of belong together at any isolation level.
    """
    before = _kept.get(cell_id)
    if before is not None:
        moment, rows = _statement(cell_id, _CHANGED, before.hosts.names, before.moment)
        if not moment.writing and _continues(before.moment, moment) and not before.worn:
            return _keep(cell_id, _Kept(moment, before.hosts.updated(rows), before.taints))
    moment, rows = _statement(cell_id, _ALL, Names())
    return rows if moment.writing else _keep(cell_id, _Kept(moment, rows, len(rows.names.taints)))


def lock(host_ids: list[int], names: Names) -> Hosts:
    """Lock these rows in id order (NO KEY UPDATE) and read them as they stand under the lock, by the names of a plan's reading."""
    query = f"SELECT {_AGGREGATES} FROM ({_LOCKED}) h"  # noqa: S608
    return _hosts(arrays.columns(query, {"ids": sorted(set(host_ids))}), names)


def forget() -> None:
    """Drop what is kept: the next reading of each cell is a cold one."""
    _kept.clear()


def _continues(before: Moment, now: Moment) -> bool:
    """The same server since then, going forward, and no host has left the cell."""
    return before.server == now.server and before.layout == now.layout and before.xmax <= now.xmax


def _keep(cell_id: int, made: _Kept) -> Hosts:
    _kept[cell_id] = made
    _kept.move_to_end(cell_id)
    while len(_kept) > KEPT_CELLS:
        _kept.popitem(last=False)
    return made.hosts


def _statement(cell_id: int, rows: str, names: Names, since: Moment | None = None) -> tuple[Moment, Hosts]:
    query = f"WITH head AS ({_HEAD}), hosts AS (SELECT {_AGGREGATES} FROM ({rows}) h) SELECT * FROM head, hosts"  # noqa: S608
    query = query.replace("%(xmax)s", "pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
    parameters: dict[str, Any] = {"cell": cell_id}
    if since is not None:
        parameters |= {"seen": since.snapshot, "xmin": since.xmin}
    found = arrays.columns(query, parameters)
    width = len(Moment.__annotations__)
    return Moment(*found[:width]), _hosts(found[width:], names)


def _hosts(found: tuple[Any, ...], names: Names) -> Hosts:
    made: dict[str, Any] = {}
    for (name, (_, dtype)), column in zip(_SCALARS.items(), found, strict=False):
        made[name] = np.zeros(0, dtype) if column is None else column.astype(dtype)
    for (name, (_, dtype)), data in zip(_MATRICES.items(), found[len(_SCALARS) :], strict=False):
        made[name] = arrays.matrix(data, dtype)
    for name, texts in zip(("leaf", "spine"), found[-3:-1], strict=True):
        made[name] = names.fabric(made["site"], texts or [], made["host_id"])
    made["taints"] = names.masks(found[-1] or [])
    here = np.arange(MAX_GPUS) < made["gpu_count"][:, None]
    bit = (1 << np.arange(MAX_GPUS)).astype(np.int32)
    made["gpu_active"] = (((made["gpu_free"] < 1000) & here) @ bit).astype(np.int32)
    return Hosts(made, names)
