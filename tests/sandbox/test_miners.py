"""The simulated LuxOS fleet as a client sees it on the wire. (The drivers' suite is tests/agent/test_miner_conformance.py.)"""

import asyncio
import json

import numpy as np
import pytest

from sandbox.miners import Fleet, FleetServer
from sandbox.site.spec import miner

pytestmark = pytest.mark.serverless
COMMANDS = ("version", "config", "profiles", "pools", "groups", "stats", "power", "session")


async def ask(address, port, payload):
    reader, writer = await asyncio.open_connection(address, port)
    for part in payload if isinstance(payload, list) else [payload]:
        writer.write(part.encode())
        await writer.drain()
        await asyncio.sleep(0.01)
    raw = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert raw.endswith(b"\0")
    return json.loads(raw[:-1])


def drive(check):
    async def go():
        fleet = Fleet([miner(i, "S21", "pdu", 0, 50) for i in range(300)], seed=2, speed=10)
        server = FleetServer(fleet, 0)
        await server.start()
        try:
            await check(fleet, server)
        finally:
            await server.stop()

    asyncio.run(go())


def test_one_socket_serves_every_address():
    async def check(_fleet, server):
        assert len(server.servers) == 1
        serials = set()
        for address in ("127.50.0.1", "127.50.0.250", "127.50.1.50"):
            serials.add((await ask(address, server.port, '{"command":"config"}'))["CONFIG"][0]["SerialNumber"])
        assert len(serials) == 3
        reader, writer = await asyncio.open_connection("127.50.9.9", server.port)
        data = await asyncio.gather(reader.read(), return_exceptions=True)
        assert data[0] == b"" or isinstance(data[0], ConnectionError), "no miner lives there"
        writer.close()

    drive(check)


def test_every_command_answers_in_the_cgminer_shape():
    async def check(_fleet, server):
        for command in COMMANDS:
            answer = await ask("127.50.0.1", server.port, json.dumps({"command": command}))
            assert answer["STATUS"][0]["STATUS"] == "S", command
        version = await ask("127.50.0.1", server.port, '{"command":"version"}')
        assert "LUXminer" in version["VERSION"][0]
        joined = await ask("127.50.0.1", server.port, '{"command":"config+power"}')
        assert joined["power"][0]["POWER"][0]["Watts"] > 3000
        assert joined["config"][0]["CONFIG"][0]["Profile"] == "normal"
        split = await ask("127.50.0.1", server.port, ['{"comm', 'and":"power"}'])
        assert split["POWER"][0]["Watts"] > 3000, "a request may come in pieces and without a newline"
        unknown = await ask("127.50.0.1", server.port, '{"command":"dance"}')
        assert unknown["STATUS"][0]["STATUS"] == "E"

    drive(check)


def test_privileged_commands_need_the_session():
    async def check(fleet, server):
        where = ("127.50.0.1", server.port)
        bad = await ask(*where, '{"command":"curtail","parameter":"nope,sleep"}')
        assert bad["STATUS"][0]["STATUS"] == "E"
        session = (await ask(*where, '{"command":"logon"}'))["SESSION"][0]["SessionID"]
        other = await ask(*where, '{"command":"logon"}')
        assert "Another session" in other["STATUS"][0]["Msg"]
        good = await ask(*where, json.dumps({"command": "curtail", "parameter": f"{session},sleep"}))
        assert good["STATUS"][0]["STATUS"] == "S"
        assert fleet.asleep[0]
        assert not fleet.asleep[1]
        assert (await ask(*where, json.dumps({"command": "logoff", "parameter": session})))["STATUS"][0][
            "STATUS"
        ] == "S"
        assert (await ask(*where, '{"command":"logon"}'))["STATUS"][0]["STATUS"] == "S"

    drive(check)


def test_ramps_power_cuts_and_sleep_over_a_reboot():
    fleet = Fleet([miner(i, "S21", "pdu", 0, 50) for i in range(2)], seed=2)
    before = fleet.true_w.copy()
    fleet.asleep[0] = True
    fleet._retarget(0)
    fleet.step(1.0)
    assert 25 < fleet.true_w[0] < before[0], "down in seconds, not at once"
    for _ in range(10):
        fleet.step(1.0)
    assert fleet.true_w[0] < 26
    fleet.asleep[0] = False
    fleet._retarget(0)
    fleet.step(5.0)
    assert fleet.true_w[0] < 1000, "up takes longer than down"
    for _ in range(60):
        fleet.step(1.0)
    assert fleet.true_w[0] == pytest.approx(before[0])
    cut = np.array([True, True])
    fleet.power_cut(cut)
    fleet.step(1.0, ~cut)
    assert fleet.true_w.sum() == 0
    assert fleet.true_gh.sum() == 0
    with pytest.raises(ValueError, match="unknown miner fault"):
        fleet.set_fault("m0000", "explodes")
    with pytest.raises(KeyError):
        fleet.set_fault("m9999", "hang")
