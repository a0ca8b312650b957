"""One suite for every miner driver, against the simulated fleet over real sockets, with all of its faults."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from agent.miners import MinerError
from agent.miners.luxos import LuxosMiner
from sandbox.miners import FAULTS, Fleet, FleetServer
from sandbox.site.spec import miner

pytestmark = pytest.mark.serverless


@contextlib.asynccontextmanager
async def served(count=2, speed=20.0):
    rows = [miner(i, "S21", "pdu-1", 0, 31) for i in range(count)]
    fleet = Fleet(rows, seed=7, speed=speed)
    server = FleetServer(fleet, 0)
    await server.start()
    drivers = [LuxosMiner(r["address"].split(":")[0], server.port, r["modes"], timeout_s=0.6) for r in rows]
    try:
        yield fleet, drivers
    finally:
        await server.stop()


def settle(fleet, seconds=10.0):
    for _ in range(int(seconds / 0.1)):
        fleet.step(0.1)


def drive(check, **options):
    async def go():
        async with served(**options) as (fleet, drivers):
            await check(fleet, *drivers)

    asyncio.run(go())


def test_identify_and_capabilities():
    async def check(_fleet, one, two):
        assert (await one.identify()).model == "Antminer S21"
        assert (await one.identify()).serial != (await two.identify()).serial
        found = await one.capabilities()
        assert found.sleep
        assert found.modes == (("sleep", 25, 0), ("eco", 2400, 155_000), ("normal", 3500, 200_000))

    drive(check)


def test_sleep_is_confirmed_by_watts_and_wake_comes_back():
    async def check(fleet, one, two):
        before = await one.read()
        assert before.mode == "normal"
        assert before.watts > 3000
        await one.sleep()
        acknowledged = await one.read()
        assert acknowledged.mode == "sleep"
        assert acknowledged.watts > 3000, "an acknowledgement is not a watt"
        settle(fleet)
        asleep = await one.read()
        assert asleep.watts < 60
        assert asleep.gh_s == 0
        assert (await two.read()).watts > 3000, "the neighbour is another machine"
        await one.wake()
        settle(fleet)
        awake = await one.read()
        assert awake.mode == "normal"
        assert awake.watts > 3000
        assert awake.gh_s > 180_000

    drive(check)


def test_set_mode_and_set_watts():
    async def check(fleet, one, _two):
        await one.set_mode("eco")
        settle(fleet)
        reading = await one.read()
        assert reading.mode == "eco"
        assert 2200 < reading.watts < 2450
        assert await one.set_watts(9_000) == "normal"
        assert await one.set_watts(3_000) == "eco"
        with pytest.raises(MinerError, match="below its lowest") as refused:
            await one.set_watts(100)
        assert refused.value.kind == "refused"
        with pytest.raises(MinerError, match="no mode"):
            await one.set_mode("turbo")

    drive(check)


def test_commands_repeat_without_harm():
    async def check(fleet, one, _two):
        for _ in range(3):
            await one.sleep()
        settle(fleet)
        assert (await one.read()).watts < 60

    drive(check)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("hang", "timeout"), ("refuse", "unreachable"), ("truncated", "garbled"), ("error_status", "refused")],
)
def test_faults_of_the_line_are_named_and_pass(fault, kind):
    async def check(fleet, one, two):
        fleet.set_fault("m0000", fault)
        for call in (one.read, one.sleep, one.wake):
            with pytest.raises(MinerError) as error:
                await call()
            assert error.value.kind == kind
        assert (await two.read()).watts > 3000
        fleet.set_fault("m0000", "")
        assert (await one.read()).watts > 3000

    drive(check)


def test_acknowledged_and_ignored_is_seen_by_reading():
    async def check(fleet, one, _two):
        fleet.set_fault("m0000", "ack_ignore")
        await one.sleep()
        settle(fleet)
        reading = await one.read()
        assert reading.mode == "normal"
        assert reading.watts > 3000

    drive(check)


def test_a_stolen_session_is_taken_back_once():
    async def check(fleet, one, _two):
        fleet.set_fault("m0000", "session_stolen")
        await one.sleep()
        settle(fleet)
        assert (await one.read()).watts < 60

    drive(check)


def test_slow_ramp_frozen_and_wrong_readings():
    async def check(fleet, one, two):
        fleet.set_fault("m0000", "slow_ramp")
        fleet.set_fault("m0001", "frozen_reading")
        await one.sleep()
        await two.sleep()
        settle(fleet, 1.0)
        assert (await one.read()).watts > 1500, "still on its way down"
        settle(fleet)
        assert (await one.read()).watts < 60
        assert (await two.read()).watts > 3000, "frozen: says what it said"
        assert fleet.true_w[1] < 60, "but it sleeps"
        fleet.set_fault("m0001", "wattage_off", factor=1.2)
        await two.wake()
        settle(fleet)
        assert (await two.read()).watts == pytest.approx(1.2 * fleet.true_w[1], rel=0.03)

    drive(check)


@pytest.mark.parametrize(("fault", "mode"), [("reboot_running", "normal"), ("asleep_after_reboot", "sleep")])
def test_reboots(fault, mode):
    async def check(fleet, one, _two):
        await (one.sleep if fault == "reboot_running" else one.wake)()
        settle(fleet)
        fleet.set_fault("m0000", fault)
        with pytest.raises(MinerError):
            await one.read()
        settle(fleet, 40)
        assert (await one.read()).mode == mode

    drive(check)


def test_every_fault_has_a_test_here():
    text = Path(__file__).read_text(encoding="utf-8")
    assert len(FAULTS) == 11
    assert all(f'"{fault}"' in text for fault in FAULTS)
