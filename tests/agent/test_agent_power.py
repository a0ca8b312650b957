"""Miners, limits and the safety loop of a running agent, against a simulated site that keeps its own physics."""

import pytest

from tests.agent.peer import drive, small_site, until

pytestmark = pytest.mark.serverless


def safety(control, cap_w, order=("m0002", "m0000", "m0001")):
    site = small_site(cap_w=10 * cap_w)["nodes"][0]
    nodes = [row | {"margin_w": 0} for row in (site, site | {"name": "pdu-1", "parent": "site", "cap_w": cap_w})]
    generation = (control.safety or {"generation": 0})["generation"] + 1
    control.safety = {"generation": generation, "nodes": nodes, "shed_order": list(order)}
    control.bump()


def test_over_cap_is_shed_by_the_site_itself_and_latched(tmp_path):
    """Three miners and two parked hosts draw about 12 kW; the cap falls to 9.5 kW: one machine must sleep, the first of the order."""

    async def check(world, control):
        await until(lambda: len(control.seen["miners"]) == 3, "miners")
        safety(control, 9_500)
        await until(lambda: control.seen["miners"]["m0002"][1] == "sleep", "the first of the order sleeps")
        await until(lambda: control.seen["meters"]["pdu-1"][1] < 9_500, "under the cap")
        assert {"over_cap", "over_cap_shed", "miner_shed"} <= control.kinds()
        assert [control.seen["miners"][m][1] for m in ("m0000", "m0001")] == ["normal", "normal"]
        assert control.seen["miners"]["m0002"][2] == 0, "no generation of control was applied"
        # Latched: room alone does not wake it, and a restart does not forget it; a new generation does.
        safety(control, 50_000)
        world.agent.kill()
        world.agent.start()
        count = len(control.syncs)
        await until(lambda: len(control.syncs) > count + 6, "time passes")
        assert control.seen["miners"]["m0002"][1] == "sleep"
        control.command("m0002", "normal")
        await until(lambda: control.seen["miners"]["m0002"][3] > 3000, "awake")

    drive(tmp_path, check)


async def drawing(world, control):
    """A job on all GPUs of a host, under a cap that is far away; its node's meter has seen it."""
    await world.granted()
    safety(control, 100_000)
    control.place("plc_1", ["sleep", "600"], gpus=tuple(range(8)))
    await until(lambda: control.state("plc_1") == "running", "running")
    await until(lambda: control.seen["meters"].get("pdu-1", [0, 0])[1] > 8_000, "it draws")


def test_with_no_miner_left_gpu_limits_fall_to_the_floor(tmp_path):
    async def check(world, control):
        await drawing(world, control)
        safety(control, 7_500)
        await until(lambda: control.seen["hosts"]["h001"]["limits_w"] == [200] * 8, "capped")
        assert control.state("plc_1") == "running", "capped, not evicted"
        assert control.seen["hosts"]["h001"]["generation"] == 1

    drive(tmp_path, check, spec=small_site(miners=0))


def test_where_the_floor_is_not_enough_the_job_is_ended_last(tmp_path):
    async def check(world, control):
        await drawing(world, control)
        safety(control, 3_000)  # less than the hosts draw with nothing on them
        await until(lambda: control.state("plc_1") == "exited", "ended by the site itself")
        assert control.row("plc_1")["reason"] == "power_shed"
        assert control.seen["hosts"]["h001"]["limits_w"] == [200] * 8, "capped first"
        assert {"over_cap_shed", "placement_shed"} <= control.kinds()

    drive(tmp_path, check, spec=small_site(miners=0))


def test_soft_limit_holds_wakes_and_a_stale_meter_holds_all(tmp_path):
    async def check(world, control):
        await until(lambda: len(control.seen["miners"]) == 3, "miners")
        control.command("m0000", "sleep")
        await until(lambda: control.seen["miners"]["m0000"][3] < 60, "asleep")
        await until(lambda: control.seen["meters"]["pdu-1"][1] < 9_000, "the meter follows")
        world.site.physics.meter_stale[1] = True
        await until(lambda: "meter_stale" in control.kinds(), "stale")
        control.command("m0000", "normal")
        control.place("plc_1", ["sleep", "60"])
        control.limits("h001", [700] * 8, "full")
        await until(lambda: control.row("plc_1").get("reason") == "waiting_meter", "no start")
        assert control.seen["miners"]["m0000"][1] == "sleep"
        assert control.seen["hosts"]["h001"]["limits_w"] == [200] * 8
        control.forget("plc_1")
        safety(control, round(float(world.site.physics.true_w[1]) / 0.97))
        world.site.physics.meter_stale[1] = False
        await until(
            lambda: control.seen["hosts"]["h001"]["limits_w"] == [700] * 8, "fresh again: control's grant is obeyed"
        )
        count = len(control.syncs)
        await until(lambda: len(control.syncs) > count + 4, "time passes")
        assert control.seen["miners"]["m0000"][1] == "sleep", "but no wake above 95 %"

    drive(tmp_path, check)


def two_pdus():
    """A host and a miner on each of two PDUs."""
    spec = small_site(miners=2)
    first = spec["nodes"][1]
    spec["nodes"].append({**first, "name": "pdu-2"})
    spec["hosts"][1]["power_node"] = spec["miners"][1]["power_node"] = "pdu-2"
    return spec


def test_a_node_over_its_cap_holds_back_only_what_it_carries(tmp_path):
    async def check(world, control):
        await until(lambda: len(control.seen["meters"]) == 3, "meters")
        root = two_pdus()["nodes"][0] | {"margin_w": 0}
        pdus = [root | {"name": f"pdu-{i}", "parent": "site", "cap_w": 100_000} for i in (1, 2)]
        # Its own load is more than what can be shed there: it stays over.
        control.safety = {"generation": 1, "nodes": [root, pdus[0] | {"cap_w": 500}, pdus[1]], "shed_order": []}
        control.bump()
        await until(lambda: "over_cap" in control.kinds(), "pdu-1 is over")
        for host in ("h001", "h002"):
            control.limits(host, [700] * 8, "full")
        control.place("plc_1", ["sleep", "60"], host="h001")
        control.place("plc_2", ["sleep", "60"], host="h002")
        await until(lambda: control.state("plc_2") == "running", "pdu-2 has its watts, and starts")
        assert control.row("plc_1")["reason"] == "waiting_power"
        assert control.seen["hosts"]["h001"]["limits_w"] == [200] * 8
        assert control.seen["miners"]["m0001"][1] == "normal"
        control.safety = {"generation": 2, "nodes": [root, *pdus], "shed_order": []}
        control.bump()
        await until(lambda: control.state("plc_1") == "running", "no longer over")

    drive(tmp_path, check, spec=two_pdus())


@pytest.mark.parametrize("mode", ["shed", "off"])
def test_modes_lower(tmp_path, mode):
    async def check(world, control):
        await world.granted()
        control.place("plc_1", ["sleep", "60"])
        await until(lambda: control.state("plc_1") == "running", "running")
        control.mode = mode
        control.bump()
        await until(lambda: all(row[1] == "sleep" for row in control.seen["miners"].values()), "all asleep")
        if mode == "off":
            await until(lambda: control.state("plc_1") == "exited", "drained")
            assert control.row("plc_1")["reason"] == "power_shed"
        else:
            assert control.state("plc_1") == "running"
        control.place("plc_2", ["sleep", "60"], gpus=(1,))
        await until(lambda: control.row("plc_2").get("reason") == "waiting_mode", "no start")

    drive(tmp_path, check)


def test_miners_that_ignore_or_come_back_are_commanded_again(tmp_path):
    async def check(world, control):
        fleet = world.site.physics.fleet
        await until(lambda: len(control.seen["miners"]) == 3, "miners")
        fleet.set_fault("m0000", "ack_ignore")
        control.command("m0000", "sleep")
        control.command("m0001", "sleep")
        await until(lambda: control.seen["miners"]["m0001"][3] < 60, "the honest one sleeps")
        assert control.seen["miners"]["m0000"][1] == "normal", "the ledger sees what is, not what was acknowledged"
        fleet.set_fault("m0001", "reboot_running")
        await until(lambda: "miner_found_hashing" in control.kinds(), "found hashing")
        await until(lambda: control.seen["miners"]["m0001"][1] == "sleep" and fleet.asleep[1], "slept again")
        fleet.set_fault("m0000", "")
        await until(lambda: control.seen["miners"]["m0000"][3] < 60, "asked again until it obeys")
        fleet.set_fault("m0002", "hang")
        await until(lambda: "miner_not_answering" in control.kinds(), "said once")

    drive(tmp_path, check)
