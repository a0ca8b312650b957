"""A host that is verified while it is bought, placed on, drained and asked for again: nobody gets what another has."""

import pytest

from marketplace.models import Host, Placement, Verification
from marketplace.services import sites, verifications
from scheduler import cycle
from tests.factories import NOW
from tests.races.market import Market, sold
from tests.threads import at_once

pytestmark = pytest.mark.django_db(transaction=True)


def test_operators_clock_and_planner_at_once():
    market = Market(hosts=2)
    job = market.submit(gpus=8)
    one, two = market.hosts
    actor = market.actor
    calls = [
        lambda: verifications.begin(one, actor=actor, now=NOW),
        lambda: verifications.begin(two, actor=actor, now=NOW),
        lambda: verifications.begin(one, actor=actor, now=NOW),
        lambda: cycle.run(market.cell.pk, now=NOW),
        lambda: sold(market, 8),
        lambda: sites.drain_host(two, actor=actor, now=NOW, reason="fan"),
    ]
    answers = at_once(calls)
    assert not [a for a in answers if isinstance(a, str) and "Error(" in a], answers
    assert Verification.objects.count() <= 1
    for host in Host.objects.all():
        held = [p for p in Placement.objects.filter(host=host) if p.state not in Placement.FINAL]
        for index in range(host.gpu_count):
            assert host.gpu_free[index] == 1000 - sum(p.gpu_milli for p in held if index in p.gpu_indices) >= 0
    job.refresh_from_db()
    assert job.state in {"queued", "placed"}


def test_eight_who_ask_at_once_begin_one_run():
    market = Market(hosts=1)
    (host,) = market.hosts
    answers = at_once([lambda: verifications.begin(host, actor=market.actor, now=NOW) for _ in range(8)])
    assert sorted(a if isinstance(a, str) else "begun" for a in answers) == ["begun", *["verification_not_now"] * 7]
    assert Placement.objects.count() == 1
