"""What a change of mode costs, from the operator's page to what the machines are told."""

import pytest
from django.urls import reverse

from marketplace.models import AuditEvent, Miner, Site
from marketplace.services import feeds
from scheduler import site_loop
from tests import factories as f
from tests.faults.yard import PRICES, Yard

pytestmark = pytest.mark.django_db
DEAR = 70_000  # micro-USD per kWh: at the yard's hashprice an S21 would earn a cent an hour more in its eco mode


def test_machines_do_not_flutter_around_break_even_for_less_than_a_change_costs():
    yard = Yard()
    yard.turn(3)
    Site.objects.filter(pk=yard.site.pk).update(energy_price_microusd_per_kwh=DEAR)
    before = dict(Miner.objects.values_list("name", "desired_generation"))
    yard.turn(65)  # past the slow tier's five minutes
    assert dict(Miner.objects.values_list("name", "desired_generation")) == before
    api = f.client(yard.site.organization)
    path = f"/api/v1/sites/{yard.site.public_id}"
    assert api.get(path).json()["switch_cost_uusd"] == 20_000
    assert api.patch(path, {"switch_cost_uusd": 0}, format="json").json()["switch_cost_uusd"] == 0
    assert AuditEvent.objects.get(verb="site.updated").after == {"switch_cost_uusd": 0}
    yard.turn(65)
    assert dict(Miner.objects.values_list("name", "desired_generation")) != before
    api.patch(path, {"switch_cost_uusd": 1_000_000}, format="json")
    Site.objects.filter(pk=yard.site.pk).update(energy_price_microusd_per_kwh=45_000)
    eco = dict(Miner.objects.values_list("name", "desired_mode"))
    yard.turn(65)
    assert dict(Miner.objects.values_list("name", "desired_mode")) == eco, (
        "six cents an hour more do not pay for a dollar"
    )


def test_the_operators_form_and_bounds():
    site = f.site()
    operator = f.client(site.organization)
    page = operator.get(reverse("operator:marketplace_site_change", args=[site.pk])).content.decode()
    assert 'name="switch_cost_uusd" value="20000"' in page
    for wrong in (-1, 100_000_001):
        answer = operator.patch(f"/api/v1/sites/{site.public_id}", {"switch_cost_uusd": wrong}, format="json")
        assert answer.status_code == 400
    stranger = f.client(f.organization())
    assert stranger.patch(f"/api/v1/sites/{site.public_id}", {"switch_cost_uusd": 1}, format="json").status_code == 404
    for kind, value in PRICES.items():
        feeds.store(kind, value, source="test", observed_at=f.NOW, now=f.NOW)
    assert feeds.rates(site, now=f.NOW).hashing.wear_uusd_h == 20_000


def test_the_slow_tier_changes_so_many_machines_a_tick_and_none_in_between(monkeypatch):
    monkeypatch.setattr(site_loop, "CHANGE_LIMIT", 3)
    yard = Yard()
    yard.turn(3)
    sites = Site.objects.filter(pk=yard.site.pk)
    sites.update(energy_price_microusd_per_kwh=DEAR, switch_cost_uusd=0, dispatched_at=yard.now)
    before = dict(Miner.objects.values_list("pk", "desired_mode"))

    def changed():
        return sum(mode != before[pk] for pk, mode in Miner.objects.values_list("pk", "desired_mode"))

    yard.turn(3)
    assert changed() == 0, "the fast tier re-tunes nobody"
    for tick in (1, 2):
        sites.update(dispatched_at=yard.now - site_loop.SLOW)
        yard.turn(3)
        assert changed() == 3 * tick
