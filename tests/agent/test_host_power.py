"""Wishes that change while a host is being brought to the last one."""

import asyncio
from collections.abc import Callable

import pytest

from agent.events import Events
from agent.hosts import HostReading
from agent.hosts.power import HostPower
from agent.reports import Reports
from agent.store import Store

pytestmark = pytest.mark.serverless

ROW = {"name": "h1", "power_node": "pdu-1", "gpus": 2, "gpu_min_w": 100, "gpu_max_w": 300, "cap_control": True}


class Machine:
    """A host behind its management network: limits as set, and a moment to interfere before each answer."""

    def __init__(self) -> None:
        self.limits, self.meanwhile = (100, 100), lambda: None

    def reading(self) -> HostReading:
        return HostReading("h1", True, "capped" if max(self.limits) > 100 else "parked", self.limits, 500)

    async def read(self, name: str) -> HostReading:
        return self.reading()

    async def set_limits(self, name: str, limits_w: list[int]) -> tuple[int, ...]:
        self.limits = tuple(limits_w)
        meanwhile: Callable[[], None] = self.meanwhile
        self.meanwhile = lambda: None
        meanwhile()
        return self.limits


def wish(generation: int, watts: int) -> list[dict[str, object]]:
    return [{"name": "h1", "generation": generation, "power_state": "capped", "limits_w": [watts, watts]}]


@pytest.mark.parametrize(("first", "then"), [(100, 300), (300, 100)])
def test_a_wish_that_comes_while_an_older_one_is_applied_is_not_taken_for_done(tmp_path, first, then):
    store, machine = Store(tmp_path), Machine()
    machine.limits = (then, then)  # so that the first wish has something to set
    power = HostPower(
        [ROW], machine, store, Reports(), Events(store), beat_s=5, may_raise=lambda _: True, draining=lambda _: set()
    )
    power.observe([machine.reading()], 1.0)
    power.apply(wish(1, first))
    machine.meanwhile = lambda: power.apply(wish(2, then))
    asyncio.run(power.step())
    host = power.hosts["h1"]
    assert (machine.limits, host.generation, host.applied) == ((first, first), 2, 1)
    asyncio.run(power.step())
    assert (machine.limits, host.applied) == ((then, then), 2)
    assert power.granted("h1", [0, 1]) is (then > 100)
    store.close()
