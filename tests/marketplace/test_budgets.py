"""What power nodes can still give: the watts that wait for a grant are a fact of the host, counted once however many wait there."""

import random
from collections import defaultdict

import pytest
from django.db import transaction

from marketplace.locks import Lock, acquire
from marketplace.models import Host, Placement, PowerGrant, PowerNode
from marketplace.services import placements, power
from marketplace.services.budgets import node_budgets, pending_w
from tests import factories as f
from tests.factories import NOW

pytestmark = pytest.mark.django_db


# --- a plain twin
def watts(host, gpus_of_each):
    """W of the host when all of these run: GPU by GPU."""
    if not gpus_of_each:
        return host.parked_w if host.cap_control else host.base_w + host.gpu_count * host.gpu_max_w
    total = host.base_w
    for gpu in range(host.gpu_count):
        used = any(gpu in gpus for gpus in gpus_of_each)
        total += host.gpu_max_w if used or not host.cap_control else host.gpu_min_w
    return total


def short(host):
    """W that the host lacks for those who wait there, 0 where nobody does."""
    rows = PowerGrant.objects.filter(host=host).exclude(state="released").select_related("placement")
    if all(g.state == "granted" for g in rows):
        return 0
    return max(0, watts(host, [g.placement.gpu_indices for g in rows]) - host.reserved_w)


def free(site):
    """MW by node, by walking up from each host."""
    lacking = defaultdict(int)
    for host in Host.objects.filter(site=site):
        node = host.power_node
        while node is not None:
            lacking[node.pk] += short(host)
            node = node.parent
    return {
        n.pk: n.allowed_mw - n.reserved_mw - lacking[n.pk] * n.overhead_gpu_permille
        for n in PowerNode.objects.filter(site=site)
    }


def budgets(site):
    return {pk: b.free_mw for pk, b in node_budgets([site.pk]).items()}


def a_site(dice):
    site = f.site(pdus=2, power_w=10_000_000)
    for _ in range(dice.choice((1, 3))):
        capped = dice.random() < 0.8
        f.host(site, power_node=f"pdu-{dice.choice((1, 2))}", cap_control=capped)
    return site, f.contract(f.listing(site, hosts=Host.objects.filter(site=site)), f.organization(), gpu_count=64)


def somebody(contract, dice):
    """One more placement: a share of a GPU, whole ones, or none; its watts granted or awaited."""
    host = dice.choice(list(Host.objects.filter(site__cell=contract.cell)))
    milli = dice.choice((250, 1000))
    room = [i for i, left in enumerate(host.gpu_free) if left >= milli]
    count = dice.choice((0, 1, 1, 2, 4)) if milli == 1000 else 1
    if count > len(room):
        return
    gpus = sorted(dice.sample(room, count))
    job = f.job(contract, gpus=count, gpu_milli=milli, state="placed", attempt=1, vcpu_milli=100, ram_mib=100)
    f.placement(job, host, gpus, state=dice.choice(("shedding", "shedding", "granted")))


@pytest.mark.parametrize("seed", range(16))
def test_what_nodes_can_give_is_what_is_left_when_all_who_wait_run_together(seed):
    dice = random.Random(seed)
    site, contract = a_site(dice)
    other, _ = a_site(dice)  # whose watts are its own
    assert pending_w([site.pk]) == {}
    for _ in range(10):
        somebody(contract, dice)
        # What is booked lags behind what is granted: limits that nobody has read back yet, hosts parked meanwhile.
        host = dice.choice(list(Host.objects.filter(site=site)))
        granted = PowerGrant.objects.filter(host=host, state="granted").values_list("placement__gpu_indices", flat=True)
        least = watts(host, list(granted))
        Host.objects.filter(pk=host.pk).update(
            reserved_w=dice.choice((least, least, least + 500, host.base_w + 8 * host.gpu_max_w))
        )
        if dice.random() < 0.2:
            PowerGrant.objects.filter(pk__in=PowerGrant.objects.order_by("?").values("pk")[:1]).update(state="released")
        assert budgets(site) == free(site)
        assert pending_w([site.pk]).get(site.pk, 0) == sum(short(h) for h in Host.objects.filter(site=site))
    assert budgets(other) == free(other)


def locked(site, call):
    with transaction.atomic():
        acquire((Lock.SITE, site.pk))
        return call()


@pytest.mark.parametrize("seed", range(12))
def test_a_grant_takes_nothing_that_was_not_counted_and_an_end_gives_all_of_it_back(seed):
    """What is free beside what waits is the same before and after it is granted, in whatever order they come and go."""
    dice = random.Random(seed)
    site, contract = a_site(dice)
    for _ in range(14):
        move = dice.random()
        live = list(Placement.objects.exclude(state__in=Placement.FINAL))
        if move < 0.5 or not live:
            somebody(contract, dice)
        elif move < 0.7:
            before, waits = budgets(site), {h.pk: (h.reserved_w, short(h)) for h in Host.objects.filter(site=site)}
            granted = locked(site, lambda: power.grant_pending(power.Ledger.of(site.pk), now=NOW))
            locked(site, lambda ids=granted: placements.grant(ids, now=NOW))
            assert not PowerGrant.objects.filter(state="shedding").exists()  # there is enough for all
            assert budgets(site) == before
            assert {h.pk: h.reserved_w for h in Host.objects.filter(site=site)} == {
                pk: booked + lacked for pk, (booked, lacked) in waits.items()
            }
        else:
            gone = dice.choice(live)
            locked(
                site,
                lambda pk=gone.pk: placements.finish([pk], to="failed", now=NOW, actor="site", reason="exit code 1"),
            )
            if dice.random() < 0.5:  # and its host reads its limits back
                Host.objects.update(applied_generation=1_000_000)
                locked(site, lambda: power.lower_hosts(power.Ledger.of(site.pk)))
        assert budgets(site) == free(site)


def test_those_who_wait_on_one_host_keep_one_place_in_the_queue():
    """Two wait on one host, which is raised once for both; who comes after them to another host of the node gets what is left
    beside that, not beside twice as much.
    """
    site = f.site(pdus=1, power_w=10_000_000)
    first, second = f.host(site, power_node="pdu-1"), f.host(site, power_node="pdu-1")
    contract = f.contract(f.listing(site, hosts=[first, second]), f.organization(), gpu_count=16)

    def waits(host, gpus):
        return f.placement(f.job(contract, gpus=len(gpus), state="placed", attempt=1), host, gpus, state="shedding")

    one, two, other = waits(first, [0, 1, 2]), waits(first, [3]), waits(second, [0])
    lacks = watts(first, [[0, 1, 2, 3]]) - first.parked_w
    needs = watts(second, [[0]]) - second.parked_w
    pdu = PowerNode.objects.get(name="pdu-1")

    def with_free(watts_free):
        PowerNode.objects.filter(pk=pdu.pk).update(
            cap_w=pdu.reserved_mw // 1000 + pdu.fixed_w + pdu.margin_w + watts_free
        )
        return locked(site, lambda: power.grant_pending(power.Ledger.of(site.pk), now=NOW))

    # The largest asks for all but one watt of what is there: it waits, and so does the one behind it on the same host.
    alone = watts(first, [[0, 1, 2]]) - first.parked_w
    assert with_free(alone - 1) == []
    # Under a limit that never binds it, the other host is served though both of the first wait for a deeper node.
    deep = f.node(site, "rack-1", parent=pdu, cap_w=first.reserved_w + 1)
    deep.margin_w = deep.fixed_w = 0
    deep.reserved_mw = 1000 * first.reserved_w
    deep.save()
    Host.objects.filter(pk=first.pk).update(power_node=deep)
    assert with_free(lacks + needs - 1) == []
    assert with_free(lacks + needs) == [other.pk]
    PowerNode.objects.filter(pk=deep.pk).update(cap_w=1_000_000)
    assert with_free(lacks + needs) == [one.pk, two.pk]
    host = Host.objects.get(pk=first.pk)
    assert host.reserved_w == watts(first, [[0, 1, 2, 3]])
