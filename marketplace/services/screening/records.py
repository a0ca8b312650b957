"""The only writer of screenings and of what an organization tells for them.

Every step takes the organization's lock, is guarded by the round or the version that its author saw, and leaves an event; the audit
trail, the organization's `verification` and the mail about it go with the same transaction.
"""

from datetime import datetime
from typing import Any

from django.conf import settings
from django.db import connection, transaction

from marketplace import outbox
from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import BusinessProfile, Membership, Organization, Screening, ScreeningEvent
from marketplace.services import audit
from marketplace.services.screening.rule import ASKED, BASIC, RENEW_BEFORE, VALID
from marketplace.tenancy import SYSTEM, Actor

ASK = "marketplace.screening_ask"
NOTICE = "marketplace.screening_notice"
OPERATOR_CLEAR = "billing.operator_clear"  # an operator may be paid out (again)
Kind, State = Screening.Kind, Screening.State
TOLD = ("legal_name", "registration_number", "address", "website", "beneficial_owners", "end_use", "end_use_countries")
_FACTS = {
    Kind.BUSINESS: ("name", "country", "owners", "legal_name", "registration_number", "address", "website", "beneficial_owners"),
    Kind.SANCTIONS: ("name", "country", "owners", "legal_name", "beneficial_owners"),
    Kind.EXPORT: ("name", "country", "legal_name", "end_use", "end_use_countries"),
}  # fmt: skip


def facts_of(organization: Organization) -> dict[str, Any]:
    """Everything that a question may be about; what was not told is absent."""
    people = Membership.objects.filter(organization=organization, role="owner").select_related("user").order_by("pk")
    profile = BusinessProfile.objects.filter(organization=organization).first()
    told = {name: getattr(profile, name) for name in TOLD} if profile else {}
    owners = [member.user.get_full_name() for member in people]
    known = {"name": organization.name, "country": organization.country, "owners": owners, **told}
    return {name: value for name, value in known.items() if value}


def missing(kind: str, facts: dict[str, Any]) -> list[str]:
    """What the organization has not told yet and the check cannot do without."""
    return [name for name in ASKED[Kind(kind)] if not facts.get(name)]


def begin(organization: Organization, *, now: datetime) -> None:
    """It can sign or be paid out from now on: its checks begin, and it is told what is asked of it. A second call does nothing.

    Nothing is asked of test tenants.
    """
    if not organization.livemode:
        return
    with transaction.atomic():
        acquire((Lock.ORG, organization.pk))
        have = set(Screening.objects.filter(organization=organization).values_list("kind", flat=True))
        fresh = [kind for kind in Kind.values if kind not in have]
        if not fresh:
            return
        facts = facts_of(organization)
        for kind in fresh:
            row = Screening(organization=organization, kind=kind, changed_at=now)
            _question(row, facts, now)
            row.save()
            _event(row, SYSTEM, "begun", State.PENDING, now)
            _ask_soon(row)
        if any(missing(kind, facts) for kind in fresh):
            _tell(organization.pk, "asked")


def tell(actor: Actor, organization: Organization, values: dict[str, Any], *, now: datetime) -> BusinessProfile:
    """What the organization says of itself, whole; the checks that it concerns are asked anew where something changed."""
    assert set(values) <= set(TOLD), values
    with transaction.atomic():
        acquire((Lock.ORG, organization.pk))
        profile, _ = BusinessProfile.objects.update_or_create(
            organization=organization, defaults={**values, "updated_at": now, "updated_by": actor.label[:120]}
        )
        audit.record(
            actor, "screening.told", organization.public_id, now=now, organization_id=organization.pk,
            after={"fields": sorted(name for name, value in values.items() if value)},
        )  # fmt: skip
        begin(organization, now=now)
        refresh(organization, actor=actor, now=now)
    return profile


def refresh(organization: Organization, *, actor: Actor, now: datetime) -> None:
    """Something that was asked about may have changed: checks of other facts than before are asked anew, at once.

    A rejected one stays rejected: the change stands on its record, for the person who decides.
    """
    with transaction.atomic():
        acquire((Lock.ORG, organization.pk))
        rows = list(Screening.objects.filter(organization=organization).order_by("pk"))
        if not rows:
            return
        organization.refresh_from_db()
        facts = facts_of(organization)
        for row in rows:
            changed = sorted(name for name in _FACTS[Kind(row.kind)] if facts.get(name) != row.facts.get(name))
            if not changed:
                continue
            before, reason = row.state, f"changed: {', '.join(changed)}"
            if row.state == State.REJECTED:
                row.facts, row.version = _about(row.kind, facts), row.version + 1
            else:
                row.state = State.PENDING
                _question(row, facts, now)
            if row.state != before:
                row.changed_at = now
            row.save()
            _event(row, actor, "changed", before, now, reason)
            _ask_soon(row)
        _mark(organization)


def renew(row: Screening, *, now: datetime, reason: str) -> None:
    """The same question once more, of the facts as they are now. What was clear stays so until it is answered or expires."""
    with transaction.atomic():
        acquire((Lock.ORG, row.organization_id))
        fresh = _row(row.pk)
        if fresh.version != row.version or fresh.ask_at is not None:
            return  # somebody was faster
        before = fresh.state
        if before == State.CLEAR and fresh.valid_until and fresh.valid_until <= now:
            fresh.state, fresh.changed_at = State.EXPIRED, now
        _question(fresh, facts_of(fresh.organization), now)
        fresh.renew_at = None
        fresh.save()
        _event(fresh, SYSTEM, "renewed", before, now, reason)
        _ask_soon(fresh)
        if fresh.state != before:
            _tell(fresh.organization_id, "expired")
        _mark(fresh.organization)


def expire(row: Screening, *, now: datetime) -> bool:
    """It was clear until `valid_until`, and nobody has answered since."""
    with transaction.atomic():
        acquire((Lock.ORG, row.organization_id))
        fresh = _row(row.pk)
        if fresh.state != State.CLEAR or fresh.valid_until is None or fresh.valid_until > now:
            return False
        fresh.state, fresh.changed_at, fresh.version = State.EXPIRED, now, fresh.version + 1
        fresh.save()
        _event(fresh, SYSTEM, "expired", State.CLEAR, now)
        _tell(fresh.organization_id, "expired")
        _mark(fresh.organization)
    return True


def answered(
    pk: int,
    round_: int,
    outcome: str,
    *,
    provider: str,
    provider_version: str,
    reason: str,
    evidence: dict[str, Any],
    now: datetime,
) -> bool:
    """A provider's `clear`, `hit` or `person` to the question of that round; whether the check stands elsewhere by it.

    To an earlier round, or after a rejection, it is only kept on record. Where a person has decided meanwhile, a `clear` is only
    kept, too; a `hit`, which that person did not see, goes back to the queue.
    """
    with transaction.atomic():
        acquire((Lock.ORG, Screening.objects.values_list("organization_id", flat=True).get(pk=pk)))
        row = _row(pk)
        before = row.state
        late = (
            row.round != round_
            or row.state == State.REJECTED
            or (row.asked_at is None and outcome != "hit")
            or ScreeningEvent.objects.filter(screening=row, round=round_, what="answered").exists()
        )
        if not late:
            row.provider, row.provider_version = provider[:40], provider_version[:64]
            row.ask_at = row.asked_at = None
            row.ticket, row.failures, row.last_error = "", 0, ""
            if outcome == "clear":
                _clear(row, now)
            elif outcome == "hit" or row.state != State.CLEAR:
                row.state, row.needs_person = State.REVIEW, True
            else:
                row.needs_person = True  # a renewal that a person decides: until it expires, what was clear stays so
            row.version += 1
            if row.state != before:
                row.changed_at = now
            row.save()
        words = f"{provider}: {outcome}{': ' + reason if reason else ''}{' (late: only kept)' if late else ''}"
        _event(row, SYSTEM, "answered", before, now, words, evidence)
        if not late and row.state != before:
            _after(row, before)
    return not late and row.state != before


def decide(actor: Actor, pk: int, to: str, *, seen: int, reason: str, message: str = "", now: datetime) -> Screening:
    """One of our own people decides: `clear`, `rejected`, or `review` (asks the organization for `message`, and goes on waiting).

    `seen` is the version that they looked at: MarketError("conflict") where it has changed since, "forbidden" for anybody else,
    "illegal_transition". With SCREENING_FOUR_EYES two people must say the same of `clear` and `rejected`; the first one proposes.
    """
    if not actor.is_staff:
        raise MarketError("forbidden", "Screenings are decided by our own people.")
    if not reason.strip():
        raise MarketError("invalid_request", "A decision needs its reason.", {"/reason": "say why"})
    with transaction.atomic():
        found = Screening.objects.filter(pk=pk).values_list("organization_id", flat=True).first()
        if found is None:
            raise MarketError("not_found", "There is no such screening.")
        acquire((Lock.ORG, found))
        row = _row(pk)
        if row.version != seen:
            raise MarketError("conflict", f"It has changed since you looked: {_last(row)}. Look again, then decide.")
        before = row.state
        if to not in row.TRANSITIONS[before] and not (to == before and to in {State.REVIEW, State.CLEAR}):
            raise MarketError("illegal_transition", f"The {row.kind} check is {before}; it cannot become {to}.")
        if (
            to != State.REVIEW
            and settings.SCREENING_FOUR_EYES
            and not (row.proposed == to and row.proposed_by != actor.label)
        ):
            row.proposed, row.proposed_by, row.version = to, actor.label[:120], row.version + 1
            row.save()
            _event(row, actor, "proposed", before, now, f"{to}: {reason}")
            return row
        if to == State.CLEAR:
            _clear(row, now)
        else:
            row.state, row.needs_person = to, to == State.REVIEW
        row.version += 1
        row.message, row.decided_by = message[:300], actor.label[:120]
        if to != State.REVIEW:
            row.ask_at = row.asked_at = None
        row.proposed = row.proposed_by = ""
        if to != before:
            row.changed_at = now
        row.save()
        _event(row, actor, "decided", before, now, reason)
        audit.record(
            actor, f"screening.{to}", row.public_id, now=now, organization_id=row.organization_id,
            before={"kind": row.kind, "state": before}, after={"kind": row.kind, "state": to},
        )  # fmt: skip
        _after(row, before)
    return row


def postpone(pk: int, round_: int, *, ask_at: datetime, now: datetime, ticket: str = "", error: str = "") -> None:
    """Still no answer: asked again at `ask_at`. The first failure in a row is put on record."""
    with transaction.atomic():
        acquire((Lock.ORG, Screening.objects.values_list("organization_id", flat=True).get(pk=pk)))
        row = _row(pk)
        if row.round != round_ or row.ask_at is None:
            return  # answered or asked anew meanwhile
        first = bool(error) and not row.failures
        row.ask_at, row.ticket = ask_at, ticket[:120]
        row.failures, row.last_error = (row.failures + 1, error[:200]) if error else (0, "")
        row.save(update_fields=["ask_at", "ticket", "failures", "last_error"])
        if first:
            _event(row, SYSTEM, "failed", row.state, now, error)


# --- one row, under its organization's lock
def _row(pk: int) -> Screening:
    assert connection.in_atomic_block
    rows = Screening.objects.select_related("organization").select_for_update(no_key=True, of=("self",))
    found: Screening = rows.get(pk=pk)
    return found


def _about(kind: str, facts: dict[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in _FACTS[Kind(kind)] if facts.get(name)}


def _question(row: Screening, facts: dict[str, Any], now: datetime) -> None:
    """A new question about these facts; it is open as soon as nothing is missing."""
    if row.pk:
        row.round, row.version = row.round + 1, row.version + 1
    row.facts, row.ticket, row.failures, row.last_error = _about(row.kind, facts), "", 0, ""
    row.needs_person, row.proposed, row.proposed_by, row.message = False, "", "", ""
    row.ask_at = row.asked_at = None if missing(row.kind, facts) else now


def _clear(row: Screening, now: datetime) -> None:
    row.state, row.needs_person, row.message = State.CLEAR, False, ""
    row.valid_until = now + VALID[Kind(row.kind)]
    row.renew_at = row.valid_until - RENEW_BEFORE


def _event(
    row: Screening, actor: Actor, what: str, before: str, now: datetime, reason: str = "", evidence: Any = None
) -> None:
    ScreeningEvent.objects.create(
        screening=row, at=now, actor=actor.label[:120], what=what, from_state=before, to_state=row.state, round=row.round,
        reason=reason[:500], evidence=evidence or {},
    )  # fmt: skip


def _last(row: Screening) -> str:
    event = ScreeningEvent.objects.filter(screening=row).order_by("-pk").first()
    return f"{event.what} by {event.actor}, it is {row.state}" if event else f"it is {row.state}"


def _ask_soon(row: Screening) -> None:
    if row.ask_at is not None:
        outbox.emit(ASK, key=str(row.pk), payload={"screening": row.pk})


def _after(row: Screening, before: str) -> None:
    """What follows from where a check stands now: the organization's mark, and the mail."""
    verified = _mark(row.organization)
    if row.state == State.CLEAR:
        if before != State.CLEAR and not _open(row.organization_id):
            _tell(row.organization_id, "clear")
    elif row.state != before or row.message:
        _tell(row.organization_id, "asked" if row.message and row.state == State.REVIEW else row.state)
    if verified and row.organization.is_operator:
        outbox.emit(OPERATOR_CLEAR, key=str(row.organization_id), payload={"operator": row.organization_id})


def _open(organization_id: int) -> bool:
    return Screening.objects.filter(organization_id=organization_id).exclude(state=State.CLEAR).exists()


def _mark(organization: Organization) -> bool:
    """The organization's `verification`, of its business and sanctions checks; whether it became VERIFIED by this."""
    states = dict(Screening.objects.filter(organization=organization, kind__in=BASIC).values_list("kind", "state"))
    mark = Organization.Verification.NEW
    if State.REJECTED in states.values():
        mark = Organization.Verification.REFUSED
    elif all(states.get(kind) == State.CLEAR for kind in BASIC):
        mark = Organization.Verification.VERIFIED
    moved = Organization.objects.filter(pk=organization.pk).exclude(verification=mark).update(verification=mark)
    organization.verification = mark
    return bool(moved) and mark == Organization.Verification.VERIFIED


def _tell(organization_id: int, what: str) -> None:
    outbox.emit(NOTICE, key=f"{organization_id}-{what}", payload={"organization": organization_id, "what": what})
