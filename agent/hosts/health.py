"""Errors of GPUs: how they are written in a host's reading, and how each is told once.

A reading lists what its devices have reported since they came up, one text for each device and kind: `gpu 3: xid 79 x2 fell off the
bus`: device 3 has reported XID 79 twice. The list is a level (docs/agent-protocol.md, `gpu_errors`); what control counts are the
`gpu_error` events made of its rises, which are spooled until acknowledged. What was told is on disk: a restarted agent does
not tell it again, and a device whose counter starts anew is told anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from agent.events import Events
from agent.hosts import HostReading
from agent.store import Store

_ERROR = re.compile(r"gpu (\d+): (xid|ecc|lost|retired) (\d+) x(\d+)(?: (.*))?")


def written(gpu: int, kind: str, code: int, times: int, text: str = "") -> str:
    """`kind`: xid (code: its number), ecc (uncorrected memory errors), lost (does not answer), retired (pages or rows)."""
    return f"gpu {gpu}: {kind} {code} x{times} {text}".rstrip()


def read(text: str) -> dict[str, Any] | None:
    """The parts of a `written` error; None for what is none."""
    found = _ERROR.fullmatch(text)
    if found is None:
        return None
    gpu, kind, code, times, words = found.groups()
    return {"gpu": int(gpu), "kind": kind, "code": int(code), "times": int(times), "text": words or ""}


class Health:
    def __init__(self, store: Store, events: Events) -> None:
        self.store, self.events = store, events
        self.told: dict[str, dict[str, int]] = store.all("gpu_errors")

    def observe(self, readings: Iterable[HostReading]) -> None:
        """Tells what is new since the last reading of each host. A host that does not answer says nothing of its GPUs."""
        for reading in readings:
            if reading.alive and (reading.gpu_errors or self.told.get(reading.name)):
                self._host(reading)

    def _host(self, reading: HostReading) -> None:
        before = self.told.get(reading.name, {})
        errors = [error for text in reading.gpu_errors if (error := read(text))]
        now = {f"{e['gpu']} {e['kind']} {e['code']}": e["times"] for e in errors}
        if now == before:
            return
        with self.store.batch():  # the events and that they were told: both on disk, or neither
            for error in errors:
                times = before.get(f"{error['gpu']} {error['kind']} {error['code']}", 0)
                if error["times"] != times:
                    rise = error["times"] - times if error["times"] > times else error["times"]
                    self.events.add("gpu_error", reading.name, **{**error, "times": rise})
            self.store.put("gpu_errors", reading.name, now)
        self.told[reading.name] = now
