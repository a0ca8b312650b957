"""Reservations and the GPUs they name: with `forward.pieces` the only writer of Reservation and ReservationBlock.

The capacity core promises counts per host. Here each count becomes device indices. Every claim that has begun keeps
its devices; those still to come are renumbered where that makes room, in order of their start, which always succeeds: all
that has begun overlaps now, and an interval graph is coloured greedily from the left. Callers hold the cell's lock.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from django.db.models import Q

from marketplace.compiled import Compiled, any_of, time
from marketplace.errors import MarketError
from marketplace.models import Contract, Gpu, Host, Kind, Placement, Reservation, ReservationBlock
from marketplace.services import availability
from marketplace.services.availability import seconds

CLAIM_OF_MAINTENANCE = Q(contract=None, maintenance__isnull=False)  # a host's every GPU: nothing to number


@dataclass(frozen=True)
class Taken:
    """GPU `indices` of one host during [start, end) (s). `pinned`: work may run on them, so they stay what they are."""

    key: int
    start: int
    end: int
    indices: tuple[int, ...]
    pinned: bool


def number(
    usable: Sequence[int], taken: Iterable[Taken], start: int, end: int, count: int
) -> tuple[tuple[int, ...], dict[int, tuple[int, ...]]] | None:
    """(indices for [start, end), {key: new indices} of claims that must move), or None where the host has no room.

    Pure. Devices that are free as they stand are preferred, in the order of `usable`; nothing moves then.
    """
    rivals = list(taken)
    busy = {i for t in rivals if t.start < end and start < t.end for i in t.indices}
    free = [i for i in usable if i not in busy]
    if len(free) >= count:
        return tuple(sorted(free[:count])), {}
    found = recolour(usable, [Taken(0, start, end, (-1,) * count, pinned=False), *rivals])
    return None if found is None else (found.pop(0), found)


def recolour(usable: Sequence[int], claims: Iterable[Taken]) -> dict[int, tuple[int, ...]] | None:
    """{key: new indices} of the claims that must move so that no device is taken twice, or None where there is no room. Pure."""
    rows = list(claims)
    placed = [t for t in rows if t.pinned]
    moves: dict[int, tuple[int, ...]] = {}
    for claim in sorted((t for t in rows if not t.pinned), key=lambda t: (t.start, t.key)):
        busy = {i for t in placed if t.start < claim.end and claim.start < t.end for i in t.indices}
        free = [i for i in usable if i not in busy]
        if len(free) < len(claim.indices):
            return None
        kept = [i for i in claim.indices if i in free]  # its own devices first, so that few rows change
        indices = tuple(sorted((kept + [i for i in free if i not in kept])[: len(claim.indices)]))
        placed.append(Taken(claim.key, claim.start, claim.end, indices, pinned=True))
        if indices != tuple(sorted(claim.indices)):
            moves[claim.key] = indices
    return moves


def write_blocks(
    reservation: Reservation, hold: Iterable[tuple[int, int]], *, now: datetime, new: bool = False
) -> list[ReservationBlock]:
    """Give `reservation` the GPUs of `hold` ((host id, count), ...), replacing those it had (`new`: it has none).
    MarketError("no_capacity") if a host has no such devices left.
    """
    wanted = dict(hold)
    if not new:
        ReservationBlock.objects.filter(reservation=reservation).delete()
    usable = _usable(wanted)
    taken = _taken(wanted, now)
    start, end = seconds(reservation.claims_at), seconds(reservation.ends_at)
    made: list[ReservationBlock] = []
    for host, count in sorted(wanted.items()):
        rivals = taken.get(host, [])
        found = number(usable.get(host, ()), [t for t, _ in rivals], start, end, count)
        if found is None:
            raise MarketError("no_capacity", "The GPUs of a host were taken meanwhile; ask again.")
        indices, moves = found
        made.append(ReservationBlock(reservation=reservation, host_id=host, gpu_indices=list(indices)))
        _write_moves(rivals, moves)
    return ReservationBlock.objects.bulk_create(made)


def lengthen(reservation: Reservation, *, now: datetime) -> None:
    """The same GPUs to the reservation's new end; claims to come that were to have them are renumbered. The pool has said that
    there is room. MarketError("no_capacity") if a host has not.
    """
    renumber(reservation.blocks.values_list("host_id", flat=True), now=now)  # itself is among them, with its new end


def grow(reservation: Reservation, hold: Iterable[tuple[int, int]], *, now: datetime) -> None:
    """`hold` more GPUs ((host id, count), ...) from now on, beside those it has. MarketError("no_capacity") without room."""
    wanted = dict(hold)
    usable, taken = _usable(wanted), _taken(wanted, now)
    start, end = max(seconds(reservation.claims_at), seconds(now)), seconds(reservation.ends_at)
    own = {block.host_id: block for block in reservation.blocks.all()}
    for host, count in sorted(wanted.items()):
        rivals = taken.get(host, [])
        found = number(usable.get(host, ()), [t for t, _ in rivals], start, end, count)
        if found is None:
            raise MarketError("no_capacity", "The GPUs of a host were taken meanwhile; ask again.")
        indices, moves = found
        _write_moves(rivals, moves)
        block = own.get(host)
        if block is None:
            ReservationBlock.objects.create(reservation=reservation, host_id=host, gpu_indices=list(indices))
            continue
        block.refresh_from_db()
        block.gpu_indices = sorted({*block.gpu_indices, *indices})
        block.save(update_fields=["gpu_indices"])


def record(reservation: Reservation, gpus: Mapping[int, Sequence[int]], *, until: datetime) -> None:
    """These GPUs (host id -> indices) were the reservation's until then, and others are from now on: on record, promised to nobody.
    What runs there came by right.
    """
    if not gpus or until <= reservation.starts_at:
        return
    made = Reservation.objects.create(
        listing_id=reservation.listing_id, contract_id=reservation.contract_id, maintenance_id=reservation.maintenance_id, piece=True,
        starts_at=reservation.starts_at, claims_at=reservation.claims_at, ends_at=until, state=Reservation.State.RELEASED,
    )  # fmt: skip
    ReservationBlock.objects.bulk_create(
        ReservationBlock(reservation=made, host_id=host, gpu_indices=sorted(indices))
        for host, indices in sorted(gpus.items())
    )


def neighbours(reservation: Reservation, level: str) -> Collection[int] | None:
    """Hosts in the same cell of `level` as the contract's own; None: any of the listing."""
    if level == "site":
        return None
    hosts = Host.objects.filter(listing_id=reservation.listing_id)
    own_hosts = Host.objects.filter(reservation_blocks__reservation=reservation)
    if level == "host":
        return list(own_hosts.values_list("pk", flat=True))
    # A leaf's name is its own within its spine alone; a host without a name is a place of its own.
    names = ("spine", "leaf") if level == "leaf" else ("spine",)
    own = {pk: place for pk, *place in own_hosts.values_list("pk", *names)}
    there = [place for place in own.values() if all(place)]
    return [pk for pk, *place in hosts.order_by("pk").values_list("pk", *names) if pk in own or place in there]


def cut(contract: Contract, ends_at: datetime) -> None:
    """Its GPUs, and those that stand in for them, are free from `ends_at` on."""
    rows = Reservation.objects.filter(contract=contract, state=Reservation.State.FIRM)
    rows.filter(starts_at__gte=ends_at).update(state=Reservation.State.RELEASED)
    rows.filter(starts_at__lt=ends_at, ends_at__gt=ends_at).update(ends_at=ends_at)


def renumber(host_ids: Iterable[int], *, now: datetime, owed: bool = False) -> None:
    """Claims to come get other devices of their hosts where two would have the same. MarketError("no_capacity") without room; what is
    `owed` anyhow stays where it stands on a host with fewer working GPUs than are promised, and is a shortfall when its hour comes.
    """
    hosts = sorted(set(host_ids))
    usable, taken = _usable(hosts), _taken(hosts, now, limits=True)
    for host in hosts:
        rivals = taken.get(host, [])
        moves = recolour(usable.get(host, ()), [t for t, _ in rivals])
        if moves is None and owed:
            continue
        if moves is None:
            raise MarketError("no_capacity", "The GPUs of a host were taken meanwhile; ask again.")
        _write_moves(rivals, moves)


def _write_moves(rivals: Sequence[tuple[Taken, ReservationBlock | None]], moves: dict[int, tuple[int, ...]]) -> None:
    moved: list[ReservationBlock] = []
    for claim, block in rivals:
        if block is not None and claim.key in moves:
            block.gpu_indices = list(moves[claim.key])
            moved.append(block)
    if moved:
        ReservationBlock.objects.bulk_update(moved, ["gpu_indices"])


_SIZES = Compiled(lambda: Host.objects.filter(any_of("pk", "hosts")).order_by().values_list("pk", "gpu_count"))
_BROKEN = Compiled(
    lambda: Gpu.objects.filter(any_of("host_id", "hosts"), healthy=False).values_list("host_id", "index")
)
_SPOT = Compiled(
    lambda: (
        Placement.objects.filter(any_of("host_id", "hosts"), contract__kind=Kind.SPOT)
        .exclude(state__in=Placement.FINAL)
        .values_list("host_id", "gpu_indices", "contract__limit_price")
    )
)
_BLOCKS = Compiled(
    lambda: ReservationBlock.objects.filter(
        any_of("host_id", "hosts"),
        reservation__in=Reservation.objects.filter(availability.live_reservations(time("now"))).exclude(
            CLAIM_OF_MAINTENANCE
        ),
    ).select_related("reservation")
)


def _usable(host_ids: Iterable[int]) -> dict[int, list[int]]:
    """{host: its working devices, in the order in which a claim takes them}: idle ones, then those of spot, the lowest bid first."""
    ids = list(host_ids)
    broken: dict[int, set[int]] = defaultdict(set)
    for host, index in _BROKEN(hosts=ids):
        broken[host].add(index)
    bids: dict[tuple[int, int], int] = {}
    for host, indices, bid in _SPOT(hosts=ids):
        for i in indices:  # parts of one device leave together
            bids[host, i] = max(bids.get((host, i), 0), bid or 0)
    return {
        pk: sorted((i for i in range(count) if i not in broken[pk]), key=lambda i: (bids.get((pk, i), -1), i))
        for pk, count in _SIZES(hosts=ids)
    }


def _taken(
    host_ids: Iterable[int], now: datetime, *, limits: bool = False
) -> dict[int, list[tuple[Taken, ReservationBlock | None]]]:
    """What holds devices of these hosts: blocks of live reservations, and running work outside them; with `limits` a job's own ends it."""
    ids, at = list(host_ids), seconds(now)
    found: dict[int, list[tuple[Taken, ReservationBlock | None]]] = defaultdict(list)
    for block in _BLOCKS(hosts=ids, now=now):
        of = block.reservation
        start, end = seconds(of.claims_at), seconds(of.ends_at)
        claim = Taken(block.pk, start, end, tuple(block.gpu_indices), pinned=start <= at)
        found[block.host_id].append((claim, block))
    for host, ends in availability.unreserved_gpus(ids, now, limits=limits).items():
        found[host] += [(Taken(-1 - i, at, end, (i,), pinned=True), None) for i, end in ends.items()]
    return found


def disturbed(reservations: Iterable[Reservation], now: datetime) -> set[int]:
    """Ids of those whose host or GPU has gone, or onto whose GPUs work outside any reservation has come meanwhile. Five queries."""
    wanted = {r.pk: r for r in reservations}
    blocks: dict[int, list[ReservationBlock]] = defaultdict(list)
    for block in ReservationBlock.objects.filter(reservation_id__in=wanted).select_related("host"):
        blocks[block.reservation_id].append(block)
    host_ids = {block.host_id for group in blocks.values() for block in group}
    running, usable = availability.unreserved_gpus(host_ids, now, limits=True), _usable(host_ids)

    def spoilt(block: ReservationBlock, start: int, end: int) -> bool:
        ends = running.get(block.host_id, {})
        host = block.host
        stays = host.state == Host.State.DRAINING and host.leaves_at is not None and seconds(host.leaves_at) >= end
        stays = (
            stays or host.back_at is not None
        )  # maintenance has it, and has found others that stand in where there were any
        return (
            (host.state != Host.State.ACTIVE and not stays)
            or not set(block.gpu_indices) <= set(usable[block.host_id])
            or any(ends.get(index, 0) > start for index in block.gpu_indices)
        )

    return {
        pk
        for pk, row in wanted.items()
        if not blocks[pk] or any(spoilt(block, seconds(row.claims_at), seconds(row.ends_at)) for block in blocks[pk])
    }


def maintained(reservation: Reservation) -> bool:
    """Does announced maintenance claim one of its hosts during its window?"""
    claims = Reservation.objects.filter(
        CLAIM_OF_MAINTENANCE,
        state=Reservation.State.FIRM,
        claims_at__lt=reservation.ends_at,
        ends_at__gt=reservation.claims_at,
    )
    own = ReservationBlock.objects.filter(reservation=reservation)
    return claims.filter(blocks__host__in=own.values("host")).exists()


def lent_to_spot(reservation: Reservation) -> bool:
    """Does spot work still occupy a GPU of it?"""
    own = {b.host_id: set(b.gpu_indices) for b in ReservationBlock.objects.filter(reservation=reservation)}
    spot = Placement.objects.filter(host_id__in=own, contract__kind=Kind.SPOT).exclude(state__in=Placement.FINAL)
    return any(own[host] & set(indices) for host, indices in spot.values_list("host_id", "gpu_indices"))


@dataclass(frozen=True)
class Lodger:
    """A placement that stands on a promised host without a promise there. `amounts`: CPU milli, RAM MiB, NVMe GiB."""

    placement: int
    amounts: tuple[int, ...]
    spot: bool
    bid: int


def leavers(owed: Sequence[int], free: Sequence[int], lodgers: Sequence[Lodger]) -> list[int]:
    """Placements that must leave one host so that what is `owed` there is free: spot first, the lowest bid first, then the youngest
    (largest id) of the others; who turns out to be needless stays. [] when all is free already, and all when all are not enough.

    Pure. GPUs are not looked at: whoever stands on a promised device leaves anyhow.
    """
    order = sorted(lodgers, key=lambda p: (not p.spot, p.bid if p.spot else 0, -p.placement))
    short = [max(0, want - have) for want, have in zip(owed, free, strict=True)]
    going: list[Lodger] = []

    def enough(some: Sequence[Lodger]) -> bool:
        return all(sum(p.amounts[i] for p in some) >= lack for i, lack in enumerate(short))

    for lodger in order:
        if enough(going):
            break
        if any(lack and amount for lack, amount in zip(short, lodger.amounts, strict=True)):
            going.append(lodger)
    for lodger in reversed(list(going)):
        rest = [p for p in going if p is not lodger]
        if enough(rest):
            going = rest
    return [p.placement for p in going]


def crowding(cell_id: int | None, now: datetime) -> list[tuple[int, int, int]]:
    """(cell, placement, site) of those that hold the CPU, RAM or NVMe which goes with GPUs whose claim has begun.

    A reservation of g of n GPUs is owed g/n of its host, less what its own jobs hold there. Work that stands beside it took
    more than its share in the days before, when nobody needed it. Of all cells where none is named.
    """
    claims = ReservationBlock.objects.filter(
        reservation__state=Reservation.State.FIRM, reservation__claims_at__lte=now, reservation__ends_at__gt=now,
        reservation__contract__isnull=False,
    )  # fmt: skip
    if cell_id is not None:
        claims = claims.filter(host__cell_id=cell_id)
    promised: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for host_id, contract_id, indices in claims.values_list("host_id", "reservation__contract_id", "gpu_indices"):
        promised[host_id][contract_id] += len(indices)
    hosts = _short_hosts(promised)
    if not hosts:
        return []
    live: dict[int, list[Placement]] = defaultdict(list)
    rows = Placement.objects.filter(host__in=hosts).exclude(state__in=Placement.FINAL).select_related("contract")
    for placement in rows.order_by("pk"):
        live[placement.host_id].append(placement)
    found: set[tuple[int, int, int]] = set()
    for host in hosts:
        owed = [0, 0, 0]
        held: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
        lodgers: list[Lodger] = []
        free = [host.vcpu_free, host.ram_free, host.nvme_free]
        for p in live[host.pk]:
            amounts = (p.vcpu_milli, p.ram_mib, p.nvme_gib)
            if p.contract_id in promised[host.pk]:
                held[p.contract_id] = [a + b for a, b in zip(held[p.contract_id], amounts, strict=True)]
            elif p.release_requested_at is not None:  # on its way out
                free = [a + b for a, b in zip(free, amounts, strict=True)]
            else:
                lodgers.append(Lodger(p.pk, amounts, p.contract.kind == Kind.SPOT, p.contract.limit_price or 0))
        for contract_id, gpus in promised[host.pk].items():
            share = _share(host, gpus)
            owed = [o + max(0, s - h) for o, s, h in zip(owed, share, held[contract_id], strict=True)]
        found |= {(host.cell_id, placement, host.site_id) for placement in leavers(owed, free, lodgers)}
    return sorted(found)


def _short_hosts(promised: dict[int, dict[int, int]]) -> list[Host]:
    """Those of the hosts that have less free than all that is promised there would be owed: few, and the only ones looked at."""
    rows = Host.objects.filter(pk__in=promised).order_by("pk")
    return [
        host
        for host in rows
        if any(
            free < owed
            for free, owed in zip(
                (host.vcpu_free, host.ram_free, host.nvme_free),
                _share(host, sum(promised[host.pk].values())),
                strict=True,
            )
        )
    ]


def _share(host: Host, gpus: int) -> tuple[int, int, int]:
    """CPU, RAM and NVMe that go with so many of the host's GPUs."""
    of = max(1, host.gpu_count)
    return host.vcpu_milli * gpus // of, host.ram_mib * gpus // of, host.nvme_gib * gpus // of
