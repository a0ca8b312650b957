"""The fan-out over real sockets: what the agent makes of each fault, whom it gives up, and when a PDU's network is to blame."""

import asyncio
import time
from pathlib import Path

import pytest

from agent.events import Events
from agent.miners import fleet as fleet_module
from agent.miners.fanout import FanOut, lanes, shards
from agent.miners.fleet import Fleet
from agent.miners.miner import BREAK_AFTER, Miner
from agent.reports import Reports
from agent.store import Store
from sandbox.miners import FAULTS, FleetServer
from sandbox.miners import Fleet as Machines
from sandbox.site.spec import MINER_MODELS, miner
from tests.agent.peer import until

pytestmark = pytest.mark.serverless
SPEED = 30.0


class Hall:
    """Simulated machines by PDU, and an agent's fleet that commands them. Time runs `SPEED` times as fast for the machines."""

    def __init__(self, folder, **pdus):
        names = [pdu for pdu, count in pdus.items() for _ in range(count)]
        self.rows = [miner(i, "S21", pdu, 0, 35) for i, pdu in enumerate(names)]
        self.machines = Machines(self.rows, seed=3, speed=SPEED)
        self.server = FleetServer(self.machines, 0)
        self.folder = Path(folder)
        self.may_wake = True

    async def __aenter__(self):
        await self.server.start()
        for row in self.rows:
            row["address"] = f"{row['address'].split(':')[0]}:{self.server.port}"
        self.store, self.reports = Store(self.folder), Reports()
        self.events = Events(self.store)
        self.fleet = Fleet(
            self.rows, self.store, self.reports, self.events, poll_s=0.3, timeout_s=0.5, retry_s=0.4, concurrency=8,
            may_wake=lambda _pdu: self.may_wake,
        )  # fmt: skip
        self.tasks = [asyncio.create_task(self.fleet.run()), asyncio.create_task(self._time())]
        await until(lambda: all(m.reading for m in self.fleet.miners.values()), "all were read")
        return self

    async def __aexit__(self, *_):
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.store.close()
        await self.server.stop()

    async def _time(self):
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.03)
            now = time.monotonic()
            self.machines.step(now - last)
            last = now

    def told(self, kind):
        return [e for e in self.events.waiting.values() if e["kind"] == kind]

    def subjects(self, kind):
        return [e["subject"] for e in self.told(kind)]

    def row(self, name):
        """What control is told: [name, mode, applied, W, GH/s, at]."""
        return self.reports.rows["miners"][name][1]

    def asleep(self, name):
        return self.row(name)[1] == "sleep" and self.row(name)[3] < 60


@pytest.fixture
def quick(monkeypatch):
    """The same steps, sooner."""
    for name, seconds in {"FAST_S": 0.1, "RAMP_S": 0.1, "LONGEST_S": 0.8}.items():
        monkeypatch.setattr(fleet_module, name, seconds)


def play(folder, check, **pdus):
    async def go():
        async with Hall(folder, **pdus) as hall:
            await check(hall, hall.machines, hall.fleet)

    asyncio.run(go())


# --- each fault


@pytest.fixture(scope="module")
def faults_played(tmp_path_factory):
    """One machine for each fault, all told to sleep while it lasts, then repaired: (told during, told in all) by fault."""
    with pytest.MonkeyPatch.context() as patch:
        for name, seconds in {"FAST_S": 0.1, "RAMP_S": 0.1, "LONGEST_S": 0.5}.items():
            patch.setattr(fleet_module, name, seconds)
        during, after = {}, {}

        async def check(hall, machines, fleet):
            names = dict(zip(FAULTS, fleet.miners, strict=True))
            for fault, name in names.items():
                if "reboot" not in fault:
                    machines.set_fault(name, fault)
            fleet.apply([[name, "sleep", 1] for fault, name in names.items() if fault != "asleep_after_reboot"])
            fleet.apply([[names["asleep_after_reboot"], "normal", 1]])
            await until(lambda: hall.asleep(names["reboot_running"]), "it sleeps before it reboots")
            woken = fleet.miners[names["asleep_after_reboot"]]
            await until(lambda: woken.settled == fleet_module.PROOFS, "it has settled: what comes now is not our wake")
            for fault in ("reboot_running", "asleep_after_reboot"):
                machines.set_fault(names[fault], fault)
            told = lambda kind, fault: names[fault] in hall.subjects(kind)  # noqa: E731
            await until(lambda: told("miner_unresponsive", "ack_ignore"), "commanded twice, to no avail")
            await until(
                lambda: all(told("miner_not_answering", f) for f in ("hang", "refuse", "truncated", "error_status")),
                "four that do not answer",
            )
            await until(lambda: told("miner_found_hashing", "reboot_running"), "found hashing")
            await until(lambda: hall.asleep(names["asleep_after_reboot"]), "read again after its reboot")
            await until(lambda: hall.asleep(names["slow_ramp"]), "down at last")
            for fault, name in names.items():
                during[fault] = (hall.row(name), fleet.facts()[name], machines.true_w[machines.index[name]])
            for name in names.values():
                machines.set_fault(name, "")
            sleepers = [name for fault, name in names.items() if fault != "asleep_after_reboot"]
            await until(lambda: all(hall.asleep(name) for name in sleepers), "repaired, they do as they were told")
            for fault, name in names.items():
                told = {e["kind"]: e["data"] for e in hall.events.waiting.values() if e["subject"] == name}
                after[fault] = (told, fleet.miners[name])

        play(tmp_path_factory.mktemp("faults"), check, **dict.fromkeys(FAULTS, 1))
    return during, after


@pytest.mark.parametrize(
    ("fault", "problem"),
    [("hang", "timeout"), ("refuse", "unreachable"), ("truncated", "garbled"), ("error_status", "refused")],
)
def test_who_does_not_answer_is_given_up_and_counts_at_its_nameplate(faults_played, fault, problem):
    during, after = faults_played
    row, facts, drawn = during[fault]
    assert drawn > 3000, "it was never reached"
    assert row[1] == "normal", "and never said to sleep"
    assert (facts.answers, facts.watts) == (False, 3500)
    told, machine = after[fault]
    assert told["miner_not_answering"]["problem"] == problem
    assert "miner_answers_again" in told
    assert (machine.failures, machine.applied) == (0, 1)


def test_acknowledges_and_ignores(faults_played):
    """Once more with a fresh session, then somebody is told; what control hears is what the machine draws."""
    row, facts, _ = faults_played[0]["ack_ignore"]
    assert (row[1], row[2]) == ("normal", 1), "acknowledged, and not obeyed"
    assert row[3] > 3000
    assert facts.answers
    told, machine = faults_played[1]["ack_ignore"]
    assert told["miner_unresponsive"]["wanted"] == "sleep"
    assert machine.tries >= 2


def test_session_stolen(faults_played):
    told, machine = faults_played[1]["session_stolen"]
    assert told == {}, "nobody needs to hear of it"
    assert machine.reading.mode == "sleep"


def test_slow_ramp(faults_played):
    told, _ = faults_played[1]["slow_ramp"]
    assert told == {}, "slow is not deaf: its watts were reported as they fell"


def test_frozen_reading(faults_played):
    row, _, drawn = faults_played[0]["frozen_reading"]
    assert drawn < 60
    assert row[1] == "sleep"
    assert row[3] > 3000, "what it says is passed on as it is: control confirms nothing by it"


def test_wattage_off(faults_played):
    row, _, drawn = faults_played[0]["wattage_off"]
    assert row[3] == pytest.approx(1.2 * drawn, abs=3)


def test_reboots_into_running(faults_played):
    told, machine = faults_played[1]["reboot_running"]
    assert told["miner_found_hashing"]["watts"] >= 0
    assert machine.reading.mode == "sleep", "sent down again, with no word from control"


def test_asleep_after_reboot(faults_played):
    told, machine = faults_played[1]["asleep_after_reboot"]
    assert machine.want == "normal"
    assert machine.reading.mode == "sleep", "raising is control's to order: it sees the reading"
    assert "miner_found_hashing" not in told


def test_every_fault_is_played():
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{fault}"' in text for fault in FAULTS)


# --- no answer: circuit-break the device; N per PDU = a network fault


def test_a_broken_circuit_is_probed_less_and_less_and_commanded_the_moment_it_closes(tmp_path, quick):
    async def check(hall, machines, fleet):
        one = fleet.miners["m0000"]
        machines.set_fault("m0000", "refuse")
        fleet.apply([["m0000", "sleep", 1]])
        await until(lambda: one.broken, "given up")
        assert one.failures >= BREAK_AFTER
        before, tries = machines.commands, one.tries
        pauses = []
        for failures in range(one.failures + 1, one.failures + 4):
            start = time.monotonic()
            await until(lambda failures=failures: one.failures >= failures, "a probe")
            pauses.append(time.monotonic() - start)
        assert pauses[-1] > 1.8 * fleet.poll_s, "twice as late each time, and not at every poll"
        assert one.tries == tries, "probed, not commanded"
        assert machines.commands - before > 0, "the others are read meanwhile"
        machines.set_fault("m0000", "")
        await until(lambda: hall.asleep("m0000"), "what it missed")
        assert hall.subjects("miner_not_answering") == hall.subjects("miner_answers_again") == ["m0000"]

    play(tmp_path, check, a=2)


def test_no_answer_of_many_under_one_pdu_is_one_fault_of_the_network(tmp_path, quick):
    async def check(hall, machines, fleet):
        dead = [m.name for m in fleet.miners.values() if m.pdu == "a"][:8]
        lone = next(m.name for m in fleet.miners.values() if m.pdu == "b")
        for name in (*dead, lone):
            machines.set_fault(name, "refuse")
        await until(lambda: hall.told("pdu_network_fault") and hall.told("miner_not_answering"), "both are told")
        (fault,) = hall.told("pdu_network_fault")
        assert (fault["subject"], fault["data"]["silent"], fault["data"]["machines"]) == ("a", 8, 10)
        assert fault["data"]["names"] == dead
        assert hall.subjects("miner_not_answering") == [lone], "one dead machine is a dead machine"
        facts = fleet.facts()
        assert {name for name, f in facts.items() if not f.answers} == {*dead, lone}
        fleet.apply([[name, "sleep", 1] for name in fleet.miners])
        await until(
            lambda: all(hall.asleep(n) for n in fleet.miners if n not in (*dead, lone)), "the others are reached"
        )
        for name in dead[1:]:
            machines.set_fault(name, "")
        await until(lambda: hall.subjects("pdu_network_back") == ["a"], "the switch is back")
        await until(lambda: all(hall.asleep(name) for name in dead[1:]), "and all behind it do as they were told")
        await until(
            lambda: dead[0] in hall.subjects("miner_not_answering"), "the one that stayed away has its own event"
        )
        assert len(hall.told("pdu_network_fault")) == 1

    play(tmp_path, check, a=10, b=4)


def test_what_a_machine_says_itself_is_no_fault_of_the_network(tmp_path, quick):
    async def check(hall, machines, fleet):
        for name in fleet.miners:
            machines.set_fault(name, "error_status")
        await until(lambda: len(hall.told("miner_not_answering")) == 4, "each for itself")
        assert not hall.told("pdu_network_fault")

    play(tmp_path, check, a=4)


def test_what_was_commanded_is_known_after_a_restart(tmp_path, quick):
    async def check(hall, _machines, fleet):
        fleet.apply([["m0000", "sleep", 7]])
        await until(lambda: hall.asleep("m0000"), "asleep")
        await until(lambda: not fleet.unkept, "written")
        assert hall.store.get("miner", "m0000") == {"want": "sleep", "generation": 7, "applied": 7, "latched": -1}

    play(tmp_path, check, a=1)


# --- turns


def stub(name, pdu="a"):
    """A machine without a driver, for parts that never ask one."""
    modes = MINER_MODELS["S21"]
    return Miner({"name": name, "power_node": pdu, "modes": modes}, driver=None, watts_of={m: w for m, w, _ in modes})


def test_shards_keep_pdus_whole_up_to_a_thousand():
    miners = [stub(f"m{i}", f"pdu-{i // 150}") for i in range(2_000)]
    parts = shards(miners)
    assert [m for part in parts for m in part] == miners
    assert [len(part) for part in parts] == [900, 900, 200]
    homes = [{m.pdu for m in part} for part in parts]
    assert not homes[0] & homes[1] | homes[1] & homes[2]
    assert [len(part) for part in shards([stub(str(i)) for i in range(2_300)])] == [1_000, 1_000, 300]
    assert shards([]) == []


def test_lines_fit_the_loop_and_the_open_files_there_may_be():
    assert lanes(10, 1) == 10
    assert lanes(100, 20) == 20, "one loop serves them all: more would only wait for it, and time out"
    assert lanes(100, 10**7) == 1


def turns(miners, lines, turn, until_done):
    async def go():
        fanout = FanOut(miners, lines, turn)
        running = asyncio.create_task(fanout.run())
        try:
            await until(lambda: until_done(fanout), "turns")
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(go())


def test_turns_are_bounded_and_nobody_has_two_at_once():
    miners = [stub(f"m{i}") for i in range(40)]
    at_once, most, count = set(), 0, 0

    async def turn(one):
        nonlocal most, count
        assert one not in at_once
        at_once.add(one)
        most, count = max(most, len(at_once)), count + 1
        await asyncio.sleep(0.001)
        at_once.discard(one)
        one.due = time.monotonic()

    turns(miners, 7, turn, lambda _: count > 400)
    assert most == 7


def test_who_is_asked_comes_before_who_is_due():
    miners = [stub(f"m{i}") for i in range(50)]
    for one in miners:
        one.due = time.monotonic() - 1
    order = []

    async def turn(one):
        order.append(one.name)
        one.due = time.monotonic() + 100
        if len(order) == 3:
            fanout[0].ask(miners[48])
        await asyncio.sleep(0)

    fanout = []
    turns(miners, 1, turn, lambda f: fanout.append(f) or len(order) == 50)
    assert "m48" in order[3:6]


def test_who_settles_is_read_before_all_that_is_only_polled():
    """A backlog (a network whose timeouts hold the lines) must not keep the readings that prove a command."""
    miners = [stub(f"m{i}") for i in range(50)]
    now = time.monotonic()
    for one in miners:
        one.due = now - 1
    settling, broken = miners[48:]
    settling.settle_until = broken.settle_until = now + 60
    settling.due = broken.due = now - 0.5  # due later than every poll
    broken.failures = 3  # it is waited for no more
    order = []

    async def turn(one):
        order.append(one.name)
        again = one is settling and order.count(one.name) < 4
        one.due = time.monotonic() + (0 if again else 100)
        await asyncio.sleep(0)

    turns(miners, 1, turn, lambda _: len(order) == 53)
    assert order[:4] == ["m48"] * 4
    assert order[-1] == "m49"


def test_who_is_asked_during_a_turn_has_another_one():
    """The race of a command that comes while the machine is being read: it does not wait for the next poll."""
    one = stub("m0")
    count = 0

    async def turn(machine):
        nonlocal count
        count += 1
        machine.due = time.monotonic() + 100
        if count == 1:
            await asyncio.sleep(0.01)
            fanout[0].ask(machine)
            assert count == 1, "not at once: it has a turn"
            await asyncio.sleep(0.01)

    fanout = []
    turns([one], 4, turn, lambda f: fanout.append(f) or count == 2)
    assert one.due > time.monotonic()
