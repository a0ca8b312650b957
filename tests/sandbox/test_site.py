"""The physics and the face of the simulated site."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from sandbox.miners.fleet import INRUSH
from sandbox.site.executor import Executor
from sandbox.site.physics import BOOT_S, Physics
from sandbox.site.server import SiteServer
from sandbox.site.spec import MINER_MODELS, demo_site, host, miner, nameplate_w, node, openb_site, synthetic_site, top_w
from sandbox.site.uplink import Uplink

pytestmark = pytest.mark.serverless
ROOT = Path(__file__).resolve().parents[2]
TRACES = ROOT.parent / "shared" / "traces"


def site(cap_w=100_000, hosts=1, miners=2, **over):
    h100 = (60, 1100, 4600, 200, 700)
    return {
        "name": "t", "seed": 5, "miner_port": 0,
        "nodes": [node("site", None, "site", 10 * cap_w, fixed_w=500, gpu=1250, miner=1050), node("pdu", "site", "pdu", cap_w, **over)],
        "hosts": [host(f"h{i}", "pdu", "H100-SXM", 8, h100) for i in range(hosts)],
        "miners": [miner(i, "S21", "pdu", 0, 40) for i in range(miners)],
    }  # fmt: skip


def run(physics, seconds, dt=0.25, start=0.0):
    for i in range(int(seconds / dt)):
        physics.step(dt, start + (i + 1) * dt)


def test_a_parked_host_draws_less_than_its_parked_watts_and_a_full_one_less_than_its_nameplate():
    physics = Physics(site(miners=0))
    run(physics, 30)
    parked = float(physics.hosts.watts()[0])
    assert 900 < parked <= 1100
    physics.hosts.set_limits(0, [700] * 8)
    physics.hosts.attach("w", 0, list(range(8)), 1.0)
    run(physics, 60)
    full = float(physics.hosts.watts()[0])
    assert 8_500 < full < 4600 + 8 * 700
    assert physics.hosts.power_state(0) == "full"
    physics.hosts.set_limits(0, [300] * 8)
    run(physics, 10)
    assert float(physics.hosts.gpu_w.max()) <= 300 * 1.03
    assert physics.hosts.power_state(0) == "capped"
    physics.hosts.detach("w")
    run(physics, 30)
    assert float(physics.hosts.watts()[0]) == pytest.approx(parked, rel=0.05)


def test_limits_are_clamped_and_wrong_ones_refused():
    physics = Physics(site())
    assert physics.hosts.set_limits(0, [100] * 4 + [900] * 4) == [200] * 4 + [700] * 4
    with pytest.raises(ValueError, match="8 GPUs"):
        physics.hosts.set_limits(0, [200])
    with pytest.raises(ValueError, match="asked"):
        physics.hosts.attach("w", 0, [8], 1.0)


def test_node_watts_follow_the_overheads_with_a_lag():
    physics = Physics(site(hosts=0, miners=2))
    run(physics, 200)
    miners = float(physics.fleet.true_w.sum())
    assert float(physics.true_w[1]) == pytest.approx(miners, rel=1e-6)
    assert float(physics.true_w[0]) == pytest.approx(500 + 1.05 * miners, rel=1e-3)
    physics.fleet.asleep[:] = True
    physics.fleet._retarget(0)
    physics.fleet._retarget(1)
    run(physics, 5)
    assert float(physics.true_w[0]) > 500 + 1.05 * float(physics.fleet.true_w.sum()) + 50, (
        "the plant cools on for a while"
    )


def test_energy_adds_up():
    physics = Physics(site(hosts=1, miners=2))
    total = 0.0
    for i in range(400):
        physics.step(0.25, i * 0.25)
        total += float(physics.true_w[1]) * 0.25
    assert physics.node_j[1] == pytest.approx(total)
    assert physics.node_j[1] == pytest.approx(physics.miner_j + physics.host_j, rel=1e-9), (
        "a PDU is the sum of its devices"
    )
    assert physics.node_j[0] > physics.node_j[1]
    truth = physics.truth()
    assert truth["nodes"]["pdu"]["energy_wh"] == round(total / 3600)
    assert truth["hashing_wh"] == truth["miner_wh"] > 0


@pytest.mark.parametrize(
    ("ratio", "within", "never"), [(1.5, 25.0, False), (1.2, 60.0, False), (1.0, 600.0, True), (4.0, 0.5, False)]
)
def test_a_breaker_trips_by_its_curve(ratio, within, never):
    probe = Physics(site(hosts=0, miners=4))
    run(probe, 10)
    watts = float(probe.true_w[1])
    physics = Physics(site(cap_w=round(watts / ratio) + (10 if never else 0), hosts=0, miners=4))
    run(physics, within)
    assert bool(physics.trips) is not never
    if never:
        return
    assert physics.trips[0]["node"] == "pdu"
    assert physics.over_s[1] > 0
    assert physics.max_w[1] > physics.cap[1]
    run(physics, 5)
    assert float(physics.fleet.true_w.sum()) == 0, "devices below lose power"
    physics.reset_breaker("pdu")
    run(physics, 120)
    assert len(physics.trips) > 1 or float(physics.fleet.true_w.sum()) > 0, "and boot hashing when it closes"


@pytest.mark.parametrize(("at_once", "trips"), [(12, True), (1, False), (3, False)])
def test_boards_that_come_on_together_trip_a_breaker_that_carries_them_all_day(at_once, trips):
    """Inrush: several times what a machine draws, for half a second. The meter never sees it, and the watts that run stay under the cap."""
    physics = Physics(site(cap_w=44_000, hosts=0, miners=12))
    fleet = physics.fleet
    fleet.asleep[:] = True
    for i in range(12):
        fleet._retarget(i)
    run(physics, 60)
    read = []
    for second in range(60):
        if second % 5 == 0:
            for i in np.flatnonzero(fleet.asleep)[:at_once]:
                fleet.asleep[i] = False
                fleet._retarget(i)
        run(physics, 1, start=60.0 + second)
        read.append(physics.meters()[1][1])
    assert bool(physics.trips) is trips
    assert physics.over_s[1] == 0
    assert max(read) < 44_000
    if trips:
        assert physics.trips[0]["inrush_w"] > 3 * 44_000 > 3 * physics.trips[0]["watts"]


def test_after_an_outage_no_two_boards_come_on_in_the_same_moment():
    physics = Physics(site(cap_w=44_000, hosts=0, miners=12))
    run(physics, 10)
    physics.closed[1] = False
    physics.fleet.power_cut(np.ones(12, dtype=bool))
    run(physics, 60)
    physics.reset_breaker("pdu")
    run(physics, 120)
    assert not physics.trips
    assert float(physics.true_w[1]) == pytest.approx(float(physics.fleet.target_w.sum())), "all hash again"


@pytest.mark.parametrize("dt", [0.1, 0.25, 1.0, 5.0])
def test_a_shorter_step_makes_no_larger_inrush(dt):
    """And a step of many seconds does not put all that comes on within it into one moment."""
    physics = Physics(site(cap_w=44_000, hosts=0, miners=2))
    physics.fleet.asleep[:] = True
    for i in range(2):
        physics.fleet._retarget(i)
    run(physics, 60, dt=dt)
    physics.fleet.asleep[:] = False
    for i in range(2):
        physics.fleet._retarget(i)
    physics.step(dt, 60 + dt)
    whole = INRUSH * float(physics.fleet.target_w.sum())
    assert float(physics._surge()[1]) == pytest.approx(whole * min(1.0, 1.0 / dt))


def test_overdriven_by_a_blind_controller_it_trips_and_work_is_lost():
    physics = Physics(site(cap_w=12_000, hosts=1, miners=3))
    physics.hosts.set_limits(0, [700] * 8)
    physics.hosts.attach("plc_1", 0, list(range(8)), 1.0)
    lost = []
    for i in range(400):
        lost += physics.step(0.25, i * 0.25)
    assert lost == ["plc_1"]
    assert physics.truth()["nodes"]["pdu"]["closed"] is False
    assert physics.hosts.boot_left[0] == BOOT_S


def test_meters_lag_have_noise_and_go_stale():
    physics = Physics(site())
    run(physics, 20)
    name, watts, at = physics.meters()[1]
    assert (name, at) == ("pdu", 20.0)
    assert watts == pytest.approx(float(physics.true_w[1]), rel=0.03)
    physics.meter_stale[1] = True
    run(physics, 10, start=20.0)
    assert physics.meters()[1] == ("pdu", round(float(physics.meter_w[1])), 20.0)


def test_the_demo_site_is_tight():
    """At rest it fits; one GPU host at full power under a PDU fits only when miners there sleep; all hosts fit without miners."""
    spec = demo_site(1)
    caps = {n["name"]: n["cap_w"] for n in spec["nodes"]}
    assert len(spec["miners"]) == 60
    assert sum(h["gpus"] for h in spec["hosts"]) == 56
    for pdu in ("pdu-a1", "pdu-a2", "pdu-b1", "pdu-b2"):
        hosts = [h for h in spec["hosts"] if h["power_node"] == pdu]
        hashing = sum(top_w(m) for m in spec["miners"] if m["power_node"] == pdu)
        parked = sum(h["parked_w"] for h in hosts)
        assert parked + hashing + caps[pdu] * 0.02 <= caps[pdu]
        assert nameplate_w(hosts[0]) - hosts[0]["parked_w"] + parked + hashing > caps[pdu]
        assert sum(nameplate_w(h) for h in hosts) + caps[pdu] * 0.02 <= caps[pdu]
    site_hosts = 1.25 * sum(nameplate_w(h) for h in spec["hosts"]) + 5_000
    assert site_hosts < 0.98 * caps["site"]
    physics = Physics(spec)
    run(physics, 30)
    truth = physics.truth()
    assert all(n["max_w"] <= n["cap_w"] for n in truth["nodes"].values())
    assert demo_site(1) == demo_site(1) != demo_site(2)


def test_synthetic_and_openb_sites_fit_at_rest():
    specs = [synthetic_site(40, miners=40)]
    if TRACES.exists():
        whole = openb_site(TRACES)
        assert len(whole["hosts"]) == 1213
        assert sum(h["gpus"] for h in whole["hosts"]) == 6212
        assert len(whole["miners"]) == 1000
        specs.append(openb_site(TRACES, 100, miners=50))
    for spec in specs:
        physics = Physics(spec)
        run(physics, 10)
        assert all(n["max_w"] < n["cap_w"] for n in physics.truth()["nodes"].values())
        assert max(np.bincount(physics.host_node)) <= 16
    with pytest.raises(FileNotFoundError):
        openb_site("/nonexistent")
    assert all(ladder[0][0] == "sleep" for ladder in MINER_MODELS.values())


# --- over HTTP


def test_the_management_interface():
    async def go():
        server = SiteServer(site(hosts=2), speed=20)
        await server.start()
        async with httpx.AsyncClient(base_url=server.httpd.url, trust_env=False) as client:
            inventory = (await client.get("/inventory")).json()
            assert inventory["miners"][0]["address"] == f"127.40.0.1:{server.miners.port}"
            state = (await client.get("/state?since=0")).json()
            assert len(state["hosts"]) == 2
            assert (await client.post("/hosts/h0/limits", json={"limits_w": [700] * 8})).json() == {
                "limits_w": [700] * 8
            }
            assert (await client.post("/hosts/h0/limits", json={"limits_w": [700]})).status_code == 400
            assert (await client.get("/hosts/nobody")).status_code == 404
            row = (
                await client.post("/hosts/h0/work", json={"id": "w1", "command": ["sleep", "0.3"], "gpus": [0]})
            ).json()
            assert row["state"] == "running"
            for _ in range(100):
                await asyncio.sleep(0.05)
                work = (await client.get(f"/state?since={state['version']}")).json()["work"]
                if work and work[0]["state"] == "exited":
                    break
            assert (work[0]["id"], work[0]["exit_code"]) == ("w1", 0)
            assert not server.physics.hosts.workloads
            await client.post("/control/fault", json={"kind": "host", "name": "h1", "fault": "dies"})
            assert (await client.get("/hosts/h1")).status_code == 504
            await client.post("/hosts/h0/power", json={"state": "off"})
            assert (await client.post("/hosts/h0/limits", json={"limits_w": [700] * 8})).status_code == 409
            await client.post("/control/fault", json={"kind": "link", "fault": "cut"})
            with pytest.raises(httpx.HTTPError):
                await client.get("/meters")
            assert "nodes" in (await client.get("/truth")).json()
            assert (await client.post("/control/fault", json={"kind": "cat", "fault": "x"})).status_code == 400
        await server.stop()

    asyncio.run(go())


def test_as_a_process_it_serves_and_leaves_its_record(tmp_path):
    spec, record = tmp_path / "spec.json", tmp_path / "truth.json"
    spec.write_text(json.dumps(demo_site(3, miner_port=0)))
    command = [sys.executable, "-m", "sandbox.site", "--spec", str(spec), "--record", str(record), "--speed", "10"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().split()[2].rstrip(",")
        truth = httpx.get(f"{url}/truth", trust_env=False).json()
        assert truth["site"] == "demo"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert json.loads(record.read_text())["trips"] == []
    wrong = subprocess.run(
        [*command[:4], str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "none" in wrong.stderr


def test_the_uplink_forwards_and_can_be_cut():
    async def go():
        server = SiteServer(site(miners=1))
        await server.start()
        line = Uplink(f"127.0.0.1:{server.httpd.port}")
        await line.start()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{line.port}", trust_env=False) as client:
            assert (await client.get("/truth")).status_code == 200
            line.cut = True
            with pytest.raises(httpx.HTTPError):
                await client.get("/truth")
            line.cut = False
            assert (await client.get("/truth")).status_code == 200
        await line.stop()
        await server.stop()

    asyncio.run(go())


def test_virtual_training_saves_its_state_as_it_goes_and_when_it_is_asked_to_leave():
    made = Executor()
    train, sleep = (made.start(key, "h0", command, [0], {}, 100.0) for key, command in
                    (("a", ["train", "60", "10"]), ("b", ["sleep", "60"])))  # fmt: skip
    made.step(100.0)
    seen = [(at, made.step(at), train.row()["checkpoint_at"]) for at in (105.0, 110.0, 119.0, 145.0)]
    assert seen == [(105.0, [], None), (110.0, ["a"], 110.0), (119.0, [], 110.0), (145.0, ["a"], 140.0)]
    assert made.signal("a", "TERM", 147.5).row()["checkpoint_at"] == 147.5
    assert made.signal("b", "KILL", 147.5).row()["checkpoint_at"] is None
    assert (train.exit_code, made.step(200.0), train.checkpoint_at) == (143, ["a", "b"], 147.5)
    whole = made.start("c", "h0", ["train", "60", "25"], [0], {}, 300.0)
    made.step(900.0)
    assert (whole.exit_code, whole.checkpoint_at, whole.finished_at) == (0, 350.0, 360.0)
    assert made.start("d", "h0", ["train", "60", "0"], [0], {}, 300.0).exit_code == 127
    assert sleep.checkpoint_at is None
