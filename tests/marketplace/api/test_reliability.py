"""The routes of a host's reliability and conditions: its operator's alone."""

from datetime import timedelta
from uuid import uuid4

import pytest
from django.db import transaction
from django.utils import timezone
from rest_framework.test import APIClient

from marketplace.services import conditions, drains, reliability
from tests import factories as f

pytestmark = pytest.mark.django_db


@pytest.fixture
def world():
    now = timezone.now()
    site = f.site()
    host = f.host(site)
    f.listing(site, hosts=[host])
    with transaction.atomic():
        conditions.record(sites=[site.pk], now=now - timedelta(minutes=30))
    actor = f.actor(site.organization)
    drains.drain_host(host, actor=actor, now=now - timedelta(minutes=20), reason="fan 2")
    drains.undrain_host(host, actor=actor, now=now - timedelta(minutes=10))
    event = {"id": str(uuid4()), "at": now - timedelta(minutes=5), "kind": "gpu_error", "subject": host.name}
    reliability.take_errors(site.pk, [{**event, "data": {"gpu": 1, "kind": "xid", "code": 79}}], now=now)
    reliability.roll_up(now=now)
    return site, host


def client(organization):
    _, key = f.key(organization, scopes=["sites:read", "listings:read"])
    made = APIClient()
    made.credentials(HTTP_AUTHORIZATION=f"Bearer {key}")
    return made


def test_an_operator_reads_what_counted_and_the_record_of_it(world):
    site, host = world
    mine = client(site.organization)
    told = mine.get(f"/api/v1/hosts/{host.public_id}/reliability").json()
    assert told["reliability"]["score_permille"] < 980
    assert [(e["kind"], e["text"]) for e in told["events"]] == [("gpu_error", "GPU 1: xid 79"), ("draining", "fan 2")]
    assert [e["record"][:4] for e in told["events"]] == ["gpe_", "cnd_"]
    page = mine.get(f"/api/v1/hosts/{host.public_id}/conditions", {"limit": 2}).json()
    assert [c["kind"] for c in page["data"]] == ["able", "draining"]
    assert page["data"][0]["starts_at"] == page["data"][1]["ends_at"]
    rest = mine.get(f"/api/v1/hosts/{host.public_id}/conditions", {"cursor": page["cursor"]}).json()
    assert ([c["kind"] for c in rest["data"]], rest["has_more"]) == (["able"], False)
    assert mine.get(f"/api/v1/hosts/{host.public_id}").json()["reliability_permille"] < 980


@pytest.mark.parametrize("noun", ["reliability", "conditions"])
def test_a_stranger_finds_nothing(world, noun):
    _, host = world
    stranger = client(f.organization(is_operator=True))
    assert stranger.get(f"/api/v1/hosts/{host.public_id}/{noun}").status_code == 404
