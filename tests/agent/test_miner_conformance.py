"""One suite for every miner driver, against the simulated fleet over real sockets, with all of its faults.

What an adapter cannot tell or do stands in its row of ADAPTERS; all else is asked of each.
"""

import asyncio
import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.miners import MinerError
from agent.miners.adapters import ADAPTERS as DRIVERS
from agent.miners.adapters import ASIC_RS, LUXOS, driver_of
from sandbox.miners import FAULTS, Fleet, FleetServer
from sandbox.site.spec import miner
from tests.agent.peer import until

pytestmark = pytest.mark.serverless
# `asic-rs` asks at the port that the firmware has, so its machines need addresses that no other test run has.
BLOCK = 128 + os.getpid() % 100


@dataclass(frozen=True)
class Adapter:
    driver: str
    port: int = 0
    keeps_open: bool = False
    names_modes: bool = True  # reads the mode; else it is told from the watts
    profiles: bool = True  # sets any mode of a LuxOS machine
    kinds: tuple[str, str, str, str] = ("timeout", "unreachable", "garbled", "refused")


ADAPTERS = {
    "luxos": Adapter(LUXOS),
    "luxos-kept-open": Adapter(LUXOS, keeps_open=True),
    "asic-rs": Adapter(ASIC_RS, 4028, names_modes=False, profiles=False, kinds=("timeout", *["unreachable"] * 3)),
}


@pytest.fixture(params=ADAPTERS)
def adapter(request):
    return ADAPTERS[request.param]


@contextlib.asynccontextmanager
async def served(adapter, count=2, speed=20.0):
    rows = [miner(i, "S21", "pdu-1", adapter.port, BLOCK) for i in range(count)]
    fleet = Fleet(rows, seed=7, speed=speed)
    server = FleetServer(fleet, adapter.port, keeps_open=adapter.keeps_open, shared=not adapter.port)
    try:
        await server.start()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            pytest.skip(f"port {adapter.port} is in use on this machine, and the firmware has no other")
        raise
    for row in rows:
        row["address"] = f"{row['address'].split(':')[0]}:{server.port}"
        row["driver"] = adapter.driver
    try:
        yield server, [driver_of(row, timeout_s=0.6) for row in rows]
    finally:
        await server.stop()


def settle(fleet, seconds=10.0):
    for _ in range(int(seconds / 0.1)):
        fleet.step(0.1)


def drive(adapter, check):
    async def go():
        async with served(adapter) as (server, drivers):
            await check(server.fleet, *drivers)

    asyncio.run(go())


def test_identify_and_capabilities(adapter):
    async def check(_fleet, one, two):
        assert (await one.identify()).model == "Antminer S21"
        assert (await one.identify()).serial != (await two.identify()).serial
        found = await one.capabilities()
        assert found.sleep
        assert found.set_watts is adapter.profiles
        ladder = [("sleep", 25, 0), ("eco", 2400, 155_000), ("normal", 3500, 200_000)]
        assert list(found.modes) == (ladder if adapter.profiles else [ladder[0], ladder[2]])

    drive(adapter, check)


def test_sleep_is_confirmed_by_watts_and_wake_comes_back(adapter):
    async def check(fleet, one, two):
        before = await one.read()
        assert before.mode == "normal"
        assert before.watts > 3000
        await one.sleep()
        acknowledged = await one.read()
        assert acknowledged.mode == ("sleep" if adapter.names_modes else "normal")
        assert acknowledged.watts > 3000, "an acknowledgement is not a watt"
        settle(fleet)
        asleep = await one.read()
        assert (asleep.mode, asleep.gh_s) == ("sleep", 0)
        assert asleep.watts < 60
        assert (await two.read()).watts > 3000, "the neighbour is another machine"
        await one.wake()
        settle(fleet)
        awake = await one.read()
        assert awake.mode == "normal"
        assert awake.watts > 3000
        assert 180_000 < awake.gh_s <= 200_000

    drive(adapter, check)


def test_every_mode_it_says_it_has_can_be_set_and_no_other(adapter):
    async def check(fleet, one, _two):
        able = await one.capabilities()
        for mode, watts, _ in (*reversed(able.modes), *able.modes):
            await one.set_mode(mode)
            settle(fleet)
            reading = await one.read()
            assert reading.mode == mode
            assert 0.9 * watts < reading.watts < 1.05 * watts
        refused = {"turbo", "sleep", "eco", "normal"} - {mode for mode, _, _ in able.modes}
        for mode in refused:
            with pytest.raises(MinerError) as error:
                await one.set_mode(mode)
            assert error.value.kind == "refused"
        assert (await one.read()).mode == able.modes[-1][0], "a refusal changes nothing"

    drive(adapter, check)


def test_set_watts(adapter):
    async def check(_fleet, one, _two):
        if (await one.capabilities()).set_watts:
            assert await one.set_watts(9_000) == "normal"
            assert await one.set_watts(3_000) == "eco"
        else:
            with pytest.raises(MinerError, match="has no set_power_limit") as error:
                await one.set_watts(3_000)
            assert error.value.kind == "refused"
        with pytest.raises(MinerError, match="below its lowest") as error:
            await one.set_watts(100)
        assert error.value.kind == "refused"

    drive(adapter, check)


def test_commands_repeat_without_harm(adapter):
    async def check(fleet, one, _two):
        for _ in range(3):
            await one.sleep()
        settle(fleet)
        assert (await one.read()).watts < 60

    drive(adapter, check)


@pytest.mark.parametrize("fault", ["hang", "refuse", "truncated", "error_status"])
@pytest.mark.parametrize("met", [False, True])
def test_faults_of_the_line_are_named_and_pass(adapter, fault, met):
    """Also on a machine that has never been met: then the firmware is still to be found out."""
    kind = adapter.kinds[("hang", "refuse", "truncated", "error_status").index(fault)]

    async def check(fleet, one, two):
        if met:
            await one.read()
        fleet.set_fault("m0000", fault)
        for call in (one.read, one.sleep, one.wake):
            with pytest.raises(MinerError) as error:
                await call()
            assert error.value.kind == kind
        assert not fleet.asleep[0]
        assert (await two.read()).watts > 3000
        fleet.set_fault("m0000", "")
        assert (await one.read()).watts > 3000

    drive(adapter, check)


def test_acknowledged_and_ignored_is_seen_by_reading(adapter):
    async def check(fleet, one, _two):
        fleet.set_fault("m0000", "ack_ignore")
        await one.sleep()
        settle(fleet)
        reading = await one.read()
        assert reading.mode == "normal"
        assert reading.watts > 3000
        fleet.set_fault("m0000", "")
        await one.sleep()
        settle(fleet)
        assert (await one.read()).mode == "sleep", "asked once more, by a session of its own"

    drive(adapter, check)


def test_a_stolen_session_is_taken_back_once(adapter):
    async def check(fleet, one, _two):
        fleet.set_fault("m0000", "session_stolen")
        await one.sleep()
        settle(fleet)
        assert (await one.read()).watts < 60
        fleet.set_fault("m0000", "session_stolen")
        await one.wake()  # which goes under no session but its own
        settle(fleet)
        assert (await one.read()).watts > 3000

    drive(adapter, check)


def test_slow_ramp_frozen_and_wrong_readings(adapter):
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

    drive(adapter, check)


@pytest.mark.parametrize(("fault", "mode"), [("reboot_running", "normal"), ("asleep_after_reboot", "sleep")])
def test_reboots(adapter, fault, mode):
    async def check(fleet, one, _two):
        await (one.sleep if fault == "reboot_running" else one.wake)()
        settle(fleet)
        fleet.set_fault("m0000", fault)
        with pytest.raises(MinerError):
            await one.read()
        settle(fleet, 40)
        assert (await one.read()).mode == mode

    drive(adapter, check)


def test_who_refuses_to_share_its_session_cannot_keep_a_machine_awake():
    """LuxOS has one session, and a dashboard may hold it. Watts are not to wait for that; a wake can."""
    adapter = ADAPTERS["luxos"]

    async def check(fleet, one, _two):
        fleet.sessions[0] = ("theirs", float("inf"))
        with pytest.raises(MinerError) as error:
            await one.wake()
        assert error.value.kind == "session"
        await one.sleep()
        settle(fleet)
        assert (await one.read()).watts < 60
        assert fleet.sessions[0][0] == "theirs", "and it is still theirs"

    drive(adapter, check)


@pytest.mark.parametrize(("keeps_open", "connections"), [(True, 1), (False, 3)])
def test_connections_are_reused_where_the_firmware_allows(keeps_open, connections):
    async def go():
        async with served(Adapter(LUXOS, keeps_open=keeps_open), count=1) as (server, (one,)):
            await one.sleep()  # it learns what this firmware does
            before = server.accepted
            await one.sleep()  # logon, curtail, logoff
            assert server.accepted - before == connections
            await until(lambda: not server.lines, "nothing is left open between two turns", 5)

    asyncio.run(go())


def test_pools_say_where_the_hashes_go():
    async def check(_fleet, one, _two):
        (pool,) = await one.pools()
        assert (pool.url, pool.user, pool.alive, pool.quota) == ("stratum+tcp://pool.invalid:3333", "sim", True, 1)

    drive(ADAPTERS["luxos"], check)


def test_a_driver_that_nobody_knows_is_named():
    with pytest.raises(ValueError, match="miner m0000: driver 'antique' is not known; known: luxos, asic-rs"):
        driver_of(miner(0, "S21", "pdu-1", 4028, 31) | {"driver": "antique"})


def test_every_driver_passes_this_suite():
    assert {adapter.driver for adapter in ADAPTERS.values()} == set(DRIVERS)


def test_every_fault_has_a_test_here():
    text = Path(__file__).read_text(encoding="utf-8")
    assert len(FAULTS) == 11
    assert all(f'"{fault}"' in text for fault in FAULTS)
