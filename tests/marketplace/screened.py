"""An organization under screening: what it tells, who decides, and what is on record."""

from marketplace.models import (
    Screening,
)
from marketplace.services import screening
from marketplace.tenancy import Actor
from tests import factories
from tests.factories import NOW

STAFF = Actor(kind="staff", user_id=1, label="dana@tailrace.example")
OTHER = Actor(kind="staff", user_id=2, label="kim@tailrace.example")
PROFILE = {
    "legal_name": "Lumen Labs Inc.", "registration_number": "C-4711", "address": "1 Main St, Austin", "website": "",
    "beneficial_owners": ["Ada Park"], "end_use": "training language models", "end_use_countries": ["US"],
}  # fmt: skip


def tell(organization, now=NOW, **changes):
    return screening.tell(factories.actor(organization), organization, {**PROFILE, **changes}, now=now)


def states(organization):
    return dict(Screening.objects.owned_by(organization.pk).values_list("kind", "state"))


def row(organization, kind="sanctions"):
    return Screening.objects.get(organization=organization, kind=kind)


def ask_all(organization, now=NOW):
    for pk in Screening.objects.owned_by(organization.pk).order_by("pk").values_list("pk", flat=True):
        screening.ask(pk, now=now)


def decide(organization, to, kind="sanctions", actor=STAFF, now=NOW, **more):
    found = row(organization, kind)
    return screening.decide(actor, found.pk, to, seen=more.pop("seen", found.version), reason="looked", now=now, **more)


def clear_all(organization, now=NOW):
    for kind in Screening.Kind.values:
        decide(organization, "clear", kind, now=now)


def history(screened):
    return list(screened.events.values_list("what", "from_state", "to_state"))
