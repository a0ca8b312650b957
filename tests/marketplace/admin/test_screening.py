"""The queue: what waits for us, on what evidence, decided with a reason, by who saw it as it is."""

import pytest
from django.urls import reverse

from marketplace.models import AuditEvent, Screening
from marketplace.services import screening
from tests import factories
from tests.factories import NOW

pytestmark = pytest.mark.django_db
PROFILE = {
    "legal_name": "Lumen Labs Inc.", "registration_number": "C-4711", "address": "1 Main St", "beneficial_owners": ["Ada <b>Park"],
    "end_use": "training", "end_use_countries": ["US"],
}  # fmt: skip


@pytest.fixture
def row():
    made = factories.organization("Lumen Labs", screened=False)
    screening.tell(factories.actor(made), made, PROFILE, now=NOW)
    found = Screening.objects.get(organization=made, kind="sanctions")
    screening.ask(found.pk, now=NOW)
    found.refresh_from_db()
    return found


def url(what, *args):
    return reverse(f"staff:marketplace_screening_{what}", args=args)


def test_the_queue_shows_what_waits_and_the_page_its_evidence(staff, row):
    row.events.create(
        at=NOW, actor="system", what="answered", from_state="pending", to_state="review", round=1, reason="list: hit",
        evidence={"threshold": 85, "matches": [{"asked": "Ada Park", "name": "Ádám Parker", "list": "SDN", "score": 91}]},
    )  # fmt: skip
    assert "Screenings for us" in staff.get("/staff/").content.decode()
    page = staff.get(url("changelist") + "?needs_person__exact=1")
    assert page.context["cl"].result_count == 1
    shown = staff.get(url("change", row.pk)).content.decode()
    for word in ("Lumen Labs Inc.", "Ádám Parker", "91", "threshold: 85", "Ada &lt;b&gt;Park", "Reject it"):
        assert word in shown


def test_a_decision_needs_a_reason_and_counts_for_what_was_seen(staff, row):
    form = staff.get(url("clear", row.pk)).content.decode()
    assert f'name="seen" value="{row.version}"' in form
    assert staff.post(url("clear", row.pk), {"seen": row.version, "reason": ""}).status_code == 200
    row.refresh_from_db()
    assert row.state == "review"
    staff.post(url("ask", row.pk), {"seen": row.version, "reason": "no register", "message": "Send us the register."})
    row.refresh_from_db()
    assert (row.state, row.message) == ("review", "Send us the register.")
    stale = staff.post(url("reject", row.pk), {"seen": row.version - 1, "reason": "x"})
    assert "It has changed since you looked" in stale.content.decode()
    assert staff.post(url("reject", row.pk), {"seen": row.version, "reason": "on a list"}).status_code == 302
    row.refresh_from_db()
    assert row.state == "rejected"
    assert AuditEvent.objects.get(verb="screening.rejected").subject == row.public_id


def test_what_a_rejected_one_runs_is_ended_by_a_person(staff, row):
    site = factories.site()
    listing = factories.listing(site, hosts=[factories.host(site)])
    contract = factories.contract(listing, row.organization)
    assert "End its contracts" not in staff.get(url("change", row.pk)).content.decode()
    staff.post(url("reject", row.pk), {"seen": row.version, "reason": "on a list"})
    contract.refresh_from_db()
    assert contract.state == "active"
    assert contract.public_id in staff.get(url("change", row.pk)).content.decode()
    assert staff.post(url("end", row.pk), {"reason": "on a list of sanctions"}).status_code == 302
    contract.refresh_from_db()
    assert contract.state == "terminated"


def test_nobody_else_opens_it(client, row):
    assert client.get(url("change", row.pk)).status_code == 404
    assert client.post(url("clear", row.pk), {"seen": row.version, "reason": "x"}).status_code == 404
