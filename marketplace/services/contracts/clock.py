"""What happens to quotes and contracts because time passes."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db import transaction
from django.db.models import Exists, OuterRef, QuerySet

from marketplace.models import Amendment, Contract, ContractEvent, Job, Quote, Reservation, ReservationBlock
from marketplace.services import audit, catalogue
from marketplace.services.availability import HOLDING
from marketplace.services.contracts import healing, notices, prices
from marketplace.services.contracts.ending import cancel, end, settle
from marketplace.services.forward import resales
from marketplace.tenancy import SYSTEM

BATCH = 500


@dataclass(frozen=True)
class Ticked:
    """What one tick did, in rows."""

    holds_released: int = 0
    quotes_expired: int = 0
    contracts_begun: int = 0
    prices_applied: int = 0
    prices_lapsed: int = 0
    contracts_over: int = 0
    contracts_settled: int = 0
    payments_lapsed: int = 0
    reservations_moved: int = 0
    resales_expired: int = 0


def clock(now: datetime) -> Ticked:
    """Lapsed holds are free, quotes expire, contracts begin and end with their window, drained ones are settled, unpaid ones are
    cancelled, promises whose GPUs cannot be used move to others. Bounded batches of BATCH rows; each step is a guarded update of its
    own, so that any number of copies may run beside each other and beside buyers.
    """
    lapsed = Reservation.objects.filter(state=Reservation.State.HELD, held_until__lte=now).order_by("pk")
    released = Reservation.objects.filter(
        pk__in=_some(lapsed), state=Reservation.State.HELD, held_until__lte=now
    ).update(state=Reservation.State.RELEASED)
    stale = Quote.objects.filter(state=Quote.State.OPEN, firm_until__lte=now).order_by("pk")
    expired = Quote.objects.filter(pk__in=_some(stale), state=Quote.State.OPEN).update(state=Quote.State.EXPIRED)
    _forget_blocks()
    offers = resales.expire(now)
    resales.rejoin(now)
    catalogue.prune(now)
    begun = _begin(now)
    applied, lapsed_prices = prices.clock(now, BATCH)
    proposals = Amendment.objects.filter(state="open", answer_by__lte=now).exclude(kind=Amendment.Kind.PRICE)
    Amendment.objects.filter(pk__in=_some(proposals.order_by("pk")), state="open").update(
        state=Amendment.State.EXPIRED, decided_at=now
    )
    over = Contract.objects.filter(state="active", ends_at__lte=now).order_by("ends_at", "pk")
    ended = end(_some(over), now=now)
    live_jobs = Job.objects.filter(contract=OuterRef("pk")).exclude(state__in=Job.FINAL)
    ending = Contract.objects.filter(~Exists(live_jobs), state="ending").order_by("ended_at", "pk")
    settled = settle(_some(ending), now=now)
    unpaid = Contract.objects.filter(state="pending_payment", pay_by__lte=now).order_by("pk")
    with transaction.atomic():
        cancelled = cancel(_some(unpaid), now=now, actor="system", reason="the payment did not arrive in time")
    return Ticked(
        released, expired, begun, applied, lapsed_prices, len(ended), settled, len(cancelled), healing.heal(now), offers
    )  # fmt: skip


def _some(rows: QuerySet[Any]) -> list[int]:
    return list(rows.values_list("pk", flat=True)[:BATCH])


def _begin(now: datetime) -> int:
    """Windows that have begun: the record and the customer learn of it, once. Rivals skip each other's rows."""
    waiting = Contract.objects.filter(
        state="active", kind__in=HOLDING, began_at=None, starts_at__lte=now, ends_at__gt=now
    ).order_by("starts_at", "pk")
    with transaction.atomic():
        rows = list(waiting.select_for_update(no_key=True, skip_locked=True)[:BATCH])
        if not rows:
            return 0
        Contract.objects.filter(pk__in=[row.pk for row in rows]).update(began_at=now)
        ContractEvent.objects.bulk_create(
            ContractEvent(
                contract=row, at=now, actor="system", from_state="active", to_state="active",
                reason=f"its window has begun: {row.gpu_count} GPUs",
            )
            for row in rows
        )  # fmt: skip
        audit.record_many(
            SYSTEM, "contract.began", [(row.organization_id, row.public_id, None) for row in rows], now=now
        )
        notices.tell([row.pk for row in rows], "began")
    return len(rows)


def _forget_blocks() -> None:
    """The GPUs that an expired quote once held are of no interest."""
    gone = ReservationBlock.objects.filter(
        reservation__state=Reservation.State.RELEASED,
        reservation__contract=None,
        reservation__quote__state__in=(Quote.State.EXPIRED, Quote.State.RELEASED),
    ).order_by("pk")[: BATCH * 4]
    ReservationBlock.objects.filter(pk__in=list(gone.values_list("pk", flat=True))).delete()
