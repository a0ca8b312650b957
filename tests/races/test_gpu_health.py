"""A GPU falls sick while its host is planned on and others report of it, too: out once, and nothing comes to stand on it."""

from collections import Counter
from uuid import uuid4

import pytest

from marketplace.models import AuditEvent, Gpu, Placement
from marketplace.services import agents
from scheduler import commit
from tests import factories as f
from tests.factories import NOW
from tests.races.market import Market
from tests.threads import at_once

pytestmark = pytest.mark.django_db(transaction=True)


def reporter(market, host, n=0, gpu=3):
    """An agent of the site, with XID 79 of one GPU to tell."""
    agent, _ = f.agent(market.site, name=f"hall-{n}", last_sync_at=NOW)
    data = {"gpu": gpu, "kind": "xid", "code": 79}
    event = {"id": str(uuid4()), "at": NOW, "kind": "gpu_error", "subject": host.name, "data": data}
    return lambda: agents.observe(
        agent, {"agent_time": NOW, "boot": "b", "sequence": 1, "events": [event]}, now=NOW
    )  # fmt: skip


def test_many_who_report_it_at_once_take_it_out_once():
    market = Market(hosts=1)
    (host,) = market.hosts
    answers = at_once([reporter(market, host, n) for n in range(6)])
    assert not [a for a in answers if isinstance(a, Exception | str)], answers
    assert Counter(AuditEvent.objects.values_list("verb", flat=True))["host.gpu_sick"] == 1
    assert list(Gpu.objects.filter(healthy=False).values_list("host", "index")) == [(host.pk, 3)]


def test_a_plan_made_before_is_not_carried_out_after():
    market = Market(hosts=1)
    market.submit(gpus=8)
    plan = market.planned()
    assert plan[1].placements
    reporter(market, market.hosts[0])()
    outcome = commit.commit(*plan, now=NOW)
    assert not outcome.placed
    assert not Placement.objects.exists()


def test_committed_and_reported_at_once_nothing_stays_on_it():
    market = Market(hosts=1)
    market.submit(gpus=8)
    plan = market.planned()
    answers = at_once([lambda: commit.commit(*plan, now=NOW), reporter(market, market.hosts[0])])
    assert not [a for a in answers if isinstance(a, Exception | str)], answers
    for placement in Placement.objects.exclude(state__in=Placement.FINAL):
        assert placement.release_requested_at is not None
    market.sound()
