"""Our own people see all of it and write nothing but by the few actions, each of them audited."""

import pytest
from django.urls import reverse
from django.utils import timezone

from billing import invoices, ledger
from billing.models import BillingAccount, BillingCase, StripeEvent
from marketplace import outbox
from marketplace.admin import dashboard
from marketplace.admin.sites import staff_site
from marketplace.models import AuditEvent, Host, Organization, OutboxMessage, Screening, User
from tests import factories
from tests.factories import NOW

pytestmark = pytest.mark.django_db


def url(name, what, *args):
    return reverse(f"staff:{name}_{what}", args=args)


@pytest.fixture
def account():
    home = factories.organization("Lumen")
    return BillingAccount.objects.create(organization=home, currency="USD", created_at=NOW)


def parked(topic="billing.collect", key="7"):
    return OutboxMessage.objects.create(
        topic=topic, key=key, available_at=NOW, parked_at=NOW, attempts=12, last_error="Boom", claimed_until=NOW
    )


def test_nothing_is_edited(staff, mine):
    for model in staff_site._registry:
        name = f"{model._meta.app_label}_{model._meta.model_name}"
        assert staff.get(url(name, "add")).status_code == 403, name
        assert staff.post(url(name, "add"), {}).status_code == 403, name
        row = model._default_manager.first()
        if row is not None:
            assert staff.post(url(name, "change", row.pk), {"name": "x"}).status_code == 403, name
            assert staff.post(url(name, "delete", row.pk), {"post": "yes"}).status_code == 403, name
        assert staff_site._registry[model].actions == () or not staff_site._registry[model].actions, name
    assert {m for m, a in staff_site._registry.items() if a.moves} == {
        BillingCase, BillingAccount, Host, Organization, OutboxMessage, Screening, User,
    }  # fmt: skip


def test_sees_all_organizations(staff, mine, theirs):
    page = staff.get(url("marketplace_organization", "changelist")).content.decode()
    assert mine.home.name in page
    assert theirs.home.name in page
    job = factories.job(factories.contract(mine.listing, theirs.home))
    assert staff.get(url("marketplace_job", "change", job.pk)).status_code == 200


def test_secrets_are_not_shown(staff, mine):
    job = factories.job(factories.contract(mine.listing, mine.home), env={"TOKEN": "hunter2"})
    assert "hunter2" not in staff.get(url("marketplace_job", "change", job.pk)).content.decode()
    person = factories.user()
    assert person.password not in staff.get(url("marketplace_user", "change", person.pk)).content.decode()


def test_a_parked_message_is_tried_again(staff):
    message = parked()
    path = url("marketplace_outboxmessage", "retry", message.pk)
    assert staff.get(path).status_code == 200
    message.refresh_from_db()
    assert message.parked_at is not None
    assert staff.post(path).status_code == 302
    message.refresh_from_db()
    assert (message.parked_at, message.claimed_until, message.attempts) == (None, None, 0)
    assert [m.pk for m in outbox.claim(10, "billing.collect")] == [message.pk]
    assert AuditEvent.objects.get(verb="outbox.retried").before == {"topic": "billing.collect", "error": "Boom"}
    assert "is not parked" in staff.post(path).content.decode()


def test_a_parked_message_with_a_newer_twin_is_dropped(staff):
    message = parked()
    twin = OutboxMessage.objects.create(topic=message.topic, key=message.key, available_at=NOW)
    assert outbox.retry(message.pk, now=NOW)
    assert OutboxMessage.objects.get() == twin


def test_messages_from_the_list_all_or_none(staff):
    first, second = parked(key="1"), parked(key="2")
    waiting = OutboxMessage.objects.create(topic="billing.collect", key="3", available_at=NOW)
    path = url("marketplace_outboxmessage", "changelist")
    chosen = {"action": "retry", "confirmed": "1", "_selected_action": [first.pk, waiting.pk]}
    assert "is not parked" in staff.post(path, chosen).content.decode()
    assert OutboxMessage.objects.exclude(parked_at=None).count() == 2
    staff.post(path, {**chosen, "_selected_action": [first.pk, second.pk]})
    assert not OutboxMessage.objects.exclude(parked_at=None).exists()


def test_closing_the_case_of_a_parked_account_bills_it_again(staff, account):
    invoices.park(account, "a total that differs", now=NOW)
    case = BillingCase.objects.get()
    path = url("billing_billingcase", "close", case.pk)
    assert staff.post(path).status_code == 302
    account.refresh_from_db()
    case.refresh_from_db()
    assert (account.state, case.closed_at is not None) == ("open", True)
    assert "@" in case.closed_by
    assert AuditEvent.objects.get(verb="billing_case.closed").organization == account.organization
    assert "is closed already" in staff.post(path).content.decode() or staff.get(path).status_code == 302


def test_closing_another_case_leaves_the_account(staff, account):
    invoices.park(account, "parked", now=NOW)
    invoices.open_case("mirror", "ivc_1", "Stripe says 12", now=NOW, organization_id=account.organization_id)
    case = BillingCase.objects.get(kind="mirror")
    staff.post(url("billing_billingcase", "close", case.pk))
    account.refresh_from_db()
    assert account.state == "parked"
    assert BillingCase.objects.get(closed_at=None).kind == "parked"
    again = staff.post(url("billing_billingcase", "close", case.pk))
    assert "is closed already" in again.content.decode()


def test_unpark_by_the_account(staff, account):
    invoices.park(account, "parked", now=NOW)
    assert staff.post(url("billing_billingaccount", "unpark", account.pk)).status_code == 302
    account.refresh_from_db()
    assert account.state == "open"
    assert not BillingCase.objects.filter(closed_at=None).exists()


def test_the_overviews_counts_lead_to_their_rows(staff, account):
    invoices.park(account, "parked", now=NOW)
    parked()
    StripeEvent.objects.create(event_id="evt_1", type="invoice.paid", event_created_at=NOW, received_at=NOW)
    page = staff.get("/staff/").content.decode()
    assert "Parked messages" in page
    for name, count, model, query, _ in dashboard.staff()["cards"]:
        found = staff.get(url(model, "changelist") + f"?{query}")
        assert found.status_code == 200, name
        if query and "queued" not in query:
            assert found.context["cl"].result_count == count, name


def test_ledger_pages_show_even_books(staff, account):
    ledger.book(
        ledger.Booking(
            key="test-1",
            kind="test",
            subject="",
            at=timezone.now(),
            entries=(
                ledger.Entry("receivable", account.organization_id, "USD", 1200),
                ledger.Entry("revenue", None, "USD", -1200),
            ),
        )
    )
    page = staff.get(url("billing_ledgeraccount", "changelist")).content.decode()
    assert "12.00" in page
    assert "even" in staff.get("/staff/").content.decode()
    transaction = ledger.find("test-1")
    assert "12.00" in staff.get(url("billing_ledgertransaction", "change", transaction.pk)).content.decode()


def test_a_limit_is_raised_by_our_own_people_and_stands_in_the_trail(staff, mine):
    home = mine.home
    path = url("marketplace_organization", "limit", home.pk)
    assert "1024" in staff.get(path).content.decode()
    for bad in ({"gpu_limit": "-1"}, {"gpu_limit": "100001"}, {"reason": ""}, {"gpu_limit": ""}):
        assert staff.post(path, {"seen": 1024, "gpu_limit": 2000, "reason": "a large fleet", **bad}).status_code == 200
        assert Organization.objects.get(pk=home.pk).gpu_limit == 1024
    assert staff.post(path, {"seen": 1024, "gpu_limit": 2000, "reason": "a large fleet"}).status_code == 302
    assert Organization.objects.get(pk=home.pk).gpu_limit == 2000
    event = AuditEvent.objects.get(verb="organization.limit_changed")
    assert (event.organization, event.subject) == (home, home.public_id)
    assert (event.before, event.after) == ({"gpu_limit": 1024}, {"gpu_limit": 2000, "reason": "a large fleet"})
    stale = staff.post(path, {"seen": 1024, "gpu_limit": 4000, "reason": "twice"})
    assert "The limit is 2000 by now" in stale.content.decode()
    assert Organization.objects.get(pk=home.pk).gpu_limit == 2000
    assert AuditEvent.objects.filter(verb="organization.limit_changed").count() == 1
