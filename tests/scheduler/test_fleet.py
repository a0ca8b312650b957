"""A kept reading of a cell's hosts is the cold one, whatever has happened in between and in whatever order it became visible."""

import random
import threading

import numpy as np
import pytest
from django.db import transaction

from marketplace.models import Host
from scheduler import fleet
from tests import factories as f
from tests.threads import in_thread

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def cold():
    fleet.forget()
    yield
    fleet.forget()


def canonical(hosts):
    """The columns, with leaves, spines and taints by name instead of by number."""
    out = {name: column.tolist() for name, column in hosts.columns.items() if name not in {"leaf", "spine", "taints"}}
    for level in ("leaf", "spine"):
        first: dict[int, int] = {}
        out[level] = [first.setdefault(n, i) for i, n in enumerate(hosts[level].tolist())]
    names = {bit: name for name, bit in hosts.names.taints.items()}
    out["taints"] = [sorted(names[b] for b in range(63) if mask >> b & 1) for mask in hosts["taints"].tolist()]
    return out


def cold_reading(cell_id):
    kept = fleet._kept.pop(cell_id, None)
    cold = fleet.read(cell_id)
    if kept is None:
        fleet._kept.pop(cell_id, None)
    else:
        fleet._kept[cell_id] = kept
    return cold


def same(cell_id):
    warm = fleet.read(cell_id)
    assert canonical(warm) == canonical(cold_reading(cell_id))
    return warm


def world(hosts=6):
    site = f.site(pdus=2)
    made = [
        f.host(site, gpus=random.Random(i).choice([0, 1, 4, 8]), power_node=f"pdu-{1 + i % 2}") for i in range(hosts)
    ]
    return site, made


def change(dice, site, others):
    """One thing that may happen to a host."""
    hosts = list(Host.objects.order_by("id"))
    host = dice.choice(hosts)
    one = Host.objects.filter(pk=host.pk)
    free = [dice.choice([0, 300, 1000]) for _ in range(host.gpu_count)]
    kind = dice.choice(
        [
            "free",
            "cpu",
            "state",
            "names",
            "node",
            "add",
            "retire",
            "move",
            "delete",
            "taint",
            "model",
            "beat",
            "undone",
            "own",
        ]
    )
    if kind == "free":
        one.update(gpu_free=free, vram_free=[7 * x for x in free])
    elif kind == "cpu":
        one.update(vcpu_free=dice.randrange(1000), ram_free=dice.randrange(1000), cpu_only_active=dice.randrange(3))
    elif kind == "state":
        one.update(
            state=dice.choice(["active", "draining", "lost", "maintenance"]), power_state=dice.choice(["off", "parked"])
        )
    elif kind == "names":
        one.update(leaf=dice.choice(["", "a", "b"]), spine=dice.choice(["", "s"]))
    elif kind == "node":
        one.update(power_node=f.a_node(site, dice.choice(["pdu-1", "pdu-2"])))
    elif kind == "add":
        f.host(site, gpus=dice.choice([0, 2, 8]))
    elif kind == "retire":
        one.update(state="retired")
    elif kind == "move":
        one.update(cell=dice.choice(others))
    elif kind == "delete":
        one.delete()
    elif kind == "taint":
        one.update(taints=dice.choice([[], ["x"], ["y", "x"]]), leaves_at=f.NOW)
    elif kind == "model":
        one.update(gpu_model=f.gpu_model(dice.choice(["A100", "B200"])))
    elif kind == "beat":
        one.update(beat_at=f.NOW, measured_w=3)
    elif kind == "own":  # inside one transaction: seen, but not kept
        with transaction.atomic():
            one.update(vcpu_free=dice.randrange(1000))
            same(site.cell_id)
            one.update(ram_free=dice.randrange(1000))
            same(site.cell_id)
    else:
        with transaction.atomic():
            one.update(gpu_free=free, state="draining")
            same(site.cell_id)
            transaction.set_rollback(True)
    return kind


@pytest.mark.parametrize("seed", range(3))
def test_a_kept_reading_is_the_cold_one(seed):
    dice = random.Random(seed)
    site, _ = world()
    others = [site.cell, f.cell()]
    same(site.cell_id)
    for _ in range(40):
        if not Host.objects.exists():
            f.host(site)
        for _ in range(dice.choice([1, 1, 3])):
            if Host.objects.exists():
                change(dice, site, others)
        same(site.cell_id)
        same(others[1].pk)


def test_what_commits_late_is_read_again():
    """A transaction that changed a host first and commits last, with later ones read in between."""
    site, (slow, quick, *_) = world()
    began, go = threading.Event(), threading.Event()

    def late():
        with transaction.atomic():
            Host.objects.filter(pk=slow.pk).update(vcpu_free=1)
            began.set()
            assert go.wait(20)

    same(site.cell_id)
    join = in_thread(late)
    assert began.wait(20)
    Host.objects.filter(pk=quick.pk).update(vcpu_free=2)
    before = same(site.cell_id)
    assert before["cpu_free"][before.position([quick.pk])[0]] == 2
    assert before["cpu_free"][before.position([slow.pk])[0]] == slow.vcpu_free
    go.set()
    join()
    after = same(site.cell_id)
    assert after["cpu_free"][after.position([slow.pk])[0]] == 1
    assert before["cpu_free"][before.position([slow.pk])[0]] == slow.vcpu_free  # an earlier reading stays what it was


def test_only_what_changed_is_read_and_columns_without_a_change_are_shared(monkeypatch):
    site, hosts = world(12)
    first = fleet.read(site.cell_id)
    assert first.models[1].tolist()
    read = []
    build = fleet._hosts
    monkeypatch.setattr(fleet, "_hosts", lambda found, names: read.append(build(found, names)) or read[-1])
    Host.objects.filter(pk__in=[h.pk for h in hosts[:3]]).update(vcpu_free=9)
    second = fleet.read(site.cell_id)
    assert [len(rows) for rows in read] == [3]
    assert second["gpu_free"] is first["gpu_free"]
    assert second["cpu_free"] is not first["cpu_free"]
    assert second.models is first.models
    third = fleet.read(site.cell_id)
    assert third is second


def test_another_server_or_one_set_back_is_read_anew():
    site, _ = world()
    fleet.read(site.cell_id)
    kept = fleet._kept[site.cell_id]
    broken = {name: column.copy() for name, column in kept.hosts.columns.items()}
    broken["cpu_free"][:] = -1
    for moment in (
        kept.moment._replace(server="other"),
        kept.moment._replace(xmax=1 << 60),
        kept.moment._replace(layout=9),
    ):
        fleet._kept[site.cell_id] = fleet._Kept(moment, fleet.Hosts(broken, kept.hosts.names), kept.taints)
        assert (fleet.read(site.cell_id)["cpu_free"] > 0).all()


def test_no_more_cells_are_kept_than_allowed(monkeypatch):
    monkeypatch.setattr(fleet, "KEPT_CELLS", 2)
    cells = [f.cell() for _ in range(3)]
    for cell in cells:
        assert len(fleet.read(cell.pk)) == 0
    assert list(fleet._kept) == [cells[1].pk, cells[2].pk]


def test_a_host_of_an_unknown_cell_has_no_row():
    site, hosts = world(2)
    kept = fleet.read(site.cell_id)
    assert kept.position([h.pk for h in hosts]).tolist() == [0, 1]
    for wrong in ([hosts[-1].pk + 1], [0]):
        with pytest.raises(KeyError):
            kept.position(wrong)
    assert kept.position(np.zeros(0)).tolist() == []


def test_taints_of_the_past_do_not_use_up_the_bits():
    """Taints that come and go, one for each job, say: the newest can be tolerated as the first could."""
    site, (host, *_) = world(2)
    for number in range(70):
        Host.objects.filter(pk=host.pk).update(taints=[f"job={number}"])
        here = same(site.cell_id)
        assert here.names.taints[f"job={number}"] < 62
    Host.objects.filter(pk=host.pk).update(taints=[f"all={number}" for number in range(70)])
    kept = same(site.cell_id).names
    assert sum(bit == 62 for bit in kept.taints.values()) == 8, (
        "more than there are bits for at once: the rest nobody tolerates"
    )
    Host.objects.filter(pk=host.pk).update(vcpu_free=1)
    assert same(site.cell_id).names is kept, "and reading anew would not help"
