"""Hosts and miners in bulk: books agree after any history, live placements are never cut, what does not fit is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.django import TestCase as HypothesisCase

from marketplace.models import AuditEvent, GpuModel, Host, Miner, OutboxMessage
from marketplace.services import sites
from marketplace.tenancy import Actor
from tests import factories
from tests.factories import NOW
from tests.marketplace.refusals import refused

pytestmark = pytest.mark.django_db

HOST = {
    "name": "h001", "gpu_model": "H100-SXM", "gpus": 8, "vram_mib": 81920, "vcpu_milli": 192000, "ram_mib": 2097152,
    "nvme_gib": 28000, "power_node": "pdu-1", "leaf": "leaf-1", "spine": "spine-1", "nvlink_domains": [0] * 8,
    "standby_w": 60, "parked_w": 1100, "base_w": 4600, "gpu_min_w": 200, "gpu_max_w": 700, "cap_control": True,
}  # fmt: skip
MINER = {
    "name": "m0001", "model": "S21", "power_node": "pdu-2", "driver": "luxos", "address": "127.1.0.1:4028",
    "modes": [["sleep", 25, 0], ["eco", 2400, 155000], ["normal", 3500, 200000]],
}  # fmt: skip


def upsert(site, hosts=(), miners=(), actor=None):
    by = actor or factories.actor(site.organization)
    one = sites.upsert_hosts(site, hosts, now=NOW, actor=by) if hosts else None
    two = sites.upsert_miners(site, miners, now=NOW, actor=by) if miners else None
    assert sites.recompute_reserved(site) == dict(site.power_nodes.values_list("pk", "reserved_mw"))
    return two if one is None else one


def agent_of(site):
    return Actor(kind="agent", site_id=site.pk, label="agent a")


def test_new_devices_are_free_booked_and_commanded():
    site = factories.site()
    assert upsert(site, [HOST]).counts == {"created": 1, "updated": 0, "unchanged": 0, "drained": 0}
    assert upsert(site, miners=[MINER]).created == ["m0001"]
    host, miner = Host.objects.get(), Miner.objects.get()
    assert (host.gpu_free, host.vram_free, host.vcpu_free) == ([1000] * 8, [81920] * 8, 192000)
    assert (host.reserved_w, host.power_state, host.desired_limits_w) == (1100, "parked", [200] * 8)
    assert host.applied_generation < host.desired_generation
    assert host.gpus.count() == 8
    assert host.cell == site.cell
    assert (miner.reserved_w, miner.desired_mode, miner.commanded_w, miner.desired_generation) == (3500, 0, 25, 1)
    assert GpuModel.objects.get().tdp_w == 700
    assert set(OutboxMessage.objects.values_list("topic", flat=True)) == {"scheduler.site_loop", "scheduler.run_cycle"}


def test_a_host_without_cap_control_is_at_nameplate():
    site = factories.site()
    upsert(site, [{**HOST, "cap_control": False}])
    host = Host.objects.get()
    assert (host.reserved_w, host.power_state, host.desired_limits_w) == (4600 + 8 * 700, "full", [700] * 8)


def test_the_same_inventory_again_changes_nothing():
    site = factories.site()
    upsert(site, [HOST], [MINER])
    site.refresh_from_db()
    generation, events = site.desired_generation, AuditEvent.objects.count()
    factories.unmark(Host.objects.get())
    assert upsert(site, [HOST], actor=agent_of(site)).counts["unchanged"] == 1
    assert upsert(site, miners=[MINER], actor=agent_of(site)).counts["unchanged"] == 1
    site.refresh_from_db()
    assert (site.desired_generation, AuditEvent.objects.count()) == (generation, events)
    assert Host.objects.get().changed_in == 0


def test_a_missing_row_means_unchanged():
    site = factories.site()
    upsert(site, [HOST, {**HOST, "name": "h002"}])
    upsert(site, [HOST])
    assert Host.objects.count() == 2


def test_a_device_moves_between_nodes_with_its_watts():
    site = factories.site()
    upsert(site, [HOST], [MINER])
    upsert(site, [{**HOST, "power_node": "pdu-2"}], [{**MINER, "power_node": "pdu-1"}])
    sums = dict(site.power_nodes.values_list("name", "reserved_mw"))
    assert (sums["pdu-1"], sums["pdu-2"]) == (3_500_000, 1_100_000)


class TestCaps:
    def test_by_hand_what_does_not_fit_is_refused_and_nothing_is_kept(self):
        site = factories.site(power_w=5_000)
        with refused("over_power_cap"):
            upsert(site, miners=[MINER, {**MINER, "name": "m0002"}])
        assert not Miner.objects.exists()
        assert set(site.power_nodes.values_list("reserved_mw", flat=True)) == {0}

    def test_an_agent_tells_a_fact_and_it_is_booked(self):
        site = factories.site(power_w=5_000)
        upsert(site, miners=[MINER, {**MINER, "name": "m0002"}], actor=agent_of(site))
        root = site.power_nodes.get(name="site")
        assert root.reserved_mw > root.allowed_mw

    def test_what_is_over_already_may_still_shrink_by_hand(self):
        site = factories.site(power_w=5_000)
        upsert(site, miners=[MINER, {**MINER, "name": "m0002"}], actor=agent_of(site))
        low = [["sleep", 25, 0], ["eco", 2400, 155000]]
        upsert(site, miners=[{**MINER, "modes": low}])
        assert Miner.objects.get(name="m0001").reserved_w == 2400

    def test_an_unknown_node_is_refused_by_hand_and_counts_at_the_root_for_an_agent(self):
        site = factories.site()
        with refused("import_invalid"):
            upsert(site, [{**HOST, "power_node": "pdu-9"}])
        upsert(site, [{**HOST, "power_node": "pdu-9"}], actor=agent_of(site))
        assert Host.objects.get().power_node.name == "site"


class TestLivePlacements:
    def setup_host(self, gpus=2, state="running"):
        site = factories.site()
        upsert(site, [HOST])
        host = Host.objects.get()
        job = factories.job(factories.contract(factories.listing(site, hosts=[host])), gpus=gpus, state="running")
        return site, host, factories.placement(job, host, [6, 7][:gpus], state=state)

    def test_a_host_that_shrinks_under_them_drains_and_keeps_its_shape(self):
        site, host, _ = self.setup_host()
        for row in (
            {**HOST, "gpus": 6, "nvlink_domains": [0] * 6},
            {**HOST, "vcpu_milli": 4_000},
            {**HOST, "vram_mib": 40_960},
            {**HOST, "gpu_model": "A100"},
        ):
            Host.objects.filter(pk=host.pk).update(state="active", state_reason="")
            assert upsert(site, [row], actor=agent_of(site)).drained == ["h001"]
            host.refresh_from_db()
            assert (host.state, host.gpu_count, host.vcpu_milli) == ("draining", 8, 192_000)
            assert host.gpu_free == [1000] * 6 + [0, 0]

    def test_once_it_is_empty_the_new_shape_holds_and_it_works_again(self):
        site, host, placement = self.setup_host()
        small = {**HOST, "gpus": 4, "nvlink_domains": [0, 0, 1, 1]}
        upsert(site, [small])
        placement.grant.delete()
        placement.delete()
        Host.objects.filter(pk=host.pk).update(
            gpu_free=[1000] * 8, vram_free=[81920] * 8, vcpu_free=192000, ram_free=2097152
        )
        assert upsert(site, [small]).updated == ["h001"]
        host.refresh_from_db()
        assert (host.state, host.gpu_count, host.gpu_free, host.gpus.count()) == ("active", 4, [1000] * 4, 4)

    def test_growth_and_slack_are_taken_at_once(self):
        site, host, _ = self.setup_host(gpus=1)
        upsert(site, [{**HOST, "gpus": 10, "nvlink_domains": [0] * 10, "vcpu_milli": 100_000}])
        host.refresh_from_db()
        assert host.gpu_free == [1000] * 6 + [0, 1000, 1000, 1000]
        assert (host.vcpu_free, host.state) == (92_000, "active")

    def test_new_watts_of_a_running_host_are_booked_for_its_active_gpus(self):
        site, host, _ = self.setup_host()
        upsert(site, [{**HOST, "gpu_max_w": 750, "gpu_min_w": 220}])
        host.refresh_from_db()
        assert host.reserved_w == 4600 + 2 * 750 + 6 * 220
        assert host.desired_limits_w == [220] * 6 + [750] * 2

    def test_watts_on_their_way_down_stay_booked(self):
        site, host, placement = self.setup_host()
        placement.grant.__class__.objects.update(state="released")  # ended, limits not read back yet
        booked = host.reserved_w
        host.refresh_from_db()
        booked = host.reserved_w
        upsert(site, [{**HOST, "parked_w": 1000}])
        host.refresh_from_db()
        assert host.reserved_w == booked


class TestMiners:
    def test_a_new_ladder_is_unconfirmed(self):
        site = factories.site()
        miner = factories.miner(site, "m1", mode=1)
        row = {**MINER, "name": "m1", "power_node": "pdu-1", "modes": [["sleep", 30, 0], ["max", 4000, 230000]]}
        upsert(site, miners=[row])
        miner.refresh_from_db()
        assert (miner.mode_watts, miner.desired_mode, miner.reserved_w) == ([30, 4000], 1, 4000)
        assert miner.desired_generation == 1

    def test_a_new_address_leaves_the_watts_alone(self):
        site = factories.site()
        upsert(site, miners=[MINER])
        Miner.objects.update(confirmed_w=25, reserved_w=25)
        site.power_nodes.filter(name="pdu-2").update(reserved_mw=25_000)
        site.power_nodes.filter(name="tx-1").update(reserved_mw=25_000)
        site.power_nodes.filter(name="site").update(reserved_mw=25 * site.miner_pue_permille)
        upsert(site, miners=[{**MINER, "address": "127.1.0.9:4028"}])
        assert Miner.objects.get().reserved_w == 25


@pytest.mark.parametrize(
    "change",
    [
        {"gpus": 17},
        {"gpus": -1},
        {"gpus": "many"},
        {"gpus": True},
        {"name": ""},
        {"name": "x" * 61},
        {"nvlink_domains": [0]},
        {"gpu_min_w": 701},
        {"parked_w": 50},
        {"parked_w": 99_999},
        {"vram_mib": 0},
        {"cap_control": "perhaps"},
        {"colour": "red"},
        {"base_w": None},
    ],
)
def test_a_wrong_host_is_refused_by_column(change):
    site = factories.site()
    column = next(iter(change))
    with refused("import_invalid") as caught:
        upsert(site, [HOST | {"name": "h0"}, {**HOST, **change}])
    assert f"/1/{column}" in caught.value.fields
    assert not Host.objects.exists()


@pytest.mark.parametrize(
    "modes", [[], [["sleep", 25, 0]], "sleep:25:0 eco:2400", [["a", 25, 0], ["a", 26, 1]], [["a", 25, 0], ["b", 20, 1]],
              [["a", 25, 5], ["b", 30, 9]]],
)  # fmt: skip
def test_a_wrong_ladder_is_refused(modes):
    with refused("import_invalid"):
        upsert(factories.site(), miners=[{**MINER, "modes": modes}])


def test_a_name_twice_is_refused():
    with refused("import_invalid"):
        upsert(factories.site(), [HOST, HOST])


class TestBooks(HypothesisCase):
    @settings(max_examples=30)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["h", "m"]),
                st.integers(0, 2),
                st.sampled_from(["pdu-1", "pdu-2", "tx-1", "gone"]),
                st.integers(1, 4),
                st.booleans(),
            ),
            max_size=12,
        )
    )
    def test_the_sums_are_those_of_the_devices_after_any_history(self, history):
        site = factories.site()
        for kind, n, node, size, flag in history:
            if kind == "h":
                row = {**HOST, "name": f"h{n}", "power_node": node, "gpus": size, "nvlink_domains": [0] * size}
                upsert(site, [{**row, "cap_control": flag}], actor=agent_of(site))
            else:
                row = {**MINER, "name": f"m{n}", "power_node": node}
                top = [["top", 3000 + size, 9]] if flag else []
                upsert(site, miners=[{**row, "modes": [*MINER["modes"][:2], *top]}], actor=agent_of(site))
