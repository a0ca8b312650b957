"""Grid sources: an OpenADR 3 programme over a real socket, a frequency, silence; by API, and nobody else's."""

import copy
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from django.utils import timezone

from marketplace import tasks
from marketplace.errors import MarketError
from marketplace.models import (
    AuditEvent,
    Curtailment,
    CurtailmentReport,
    FeedValue,
    GridSource,
    MeterReading,
    OutboxMessage,
    PowerNode,
)
from marketplace.services import curtailments, feeds, grid, outbound
from marketplace.services.grid import clock, openadr
from sandbox.vtn import Vtn
from tests import factories as f

pytestmark = pytest.mark.django_db
RECORDED = json.loads((Path(__file__).parent / "exchanges.json").read_text())
NOW = datetime(2026, 11, 2, 12, tzinfo=UTC)
URL = "/api/v1/grid-sources"


@pytest.fixture
def site():
    made = f.site(power_w=50_000, pdus=1)
    PowerNode.objects.filter(site=made, kind="site").update(cap_w=50_000)
    return made


def root(site):
    return PowerNode.objects.get(site=site, kind="site")


@pytest.fixture
def vtn():
    made = Vtn(secret="s3cret")
    with made.httpd.beside():
        made.control({"program": {"id": "44", "programName": "operating envelope"}})
        yield made


@pytest.fixture
def source(site, vtn):
    return grid.add(
        f.actor(site.organization), root(site), kind="openadr3", name="utility", cap_w=15_000, url=vtn.httpd.url, client_id="ven",
        secret="s3cret", ven_name="tailrace", program="operating envelope", strike_uusd_mwh=80_000_000, now=NOW,
    )  # fmt: skip


def poll(source, at):
    clock.ask(source.pk, now=at)
    source.refresh_from_db()
    rows = Curtailment.objects.filter(origin=source).order_by("starts_at", "pk")
    return [(c.starts_at, c.over_at, c.cap_w, c.state) for c in rows]


def minutes(n):
    return NOW + timedelta(minutes=n)


def test_events_are_calls_amended_and_taken_back(source, vtn):
    event = copy.deepcopy(RECORDED["import_capacity_limit"])
    vtn.control({"event": event})
    first = (minutes(5), minutes(35), 20_500, "announced")
    second = (minutes(35), minutes(50), 30_000, "announced")
    assert poll(source, NOW) == [first, second]
    assert poll(source, minutes(1)) == [first, second], "read again it is the same"
    assert source.heard_at == minutes(1)
    assert (vtn.given, vtn.polls) == (1, 2), "the token is kept"
    vtn.control({"expire": True})
    event["intervals"][2]["payloads"][0]["values"] = [28]
    vtn.control({"event": event})
    changed = (minutes(35), minutes(50), 28_000, "announced")
    assert poll(source, minutes(2)) == [first, changed]
    assert vtn.given == 2
    vtn.control({"delete": "0"})
    assert [state for *_, state in poll(source, minutes(3))] == ["cancelled", "cancelled"]
    verbs = set(AuditEvent.objects.values_list("verb", flat=True))
    assert {"curtailment.announced", "curtailment.changed", "curtailment.cancelled"} <= verbs


@pytest.mark.parametrize("fault", ["down", "error", "garbled"])
def test_a_vtn_that_fails_takes_nothing_back(source, vtn, fault):
    vtn.control({"event": RECORDED["import_capacity_limit"]})
    before = poll(source, NOW)
    vtn.control({"fault": fault})
    assert poll(source, minutes(1)) == before
    assert source.error
    assert "s3cret" not in source.error
    assert source.heard_at == NOW


def test_one_event_that_makes_no_sense_does_not_hide_the_others(source, vtn):
    vtn.control({"event": {**RECORDED["simple"], "intervals": 3}})
    vtn.control({"event": RECORDED["alert"]})
    ((_, _, cap, _),) = poll(source, NOW)
    assert cap == 15_000
    assert Curtailment.objects.get().emergency
    assert "event s" in source.error
    assert source.heard_at is None, "not all of it was understood"


def test_what_somebody_ended_by_hand_stays_ended(source, vtn, site):
    vtn.control({"event": RECORDED["alert"]})
    poll(source, NOW)
    curtailments.apply(site, now=NOW)
    curtailments.cancel(f.actor(site.organization), Curtailment.objects.get(), now=minutes(1))
    assert len(poll(source, minutes(2))) == 1
    assert Curtailment.objects.get().state == "restoring"


def test_a_message_for_each_source_so_that_one_that_fails_holds_up_no_other(source, vtn, site, monkeypatch):
    actor = f.actor(site.organization)
    dear = {"cap_w": 15_000, "strike_uusd_mwh": 90_000_000, "resume_uusd_mwh": 60_000_000, "windows": 1}
    price = grid.add(actor, root(site), kind="price", name="dear hours", now=NOW, **dear)
    grid.add(actor, root(site), kind="price", name="switched off", now=NOW, enabled=False, **dear)
    now = timezone.now()
    assert feeds.store(FeedValue.Kind.ENERGY, 95_000_000, source="test", observed_at=now, now=now, scope=site.region)
    assert tasks.tick_grid() == tasks.tick_grid() == 2
    asked = OutboxMessage.objects.filter(topic=grid.ASK)
    assert sorted(asked.values_list("key", flat=True)) == sorted([str(source.pk), str(price.pk)])

    def broken(*_args, **_named):
        raise RuntimeError("its answer made no sense to us at all")

    monkeypatch.setattr(openadr, "poll", broken)
    tasks.drain_outbox(grid.ASK)
    assert Curtailment.objects.get().origin == price
    assert asked.get().payload == {"source": source.pk}, "it is tried again by itself"
    grid.remove(actor, source, now=NOW)
    grid.ask(source.pk, now=NOW)


def test_two_workers_ask_once(source, vtn):
    """A rival has moved `asked_at` between our look at it and our move."""
    vtn.control({"event": RECORDED["alert"]})
    asked = openadr.poll

    def rival(row, *, now):
        clock.ask(row.pk, now=now)
        return asked(row, now=now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openadr, "poll", rival)
        clock.ask(source.pk, now=NOW)
    assert vtn.polls == 1
    assert Curtailment.objects.count() == 1


def test_the_report_goes_to_the_vtn_once(source, vtn, site):
    vtn.control({"event": RECORDED["alert"]})
    node = root(site)
    for second in range(-60, 0):
        MeterReading.objects.create(node=node, at=NOW + timedelta(seconds=second), watts=40_000)
    poll(source, NOW)
    curtailments.apply(site, now=NOW)
    for second in range(0, 3600, 10):
        MeterReading.objects.create(node=node, at=NOW + timedelta(seconds=second), watts=10_000)
    curtailments.apply(site, now=minutes(60))
    call = Curtailment.objects.get()
    assert call.state == "completed", "no machine is to come back"
    report = CurtailmentReport.objects.get()
    assert (report.baseline_w, report.delivered_wh, report.under_after_s, report.restored_s) == (40_000, 30_000, 0, 0)
    grid.send_report(call.pk)
    grid.send_report(call.pk)
    (sent,) = vtn.reports
    assert (sent["programID"], sent["eventID"], sent["clientName"]) == ("44", "7", "tailrace")
    intervals = sent["resources"][0]["intervals"]
    assert len(intervals) == 60
    assert intervals[0]["payloads"] == [{"type": "USAGE", "values": [10.0]}, {"type": "BASELINE", "values": [40.0]}]


# --- silence
def test_a_silent_source_holds_or_curtails(source, vtn, site):
    poll(source, NOW)
    vtn.control({"fault": "down"})
    assert poll(source, minutes(11)) == []
    assert grid.holds(site.pk, now=minutes(11))
    grid.update(f.actor(site.organization), source, stale_policy="curtail", now=minutes(11))
    ((start, _, cap, state),) = poll(source, minutes(12))
    assert (start, cap, state) == (minutes(12), 15_000, "announced")
    assert not grid.holds(site.pk, now=minutes(12))
    assert len(poll(source, minutes(13))) == 1, "once"
    vtn.control({"fault": ""})
    ((*_, state),) = poll(source, minutes(14))
    assert state == "cancelled"


# --- frequency
def now(seconds=0):
    return datetime.now(UTC) + timedelta(seconds=seconds)


def test_a_low_frequency_is_an_emergency_until_it_has_been_back_for_long_enough(site):
    api = f.client(site.organization)
    body = {
        "node": root(site).public_id,
        "kind": "frequency",
        "name": "relay",
        "cap_w": 0,
        "trip_mhz": 59_700,
        "back_mhz": 59_900,
    }
    made = api.post(URL, body, format="json")
    assert made.status_code == 201, made.content
    readings = f"{URL}/{made.json()['id']}/readings"

    def read(millihertz, at):
        return api.post(readings, {"millihertz": millihertz, "at": at.isoformat()}, format="json").json()["curtailment"]

    assert read(59_950, now(-9)) is None
    call = read(59_650, now(-8))
    row = Curtailment.objects.get()
    assert (row.public_id, row.cap_w, row.emergency, row.source) == (call, 0, True, "frequency")
    first = row.ends_at
    assert read(59_650, now(-20)) == call, "older than what was heard: nothing new"
    assert read(59_850, now(-4)) == call
    row.refresh_from_db()
    assert row.ends_at > first, "not back yet: it goes on"
    assert read(59_950, now(-2)) == call
    assert Curtailment.objects.count() == 1
    late = api.post(readings, {"millihertz": 1, "at": now(-90).isoformat()}, format="json")
    assert (late.status_code, late.json()["code"]) == (409, "clock_skew")


# --- who may, and what is refused
def test_added_changed_removed_and_its_secret_never_shown(site, vtn):
    api = f.client(site.organization)
    body = {
        "node": root(site).public_id,
        "kind": "openadr3",
        "name": "u",
        "cap_w": 9_000,
        "url": vtn.httpd.url,
        "ven_name": "v",
    }
    made = api.post(URL, {**body, "client_id": "ven", "secret": "s3cret"}, format="json")
    assert made.status_code == 201, made.content
    assert made.json()["has_secret"]
    assert "s3cret" not in made.content.decode()
    assert not AuditEvent.objects.filter(after__icontains="s3cret").exists()
    one = f"{URL}/{made.json()['id']}"
    assert b"s3cret" not in bytes(GridSource.objects.get().secret)
    assert api.patch(one, {"poll_s": 30}, format="json").json()["settings"]["poll_s"] == 30
    wrong = api.patch(one, {"trip_mhz": 5}, format="json")
    assert (wrong.status_code, wrong.json()["code"]) == (400, "invalid_request")
    assert api.post(URL, {**body, "cap_w": 10**9}, format="json").status_code == 400
    assert api.post(URL, body, format="json").status_code == 409
    vtn.control({"program": {"id": "1"}, "event": RECORDED["alert"]})
    poll(GridSource.objects.get(), NOW)
    stranger = f.client(f.organization(is_operator=True))
    assert {stranger.get(one).status_code, stranger.patch(one, {"poll_s": 9}, format="json").status_code} == {404}
    assert stranger.delete(one).status_code == 404
    assert stranger.get(URL).json()["data"] == []
    assert api.delete(one).status_code == 204
    assert not Curtailment.objects.filter(state__in=("announced", "active")).exists()


@pytest.mark.parametrize(
    "url",
    ["http://grid.example", "https://127.0.0.1/", "https://[::1]/", "https://10.0.0.8/", "https://169.254.169.254/", "ftp://x",
     "https://u:p@grid.example", "https://[::ffff:127.0.0.1]/", "https://", "https://grid.example:99999"],
)  # fmt: skip
def test_a_url_inside_our_own_network_is_refused(settings, url):
    settings.GRID_PRIVATE_HOSTS = False
    assert outbound.refused(url)


def test_a_name_that_leads_inside_is_refused_when_it_is_called(settings, site, vtn):
    settings.GRID_PRIVATE_HOSTS = False
    with pytest.raises(outbound.Refused), outbound.client(2) as http:
        http.get(f"http://localhost:{vtn.httpd.port}/programs")
    with pytest.raises(MarketError):
        grid.add(
            f.actor(site.organization),
            root(site),
            kind="openadr3",
            name="x",
            cap_w=1,
            url=vtn.httpd.url,
            ven_name="v",
            now=NOW,
        )
