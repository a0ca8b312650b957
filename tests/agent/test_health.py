"""Errors of GPUs are told once each: over a restart of the agent, over a lost line, over a device whose counter starts anew."""

import asyncio

import pytest

from agent.events import Events
from agent.hosts import HostReading
from agent.hosts.health import Health, read, written
from agent.store import Store
from tests.agent.peer import drive, until

pytestmark = pytest.mark.serverless


def reading(*errors, alive=True):
    return HostReading("h001", alive, "full", (700,), 900, errors)


def told(store):
    """(GPU, kind, code, times) of the events on disk."""
    rows = sorted(store.all("event").values(), key=lambda e: e["at"])
    return [tuple(e["data"][k] for k in ("gpu", "kind", "code", "times")) for e in rows]


def test_what_is_written_can_be_read():
    assert read(written(3, "xid", 79, 2, "fell off the bus")) == {
        "gpu": 3, "kind": "xid", "code": 79, "times": 2, "text": "fell off the bus"
    }  # fmt: skip
    assert read(written(0, "ecc", 0, 1))["text"] == ""
    assert read("something else") is None


def test_each_rise_is_told_once_and_a_restart_tells_nothing_again(tmp_path):
    store = Store(tmp_path)
    health = Health(store, Events(store))
    for seen in (
        [written(3, "xid", 79, 1)],
        [written(3, "xid", 79, 1)],
        [written(3, "xid", 79, 3), written(1, "ecc", 0, 1)],
    ):
        health.observe([reading(*seen)])
    assert sorted(told(store)) == [(1, "ecc", 0, 1), (3, "xid", 79, 1), (3, "xid", 79, 2)]  # of one instant
    health = Health(store, Events(store))
    health.observe([reading(*seen)])
    health.observe([reading(alive=False)])  # says nothing of its GPUs
    assert len(told(store)) == 3
    health.observe([reading(written(3, "xid", 79, 1))])  # its driver came up anew, and counts anew
    assert sorted(told(store)) == [(1, "ecc", 0, 1), (3, "xid", 79, 1), (3, "xid", 79, 1), (3, "xid", 79, 2)]
    store.close()


def test_an_error_reaches_control_once_over_a_lost_line_and_a_restart(tmp_path):
    def heard(control):
        return sorted(
            (e["subject"], e["data"]["gpu"], e["data"]["code"], e["data"]["times"])
            for e in control.events.values()
            if e["kind"] == "gpu_error"
        )

    async def check(world, control):
        await until(lambda: control.seen["hosts"].get("h001"), "beat")
        control.drop_answers = 2
        world.site.physics.hosts.set_error("h001", 2, "xid 79")
        await until(lambda: heard(control) == [("h001", 2, 79, 1)], "told")
        await until(lambda: control.seen["hosts"]["h001"]["gpu_errors"] == ["gpu 2: xid 79 x1"], "shown")
        world.agent.kill()
        world.site.physics.hosts.set_error("h001", 2, "xid 79")
        world.agent.start()
        await until(lambda: len(heard(control)) == 2, "told again")
        await asyncio.sleep(1)
        assert heard(control) == [("h001", 2, 79, 1), ("h001", 2, 79, 1)]

    drive(tmp_path, check)
