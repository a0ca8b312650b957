"""Another price of an on-demand contract: lower by the operator alone, higher only with its customer's consent.

A rise is proposed at least PRICE_NOTICE_DAYS ahead and says from when on it would count. Accepted, it counts from then on.
Declined, or not answered, the old price holds until then, and the contract ends: its notice has run. Nothing changes silently.
"""

from datetime import datetime, timedelta

from django.db import IntegrityError, transaction

from marketplace.errors import MarketError
from marketplace.models import Amendment, Contract, Kind
from marketplace.services import audit, documents, terms
from marketplace.services.contracts import notices
from marketplace.services.contracts.amendments import own
from marketplace.services.contracts.ending import end
from marketplace.tenancy import SYSTEM, Actor

NOTICE = timedelta(days=terms.PRICE_NOTICE_DAYS)


def propose(
    actor: Actor, contract: Contract, price: int, effective_at: datetime | None, *, now: datetime, reason: str = ""
) -> Amendment:
    """The operator's wish for `price` (millionths per GPU-hour). A lower one is accepted by itself and counts from the next minute.

    MarketError: forbidden, illegal_transition (no on-demand contract without an end), invalid_request, conflict (one is open).
    """
    if actor.organization_id != contract.operator_id:
        raise MarketError("forbidden", "Only the operator proposes a price.")
    now = now.replace(microsecond=0)
    with transaction.atomic():
        fresh = Contract.objects.select_for_update(no_key=True).get(pk=contract.pk)
        if fresh.kind != Kind.ON_DEMAND or fresh.state != Contract.State.ACTIVE or fresh.ends_at is not None:
            raise MarketError(
                "illegal_transition", "Only the price of an on-demand contract without an end can change."
            )
        lower = price < fresh.price
        at = effective_at if effective_at is not None and not lower else now + timedelta(seconds=60 - now.second)
        _check(fresh, price, at, now, lower=lower)
        row = Amendment(
            contract=fresh, kind=Amendment.Kind.PRICE, proposed_by=actor.label[:120], created_at=now, answer_by=at,
            effective_at=at, price=price, old_price=fresh.price, reason=reason[:200],
        )  # fmt: skip
        if lower:
            row.state, row.decided_at, row.decided_by = Amendment.State.ACCEPTED, now, actor.label[:120]
        try:
            with transaction.atomic():
                row.save()
        except IntegrityError as error:
            raise MarketError("conflict", "A price is proposed already; wait for its answer.") from error
        _say(fresh, actor.label, f"price from {at:%F %R}Z: {_words(row)}{': ' + reason if reason else ''}", now)
        audit.record(actor, "contract.price_proposed", fresh.public_id, now=now, after=_facts(row))
        detail = f"{_words(row)} per GPU-hour from {_at(row)}. {'' if lower else ASKS}{reason}"
        notices.tell([fresh.pk], "price_proposed", detail.strip())
    return row


ASKS = "Accept or decline it: without your consent the old price holds until then, and the contract ends. "


def _check(contract: Contract, price: int, at: datetime, now: datetime, *, lower: bool) -> None:
    if price < 1 or price == contract.price:
        raise MarketError("invalid_request", f"The price is {contract.price} now.", {"/price": "another than now"})
    if lower:
        return
    if at.second or at.microsecond or at < now + NOTICE:
        least = f"to the minute, at least {NOTICE.days} days ahead"
        raise MarketError("invalid_request", f"effective_at: {least}", {"/effective_at": least})


def accept(actor: Actor, proposal: Amendment, *, now: datetime) -> Amendment:
    """The customer's consent; MarketError("illegal_transition") where it was answered, or its day has come."""
    return _answer(actor, proposal, Amendment.State.ACCEPTED, now)


def decline(actor: Actor, proposal: Amendment, *, now: datetime) -> Amendment:
    """The old price holds, and the contract ends on the day for which the new one was proposed."""
    return _answer(actor, proposal, Amendment.State.DECLINED, now)


def _answer(actor: Actor, proposal: Amendment, to: str, now: datetime) -> Amendment:
    own(actor, proposal.contract)
    now = now.replace(microsecond=0)
    with transaction.atomic():
        contract = Contract.objects.select_for_update(no_key=True).get(pk=proposal.contract_id)
        row: Amendment = Amendment.objects.select_for_update(no_key=True).get(pk=proposal.pk)
        if row.state != Amendment.State.OPEN or row.answer_by <= now or contract.state != Contract.State.ACTIVE:
            state = "not answered in time" if row.state == Amendment.State.OPEN else row.state
            raise MarketError("illegal_transition", f"{row.public_id} is {state}; the contract is {contract.state}.")
        row.state, row.decided_at, row.decided_by = to, now, actor.label[:120]
        row.save()
        if to == Amendment.State.DECLINED:
            Contract.objects.filter(pk=contract.pk).update(ends_at=row.effective_at, terminated_at=now)
        said = "accepted" if to == Amendment.State.ACCEPTED else "declined: it ends then, at its old price"
        _say(contract, actor.label, f"price from {row.effective_at:%F %R}Z {said}", now)
        audit.record(actor, f"contract.price_{to}", contract.public_id, now=now, after=_facts(row))
        if to == Amendment.State.ACCEPTED:
            documents.keep_amendment(row, now=now)
        then = "" if to == Amendment.State.ACCEPTED else " The old price holds until then, and the contract ends."
        notices.tell([contract.pk], f"price_{to}", f"{_words(row)} per GPU-hour from {_at(row)}.{then}")
    return row


def clock(now: datetime, batch: int) -> tuple[int, int]:
    """(prices that count from now on, contracts that end because nobody answered). Each is a guarded update of its own."""
    due = Amendment.objects.filter(
        kind=Amendment.Kind.PRICE, state="accepted", applied_at=None, effective_at__lte=now
    ).order_by("effective_at", "pk")
    applied = sum(_apply(row, now) for row in due[:batch])
    silent = Amendment.objects.filter(kind=Amendment.Kind.PRICE, state="open", answer_by__lte=now).order_by("pk")
    return applied, sum(_lapse(row, now) for row in silent[:batch])


def _apply(row: Amendment, now: datetime) -> bool:
    with transaction.atomic():
        if not Amendment.objects.filter(pk=row.pk, applied_at=None).update(applied_at=now):
            return False  # another copy of the clock was faster
        if Contract.objects.filter(pk=row.contract_id, state="active").update(price=row.price):
            _say(Contract.objects.get(pk=row.contract_id), "system", f"the price is {row.price} now, as agreed", now)
            notices.tell([row.contract_id], "price_applied", f"{_words(row)} per GPU-hour since {_at(row)}, as agreed.")
    return True


def _lapse(row: Amendment, now: datetime) -> bool:
    with transaction.atomic():
        contract = Contract.objects.select_for_update(no_key=True).get(pk=row.contract_id)
        gone = Amendment.objects.filter(pk=row.pk, state="open").update(state=Amendment.State.EXPIRED, decided_at=now)
        if not gone or contract.state != Contract.State.ACTIVE:
            return False
        last = max(row.effective_at, contract.starts_at + timedelta(seconds=1))
        Contract.objects.filter(pk=contract.pk).update(ends_at=last, terminated_at=now)
        audit.record(
            SYSTEM, "contract.price_lapsed", contract.public_id, now=now, organization_id=contract.organization_id,
            after=_facts(row),
        )  # fmt: skip
        notices.tell([contract.pk], "price_lapsed")
        end([contract.pk], now=now, actor="clock", reason="its new price was not accepted")
    return True


def _say(contract: Contract, actor: str, words: str, now: datetime) -> None:
    contract.events.create(
        at=now, actor=actor[:120], from_state=contract.state, to_state=contract.state, reason=words[:200]
    )


def _facts(row: Amendment) -> dict[str, object]:
    return {
        "amendment": row.public_id, "price": row.price, "old_price": row.old_price,
        "effective_at": row.effective_at.isoformat(),
    }  # fmt: skip


def _words(row: Amendment) -> str:
    return f"{(row.price or 0) / 1_000_000:.6g} instead of {(row.old_price or 0) / 1_000_000:.6g}"


def _at(row: Amendment) -> str:
    return f"{row.effective_at:%-d %b %Y %H:%M} UTC"
