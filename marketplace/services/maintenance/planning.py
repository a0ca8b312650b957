"""What maintenance takes and from whom: its hosts, the claim on them, GPUs that stand in elsewhere, and what stays short.

A dry run and the announcement are the same code: the one is undone. Callers hold the cell's lock, so that no contract is signed,
and nothing placed, in between.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise

from django.db import transaction
from django.db.models import Q, QuerySet

from marketplace.errors import MarketError
from marketplace.models import (
    Contract,
    Host,
    Maintenance,
    MaintenanceHost,
    Placement,
    PowerNode,
    Resale,
    Reservation,
    ReservationBlock,
)
from marketplace.services import availability, holds
from marketplace.services.availability import HOLDING, LAG_S, instant
from scheduler.core.capacity import LEVELS


@dataclass(frozen=True)
class Block:
    """`gpus` of one host that a contract holds in [start, end); `stands_in`: in place of others, for maintenance."""

    contract: int
    host: int
    gpus: int
    start: datetime
    end: datetime
    stands_in: bool


@dataclass(frozen=True)
class Away:
    """A host is away for `maintenance` in [start, end)."""

    maintenance: int
    start: datetime
    end: datetime


@dataclass(frozen=True)
class Piece:
    """`gpus` of a contract's own are away for `maintenance` in [start, end), and no others stand in."""

    contract: int
    maintenance: int
    gpus: int
    start: datetime
    end: datetime


@dataclass(frozen=True)
class Touched:
    """A contract that stands where the work is: GPUs it holds or runs on there, how many of them are short, at most at once."""

    contract: Contract
    gpus: int
    short: int
    jobs: int

    @property
    def kept(self) -> int:
        return self.gpus - self.short if self.contract.kind in HOLDING else 0


@dataclass(frozen=True)
class Impact:
    """What announcing it would mean, or means. `short`: GPUs of firm contracts, all at once at the worst instant."""

    hosts: int
    gpus: int
    away_at: datetime
    ends_at: datetime
    touched: tuple[Touched, ...]
    short: int
    short_from: datetime | None
    short_until: datetime | None

    @property
    def firm(self) -> list[Contract]:
        """The firm contracts that it touches."""
        return [row.contract for row in self.touched if row.contract.kind in HOLDING]

    @property
    def sentence(self) -> str:
        """For operators: "2 contracts touched, 14 GPUs short from 1 Mar 22:00 to 2 Mar 02:00 UTC"."""
        n = len(self.touched)
        said = f"{self.hosts} host{'s' if self.hosts != 1 else ''} with {self.gpus} GPUs; {n} contract{'s' if n != 1 else ''} touched"
        if self.short_from is None or self.short_until is None:
            return f"{said}, no GPU of a firm contract short"
        return f"{said}, {self.short} GPUs short from {self.short_from:%-d %b %H:%M} to {self.short_until:%-d %b %H:%M} UTC"


# --- which hosts
def hosts_of(row: Maintenance) -> QuerySet[Host]:
    """The hosts in its scope, retired ones aside."""
    rows = Host.objects.filter(site=row.site_id).exclude(state=Host.State.RETIRED).order_by("pk")
    if row.scope == Maintenance.Scope.NODE:
        return rows.filter(power_node__in=_under(row.site_id, row.node_id))
    if row.scope == Maintenance.Scope.DOMAIN:
        return rows.filter(leaf=row.domain)
    if row.scope == Maintenance.Scope.HOSTS:
        return rows.filter(maintenance_rows__maintenance=row)
    return rows


def _under(site_id: int, node_id: int | None) -> set[int]:
    """The node and all below it."""
    children: dict[int | None, list[int]] = defaultdict(list)
    for pk, parent in PowerNode.objects.filter(site=site_id).values_list("pk", "parent_id"):
        children[parent].append(pk)
    found, todo = set(), [node_id]
    while todo:
        at = todo.pop()
        if at is not None:
            found.add(at)
        todo += children[at] if at is not None else []
    return found


# --- room
def take_room(row: Maintenance, *, now: datetime) -> Impact:
    """Write down its hosts, claim them, and find GPUs that stand in for those of contracts. Under the cell's lock."""
    hosts = list(hosts_of(row))
    if not hosts:
        raise MarketError("invalid_request", "No host is in its scope.", {"/scope": "no host"})
    MaintenanceHost.objects.bulk_create(
        [MaintenanceHost(maintenance=row, host=host) for host in hosts], ignore_conflicts=True
    )
    offered: dict[int, list[Host]] = defaultdict(list)
    for host in hosts:
        if host.listing_id is not None:
            offered[host.listing_id].append(host)
    for listing_id, some in sorted(offered.items()):
        claim = Reservation.objects.create(
            listing_id=listing_id, maintenance=row, starts_at=row.starts_at, ends_at=row.ends_at, claims_at=row.away_at,
            state=Reservation.State.FIRM,
        )  # fmt: skip
        ReservationBlock.objects.bulk_create(
            ReservationBlock(reservation=claim, host=host, gpu_indices=list(range(host.gpu_count))) for host in some
        )
    stand_in(row, row.away_at, row.ends_at, now=now)
    return impact(row, now=now)


def give_room(row: Maintenance) -> None:
    """Its claim and what stands in for others are free again."""
    Reservation.objects.filter(maintenance=row, state=Reservation.State.FIRM).update(state=Reservation.State.RELEASED)


def held_there(row: Maintenance, start: datetime, end: datetime) -> list[Reservation]:
    """Firm reservations of contracts with GPUs on its hosts in [start, end): narrow cells and large ones first, as they are harder.

    What a contract offers for resale is among them: it is its holder's again where nobody takes it.
    """
    rows = Reservation.objects.filter(
        Q(contract__isnull=False) | Q(resale__state=Resale.State.OPEN), state=Reservation.State.FIRM,
        starts_at__lt=end, ends_at__gt=start, blocks__host__maintenance_rows__maintenance=row,
    ).distinct().select_related("contract__quote", "resale__contract__quote", "listing__site").prefetch_related("blocks")  # fmt: skip
    return sorted(rows, key=lambda r: (LEVELS.index(_level(r)), -_contract(r).gpu_count, r.starts_at, r.pk))


def contracts_of(reservations: Iterable[Reservation]) -> list[Contract]:
    """Whose they are, each once."""
    return list({(of := _contract(r)).pk: of for r in reservations}.values())


def contracts_on(host_ids: Collection[int]) -> list[int]:
    """Ids of contracts with firm GPUs on these hosts, now or later."""
    rows = ReservationBlock.objects.filter(
        host_id__in=host_ids, reservation__state=Reservation.State.FIRM, reservation__contract__isnull=False
    )
    return sorted(set(rows.values_list("reservation__contract_id", flat=True)))


def _contract(reservation: Reservation) -> Contract:
    return reservation.contract or reservation.resale.contract


def _level(reservation: Reservation) -> str:
    quote = _contract(reservation).quote
    return quote.level if quote is not None else "site"


def stand_in(row: Maintenance, start: datetime, end: datetime, *, now: datetime, only: int | None = None) -> None:
    """Other GPUs of the same listing and cell of the topology for as many as can be had of those away in [start, end); of the contract
    `only`, if given. None for what is offered: its buyer knows of it, and while there is none nobody misses it.
    """
    taken = set(row.hosts.values_list("host_id", flat=True))
    away: Counter[int | None] = Counter()  # a contract may hold in parts
    for held in held_there(row, start, end):
        if held.contract_id is None or only not in {None, held.contract_id}:
            continue
        begin, until = max(start, held.starts_at, now.replace(microsecond=0)), min(end, held.ends_at)
        if begin < until:
            blocks = {block.host_id: len(block.gpu_indices) for block in held.blocks.all()}
            away[held.contract_id] += sum(count for host, count in blocks.items() if host in taken)
            _stand_in(row, held, away[held.contract_id], bool(set(blocks) - taken), (begin, until), now)


def _stand_in(
    row: Maintenance, held: Reservation, missing: int, some_stay: bool, window: tuple[datetime, datetime], now: datetime
) -> None:
    begin, until = window
    already = Reservation.objects.filter(
        maintenance=row, contract=held.contract, state=Reservation.State.FIRM, starts_at__lte=begin, ends_at__gte=until
    )
    missing -= sum(len(block.gpu_indices) for block in ReservationBlock.objects.filter(reservation__in=already))
    level = _level(held)
    among = holds.neighbours(held, level) if some_stay and level != "site" else None
    listing = held.listing
    while missing > 0:
        found = availability.admit(
            listing, gpus=missing, level=level, starts_at=begin, ends_at=until, now=now, among=among
        )
        if found.admitted:
            made = Reservation(
                listing=listing, contract=held.contract, maintenance=row, starts_at=begin, ends_at=until,
                claims_at=instant(availability.claim_window(listing, begin, until, now)[0]), state=Reservation.State.FIRM,
            )  # fmt: skip
            _hold(made, [(int(str(host)), count) for host, count in found.hold], now)
            return
        less = found.alternatives.in_window.get(level, 0) if found.alternatives is not None else 0
        missing = less if less < missing else 0


def _hold(made: Reservation, hold: Iterable[tuple[int, int]], now: datetime) -> None:
    try:
        with transaction.atomic():
            made.save()
            holds.write_blocks(made, hold, now=now, new=True)
    except MarketError as error:
        if error.code != "no_capacity":  # its devices cannot be numbered so: then it is short
            raise


def lengthen(row: Maintenance, was: datetime, *, now: datetime) -> None:
    """It ends later than `was`: so does its claim, and what stands in goes on where it stands, or elsewhere, or is short."""
    rows = Reservation.objects.filter(maintenance=row, state=Reservation.State.FIRM, ends_at=was)
    rows.filter(contract=None).update(ends_at=row.ends_at)
    for made in rows.exclude(contract=None).select_related("listing__site", "contract").order_by("pk"):
        until = min(row.ends_at, _contract(made).reservation.ends_at)
        own = [(block.host_id, len(block.gpu_indices)) for block in made.blocks.all()]
        if until > was and until == availability.free_until(
            made.listing, own, starts_at=was, ends_at=until, now=now, without=(made.pk,)
        ):
            made.ends_at = until
            made.save(update_fields=["ends_at"])
            holds.lengthen(made, now=now)
    stand_in(row, was, row.ends_at, now=now)


# --- who is touched
def impact(row: Maintenance, *, now: datetime) -> Impact:
    """Whom it touches, with its claim and stand-ins as they are written down."""
    start, end = max(row.away_at, now), row.ends_at
    gpus: Counter[int] = Counter()
    mine = set(row.hosts.values_list("host_id", flat=True))
    offered: list[Piece] = []
    for held in held_there(row, start, end):
        of = _contract(held).pk
        here = sum(len(block.gpu_indices) for block in held.blocks.all() if block.host_id in mine)
        gpus[of] += here
        if held.contract_id is None:
            offered.append(Piece(of, row.pk, here, max(start, held.starts_at), min(end, held.ends_at)))
    jobs, there = running(mine, start)
    for contract, count in there.items():
        gpus[contract] = max(gpus[contract], count)
    pieces = [p for p in short(row, gpus, now=now) if p.maintenance == row.pk] + offered
    contracts = Contract.objects.in_bulk(gpus)
    touched = tuple(
        Touched(contracts[pk], count, _peak([p for p in pieces if p.contract == pk]), len(jobs.get(pk, ())))
        for pk, count in sorted(
            gpus.items(), key=lambda item: (contracts[item[0]].kind not in HOLDING, -item[1], item[0])
        )
    )
    all_gpus = sum(Host.objects.filter(pk__in=mine).values_list("gpu_count", flat=True))
    return Impact(
        len(mine), all_gpus, row.away_at, row.ends_at, touched, _peak(pieces),
        min((p.start for p in pieces), default=None), max((p.end for p in pieces), default=None),
    )  # fmt: skip


def _peak(pieces: Collection[Piece]) -> int:
    return max((sum(p.gpus for p in pieces if p.start <= at.start < p.end) for at in pieces), default=0)


def running(host_ids: Collection[int], by: datetime) -> tuple[dict[int, set[int]], Counter[int]]:
    """Contract -> its jobs, and GPUs, that stand there now and may still stand there `by` then."""
    jobs: dict[int, set[int]] = defaultdict(set)
    gpus: Counter[int] = Counter()
    live = Placement.objects.filter(host_id__in=host_ids).exclude(state__in=Placement.FINAL)
    names = ("contract_id", "job_id", "gpu_indices", "job__max_seconds", "running_at", "created_at")
    for contract, job, indices, limit, running_at, created_at in live.values_list(*names):
        over = (running_at or created_at) + timedelta(seconds=limit + LAG_S) if limit else None
        if over is None or over > by:
            jobs[contract].add(job)
            gpus[contract] += len(indices)
    return jobs, gpus


# --- what is short
def short(row: Maintenance, contract_ids: Iterable[int], *, now: datetime) -> list[Piece]:
    """From now on, as planned: what the contracts will miss while this and other announced maintenance has its hosts."""
    wanted = list(contract_ids)
    blocks = list(blocks_of(wanted))
    rows = MaintenanceHost.objects.filter(
        Q(maintenance=row) | Q(maintenance__state__in=Maintenance.LIVE),
        host_id__in={b.host for b in blocks}, given_back_at=None,
    ).select_related("maintenance")  # fmt: skip
    return shortfalls(blocks, _away(rows, now))


def short_now(contract_ids: Iterable[int], *, now: datetime) -> list[Piece]:
    """As `short`, of hosts that are taken already: what is happening."""
    blocks = list(blocks_of(contract_ids))
    rows = MaintenanceHost.objects.filter(
        host_id__in={b.host for b in blocks}, taken_at__lte=now, given_back_at=None,
        maintenance__state__in=Maintenance.LIVE,
    ).select_related("maintenance")  # fmt: skip
    return shortfalls(blocks, _away(rows, now))


def _away(rows: Iterable[MaintenanceHost], now: datetime) -> dict[int, list[Away]]:
    found: dict[int, list[Away]] = defaultdict(list)
    for row in rows:
        of = row.maintenance
        start = max(now, row.taken_at or of.away_at)
        if start < of.ends_at:
            found[row.host_id].append(Away(of.pk, start, of.ends_at))
    return found


def blocks_of(contract_ids: Iterable[int]) -> Iterable[Block]:
    """All that these contracts hold, their own and what stands in."""
    rows = ReservationBlock.objects.filter(
        reservation__contract__in=list(contract_ids), reservation__state=Reservation.State.FIRM
    ).select_related("reservation")
    for row in rows.order_by("pk"):
        of = row.reservation
        assert of.contract_id is not None
        yield Block(
            of.contract_id, row.host_id, len(row.gpu_indices), of.starts_at, of.ends_at, of.maintenance_id is not None
        )


def shortfalls(blocks: Sequence[Block], away: Mapping[int, Sequence[Away]]) -> list[Piece]:
    """What each contract misses, when, and for which maintenance: GPUs on hosts that are away less what stands in. Pure.

    A host that several have at once is away for the first of them (by id); what stands in counts for the later ones first.
    """
    by_contract: dict[int, list[Block]] = defaultdict(list)
    for block in blocks:
        by_contract[block.contract].append(block)
    found: list[Piece] = []
    for contract, own in sorted(by_contract.items()):
        marks = {t for b in own for t in (b.start, b.end)}
        marks |= {t for b in own for a in away.get(b.host, ()) for t in (a.start, a.end)}
        latest: dict[int, Piece] = {}
        for start, end in pairwise(sorted(marks)):
            here = [b for b in own if b.start <= start < b.end]
            missing: Counter[int] = Counter()
            for block in here:
                rows = [a.maintenance for a in away.get(block.host, ()) if a.start <= start < a.end]
                if rows:
                    missing[min(rows)] += block.gpus
            left = max(0, missing.total() - sum(b.gpus for b in here if b.stands_in))
            for maintenance in sorted(missing):
                gpus = min(left, missing[maintenance])
                left -= gpus
                before = latest.get(maintenance)
                if gpus and before is not None and (before.end, before.gpus) == (start, gpus):
                    latest[maintenance] = Piece(contract, maintenance, gpus, before.start, end)
                    continue
                if before is not None:
                    found.append(latest.pop(maintenance))
                if gpus:
                    latest[maintenance] = Piece(contract, maintenance, gpus, start, end)
        found += latest.values()
    return found
