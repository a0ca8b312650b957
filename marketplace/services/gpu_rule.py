"""When a GPU is sick: the published rule (docs/reliability.md), and who is. Reads alone.

What the driver says can be the work's own fault or the device's. XIDs by NVIDIA's catalogue
(https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html): those after which nothing can be trusted on the device until it
was reset, power-cycled or replaced make it sick at once; those that it survives do when they come again and again. All others (13, 31,
43, 45, ...) are an application's, or one that was stopped: they are on record, and say nothing of the device.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from django.db.models import Q

from marketplace.models import Gpu

AT_ONCE: Final = {
    48: "uncorrectable memory error",
    62: "its microcontroller has halted",
    64: "a broken memory row could not be replaced",
    79: "fell off the bus",
    95: "memory error that was not contained",
    140: "unrecovered memory error",
    143: "could not be initialized",
}
AGAIN: Final = {
    63: "a broken memory row is to be replaced",
    74: "NVLink error",
    92: "many memory errors that could be corrected",
    94: "memory error that was contained",
    119: "its system processor does not answer",
    120: "error of its system processor",
}
KINDS: Final = {"lost": "does not answer", "ecc": "uncorrected memory errors", "retired": "broken memory pages or rows"}
REPORTS: Final = 3  # so many of one kind on one GPU
WITHIN: Final = timedelta(hours=24)
SICK: Final = Q(pk__in=Gpu.objects.filter(healthy=False).values("host"))  # of hosts


class Reported(NamedTuple):
    """One error of one GPU."""

    kind: str  # xid, ecc, lost, retired
    code: int
    at: datetime


def verdict(errors: Iterable[Reported]) -> str:
    """Why a GPU with these errors, all since it was last well, is sick; empty: it is not. Pure."""
    recent: dict[tuple[str, int], list[datetime]] = defaultdict(list)
    for error in sorted(errors, key=lambda e: e.at):
        if error.kind == "lost" or (error.kind == "xid" and error.code in AT_ONCE):
            return said(error)
        if error.kind == "xid" and error.code not in AGAIN:
            continue
        what = (error.kind, error.code if error.kind == "xid" else 0)
        recent[what] = [*(at for at in recent[what] if error.at - at < WITHIN), error.at]
        if len(recent[what]) >= REPORTS:
            return f"{said(error)}, {REPORTS} times in {WITHIN // timedelta(hours=1)} hours"
    return ""


def said(error: Reported) -> str:
    """`XID 79: fell off the bus`, `uncorrected memory errors`."""
    if error.kind != "xid":
        return KINDS.get(error.kind, error.kind)
    words = {**AT_ONCE, **AGAIN}.get(error.code, "")
    return f"XID {error.code}{': ' + words if words else ''}"


def sick_on(host_ids: Collection[int]) -> dict[int, list[Gpu]]:
    """Host -> its sick GPUs by index; hosts without any are left out."""
    found: dict[int, list[Gpu]] = defaultdict(list)
    for gpu in Gpu.objects.filter(host_id__in=list(host_ids), healthy=False).order_by("host_id", "index"):
        found[gpu.host_id].append(gpu)
    return dict(found)


def words(gpus: Iterable[Gpu]) -> str:
    """`GPU 3 (XID 79: fell off the bus), GPU 5 (...)`."""
    return ", ".join(f"GPU {gpu.index} ({gpu.last_error or 'marked'})" for gpu in gpus)
