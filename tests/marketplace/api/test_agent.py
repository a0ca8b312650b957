"""The agent's doors over HTTP: enrol once, sync level-triggered, logs without gap or repeat."""

import gzip
import json
import uuid
from datetime import UTC, datetime, timedelta

import pytest

from marketplace.models import Agent, AgentEvent, Host, LogChunk, MeterReading, Miner, Placement, PowerNode
from marketplace.services import agents, sites
from tests import factories as f

pytestmark = pytest.mark.django_db
BASE = "/api/v1/agent/"


def now(seconds=0):
    return datetime.now(UTC) + timedelta(seconds=seconds)


@pytest.fixture
def site():
    return f.site(pdus=1)


@pytest.fixture
def agent(site):
    return f.agent(site)[1]


def sync(token, status=200, **fields):
    body = {"boot": "b1", "sequence": 1, "agent_time": now().isoformat(), **fields}
    answer = f.client(agent=token).post(BASE + "sync", json.dumps(body, default=str), content_type="application/json")
    assert answer.status_code == status, answer.content
    return answer.json()


# --- enrol
def enrol(token, **fields):
    return f.client().post(BASE + "enrol", {"token": token, "name": "edge", "version": "1", **fields}, format="json")


@pytest.fixture
def token(site):
    return sites.create_enrolment_token(site, now=now(), actor=f.actor(site.organization))[1]


def test_a_token_enrols_one_agent_once(site, token):
    answer = enrol(token)
    assert answer.status_code == 201
    assert answer.json()["site"] == site.public_id
    assert sync(answer.json()["key"])["generation"] == 0
    again = enrol(token)
    assert (again.status_code, again.json()["code"]) == (401, "enrolment_token_invalid")
    assert Agent.objects.count() == 1
    assert answer.json()["key"] not in str(Agent.objects.values())  # kept as a digest alone


def test_a_token_expires(site):
    _, old = sites.create_enrolment_token(site, now=now(-90 * 86_400), actor=f.actor(site.organization))
    assert enrol(old).json()["code"] == "enrolment_token_invalid"
    assert enrol("enr_unknown").json()["code"] == "enrolment_token_invalid"


@pytest.mark.parametrize("fields", [{"name": "a b"}, {"name": ""}, {"runtime": "magic"}, {"colour": "red"}])
def test_a_bad_enrolment_spends_no_token(token, fields):
    assert enrol(token, **fields).status_code == 400
    assert enrol(token).status_code == 201


def test_the_same_name_again_is_the_same_agent_on_new_hardware(site, token):
    first = enrol(token).json()
    sync(first["key"], sequence=500)
    _, other = sites.create_enrolment_token(site, now=now(), actor=f.actor(site.organization))
    second = enrol(other).json()
    assert second["agent"] == first["agent"]
    assert sync(first["key"], 401)["code"] == "key_invalid"
    sync(second["key"], sequence=1)
    assert Agent.objects.get().sequence == 1


# --- who
def test_only_a_live_agents_key_syncs(site, agent):
    customer = f.key(f.organization())[1]
    body = {"boot": "b", "sequence": 1, "agent_time": now().isoformat()}
    for who, status in ((f.client(), 401), (f.client(key=customer), 401), (f.client(site.organization), 401)):
        assert who.post(BASE + "sync", body, format="json").status_code in {status, 403}
    assert f.client(agent=agent).get("/api/v1/jobs").status_code in {401, 403}
    Agent.objects.update(revoked_at=now())
    assert sync(agent, 401)["code"] == "key_invalid"


# --- sync
def test_a_clock_that_is_off_changes_nothing(site, agent):
    f.host(site, "h1")
    rows = [{"name": "h1", "beat_at": now().isoformat(), "power_state": "full"}]
    for skew in (-31, 31):
        answer = sync(agent, 409, agent_time=now(skew * 1.1).isoformat(), hosts=rows)
        assert (answer["code"], answer["retry"]) == ("clock_skew", "after")
    assert Host.objects.get().beat_at is None
    assert Agent.objects.get().last_sync_at is None
    sync(agent, agent_time=now(-20).isoformat(), hosts=rows)
    assert Host.objects.get().power_state == "full"


def test_a_packed_report_is_read_and_a_broken_one_refused(site, agent):
    body = json.dumps({"boot": "b", "sequence": 3, "agent_time": now().isoformat()}).encode()
    api = f.client(agent=agent)
    post = lambda raw: api.post(BASE + "sync", raw, content_type="application/json", HTTP_CONTENT_ENCODING="gzip")  # noqa: E731
    assert post(gzip.compress(body)).json()["acknowledged_sequence"] == 3
    for broken in (body, gzip.compress(body)[:-9], gzip.compress(b"{nothing")):
        assert post(broken).json()["code"] == "invalid_request"


def readings(at, watts):
    meter = PowerNode.objects.get(name="pdu-1")
    return {
        "hosts": [{"name": "h1", "beat_at": at, "power_state": "capped", "generation": 1, "measured_w": watts}],
        "miners": [["m1", "normal", 0, watts, 100, at]],
        "meters": [[meter.name, watts, at]],
    }


def test_readings_are_taken_newest_first_and_once(site, agent):
    f.host(site, "h1")
    f.miner(site, "m1", measured_at=now(-3600))
    sync(agent, sequence=5, **readings(now(-2).isoformat(), 900))
    sync(agent, sequence=6, **readings(now(-60).isoformat(), 100))  # older than what we have
    same = now(-1).isoformat()
    sync(agent, sequence=7, **readings(same, 950))
    sync(agent, sequence=8, **readings(same, 950))
    assert Host.objects.get().measured_w == Miner.objects.get().measured_w == 950
    assert PowerNode.objects.get(name="pdu-1").measured_w == 950
    assert list(MeterReading.objects.order_by("at").values_list("watts", flat=True)) == [900, 950]
    unknown = sync(
        agent,
        sequence=9,
        meters=[["nowhere", 5, now().isoformat()]],
        miners=[["ghost", "x", 1, 5, 5, now().isoformat()]],
    )
    assert unknown["acknowledged_sequence"] == 9


def test_a_report_that_was_overtaken_changes_nothing_but_keeps_its_events(site, agent):
    f.host(site, "h1")
    f.miner(site, "m1", measured_at=now(-3600))
    sync(agent, sequence=10, **readings(now(-5).isoformat(), 900))
    event = {"id": str(uuid.uuid4()), "at": now().isoformat(), "kind": "started", "subject": "x"}
    late = sync(agent, sequence=9, events=[event], **readings(now().isoformat(), 100))
    assert Host.objects.get().measured_w == 900
    assert Agent.objects.get().sequence == 10
    assert late["acknowledged_events"] == [event["id"]]
    sync(agent, sequence=11, events=[event])
    assert AgentEvent.objects.count() == 1
    sync(agent, boot="b2", sequence=1, **readings(now().isoformat(), 800))  # a new life of the agent
    assert Host.objects.get().measured_w == 800


@pytest.mark.parametrize(
    "fields",
    [
        {"sequence": -1}, {"boot": ""}, {"wait_s": 31}, {"hosts": [{"name": "h"}]}, {"miners": [["m", 1]]}, {"meters": [["n", -1, "now"]]},
        {"placements": [{"id": "job_000000000000", "generation": 1, "state": "running"}]},
        {"placements": [{"id": "plc_000000000000", "generation": 1, "state": "dancing"}]},
        {"meters": [["pdu-1", 10**20, "2026-01-01T00:00:00Z"]]},
        {"miners": [["m1", "x", 1, 10**12, 5, "2026-01-01T00:00:00Z"]]},
        {"hosts": [{"name": "h1", "beat_at": "2026-01-01T00:00:00Z", "power_state": "full", "measured_w": 10**12}]},
    ],
)  # fmt: skip
def test_a_report_out_of_shape_is_refused(site, agent, fields):
    f.host(site, "h1")
    assert sync(agent, 400, **fields)["code"] == "invalid_request"
    assert Agent.objects.get().last_sync_at is None


def test_an_agent_tells_of_its_own_site_alone(site, agent):
    other = f.site()
    host = f.host(other, "h1")
    contract = f.contract(f.listing(other, hosts=[host]))
    placement = f.placement(f.job(contract, state="placed"), host, state="granted")
    answer = sync(
        agent,
        hosts=[{"name": "h1", "beat_at": now().isoformat(), "power_state": "off"}],
        placements=[{"id": placement.public_id, "generation": 1, "state": "running"}],
    )
    placement.refresh_from_db()
    host.refresh_from_db()
    assert (placement.state, host.beat_at, answer["placements"]) == ("granted", None, [])
    chunk = {"placement": placement.public_id, "stream": "stdout", "offset": 0, "data": "stolen"}
    assert logs(agent, chunk) == []
    assert not LogChunk.objects.exists()


def test_the_inventory_is_asked_for_until_there_are_hosts(site, agent):
    assert sync(agent)["inventory_wanted"] is True
    f.host(site)
    assert sync(agent, sequence=2)["inventory_wanted"] is False


def test_safety_is_sent_when_it_is_news(site, agent):
    safety = sync(agent)["safety"]
    assert [n["name"] for n in safety["nodes"]] == ["site", "tx-1", "pdu-1"]
    assert sync(agent, sequence=2, known_safety=safety["generation"])["safety"] is None


# --- logs
def logs(token, *chunks, status=200):
    answer = f.client(agent=token).post(BASE + "logs", {"chunks": list(chunks)}, format="json")
    assert answer.status_code == status, answer.content
    return answer.json().get("next")


@pytest.fixture
def running(site):
    host = f.host(site, "h1")
    return f.placement(f.job(f.contract(f.listing(site, hosts=[host])), state="running"), host, state="running")


def chunk(placement, offset, data, stream="stdout"):
    return {"placement": placement.public_id, "stream": stream, "offset": offset, "data": data}


def stored(placement, stream="stdout"):
    return "".join(
        LogChunk.objects.filter(placement=placement, stream=stream).order_by("offset").values_list("data", flat=True)
    )


def test_logs_are_kept_once_in_order_by_byte(agent, running):
    (answer,) = logs(agent, chunk(running, 0, "héllo\n"))
    assert (answer["next"], answer["stream"], answer["placement"]) == (7, "stdout", running.public_id)
    assert logs(agent, chunk(running, 0, "héllo\n"))[0]["next"] == 7  # again: nothing
    assert logs(agent, chunk(running, 3, "llo\nworld"))[0]["next"] == 12  # an overlap gives its new part
    assert logs(agent, chunk(running, 99, "gap"))[0]["next"] == 12  # a gap waits for what is missing
    assert logs(agent, chunk(running, 15, "c"), chunk(running, 12, "ab\n"))[0]["next"] == 16
    assert logs(agent, chunk(running, 0, "E", "stderr"))[0]["next"] == 1
    assert (stored(running), stored(running, "stderr")) == ("héllo\nworldab\nc", "E")


def test_a_stream_has_a_cap_and_says_so(agent, running, monkeypatch):
    monkeypatch.setattr(agents, "LOG_CAP_BYTES", 10)
    assert logs(agent, chunk(running, 0, "12345678"))[0]["next"] == 8
    assert logs(agent, chunk(running, 8, "90abc"))[0]["next"] == 13
    assert logs(agent, chunk(running, 13, "more"))[0]["next"] == 17  # the agent may forget it
    assert stored(running) == "1234567890" + agents.LOG_NOTICE
    assert LogChunk.objects.count() == 3


def test_a_nul_in_the_output_holds_up_nothing(agent, running):
    assert logs(agent, chunk(running, 0, "a\x00b\n"))[0]["next"] == 4
    assert stored(running) == "a\ufffdb\n"
    event = {"id": str(uuid.uuid4()), "at": now().isoformat(), "kind": "x", "data": {"a": ["nul \x00"]}}
    sync(agent, events=[event])
    assert AgentEvent.objects.get().data == {"a": ["nul \ufffd"]}
    assert Placement.objects.get().state == "running"
