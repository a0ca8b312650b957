"""Asking the provider: the row is read, the question asked outside any transaction, the answer applied where it still counts."""

import logging
from datetime import datetime, timedelta

from django.db.models import Count, Exists, OuterRef, Q, Subquery
from django.db.models.functions import Coalesce

from marketplace import outbox
from marketplace.models import BillingStanding, Contract, Organization, Screening
from marketplace.services.screening import providers, records

log = logging.getLogger(__name__)
BATCH = 200
POLL_S = (5, 600)  # between two looks at an open question: a quarter of its age, within these
BACKOFF_S = (30, 3600)  # between two tries while the provider does not answer: doubled each time, within these


def ask(pk: int, *, now: datetime) -> None:
    """Ask about one screening, if it is due. Twice at once is no harm: the question's reference is its key at the provider."""
    row = Screening.objects.filter(pk=pk, ask_at__lte=now).first()
    if row is None or row.asked_at is None:
        return
    provider = providers.current()
    question = providers.Question(f"{row.public_id}-{row.round}", row.kind, row.facts)
    try:
        version = provider.version
        answer = provider.ask(question, row.ticket)
    except providers.Unavailable as error:
        wait = min(BACKOFF_S[1], BACKOFF_S[0] * 2 ** min(row.failures, 10))
        log.warning("screening %s: %s does not answer (%s); again in %d s", row.public_id, provider.name, error, wait)
        records.postpone(
            pk, row.round, ask_at=now + timedelta(seconds=wait), now=now, ticket=row.ticket,
            error=f"{provider.name}: {error}",
        )  # fmt: skip
        return
    if answer.outcome == "waiting":
        wait = min(POLL_S[1], max(POLL_S[0], int((now - row.asked_at).total_seconds()) // 4))
        records.postpone(pk, row.round, ask_at=now + timedelta(seconds=wait), now=now, ticket=answer.ticket)
        return
    records.answered(
        pk, row.round, answer.outcome, provider=provider.name, provider_version=version, reason=answer.reason,
        evidence=answer.evidence, now=now,
    )  # fmt: skip


def tick(now: datetime) -> int:
    """What time brings: open questions are asked (again), old answers are asked for anew or expire. Returns rows touched.

    Bounded batches; each step is guarded, so that any number may run beside each other.
    """
    done = _unbegun(now)
    clear = Screening.objects.filter(state=Screening.State.CLEAR)
    for row in clear.filter(valid_until__lte=now).order_by("pk")[:BATCH]:
        done += records.expire(row, now=now)
    idle = Screening.objects.filter(ask_at=None, needs_person=False)
    over = idle.filter(state=Screening.State.EXPIRED, asked_at=None)
    again = idle.filter(state=Screening.State.CLEAR, renew_at__lte=now)
    for row in (over | again).order_by("pk")[:BATCH]:
        if not records.missing(row.kind, records.facts_of(row.organization)):
            records.renew(row, now=now, reason="its time has come")
            done += 1
    done += _newer_lists(now)
    due = Screening.objects.filter(ask_at__lte=now).order_by("ask_at", "pk")
    for pk in due.values_list("pk", flat=True)[:BATCH]:
        outbox.emit(records.ASK, key=str(pk), payload={"screening": pk})
        done += 1
    return done


def _unbegun(now: datetime) -> int:
    """Who could sign or be paid out before there were checks, or before one of today's kinds was among them: theirs begin."""
    each = Screening.objects.filter(organization=OuterRef("pk")).order_by().values("organization")
    have = Coalesce(Subquery(each.annotate(n=Count("pk")).values("n")), 0)
    signs = Q(standing__isnull=False) & ~Q(standing__state=BillingStanding.State.NO_CARD)
    could = signs | Q(Exists(Contract.objects.filter(operator=OuterRef("pk"))))
    rows = Organization.objects.annotate(checks=have).filter(could, livemode=True, is_house=False)
    found = list(rows.filter(checks__lt=len(Screening.Kind.values)).order_by("pk")[:BATCH])
    for row in found:
        records.begin(row, now=now)
    return len(found)


def _newer_lists(now: datetime) -> int:
    """Whom an older version of the provider's lists let pass is asked about again."""
    provider = providers.current()
    try:
        version = provider.version
    except providers.Unavailable as error:
        log.warning("screening: %s", error)
        return 0
    if not version:
        return 0
    old = Screening.objects.filter(
        ~Q(provider_version=version), ~Q(provider_version=""), state=Screening.State.CLEAR, ask_at=None, needs_person=False,
        provider=provider.name, kind__in=(Screening.Kind.SANCTIONS, Screening.Kind.EXPORT),  # a business stands on no list
    )  # fmt: skip
    rows = list(old.order_by("pk")[:BATCH])
    for row in rows:
        records.renew(row, now=now, reason="the lists have changed")
    return len(rows)
