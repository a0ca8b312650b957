"""The end: early by its rule, with its window, by default; settled when nothing runs any more."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db import transaction

from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Contract, Fill, Job, Placement, Reservation
from marketplace.services import audit, holds, quotes, terms
from marketplace.services.availability import HOLDING
from marketplace.services.contracts import notices
from marketplace.services.forward import resales, sales
from marketplace.services.forward.topics import UNDO, nudge_book
from marketplace.services.transitions import transition_many
from marketplace.tenancy import SYSTEM, Actor

CANCELLED = "billing.contract_cancelled"
END_JOBS = "marketplace.end_contract_jobs"
OVER = "nothing runs any more"


def actions(contract: Contract, actor: Actor) -> list[str]:
    """What its customer may do now."""
    mine = actor.organization_id == contract.organization_id
    if not mine or contract.state not in {Contract.State.ACTIVE, Contract.State.PENDING_PAYMENT}:
        return []
    if contract.state == Contract.State.PENDING_PAYMENT:
        return ["terminate"]
    if contract.kind not in HOLDING:
        return ["submit_job", "terminate"]
    bought = contract.terms.get("early_termination", {}).get("rule") == terms.BOUGHT
    return ["submit_job"] if contract.terminated_at or bought else ["extend", "resize", "submit_job", "terminate"]


@dataclass(frozen=True)
class Leaving:
    """What terminating now would mean: the end, and amounts in minor units. Both 0 where nothing is committed.

    `stays_due_minor`: the commitment from now (or its start) to that end; `released_minor`: what nobody owes any more.
    """

    ends_at: datetime
    stays_due_minor: int
    released_minor: int


def leaving(contract: Contract, now: datetime) -> Leaving:
    """The price of an early end now, without ending anything. MarketError as `terminate`."""
    now = now.replace(microsecond=0)
    check_open(contract)
    if contract.state == Contract.State.PENDING_PAYMENT or contract.kind not in HOLDING or contract.ends_at is None:
        return Leaving(now, 0, 0)
    ends_at = _left_at(contract, now)
    begin = max(contract.starts_at, now)
    due = terms.commitment_minor(contract, begin, ends_at) + sum(
        quotes.total_minor(f.gpu_count, max(f.starts_at, ends_at), f.ends_at, contract.price, contract.currency)
        for f in sales.sold(contract)
        if f.ends_at > ends_at  # what is sold on stays due
    )
    return Leaving(ends_at, due, terms.commitment_minor(contract, begin, contract.ends_at) - due)


def check_open(contract: Contract) -> None:
    """May it still be ended or changed by its customer? MarketError("illegal_transition") where not."""
    if contract.state not in {Contract.State.ACTIVE, Contract.State.PENDING_PAYMENT}:
        raise MarketError("illegal_transition", f"The contract is {contract.state}.")
    if contract.terminated_at and contract.ends_at:
        raise MarketError("illegal_transition", f"It was terminated already; it ends at {contract.ends_at:%F %R} UTC.")


def _left_at(contract: Contract, now: datetime) -> datetime:
    """When it would end; refused where that is its end anyway."""
    ends_at = terms.termination(contract, now)
    if contract.ends_at is not None and contract.terms.get("early_termination", {}).get("rule") == terms.BOUGHT:
        raise MarketError(
            "illegal_transition", "It was bought from another customer and paid whole: sell it on instead."
        )
    if contract.ends_at is not None and ends_at >= contract.ends_at:
        raise MarketError(
            "illegal_transition",
            f"It ends at {contract.ends_at:%F %T}Z anyway: at least {terms.STAYS_DUE_AT_LEAST // timedelta(hours=1)} hours stay due.",
        )
    return ends_at


def terminate(
    actor: Actor, contract: Contract, *, now: datetime, reason: str = "terminated by the customer"
) -> Contract:
    """End it early, by its rule. MarketError("illegal_transition") unless it is active or waits for its payment."""
    if actor.kind != "system" and actor.organization_id != contract.organization_id:
        raise MarketError("forbidden", "Only the customer terminates a contract.")
    now = now.replace(microsecond=0)
    with transaction.atomic():
        acquire((Lock.CELL, contract.cell_id), (Lock.ORG, contract.organization_id))
        fresh: Contract = Contract.objects.select_for_update(no_key=True).get(pk=contract.pk)
        before = _ends(fresh)
        check_open(fresh)
        if fresh.state == Contract.State.PENDING_PAYMENT:
            cancel([fresh.pk], now=now, actor=actor.label, reason=reason)
        elif fresh.kind in HOLDING:
            _shorten(fresh, _left_at(fresh, now), now=now, actor=actor, reason=reason)
        else:
            ends_at = now if fresh.starts_at < now else fresh.starts_at + timedelta(seconds=1)
            Contract.objects.filter(pk=fresh.pk).update(ends_at=ends_at, terminated_at=now)
            end([fresh.pk], now=now, actor=actor.label, reason=reason)
        fresh.refresh_from_db()
        audit.record(actor, "contract.terminated", fresh.public_id, now=now, before=before, after=_ends(fresh))
    return fresh


def _ends(contract: Contract) -> dict[str, str | None]:
    return {"state": contract.state, "ends_at": contract.ends_at.isoformat() if contract.ends_at else None}


def _shorten(contract: Contract, ends_at: datetime, *, now: datetime, actor: Actor, reason: str) -> None:
    """It goes on to `ends_at` and no further; what it held after that is free. What it has sold on is its buyers', and stays due."""
    resales.drop([contract.pk], now=now, reason="its contract was ended early", give_back=True)
    Contract.objects.filter(pk=contract.pk).update(ends_at=ends_at, terminated_at=now)
    holds.cut(contract, ends_at)
    _freed([contract.pk])
    text = f"{reason}: it ends at {ends_at:%F %R}Z, by its rule of early termination"
    contract.events.create(at=now, actor=actor.label[:120], from_state="active", to_state="active", reason=text[:200])


def end(
    contract_ids: Iterable[int], *, now: datetime, actor: str = "system", reason: str = "its window is over"
) -> list[int]:
    """Active contracts are over: they become `ending`, give their capacity back and their jobs drain; without live jobs they are
    settled at once. Returns those that moved.
    """
    with transaction.atomic():
        moved = sorted(
            transition_many(
                Contract, contract_ids, expected=("active",), to="ending", now=now, actor=actor, reason=reason,
                set_columns={"ended_at": now},
            )
        )  # fmt: skip
        _let_go(moved, now)
        if actor == "system":
            _told(moved, "contract.over", "over", now)
        settle(moved, now=now)
    return moved


def _let_go(contract_ids: list[int], now: datetime) -> None:
    """What they held is free, and what they run or wait for ends."""
    resales.drop(contract_ids, now=now, reason="its contract is over", give_back=False)
    Reservation.objects.filter(contract_id__in=contract_ids).update(state=Reservation.State.RELEASED)
    _freed(contract_ids)
    for pk in _busy(contract_ids):
        outbox.emit(END_JOBS, key=str(pk), payload={"contract": pk})


def _freed(contract_ids: Iterable[int]) -> None:
    """Bids may be met by what these give back."""
    books = Contract.objects.filter(pk__in=list(contract_ids), kind__in=HOLDING).order_by()
    for book in sorted(set(books.values_list("cell__livemode", "gpu_model_id", "site__region")), key=str):
        nudge_book(*book)


def _told(contract_ids: Iterable[int], verb: str, what: str, now: datetime, detail: str = "") -> None:
    """What the clock or billing did to contracts, on the record and by mail."""
    rows = list(Contract.objects.filter(pk__in=list(contract_ids)).order_by("pk"))
    audit.record_many(SYSTEM, verb, [(row.organization_id, row.public_id, _ends(row)) for row in rows], now=now)
    notices.tell([row.pk for row in rows], what, detail)


def _busy(contract_ids: Iterable[int]) -> list[int]:
    """Those with jobs or placements that are not over."""
    ids = list(contract_ids)
    jobs = Job.objects.filter(contract_id__in=ids).exclude(state__in=Job.FINAL)
    placements = Placement.objects.filter(contract_id__in=ids).exclude(state__in=Placement.FINAL)
    return sorted({*jobs.values_list("contract_id", flat=True), *placements.values_list("contract_id", flat=True)})


def settle(contract_ids: Iterable[int], *, now: datetime) -> int:
    """`ending` contracts with nothing left to drain: `ended`, or `terminated` where that was before the agreed end."""
    with transaction.atomic():
        ids = list(contract_ids)
        busy = set(_busy(ids))
        rows = Contract.objects.filter(pk__in=[pk for pk in ids if pk not in busy], state="ending")
        early = set(rows.exclude(terminated_at=None).values_list("pk", flat=True))
        full = set(rows.filter(terminated_at=None).values_list("pk", flat=True))
        done = transition_many(
            Contract, full, expected=("ending",), to="ended", now=now, actor="system", reason=OVER
        )  # fmt: skip
        gone = transition_many(
            Contract, early, expected=("ending",), to="terminated", now=now, actor="system", reason=OVER
        )  # fmt: skip
    return len(done) + len(gone)


def cancel(contract_ids: Iterable[int], *, now: datetime, actor: str, reason: str) -> list[int]:
    """Contracts that wait for their payment are not to be; returns those that moved. Billing takes its invoice back."""
    moved = sorted(
        transition_many(
            Contract, contract_ids, expected=("pending_payment",), to="cancelled", now=now, actor=actor, reason=reason,
            set_columns={"ended_at": now},
        )
    )  # fmt: skip
    fills = dict(Fill.objects.filter(contract_id__in=moved).values_list("contract_id", "resale_id"))
    bought = {pk for pk, resale in fills.items() if resale is not None}
    Reservation.objects.filter(contract_id__in=set(moved) - bought).update(state=Reservation.State.RELEASED)
    for pk in sorted(fills):  # what was bought goes back to whom it was bought from, under the cell's lock
        outbox.emit(UNDO, key=str(pk), payload={"contract": pk})
    for pk in moved:
        outbox.emit(CANCELLED, key=str(pk), payload={"contract": pk})
    _freed(moved)
    if actor == "system":
        _told(moved, "contract.cancelled", "cancelled", now)
    return moved


def default(organization_id: int, *, now: datetime, reason: str) -> list[int]:
    """An invoice stayed unpaid to the end of dunning: all contracts of the organization end now. Returns those that moved.

    Reserved and flexible ones give their GPUs back at once; what the rule of early termination leaves due (`ends_at`) stays
    billed. What waits for its payment is cancelled.
    """
    now = now.replace(microsecond=0)
    moved: list[int] = []
    live = Contract.objects.filter(organization_id=organization_id, state__in=("pending_payment", "active", "ending"))
    for shown in live.order_by("pk"):
        with transaction.atomic():
            acquire((Lock.CELL, shown.cell_id), (Lock.ORG, organization_id))
            fresh = Contract.objects.select_for_update(no_key=True).get(pk=shown.pk)
            if fresh.state == Contract.State.PENDING_PAYMENT:
                cancel([fresh.pk], now=now, actor="billing", reason=reason)
                continue
            over = fresh.ends_at if fresh.terminated_at or fresh.state == "ending" else terms.termination(fresh, now)
            over = max(over or now, fresh.starts_at + timedelta(seconds=1))
            gone = transition_many(
                Contract, [fresh.pk], expected=("active", "ending"), to="defaulted", now=now, actor="billing", reason=reason,
                set_columns={"ends_at": over, "terminated_at": fresh.terminated_at or now, "ended_at": fresh.ended_at or now},
            )  # fmt: skip
            _let_go(sorted(gone), now)
            _told(gone, "contract.defaulted", "defaulted", now, reason)
            moved += gone
    return moved


def close_out(actor: Actor, organization_id: int, *, now: datetime, reason: str) -> list[int]:
    """One of our own people ends all live contracts of an organization now, as after a rejected screening. Returns those that moved.

    What waits is cancelled, what runs drains with its grace and is billed until then; nothing more of a commitment stays due.
    MarketError("forbidden") for anybody else.
    """
    if not actor.is_staff:
        raise MarketError("forbidden", "Only our own people close out an organization.")
    now = now.replace(microsecond=0)
    moved: list[int] = []
    live = Contract.objects.filter(organization_id=organization_id, state__in=("pending_payment", "active"))
    for shown in live.order_by("pk"):
        with transaction.atomic():
            acquire((Lock.CELL, shown.cell_id), (Lock.ORG, organization_id))
            fresh = Contract.objects.select_for_update(no_key=True).get(pk=shown.pk)
            before = _ends(fresh)
            if fresh.state == Contract.State.PENDING_PAYMENT:
                gone = cancel([fresh.pk], now=now, actor=actor.label, reason=reason)
            else:
                ends_at = max(now, fresh.starts_at + timedelta(seconds=1))
                Contract.objects.filter(pk=fresh.pk, state=Contract.State.ACTIVE).update(
                    ends_at=ends_at, terminated_at=now
                )
                gone = end([fresh.pk], now=now, actor=actor.label, reason=reason)
            if gone:
                fresh.refresh_from_db()
                audit.record(
                    actor, "contract.closed_out", fresh.public_id, now=now, organization_id=organization_id, before=before,
                    after=_ends(fresh),
                )  # fmt: skip
                notices.tell(gone, "closed_out", reason)
                moved += gone
    return moved
