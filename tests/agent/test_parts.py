"""Small parts: configuration errors, the store, reports, events, the lease's arithmetic."""

import asyncio
import json
import sys

import pytest

from agent.config import ConfigError, load, parse
from agent.events import Events
from agent.miners.adapters import PACKAGE
from agent.miners.fleet import Fleet
from agent.reports import Reports
from agent.store import StateBusyError, Store, write_private
from agent.sync import lease_end
from agent.times import from_wire, to_wire
from sandbox.site.spec import miner
from tests.agent.peer import ROOT

pytestmark = pytest.mark.serverless

GOOD = {
    "name": "hall-1",
    "hosts": {"driver": "sandbox", "url": "http://127.0.0.1:7000/"},
    "miners": {"driver": "luxos"},
}


def test_a_good_configuration():
    config = parse(GOOD | {"runtime": "virtual", "meters": {"driver": "sandbox"}, "poll_s": 2})
    assert config.host_url == "http://127.0.0.1:7000"
    assert config.miners is None
    assert config.poll_s == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": ""}, "field 'name'"),
        ({"hosts": {"driver": "sandbox"}}, "field 'hosts.url'"),
        ({"hosts": {"driver": "ilo"}}, "field 'hosts.driver' is 'ilo'; known: sandbox, local"),
        ({"hosts": {"driver": "local", "host": {"name": "x"}}}, "field 'hosts.host.power_node'"),
        ({"runtime": "docker"}, "field 'runtime' is 'docker'"),
        ({"miners": {"driver": "luxos", "list": [{"name": "m"}]}}, "field 'miners.list[0].model'"),
        ({"miners": []}, "field 'miners' must be an object"),
        (
            {"miners": {"driver": "luxos", "list": [miner(0, "S21", "pdu", 4028, 10) | {"driver": "vnish"}]}},
            "field 'miners.list[0].driver' is 'vnish'; known: luxos, asic-rs",
        ),
        ({"poll_s": "fast"}, "field 'poll_s' must be a number above 0"),
        ({"colour": 1}, "field 'colour' is not known"),
    ],
)
def test_a_wrong_field_is_named(change, says):
    with pytest.raises(ConfigError) as error:
        parse(GOOD | change)
    assert says in str(error.value)


def test_a_driver_that_is_not_installed_says_what_to_install(monkeypatch):
    assert parse(GOOD | {"miners": {"driver": "asic-rs"}}).miner_driver == "asic-rs"
    monkeypatch.setitem(sys.modules, "pyasic_rs", None)
    with pytest.raises(ConfigError, match=r"needs a package: pip install 'pyasic-rs==0\.8\.6'"):
        parse(GOOD | {"miners": {"driver": "asic-rs"}})
    row = miner(0, "S21", "pdu", 4028, 10) | {"driver": "asic-rs"}
    with pytest.raises(ConfigError, match="driver 'asic-rs' needs"):
        parse(GOOD | {"miners": {"driver": "luxos", "list": [row]}})


def test_the_pin_stands_once():
    for name in ("requirements.txt", "constraints.txt", "pyproject.toml"):
        assert PACKAGE in (ROOT / name).read_text(encoding="utf-8"), name


def test_a_wrong_line_is_named(tmp_path):
    path = tmp_path / "agent.json"
    path.write_text('{\n "name": "x",\n oops\n}')
    with pytest.raises(ConfigError, match="line 3"):
        load(path)
    toml = tmp_path / "agent.toml"
    toml.write_text('name = "x"\nhosts = {\n')
    with pytest.raises(ConfigError, match="line"):
        load(toml)
    toml.write_text('name = "x"\n[hosts]\ndriver = "local"\nhost = {name = "h", power_node = "p"}\n')
    assert load(toml).local_host["name"] == "h"
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.json")


def test_the_store_keeps_and_locks(tmp_path):
    store = Store(tmp_path / "s")
    with pytest.raises(StateBusyError):
        Store(tmp_path / "s")
    store.put("host", "h1", {"generation": 3})
    with pytest.raises(TypeError), store.batch():
        list(
            map(store.put, ["host"] * 2, ["h2", "h3"], [{"generation": 1}, {"generation": object()}])
        )  # all or nothing
    store.close()
    again = Store(tmp_path / "s")
    assert again.all("host") == {"h1": {"generation": 3}}
    again.close()
    write_private(tmp_path / "k.json", {"key": "x"})
    assert (tmp_path / "k.json").stat().st_mode & 0o777 == 0o600


def test_reports_tell_changes_until_acknowledged():
    reports = Reports()
    reports.set("placements", "p1", {"state": "starting"}, urgent=True)
    reports.set("meters", "site", ["site", 1, "t"])
    assert reports.news
    rows, versions = reports.collect(full=False)
    assert rows["placements"] == [{"state": "starting"}]
    reports.set("placements", "p1", {"state": "running"})  # while the call is under way
    reports.acknowledge(versions)
    rows, versions = reports.collect(full=False)
    assert rows["placements"] == [{"state": "running"}]
    assert rows["meters"] == []
    assert reports.pending(), "a lost call acknowledges nothing"
    reports.acknowledge(versions)
    assert not reports.pending()
    assert reports.collect(full=True)[0]["meters"] == [["site", 1, "t"]]


def test_events_survive_until_acknowledged(tmp_path):
    store = Store(tmp_path)
    events = Events(store)
    events.add("over_cap", "pdu-1", watts=5)
    events.add("host_lost", "h1")
    first = events.batch()[0]
    events.acknowledge([first["id"], "unknown"])
    store.close()
    store = Store(tmp_path)
    assert [e["kind"] for e in Events(store).batch()] == ["host_lost"]
    store.close()


def test_the_lease_is_counted_by_controls_clock():
    answer = {"server_time": "2026-03-01T12:00:00Z", "lease_until": "2026-03-01T12:15:00Z"}
    assert lease_end(answer, 1_000.0) == 1_900.0
    assert from_wire(to_wire(1_772_366_400.5)) == 1_772_366_400.5
    with pytest.raises(ValueError, match="zone"):
        from_wire("2026-03-01T12:00:00")
    assert json.dumps(to_wire(None)) == "null"


def test_the_fleet_refuses_older_generations_and_unknown_modes(tmp_path):
    async def go():
        store = Store(tmp_path)
        options = {"poll_s": 1, "timeout_s": 1, "retry_s": 1, "concurrency": 4, "may_wake": lambda _node: True}
        events = Events(store)
        fleet = Fleet([miner(0, "S21", "pdu", 4028, 10)], store, Reports(), events, **options)
        one = fleet.miners["m0000"]
        fleet.apply([["m0000", "sleep", 5]])
        fleet.apply([["m0000", "normal", 4], ["m0000", "turbo", 6], ["m9999", "sleep", 9]])
        assert (one.want, one.generation) == ("sleep", 5)
        assert [e["kind"] for e in events.batch()] == ["miner_command_refused"]
        fleet.apply([["m0000", "normal", 7]])
        fleet.shed(["m0000"], reason="over_cap")
        assert one.target == "sleep", "latched"
        fleet.apply([["m0000", "eco", 7]])
        assert one.target == "sleep"
        again = Fleet([miner(0, "S21", "pdu", 4028, 10)], store, Reports(), events, **options)
        assert again.miners["m0000"].target == "sleep", "over a restart too"
        fleet.apply([["m0000", "eco", 8]])
        assert one.target == "eco"
        store.close()

    asyncio.run(go())
