"""A site's watts and minutes, and curtailments, over HTTP."""

from datetime import UTC, datetime, timedelta

import pytest

from marketplace.models import Curtailment, PowerNode, Site, SiteMinute
from scheduler import site_loop
from tests import factories as f

pytestmark = pytest.mark.django_db
URL = "/api/v1/curtailments"


def now(seconds=0):
    return datetime.now(UTC) + timedelta(seconds=seconds)


@pytest.fixture
def site():
    return f.site(pdus=1)


@pytest.fixture
def api(site):
    return f.client(site.organization)


def error(answer, status, code):
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.json()


# --- power and minutes
def test_the_tree_with_what_is_booked_and_metered(site, api):
    f.host(site)
    f.miner(site)
    f.miner(site, mode=0)
    PowerNode.objects.filter(name="pdu-1").update(measured_w=4_200, measured_at=now())
    shown = api.get(f"/api/v1/sites/{site.public_id}/power").json()
    assert [(n["name"], n["parent"]) for n in shown["nodes"]] == [("site", None), ("tx-1", "site"), ("pdu-1", "tx-1")]
    pdu = shown["nodes"][2]
    assert (pdu["reserved_w"], pdu["measured_w"]) == (1_100 + 3_500 + 25, 4_200)
    assert pdu["free_w"] == pdu["cap_w"] - pdu["fixed_w"] - pdu["margin_w"] - pdu["reserved_w"]
    assert shown["miners"] == {"awake": 1, "asleep": 1}
    assert (shown["pending_w"], shown["hashprice_microusd_per_ph_day"]) == (0, None)
    stranger = f.client(f.organization())
    for path in ("power", "minutes"):
        error(stranger.get(f"/api/v1/sites/{site.public_id}/{path}"), 404, "not_found")


def test_minutes_add_up_and_are_bounded(site, api):
    f.host(site, measured_w=1_200)
    f.miner(site, measured_at=now())
    at = now().replace(second=10, microsecond=0) - timedelta(minutes=2)
    Site.objects.update(sampled_at=at)
    for seconds in (10, 20, 30):
        f.accounted(Site.objects.get(pk=site.pk), now=at + timedelta(seconds=seconds))
    stale = Site.objects.get(pk=site.pk)
    f.accounted(stale, now=at + timedelta(seconds=40))
    f.accounted(stale, now=at + timedelta(seconds=50))  # a rival that saw the same last sample: counted once
    (row,) = api.get(f"/api/v1/sites/{site.public_id}/minutes").json()["data"]
    assert (row["hashing_w"], row["idle_gpu_w"]) == (3_500, 1_200)
    assert row["hashing_mwh"] == 4 * int(3_500 * 10 * 1000 / 3600)
    assert row["ai_mwh"] == pytest.approx(1_200 * 40 * 1000 / 3600, abs=4)
    sums = api.get(f"/api/v1/sites/{site.public_id}/minutes").json()["sums"]
    assert sums["hashing_mwh"] == row["hashing_mwh"]
    SiteMinute.objects.update(start=at - timedelta(hours=2))
    assert api.get(f"/api/v1/sites/{site.public_id}/minutes", {"minutes": 60}).json()["data"] == []
    for minutes in ("0", "1441", "x", "²"):
        error(api.get(f"/api/v1/sites/{site.public_id}/minutes", {"minutes": minutes}), 400, "invalid_request")


def test_a_long_silence_is_not_accounted_as_if_it_had_been_seen(site):
    f.miner(site, measured_at=now())
    Site.objects.update(sampled_at=now(-3600))
    f.accounted(Site.objects.get(pk=site.pk), now=now())
    assert sum(SiteMinute.objects.values_list("miners_mj", flat=True)) == 3_500 * 60_000


# --- curtailments
def announce(api, site, **fields):
    body = {
        "node": f.a_node(site).public_id, "cap_w": 500_000, "starts_at": now(60).isoformat(), "ends_at": now(3600).isoformat(),
        "reference": "ercot-1", **fields,
    }  # fmt: skip
    return api.post(URL, body, format="json")


def test_announced_once_listed_and_cancelled(site, api):
    body = {"starts_at": now(60).isoformat(), "ends_at": now(3600).isoformat()}
    first, again = (announce(api, site, **body) for _ in range(2))
    assert (first.status_code, first.json()["state"], first.json()["actions"]) == (201, "announced", ["cancel"])
    assert again.json()["id"] == first.json()["id"]
    error(announce(api, site, **body, cap_w=1), 409, "conflict")
    one = first.json()["id"]
    assert [c["id"] for c in api.get(URL, {"site": site.public_id, "state": "announced"}).json()["data"]] == [one]
    assert api.get(f"{URL}/{one}").json() == first.json()
    done = api.post(f"{URL}/{one}/cancel").json()
    assert (done["state"], done["actions"]) == ("cancelled", [])
    error(api.post(f"{URL}/{one}/cancel"), 409, "illegal_transition")


def test_a_reference_is_the_sites_own(site, api):
    assert announce(api, site).status_code == 201
    other = f.site()
    theirs = announce(f.client(other.organization), other)
    assert theirs.status_code == 201
    assert Curtailment.objects.count() == 2


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"cap_w": 10**9}, "invalid_request"),
        ({"cap_w": -1}, "invalid_request"),
        ({"ends_at": "2020-01-01T00:00:00Z"}, "invalid_request"),
        ({"node": "sit_000000000000"}, "invalid_request"),
        ({"reference": ""}, "invalid_request"),
        ({"colour": "red"}, "unknown_field"),
    ],
)
def test_a_call_that_makes_no_sense(site, api, fields, code):
    error(announce(api, site, **fields), 400, code)
    assert not Curtailment.objects.exists()


def test_only_the_operator_of_the_node_announces(site, api):
    other = f.site()
    error(announce(api, other), 404, "not_found")
    error(announce(f.client(site.organization, "viewer"), site), 403, "forbidden")
    one = announce(api, site).json()["id"]
    stranger = f.client(other.organization)
    assert stranger.get(URL).json()["data"] == []
    error(stranger.get(f"{URL}/{one}"), 404, "not_found")
    error(stranger.post(f"{URL}/{one}/cancel"), 404, "not_found")


def test_its_life_by_the_clock(site, api):
    one = announce(api, site, starts_at=now(10).isoformat(), ends_at=now(100).isoformat(), cap_w=40_000).json()["id"]
    two = announce(
        api, site, starts_at=now(10).isoformat(), ends_at=now(50).isoformat(), cap_w=30_000, reference="b"
    ).json()["id"]

    def at(seconds):
        site_loop.run(site.pk, now=now(seconds))
        states = [api.get(f"{URL}/{c}").json()["state"] for c in (one, two)]
        return [*states, PowerNode.objects.get(name="pdu-1").limit_w]

    assert at(0) == ["announced", "announced", None]
    safety = Site.objects.get().safety_generation
    assert at(20) == ["active", "active", 30_000]
    assert Site.objects.get().safety_generation > safety  # the site's own loop learns of it
    assert at(60) == ["active", "completed", 40_000]
    api.post(f"{URL}/{one}/cancel")
    assert at(70) == ["completed", "completed", None]
