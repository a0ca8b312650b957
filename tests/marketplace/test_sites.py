"""Sites and their trees, modes, devices by hand, enrolment tokens."""

from datetime import timedelta

import pytest

from marketplace.models import AuditEvent, EnrolmentToken, Host, OutboxMessage, PowerNode, Site
from marketplace.services import sites, tokens
from marketplace.tenancy import SYSTEM
from tests import factories
from tests.factories import NOW
from tests.marketplace.refusals import refused

pytestmark = pytest.mark.django_db


def verbs(site):
    return list(AuditEvent.objects.filter(organization=site.organization).order_by("id").values_list("verb", flat=True))


def topics():
    return set(OutboxMessage.objects.values_list("topic", "key"))


@pytest.fixture
def operator():
    return factories.organization(is_operator=True)


class TestCreate:
    def test_a_site_comes_with_its_root_node(self, operator):
        site = sites.create_site(
            operator, name="Pecos", region="us-tx", contract_power_w=1_000_000, pue_permille=1300, miner_pue_permille=1060,
            fixed_w=5_000, actor=factories.actor(operator), now=NOW, carbon_g_per_kwh=320,
        )  # fmt: skip
        root = PowerNode.objects.get(site=site)
        assert (root.name, root.kind, root.parent, root.cap_w, root.fixed_w) == ("site", "site", None, 1_000_000, 5_000)
        assert (root.overhead_gpu_permille, root.overhead_miner_permille) == (1300, 1060)
        assert root.margin_w == 20_000  # 2 % with a meter
        assert site.cell.region == "us-tx"
        assert verbs(site) == ["site.created"]

    def test_sites_of_a_region_share_a_cell_and_test_sites_never_share_it_with_live_ones(self, operator):
        twin = factories.organization(is_operator=True, livemode=False)
        a, b, c = (
            sites.create_site(o, name=n, region="no-1", contract_power_w=10**6, actor=factories.actor(o), now=NOW)
            for o, n in ((operator, "a"), (operator, "b"), (twin, "a"))
        )
        assert a.cell == b.cell != c.cell
        assert (a.cell.livemode, c.cell.livemode) == (True, False)
        with refused("invalid_request"):
            sites.create_site(twin, name="x", region="no-1", contract_power_w=10**6, cell=a.cell, actor=SYSTEM, now=NOW)

    def test_refusals(self, operator):
        make = {"region": "us-tx", "contract_power_w": 10**6, "now": NOW, "actor": factories.actor(operator)}
        sites.create_site(operator, name="Pecos", **make)
        with refused("invalid_request"):
            sites.create_site(operator, name="Pecos", **make)
        with refused("forbidden"):
            sites.create_site(factories.organization(), name="Pecos", **make)
        with refused("invalid_request"):
            sites.create_site(operator, name="All fixed", fixed_w=990_000, **make)
        assert Site.objects.count() == 1

    def test_update(self, operator):
        site = factories.site(operator, name="Old")
        factories.site(operator, name="Taken")
        sites.update_site(site, actor=factories.actor(operator), now=NOW, name="New", carbon_g_per_kwh=10)
        site.refresh_from_db()
        assert (site.name, site.carbon_g_per_kwh) == ("New", 10)
        with refused("invalid_request"):
            sites.update_site(site, actor=factories.actor(operator), now=NOW, name="Taken")


class TestPowerNodes:
    @pytest.mark.parametrize(("metering", "margin"), [("meter", 2_000), ("firmware", 8_000), ("nameplate", 15_000)])
    def test_the_margin_follows_the_metering(self, operator, metering, margin):
        site = factories.site(operator, pdus=0)
        above = site.power_nodes.get(name="tx-1")
        made = sites.add_power_node(
            site, name="pdu-x", parent=above, cap_w=100_000, metering=metering, actor=factories.actor(operator), now=NOW
        )
        assert (made.margin_w, made.depth, made.parent) == (margin, 2, above)
        before = site.safety_generation
        site.refresh_from_db()
        assert site.safety_generation == before + 1
        assert ("scheduler.site_loop", str(site.pk)) in topics()

    def test_refusals(self, operator):
        site, other = factories.site(operator), factories.site(operator)
        boss = factories.actor(operator)
        with refused("invalid_request"):
            sites.add_power_node(site, name="pdu-1", cap_w=1000, actor=boss, now=NOW)
        with refused("invalid_request"):
            sites.add_power_node(
                site, name="x", parent=other.power_nodes.get(name="tx-1"), cap_w=1000, actor=boss, now=NOW
            )

    def test_a_cap_is_never_lowered_under_what_is_booked(self, operator):
        site = factories.site(operator)
        factories.host(site, cap_control=False)  # 10,200 W at nameplate
        pdu = site.power_nodes.get(name="pdu-1")
        with refused("over_power_cap", missing_w=400):
            sites.update_power_node(pdu, cap_w=10_000, actor=factories.actor(operator), now=NOW)
        sites.update_power_node(pdu, cap_w=10_500, actor=factories.actor(operator), now=NOW)
        pdu.refresh_from_db()
        assert (pdu.cap_w, pdu.margin_w) == (10_500, 210)

    def test_a_new_overhead_is_booked_at_its_node_alone(self, operator):
        site = factories.site(operator)
        factories.host(site)
        factories.miner(site)
        transformer = site.power_nodes.get(name="tx-1")
        sites.update_power_node(transformer, overhead_gpu_permille=1100, actor=factories.actor(operator), now=NOW)
        transformer.refresh_from_db()
        assert transformer.reserved_mw == 1_100 * 1100 + 3_500 * 1000
        assert sites.recompute_reserved(site) == dict(site.power_nodes.values_list("pk", "reserved_mw"))
        with refused("over_power_cap"):
            root = site.power_nodes.get(name="site")
            factories.miner(site, modes=[("sleep", 25, 0), ("all", 880_000, 1)])
            sites.update_power_node(root, overhead_miner_permille=2000, actor=factories.actor(operator), now=NOW)

    def test_the_root_cap_is_the_contract_power(self, operator):
        site = factories.site(operator)
        sites.update_power_node(
            site.power_nodes.get(parent=None), cap_w=2_000_000, actor=factories.actor(operator), now=NOW
        )
        site.refresh_from_db()
        assert site.contract_power_w == 2_000_000


def test_a_mode_is_one_click_audited_and_nudges_the_loop(operator):
    site = factories.site(operator)
    boss = factories.actor(operator)
    before = (site.desired_generation, site.safety_generation)
    sites.set_site_mode(site, "shed", actor=boss, now=NOW)
    sites.set_site_mode(site, "shed", actor=boss, now=NOW)  # nothing changes, nothing is recorded
    site.refresh_from_db()
    assert site.mode == "shed"
    assert (site.desired_generation, site.safety_generation) == (before[0] + 1, before[1] + 1)
    assert verbs(site) == ["site.mode_changed"]
    assert topics() == {("scheduler.site_loop", str(site.pk))}
    with refused("invalid_request"):
        sites.set_site_mode(site, "party", actor=boss, now=NOW)


class TestHosts:
    def test_drain_and_back(self, operator):
        host = factories.host(factories.site(operator))
        boss = factories.actor(operator)
        host = sites.drain_host(host, reason="fan", actor=boss, now=NOW)
        assert (host.state, host.state_reason) == ("draining", "fan")
        assert sites.undrain_host(host, actor=boss, now=NOW).state == "active"
        with refused("illegal_transition"):
            sites.undrain_host(host, actor=boss, now=NOW)
        assert verbs(host.site) == ["host.drained", "host.undrained"]
        assert ("scheduler.run_cycle", str(host.cell_id)) in topics()

    def test_a_retired_host_is_not_drained(self, operator):
        host = factories.host(factories.site(operator), state="retired")
        with refused("illegal_transition"):
            sites.drain_host(host, reason="x", actor=factories.actor(operator), now=NOW)

    def test_what_runs_stays_unless_it_is_asked_to_leave(self, operator):
        host = factories.host(factories.site(operator))
        job = factories.job(factories.contract(factories.listing(host.site, hosts=[host])), state="running")
        placement = factories.placement(job, host, state="running", running_at=NOW)
        boss = factories.actor(operator)
        sites.drain_host(host, reason="fan", actor=boss, now=NOW)
        placement.refresh_from_db()
        assert placement.state == "running"
        sites.drain_host(host, reason="fan", actor=boss, now=NOW + timedelta(minutes=5), evict=True)
        placement.refresh_from_db()
        assert (placement.state, placement.desired) == ("draining", "drain")
        assert placement.release_requested_at == NOW + timedelta(minutes=5)


class TestMiners:
    def test_by_hand_and_back_to_dispatch(self, operator):
        site = factories.site(operator)
        miner = factories.miner(site)
        boss = factories.actor(operator)
        miner = sites.set_miner_manual(miner, True, mode="sleep", actor=boss, now=NOW)
        assert (miner.manual, miner.desired_mode, miner.desired_generation) == (True, 0, 1)
        assert miner.reserved_w == 3500  # a sleep frees nothing until readings confirm it
        assert sites.set_miner_manual(miner, False, actor=boss, now=NOW).manual is False
        assert verbs(site) == ["miner.manual_changed"] * 2

    def test_a_wake_that_does_not_fit_is_refused(self, operator):
        site = factories.site(operator, power_w=5_000)
        factories.miner(site)
        asleep = factories.miner(site, mode=0)
        with refused("over_power_cap"):
            sites.set_miner_manual(asleep, True, mode="normal", actor=factories.actor(operator), now=NOW)
        asleep.refresh_from_db()
        assert (asleep.manual, asleep.desired_mode) == (False, 0)

    @pytest.mark.parametrize(("manual", "mode"), [(True, "turbo"), (False, "eco")])
    def test_a_mode_needs_a_ladder_and_a_hand(self, operator, manual, mode):
        miner = factories.miner(factories.site(operator))
        with refused("invalid_request"):
            sites.set_miner_manual(miner, manual, mode=mode, actor=factories.actor(operator), now=NOW)


def test_an_enrolment_token_is_shown_once_and_lasts_a_day(operator):
    site = factories.site(operator)
    row, token = sites.create_enrolment_token(site, actor=factories.actor(operator), now=NOW)
    assert token.startswith("enr_")
    assert EnrolmentToken.objects.get(digest=tokens.digest(token)) == row
    assert row.expires_at == NOW + timedelta(hours=24)
    assert token not in str(EnrolmentToken.objects.filter(pk=row.pk).values())


def test_a_revoked_agent_stays_revoked(operator):
    row, _ = factories.agent(factories.site(operator))
    boss = factories.actor(operator)
    assert sites.revoke_agent(row, actor=boss, now=NOW) is True
    assert sites.revoke_agent(row, actor=boss, now=NOW + timedelta(hours=1)) is False
    row.refresh_from_db()
    assert row.revoked_at == NOW


def test_the_database_marks_changes_that_the_scheduler_sees_and_no_others():
    host = factories.host(factories.site())

    def marked():
        return Host.objects.values_list("changed_in", flat=True).get(pk=host.pk) != 0

    assert marked()
    for columns, seen in (
        ({"measured_w": 900, "beat_at": NOW, "applied_generation": 7}, False),
        ({"vcpu_free": 5}, True),
        ({"state": "lost"}, True),
        ({"vcpu_free": 5}, False),
        ({"taints": ["burn-in"]}, True),
        ({"leaves_at": NOW}, True),
    ):
        factories.unmark(host)
        assert not marked()
        Host.objects.filter(pk=host.pk).update(**columns)
        assert marked() == seen
    factories.unmark(host)
    Host.objects.filter(pk=host.pk).update(changed_in=3)
    assert Host.objects.values_list("changed_in", flat=True).get(pk=host.pk) > 3  # it is the database's alone


def test_a_cell_that_a_host_leaves_says_so():
    host = factories.host(factories.site())
    cell, other = host.cell, factories.cell()
    Host.objects.filter(pk=host.pk).update(vcpu_free=5, state="retired")
    cell.refresh_from_db()
    assert cell.layout == 0
    Host.objects.filter(pk=host.pk).update(cell=other)
    cell.refresh_from_db()
    assert cell.layout == 1
    Host.objects.filter(pk=host.pk).delete()
    other.refresh_from_db()
    assert other.layout == 1
