"""The agent as a process of its own, against a control peer and a simulated site over real sockets."""

import asyncio
import json
import sys

import psutil
import pytest

from tests.agent.peer import drive, job_pids, until

pytestmark = pytest.mark.serverless


def test_the_main_road(tmp_path):
    """Inventory, limits before work, a job with its log, miners down and up, and the site never over its cap."""

    async def check(world, control):
        await until(lambda: control.inventory, "inventory")
        assert [h["name"] for h in control.inventory["hosts"]] == ["h001", "h002"]
        assert control.inventory["miners"][0]["modes"][0] == ["sleep", 25, 0]
        script = "import os;print(os.environ['RANK'], os.environ['CUDA_VISIBLE_DEVICES'], os.environ['TOKEN'])"
        control.place("plc_1", [sys.executable, "-c", script], gpus=(0, 3), secrets={"TOKEN": "very-secret"})
        await until(
            lambda: control.row("plc_1").get("reason") == "waiting_limits", "no start before the limits are read back"
        )
        assert control.state("plc_1") == "starting"
        await world.granted()
        await until(lambda: control.state("plc_1") == "exited", "exit")
        row = control.row("plc_1")
        assert (row["exit_code"], row["reason"]) == (0, "")
        assert row["running_at"] <= row["finished_at"]
        await until(lambda: control.text("plc_1") == "0 0,3 ***********\n", "the log, redacted")
        control.command("m0000", "sleep")
        await until(
            lambda: control.seen["miners"]["m0000"][1] == "sleep" and control.seen["miners"]["m0000"][3] < 60, "asleep"
        )
        assert control.seen["miners"]["m0000"][2] == control.miners["m0000"][2]
        control.command("m0000", "eco")
        await until(
            lambda: control.seen["miners"]["m0000"][1] == "eco" and control.seen["miners"]["m0000"][3] > 2200, "eco"
        )
        control.forget("plc_1")
        await until(lambda: not (world.agent.state / "work" / "plc_1").exists(), "forgotten")
        truth = world.site.physics.truth()
        assert truth["trips"] == []
        assert all(node["max_w"] <= node["cap_w"] for node in truth["nodes"].values())

    drive(tmp_path, check)


def test_drain_stop_and_max_seconds(tmp_path):
    async def check(world, control):
        await world.granted()
        control.place("plc_d", ["sleep", "60"], grace_s=20)
        control.place("plc_s", ["sleep", "60"], gpus=(1,), grace_s=20)
        control.place("plc_m", ["sleep", "60"], gpus=(2,), max_seconds=1)
        control.place("plc_x", ["/nonexistent/tool"], gpus=(3,))
        await until(lambda: [control.state(k) for k in ("plc_d", "plc_s")] == ["running", "running"], "running")
        control.desire("plc_d", "drain")
        control.desire("plc_s", "stop")
        wanted = {
            "plc_d": ("exited", 143, "drained"),
            "plc_s": ("exited", 137, "stopped"),
            "plc_m": ("exited", 143, "max_seconds"),
            "plc_x": ("failed", 127, "start_failed"),
        }
        for key, row in wanted.items():
            await until(lambda key=key: control.row(key).get("finished_at"), key)
            found = control.row(key)
            assert (found["state"], found["exit_code"], found["reason"]) == row, key

    drive(tmp_path, check)


def test_killed_and_restarted_loses_nothing(tmp_path):
    """kill -9: one job runs on and is adopted, one ends meanwhile and is reported with its exit code, logs resume exactly."""

    async def check(world, control):
        await world.granted()
        lines = "import time\nfor i in range(400):\n print('line', i, flush=True); time.sleep(0.01)"
        control.place("plc_a", [sys.executable, "-c", lines])
        control.place("plc_b", ["sh", "-c", "sleep 1.5; exit 7"], gpus=(1,))
        control.place("plc_c", ["sleep", "60"], gpus=(2,))
        await until(lambda: all(control.state(k) == "running" for k in ("plc_a", "plc_b", "plc_c")), "running")
        await until(lambda: control.text("plc_a"), "some log")
        _, job = job_pids(world, "plc_c")
        control.place("plc_d", ["sleep", "60"], gpus=(3,))
        await until(lambda: control.state("plc_d") == "running", "running")
        _, dropped = job_pids(world, "plc_d")
        boots = {s["boot"] for s in control.syncs}
        world.agent.kill()
        control.forget("plc_d")
        await asyncio.sleep(2)
        assert psutil.pid_exists(job), "work goes on without its agent"
        world.agent.start()
        await until(lambda: {s["boot"] for s in control.syncs} - boots, "a new boot")
        await until(lambda: control.state("plc_b") == "exited", "what ended meanwhile")
        assert control.row("plc_b")["exit_code"] == 7
        await until(lambda: control.state("plc_a") == "exited", "the adopted one ends")
        await until(lambda: len(control.text("plc_a").splitlines()) == 400, "the log")
        assert control.text("plc_a") == "".join(f"line {i}\n" for i in range(400))
        assert control.state("plc_c") == "running"
        assert job_pids(world, "plc_c")[1] == job
        await until(lambda: not psutil.pid_exists(dropped), "what control dropped meanwhile is ended")
        control.desire("plc_c", "drain")
        await until(lambda: control.state("plc_c") == "exited", "an adopted job can be drained")

    drive(tmp_path, check)


def test_lost_doubled_and_reordered_calls_change_nothing(tmp_path):
    async def check(world, control):
        await world.granted()
        await until(lambda: control.history, "answers")
        old = control.history[-1]
        control.drop_answers = 2
        marker = tmp_path / "starts"
        control.place("plc_1", ["sh", "-c", f"echo once >> {marker}; sleep 60"])
        await until(lambda: control.state("plc_1") == "running", "running")
        # An answer from before the placement arrives late: it must not stop the work.
        control.repeat_old = old
        control.changed.set()
        await until(lambda: control.repeat_old is None, "the old answer was delivered")
        count = len(control.syncs)
        control.bump()
        await until(lambda: len(control.syncs) > count + 2, "more syncs")
        assert control.state("plc_1") == "running"
        # An older host generation is ignored as well.
        control.hosts["h001"] = {"name": "h001", "generation": 0, "power_state": "parked", "limits_w": [200] * 8}
        control.bump()
        count = len(control.syncs)
        await until(lambda: len(control.syncs) > count + 2, "more syncs")
        assert world.site.physics.hosts.limits(0) == [700] * 8
        control.command("m0000", "sleep")
        await until(lambda: control.seen["miners"]["m0000"][1] == "sleep", "asleep")
        late = dict(control.history[-1], miners=[["m0000", "normal", 1]], generation=control.generation)
        control.repeat_old = late
        control.changed.set()
        await until(lambda: control.repeat_old is None, "the old command was delivered")
        count = len(control.syncs)
        await until(lambda: len(control.syncs) > count + 3, "more syncs")
        assert world.site.physics.fleet.asleep[0], "a driver refuses an older generation"
        assert marker.read_text() == "once\n"
        sequences = [s["sequence"] for s in control.syncs]
        assert len(set(sequences)) == len(sequences)

    drive(tmp_path, check)


def test_control_away_work_goes_on_and_events_arrive_once(tmp_path):
    async def check(world, control):
        await world.granted()
        control.place("plc_1", ["sh", "-c", "sleep 1; exit 4"])
        await until(lambda: control.state("plc_1") == "running", "running")
        control.refuse = True
        control.changed.set()
        world.site.physics.meter_stale[1] = True  # an event of the dark time
        await until((world.agent.state / "work" / "plc_1" / "exit.json").exists, "ends in the dark")
        await until(lambda: "meter_stale" in world.agent.log.read_text(), "noticed in the dark")
        world.site.physics.meter_stale[1] = False
        world.agent.kill()
        world.agent.start()
        await asyncio.sleep(1)
        control.refuse = False
        await until(lambda: control.state("plc_1") == "exited", "told later")
        assert control.row("plc_1")["exit_code"] == 4
        await until(lambda: "meter_stale" in control.kinds(), "the spooled event")
        count = len(control.syncs)
        await until(lambda: len(control.syncs) > count + 4, "more syncs")
        assert all(not sync["events"] for sync in control.syncs[-2:]), "acknowledged events are not told again"
        assert "the control plane does not answer" in world.agent.log.read_text()

    drive(tmp_path, check)


def test_clock_skew_applies_nothing_and_says_so(tmp_path):
    async def check(world, control):
        await world.granted()
        control.skew_s = 100
        control.bump()
        await until(lambda: "clock differs" in world.agent.log.read_text(), "says so")
        control.place("plc_1", ["sleep", "60"])
        count = len(control.syncs)
        await until(lambda: len(control.syncs) > count + 2, "refused syncs")
        assert not (world.agent.state / "work" / "plc_1").exists()
        control.skew_s = 5  # within bounds: the lease is counted by control's clock
        await until(lambda: control.state("plc_1") == "running", "runs")

    drive(tmp_path, check)


def test_the_lease_ends_work(tmp_path):
    async def check(world, control):
        await world.granted()
        control.lease_s = 60 + 5 + 4
        control.place("plc_1", ["sleep", "60"], grace_s=5)
        await until(lambda: control.state("plc_1") == "running", "running")
        control.refuse = True
        control.changed.set()
        _, job = job_pids(world, "plc_1")
        await until(lambda: not psutil.pid_exists(job), "ended by the agent itself")
        control.lease_s = 900
        control.refuse = False
        await until(lambda: control.state("plc_1") == "exited", "told")
        assert control.row("plc_1")["reason"] == "lease_expired"

    drive(tmp_path, check)


def test_a_gang_starts_together_or_not_at_all(tmp_path):
    async def check(world, control):
        await world.granted("h001")
        gang = ["plc_0", "plc_1"]
        common = {"gang": gang, "world_size": 2, "master_host": "h001", "job": "job_g"}
        show = ["sh", "-c", "echo $RANK/$WORLD_SIZE $MASTER_ADDR:$MASTER_PORT; sleep 60"]
        control.place("plc_0", show, host="h001", rank=0, **common)
        await until(lambda: control.row("plc_0").get("reason") == "waiting_gang", "waits for the other")
        control.place("plc_1", show, host="h002", rank=1, **common)
        await until(lambda: control.row("plc_1").get("reason") == "waiting_limits", "the other waits for its host")
        assert control.row("plc_0")["reason"] == "waiting_gang"
        await world.granted("h002")
        await until(lambda: [control.state(k) for k in gang] == ["running", "running"], "both run")
        await until(lambda: all(control.text(k) for k in gang), "logs")
        one, two = (control.text(k).split() for k in gang)
        assert (one[0], two[0]) == ("0/2", "1/2")
        assert one[1] == two[1]
        assert one[1].startswith("127.0.0.1:")
        # One member cannot be executed: the other does not stay.
        broken = {"gang": ["plc_2", "plc_3"], "world_size": 2, "job": "job_h"}
        control.placements["plc_2"] = control.placements["plc_0"] | broken | {"id": "plc_2", "gpus": [2]}
        control.place("plc_3", ["/nonexistent/tool"], gpus=(3,), **broken)
        await until(lambda: control.state("plc_2") in ("failed", "exited"), "ended with it")
        assert control.row("plc_2")["reason"] == "gang_member_failed"

    drive(tmp_path, check)


def test_work_that_saved_its_state_is_told_with_the_time_and_a_time_to_come_is_not_believed(tmp_path):
    async def check(world, control):
        await world.granted("h001")
        control.place("plc_0", ["sh", "-c", 'touch -d @1700000000 "$TAILRACE_SAVED_FILE"; sleep 60'], gpus=(0,))
        control.place("plc_1", ["sh", "-c", 'touch -d @99999999999 "$TAILRACE_SAVED_FILE"; sleep 60'], gpus=(1,))
        control.place("plc_2", ["sh", "-c", 'sleep 1; touch "$TAILRACE_SAVED_FILE"'], gpus=(2,))
        await until(
            lambda: control.row("plc_0").get("checkpoint_at") == "2023-11-14T22:13:20.000Z", "the first's checkpoint"
        )
        await until(lambda: control.state("plc_2") == "exited", "the third is done")
        ended = control.row("plc_2")
        assert ended["running_at"] < ended["checkpoint_at"] <= ended["finished_at"]
        assert (control.state("plc_1"), control.row("plc_1")["checkpoint_at"]) == ("running", None)

    drive(tmp_path, check)


def test_the_others_of_a_gang_learn_who_is_lost_and_who_comes_in_its_place(tmp_path):
    async def check(world, control):
        await world.granted("h001")
        watch = ["sh", "-c", 'while :; do cat "$TAILRACE_GANG_FILE"; echo; sleep 0.2; done']
        table = [{"rank": 0, "placement": "plc_0", "host": "h001"}, {"rank": 1, "placement": "plc_1", "host": "h002"}]
        gang = {"world_size": 2, "job": "job_g", "ranks": table, "epoch": 0}
        control.place("plc_0", watch, rank=0, **gang)
        await until(lambda: '"epoch": 0' in control.text("plc_0"), "its first table")
        generation = control.placements["plc_0"]["generation"]
        control.placements["plc_0"] |= {
            "ranks": table[:1],
            "epoch": 1,
        }  # the other is lost; this one's wish is what it was
        control.bump()
        await until(lambda: '"epoch": 1' in control.text("plc_0"), "the loss")
        again = [table[0], {"rank": 1, "placement": "plc_9", "host": "h003"}]
        control.placements["plc_0"] |= {"ranks": again}
        control.bump()
        await until(lambda: "plc_9" in control.text("plc_0"), "who is in its place")
        control.placements["plc_0"] |= {"ranks": table, "epoch": 0}  # an older answer
        control.bump()
        show = ["sh", "-c", "echo $RANK of $TAILRACE_GANG_SIZE at $TAILRACE_GANG_EPOCH; sleep 60"]
        control.place("plc_9", show, gpus=(3,), rank=1, **gang | {"ranks": again, "epoch": 1})  # alone: the other runs
        await until(lambda: "1 of 2 at 1" in control.text("plc_9"), "the newcomer starts by itself")
        assert json.loads(control.text("plc_0").rpartition("\n")[0].splitlines()[-1])["ranks"] == again
        assert (control.state("plc_0"), control.placements["plc_0"]["generation"]) == ("running", generation)

    drive(tmp_path, check)


def test_a_lost_host_fails_its_work_and_fences_it(tmp_path):
    async def check(world, control):
        await world.granted("h001")
        await world.granted("h002")
        control.place("plc_1", ["sleep", "60"], host="h001")
        control.place("plc_2", ["sleep", "60"], host="h002")
        await until(lambda: [control.state(k) for k in ("plc_1", "plc_2")] == ["running", "running"], "running")
        world.site.physics.kill_host("h001")
        await until(lambda: control.state("plc_1") == "failed", "failed")
        assert control.row("plc_1")["reason"] == "host_lost"
        assert control.state("plc_2") == "running"
        assert "host_lost" in control.kinds()
        world.site.physics.revive_host("h001")
        await until(lambda: "host_back" in control.kinds(), "back")
        assert control.state("plc_1") == "failed"

    drive(tmp_path, check, runtime="virtual")


def test_work_of_a_restarted_executor_is_lost_not_running(tmp_path):
    async def check(world, control):
        await world.granted()
        control.place("plc_1", ["sleep", "60"])
        await until(lambda: control.state("plc_1") == "running", "running")
        world.site.executor.work.clear()
        world.site.boot = "another"
        await until(lambda: control.state("plc_1") == "failed", "failed")
        assert control.row("plc_1")["reason"] == "supervisor_lost"

    drive(tmp_path, check, runtime="virtual")


def test_this_machine_as_a_host(tmp_path):
    async def check(world, control):
        await until(lambda: control.inventory and control.inventory["hosts"][0]["name"] == "here", "inventory")
        assert control.inventory["hosts"][0]["vcpu_milli"] >= 1000
        control.place("plc_1", ["sh", "-c", "echo on $TAILRACE_HOST"], host="here", gpus=())
        await until(lambda: control.text("plc_1") == "on here\n", "its log")
        await until(lambda: control.row("plc_1").get("exit_code") == 0, "its exit")

    local = {"driver": "local", "host": {"name": "here", "power_node": "pdu-1"}}
    drive(tmp_path, check, hosts=local, miners={"driver": "none"}, meters={"driver": "none"})


def test_virtual_work_is_adopted_after_a_restart(tmp_path):
    async def check(world, control):
        await world.granted()
        control.place("plc_1", ["sleep", "60"])
        control.place("plc_2", ["fail-after", "1"], gpus=(1,))
        await until(lambda: control.state("plc_1") == "running", "running")
        await until(lambda: control.state("plc_2") in ("running", "exited"), "running")
        world.agent.kill()
        await asyncio.sleep(1.2)
        world.agent.start()
        await until(lambda: control.state("plc_2") == "exited", "ended meanwhile")
        assert control.row("plc_2")["exit_code"] == 1
        control.desire("plc_1", "stop")
        await until(lambda: control.state("plc_1") == "exited", "stopped")
        assert control.row("plc_1")["exit_code"] == 137

    drive(tmp_path, check, runtime="virtual")
