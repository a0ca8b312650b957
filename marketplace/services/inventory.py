"""Hosts and miners in bulk: from a CSV file, and from what a site's agent sees. Rows as in docs/agent-protocol.md.

A row that is missing means unchanged, never gone. The watts of new and changed devices are booked in the same transaction,
under the site's lock. By hand (`strict`), what does not fit under a node is refused. An agent's inventory is a fact: it is
booked even over a cap, and then nothing is granted there until miners sleep or the cap is put right.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.db import transaction

from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Gpu, GpuModel, Host, Miner, PowerGrant, PowerNode, Site
from marketplace.outbox import emit
from marketplace.services import audit, columns, conditions, power
from marketplace.services.placements import touch_sites
from marketplace.tenancy import Actor
from scheduler.core import power as core

SHRANK = "the inventory shrank under what runs here"


@dataclass
class Changes:
    """What an upsert did; names in the order of the rows."""

    created: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    drained: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(names) for name, names in vars(self).items()}

    @property
    def any(self) -> bool:
        return bool(self.created or self.updated or self.drained)


class _Books:
    """A site's nodes by name, and its ledger; `close` writes, or refuses where a node would be over."""

    def __init__(self, site: Site, *, strict: bool) -> None:
        self.site, self.strict = site, strict
        self.ledger = power.Ledger.of(site.pk)
        self.by_name = {node.name: node for node in self.ledger.nodes.values()}
        self.root = next(node for node in self.ledger.nodes.values() if node.parent_id is None)

    def node(self, name: str) -> PowerNode | None:
        """By name. An agent's unknown name counts at the root: no watt is left out of the books."""
        return self.by_name.get(name) or (None if self.strict else self.root)

    def move(self, device: Host | Miner, node: PowerNode, watts: int) -> None:
        """Book `watts` for the device at `node`, and nothing any more where it stood."""
        kind = core.HOST if isinstance(device, Host) else core.MINER
        if device.pk is not None:
            self.ledger.book(device.power_node_id, -device.reserved_w, kind)
        self.ledger.book(node.pk, watts, kind)
        device.power_node, device.reserved_w = node, watts

    def close(self) -> None:
        for position, key in enumerate(self.ledger.tree.keys):
            node = self.ledger.nodes[key]  # type: ignore[index]
            over = -int(self.ledger.free[position])
            if self.strict and over > 0 and self.ledger.changes.get(node.pk, 0) > 0:
                raise over_cap(node, over)
        self.ledger.save()


def over_cap(node: PowerNode, missing_mw: int) -> MarketError:
    """The refusal of a change that would book `missing_mw` more at a node than it may carry."""
    missing = -(-missing_mw // 1000)
    return MarketError(
        "over_power_cap",
        f"Node {node.name} would be booked {missing} W over what it may carry (cap {node.cap_w} W, fixed {node.fixed_w} W, "
        f"margin {node.margin_w} W). Raise its cap, or hang devices elsewhere.",
        extra={"node": node.public_id, "missing_w": missing},
    )


def upsert_hosts(
    site: Site, rows: Sequence[Mapping[str, Any]], *, now: datetime, actor: Actor, strict: bool | None = None
) -> Changes:
    """Create and update hosts by name. `strict` (default: unless an agent speaks) refuses what the nodes cannot carry.

    A host that shrinks below what its live placements hold keeps its shape and drains instead.
    Raises import_invalid, over_power_cap, busy.
    """
    with transaction.atomic():
        books, cleaned = _begin(site, rows, columns.HOSTS, strict=actor.kind != "agent" if strict is None else strict)
        known = {
            h.name: h
            for h in Host.objects.filter(site=site, name__in=[v["name"] for v in cleaned])
            .order_by("pk")
            .select_for_update(no_key=True)
        }
        models = _gpu_models(cleaned)
        active = _active(known.values())
        changes, fresh, changed = Changes(), [], []
        for values in cleaned:
            host, node = known.get(values["name"]), books.node(values["power_node"])
            assert node is not None
            if host is None:
                fresh.append(_new_host(site, values, models[values["gpu_model"]], node, books))
                changes.created.append(values["name"])
            else:
                what = _update_host(host, values, models[values["gpu_model"]], node, books, active[host.pk])
                getattr(changes, what).append(host.name)
                if what != "unchanged":
                    changed.append(host)
        books.close()
        Host.objects.bulk_create(fresh, batch_size=500)
        Host.objects.bulk_update(changed, _HOST_COLUMNS, batch_size=200)
        _sync_gpus([*fresh, *changed])
        conditions.record(hosts=[host.pk for host in (*fresh, *changed)], now=now)
        _finish(site, "hosts", changes, now=now, actor=actor)
    return changes


def upsert_miners(
    site: Site, rows: Sequence[Mapping[str, Any]], *, now: datetime, actor: Actor, strict: bool | None = None
) -> Changes:
    """Create and update miners by name; as `upsert_hosts`.

    A new miner may be hashing at full power: it is booked at its top mode, told to sleep, and freed by readings alone.
    """
    with transaction.atomic():
        books, cleaned = _begin(site, rows, columns.MINERS, strict=actor.kind != "agent" if strict is None else strict)
        known = {
            m.name: m
            for m in Miner.objects.filter(site=site, name__in=[v["name"] for v in cleaned])
            .order_by("pk")
            .select_for_update(no_key=True)
        }
        changes, fresh, changed = Changes(), [], []
        for values in cleaned:
            miner, node = known.get(values["name"]), books.node(values["power_node"])
            assert node is not None
            if miner is None:
                fresh.append(_new_miner(site, values, node, books))
                changes.created.append(values["name"])
            elif _update_miner(miner, values, node, books):
                changed.append(miner)
                changes.updated.append(miner.name)
            else:
                changes.unchanged.append(miner.name)
        books.close()
        Miner.objects.bulk_create(fresh, batch_size=500)
        Miner.objects.bulk_update(changed, _MINER_COLUMNS, batch_size=200)
        _finish(site, "miners", changes, now=now, actor=actor)
    return changes


def _begin(
    site: Site, rows: Sequence[Mapping[str, Any]], table: Sequence[columns.Column], *, strict: bool
) -> tuple[_Books, list[dict[str, Any]]]:
    """Lock the site, check every row; the errors of all rows are told at once, by position."""
    acquire((Lock.SITE, site.pk))
    books = _Books(site, strict=strict)
    cleaned, wrong, seen = [], {}, set()
    for position, row in enumerate(rows):
        values, messages = columns.clean(table, row)
        name = values.get("name")
        if not messages and name in seen:
            messages = {"name": f"{name} stands in more than one row: keep one"}
        if not messages and books.node(values["power_node"]) is None:
            messages = {"power_node": f"there is no node {values['power_node']} at {site.name}: import it first"}
        seen.add(name)
        wrong.update({f"/{position}/{column}": message for column, message in messages.items()})
        cleaned.append(values)
    if wrong:
        raise MarketError("import_invalid", f"{len(wrong)} values are wrong.", wrong)
    return books, cleaned


def _finish(site: Site, noun: str, changes: Changes, *, now: datetime, actor: Actor) -> None:
    if not changes.any:
        return
    after = {**changes.counts, "drained": changes.drained[:100]}
    audit.record(
        actor, f"site.{noun}_changed", site.public_id, now=now, organization_id=site.organization_id, after=after
    )
    touch_sites([site.pk])
    emit("scheduler.site_loop", key=str(site.pk), payload={"site": site.pk})
    if noun == "hosts":
        emit("scheduler.run_cycle", key=str(site.cell_id), payload={"cell": site.cell_id})


# --- hosts
_WATTS = ("standby_w", "parked_w", "base_w", "gpu_min_w", "gpu_max_w", "cap_control")
_PLACE = ("leaf", "spine", "nvlink_domains")
_HOST_COLUMNS = (
    *("power_node", "gpu_model", "gpu_count", "vcpu_milli", "ram_mib", "nvme_gib", "vram_mib", "gpu_free", "vram_free"),
    *("vcpu_free", "ram_free", "nvme_free", "state", "state_reason", "reserved_w", "desired_power_state"),
    *("power_state", "desired_limits_w", "desired_generation", *_WATTS, *_PLACE),
)


def _gpu_models(cleaned: list[dict[str, Any]]) -> dict[str, GpuModel]:
    found = {m.name: m for m in GpuModel.objects.filter(name__in={v["gpu_model"] for v in cleaned})}
    for values in cleaned:
        if (name := values["gpu_model"]) not in found:
            found[name], _ = GpuModel.objects.get_or_create(
                name=name, defaults={"vram_mib": values["vram_mib"], "tdp_w": values["gpu_max_w"]}
            )
    return found


def _active(hosts: Iterable[Host]) -> dict[int, tuple[set[int], bool]]:
    """Per host: GPU indices whose watts are granted, and whether a placement without GPUs is."""
    use: dict[int, tuple[set[int], bool]] = defaultdict(lambda: (set(), False))
    grants = PowerGrant.objects.filter(host__in=list(hosts), state=PowerGrant.State.GRANTED)
    for host_id, gpus in grants.values_list("host_id", "placement__gpu_indices"):
        indices, cpu_only = use[host_id]
        use[host_id] = (indices | set(gpus), cpu_only or not gpus)
    return use


def _new_host(site: Site, values: dict[str, Any], model: GpuModel, node: PowerNode, books: _Books) -> Host:
    """Idle: parked with every GPU at its floor, or at nameplate where its power cannot be capped."""
    gpus = values["gpus"]
    parked = Host.PowerState.PARKED if values["cap_control"] else Host.PowerState.FULL
    host = Host(
        site=site,
        cell_id=site.cell_id,
        name=values["name"],
        gpu_model=model,
        gpu_count=gpus,
        **{name: values[name] for name in ("vcpu_milli", "ram_mib", "nvme_gib", "vram_mib", *_WATTS, *_PLACE)},
        gpu_free=[1000] * gpus,
        vram_free=[values["vram_mib"]] * gpus,
        vcpu_free=values["vcpu_milli"],
        ram_free=values["ram_mib"],
        nvme_free=values["nvme_gib"],
        power_state=parked,
        desired_power_state=parked,
        desired_limits_w=[values["gpu_min_w"] if values["cap_control"] else values["gpu_max_w"]] * gpus,
        desired_generation=1,
    )
    books.move(host, node, power.active_watts(host, (), cpu_only=False))
    return host


def _update_host(
    host: Host, values: dict[str, Any], model: GpuModel, node: PowerNode, books: _Books, use: tuple[set[int], bool]
) -> str:
    """Change `host` (unsaved) and the books; "updated", "unchanged" or "drained"."""
    before = {name: getattr(host, f"{name}_id", getattr(host, name)) for name in _HOST_COLUMNS}
    active, cpu_only = use
    needed = power.active_watts(host, active, cpu_only=cpu_only)
    free = _free_after(host, values, model)
    if free is None:  # what runs keeps its shape and its watts until it has left
        if host.state != Host.State.DRAINING:
            host.state, host.state_reason = Host.State.DRAINING, SHRANK
    else:
        for name, value in free.items():
            setattr(host, name, value)
        host.gpu_model, host.gpu_count = model, values["gpus"]
        for name in ("vcpu_milli", "ram_mib", "nvme_gib", "vram_mib", *_WATTS, *_PLACE):
            setattr(host, name, values[name])
        if host.state == Host.State.DRAINING and host.state_reason == SHRANK and host.back_at is None:
            host.state, host.state_reason = Host.State.ACTIVE, ""
        _command(host, active)
    target = power.active_watts(host, active, cpu_only=cpu_only)
    if host.reserved_w > needed:  # limits are on their way down; power.lower_hosts books less once they are read back
        target = max(target, host.reserved_w)
    if (node.pk, target) != (host.power_node_id, host.reserved_w):
        books.move(host, node, target)
    after = {name: getattr(host, f"{name}_id", getattr(host, name)) for name in _HOST_COLUMNS}
    if before == after:
        return "unchanged"
    return "drained" if free is None else "updated"


def _free_after(host: Host, values: dict[str, Any], model: GpuModel) -> dict[str, Any] | None:
    """The free columns under the new shape; None where what is in use does not fit it."""
    used_milli = [1000 - free for free in host.gpu_free]
    used_vram = [host.vram_mib - free for free in host.vram_free]
    busy = any(used_milli) or any(used_vram)
    if busy and (model.pk != host.gpu_model_id or any(used_milli[values["gpus"] :])):
        return None
    more = [0] * max(0, values["gpus"] - host.gpu_count)
    used_milli, used_vram = [*used_milli, *more][: values["gpus"]], [*used_vram, *more][: values["gpus"]]
    free = {
        "gpu_free": [1000 - used for used in used_milli],
        "vram_free": [values["vram_mib"] - used for used in used_vram],
        "vcpu_free": values["vcpu_milli"] - (host.vcpu_milli - host.vcpu_free),
        "ram_free": values["ram_mib"] - (host.ram_mib - host.ram_free),
        "nvme_free": values["nvme_gib"] - (host.nvme_gib - host.nvme_free),
    }
    short = min(free["vcpu_free"], free["ram_free"], free["nvme_free"], *free["vram_free"], 0) < 0
    return None if short else free


def _command(host: Host, active: set[int]) -> None:
    """The limits that follow from new watts; a host that can no longer be capped runs at nameplate."""
    limits = [host.gpu_most_w if i in active or not host.cap_control else host.gpu_min_w for i in range(host.gpu_count)]
    state = host.desired_power_state
    if not host.cap_control:
        state = Host.PowerState.FULL
    elif state == Host.PowerState.FULL:
        state = Host.PowerState.CAPPED if active else Host.PowerState.PARKED
    if (limits, state) != (host.desired_limits_w, host.desired_power_state):
        host.desired_limits_w, host.desired_power_state = limits, state
        host.desired_generation += 1


def _sync_gpus(hosts: Sequence[Host]) -> None:
    """One Gpu row for each index."""
    have: dict[int, set[int]] = defaultdict(set)
    for host_id, index in Gpu.objects.filter(host__in=hosts).values_list("host_id", "index"):
        have[host_id].add(index)
    Gpu.objects.bulk_create(
        [Gpu(host=h, index=i) for h in hosts for i in range(h.gpu_count) if i not in have[h.pk]], batch_size=1000
    )
    for host in hosts:
        if any(index >= host.gpu_count for index in have[host.pk]):
            Gpu.objects.filter(host=host, index__gte=host.gpu_count).delete()


# --- miners
_MINER_COLUMNS = (
    *("power_node", "model", "driver", "address", "mode_names", "mode_watts", "mode_ghs", "desired_mode"),
    *("desired_generation", "commanded_w", "confirmed_w", "reserved_w", "low_samples"),
)


def _new_miner(site: Site, values: dict[str, Any], node: PowerNode, books: _Books) -> Miner:
    ladder = values["modes"]
    top = ladder[-1][1]
    miner = Miner(
        site=site,
        **{name: values[name] for name in ("name", "model", "driver", "address")},
        mode_names=[mode[0] for mode in ladder],
        mode_watts=[mode[1] for mode in ladder],
        mode_ghs=[mode[2] for mode in ladder],
        desired_mode=0,
        desired_generation=1,
        commanded_w=ladder[0][1],
        confirmed_w=top,
    )
    books.move(miner, node, top)
    return miner


def _update_miner(miner: Miner, values: dict[str, Any], node: PowerNode, books: _Books) -> bool:
    """Change `miner` (unsaved) and the books; False where nothing changed."""
    before = {name: getattr(miner, f"{name}_id", getattr(miner, name)) for name in _MINER_COLUMNS}
    for name in ("model", "driver", "address"):
        setattr(miner, name, values[name])
    names, watts, ghs = (list(column) for column in zip(*values["modes"], strict=True))
    target = miner.reserved_w
    if (names, watts, ghs) != (miner.mode_names, miner.mode_watts, miner.mode_ghs):
        # Nothing has been confirmed under the new ladder: book its top until readings say less.
        miner.mode_names, miner.mode_watts, miner.mode_ghs = names, watts, ghs
        miner.desired_mode = min(miner.desired_mode, len(names) - 1)
        miner.desired_generation += 1
        miner.commanded_w = watts[miner.desired_mode]
        miner.low_samples = 0
        miner.confirmed_w = target = max(watts[-1], miner.measured_w or 0)
    if (node.pk, target) != (miner.power_node_id, miner.reserved_w):
        books.move(miner, node, target)
    return before != {name: getattr(miner, f"{name}_id", getattr(miner, name)) for name in _MINER_COLUMNS}
