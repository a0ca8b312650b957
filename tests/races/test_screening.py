"""Screenings at the same moment: two of our own people decide, a person and the provider answer, a decision meets a signature."""

from collections import Counter
from datetime import timedelta

import pytest

from marketplace.models import Contract, Organization, Screening, ScreeningEvent
from marketplace.services import contracts, jobs, quotes, screening
from marketplace.services.screening import records
from marketplace.tenancy import Actor
from tests import factories
from tests.factories import NOW
from tests.threads import at_once

pytestmark = pytest.mark.django_db(transaction=True)
PROFILE = {
    "legal_name": "Lumen Labs Inc.", "registration_number": "C-4711", "address": "1 Main St", "beneficial_owners": ["Ada Park"],
    "end_use": "training", "end_use_countries": ["US"],
}  # fmt: skip


def staff(n: int) -> Actor:
    return Actor(kind="staff", user_id=n, label=f"staff-{n}@example.org")


def told() -> tuple[Organization, Screening]:
    made = factories.organization(screened=False)
    screening.tell(factories.actor(made), made, PROFILE, now=NOW)
    return made, Screening.objects.get(organization=made, kind="sanctions")


def test_of_many_who_decide_at_once_one_does():
    _, row = told()
    answers = at_once(
        [
            lambda n=n: (
                screening.decide(
                    staff(n), row.pk, "clear" if n % 2 else "rejected", seen=row.version, reason="looked", now=NOW
                ).decided_by
            )
            for n in range(8)
        ]
    )
    counted = Counter("conflict" if a == "conflict" else "decided" for a in answers)
    assert counted == {"decided": 1, "conflict": 7}
    row.refresh_from_db()
    assert row.decided_by in answers
    assert ScreeningEvent.objects.filter(screening=row, what="decided").count() == 1


@pytest.mark.parametrize("outcome", ["clear", "hit"])
def test_a_rejection_and_an_answer_at_once(outcome):
    """Whoever comes first: it ends rejected, or, where the answer was seen to be first, the person is told to look again."""
    _, row = told()

    def answer() -> str:
        records.answered(
            row.pk, row.round, outcome, provider="http", provider_version="", reason="", evidence={}, now=NOW
        )
        return "answered"

    def reject() -> str:
        return screening.decide(staff(1), row.pk, "rejected", seen=row.version, reason="looked", now=NOW).state

    answers = Counter(at_once([answer, answer, reject]))
    row.refresh_from_db()
    if answers["rejected"]:
        assert row.state == "rejected"
    else:
        assert answers["conflict"] == 1
        assert row.state == {"clear": "clear", "hit": "review"}[outcome]
    assert row.organization.verification == ("refused" if row.state == "rejected" else "new")
    assert ScreeningEvent.objects.filter(screening=row, what="answered").count() == 2


def test_a_rejection_meets_a_signature_and_a_job():
    """Signed before it, or refused after it: never signed by a rejected organization."""
    site = factories.site()
    listing = factories.listing(site, hosts=[factories.host(site)])
    customer = factories.organization()
    actor = factories.actor(customer)
    running = factories.contract(listing, customer)
    ask = quotes.Request("reserved", 8, starts_at=NOW + timedelta(days=2), ends_at=NOW + timedelta(days=3))
    quote = quotes.quote(actor, listing.pk, ask, now=NOW)
    row = Screening.objects.get(organization=customer, kind="business")
    answers = at_once(
        [
            lambda: contracts.accept(actor, quote.pk, now=NOW),
            lambda: jobs.submit(actor, running, {"command": ["x"]}, now=NOW),
            lambda: screening.decide(staff(1), row.pk, "rejected", seen=row.version, reason="x", now=NOW),
        ]
    )
    said = [a if isinstance(a, str) else type(a).__name__ for a in answers]
    assert said[0] in {"Contract", "screening_rejected"}
    assert said[1] in {"Job", "screening_rejected"}
    assert said[2] == "Screening"
    assert Contract.objects.filter(quote=quote).count() == (said[0] == "Contract")
    customer.refresh_from_db()
    assert customer.verification == "refused"
