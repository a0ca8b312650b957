"""An operator sees its own, in every way in which the admin shows a row; customers see nothing; our own people see all."""

import pytest
from django.urls import reverse

from marketplace.admin.base import TenantAdmin
from marketplace.admin.policy import POLICY
from marketplace.admin.sites import operator_site, staff_site
from marketplace.admin.tenancy import own
from marketplace.models import AuditEvent, Contract, Listing, Placement, User
from marketplace.services import audit
from tests import factories
from tests.factories import NOW

pytestmark = pytest.mark.django_db
NOUNS = ("site", "host", "miner", "listing", "agent", "node")
MODEL = {"node": "powernode"}


def url(noun, what, *args):
    return reverse(f"operator:marketplace_{MODEL.get(noun, noun)}_{what}", args=args)


def everything(part):
    """With a contract sold, a placement, a curtailment and an audit event."""
    buyer = factories.organization()
    contract = factories.contract(part.listing, buyer)
    job = factories.job(contract, state="running")
    factories.placement(job, part.host, state="running", running_at=NOW)
    audit.record(factories.actor(part.home), "site.updated", part.site.public_id, now=NOW)
    return contract


@pytest.mark.parametrize("noun", NOUNS)
def test_lists_and_pages(client, mine, theirs, noun):
    ours, foreign = getattr(mine, noun), getattr(theirs, noun)
    page = client.get(url(noun, "changelist")).content.decode()
    assert url(noun, "change", ours.pk) in page
    assert url(noun, "change", foreign.pk) not in page
    assert "Basin" not in page
    assert client.get(url(noun, "change", ours.pk)).status_code == 200
    for what in ("change", "history", "delete"):
        assert client.get(url(noun, what, foreign.pk)).status_code == 404, what
    assert client.get(url(noun, "history", ours.pk)).status_code == 200
    assert client.get(url(noun, "delete", ours.pk)).status_code == 403


def test_buttons_of_a_strangers_row_are_not_there(client, theirs):
    for model, admin in operator_site._registry.items():
        for move in admin.moves:
            row = own(model, factories.actor(theirs.home)).first()
            if row is None:
                continue
            path = reverse(f"operator:marketplace_{model._meta.model_name}_{move.name}", args=[row.pk])
            assert client.get(path).status_code == 404, path
            assert client.post(path, {"reason": "x"}).status_code == 404, path
    assert client.post(url("site", "import", theirs.site.pk), {"kind": "hosts", "text": "x"}).status_code == 404


def test_sold_contracts_and_placements(client, mine, theirs):
    ours, foreign = everything(mine), everything(theirs)
    for model in (Contract, Placement, AuditEvent):
        name = model._meta.model_name
        rows = {True: [], False: []}
        for row in model.objects.all():
            path = reverse(f"operator:marketplace_{name}_change", args=[row.pk])
            rows[client.get(path).status_code == 200].append(row)
        assert rows[True], name
        assert own(model, factories.actor(mine.home)).count() == len(rows[True])
        assert rows[False], name
    assert client.get(reverse("operator:marketplace_contract_change", args=[ours.pk])).status_code == 200
    assert client.get(reverse("operator:marketplace_contract_change", args=[foreign.pk])).status_code == 404


def test_what_the_market_shows_to_everybody_is_no_row_of_the_admin(mine, theirs):
    """A published listing is public; in the admin it is its operator's alone."""
    actor = factories.actor(mine.home)
    assert theirs.listing in Listing.objects.all().visible_to(actor)
    assert list(own(Listing, actor).order_by("pk")) == [mine.listing, mine.draft]


def test_what_an_operator_buys_elsewhere_is_not_what_it_sold(client, mine, theirs):
    bought = factories.contract(theirs.listing, mine.home)
    assert client.get(reverse("operator:marketplace_contract_change", args=[bought.pk])).status_code == 404


def test_choices(client, mine, theirs):
    page = client.get(url("listing", "add")).content.decode()
    assert mine.site.name in page
    assert mine.host.name in page
    assert theirs.site.name not in page
    assert theirs.host.name not in page
    for field, foreign in (("site", theirs.site), ("hosts", theirs.host)):
        said = client.post(url("listing", "add"), {**form(mine), field: foreign.pk})
        assert said.status_code == 200
        assert "one of the available choices" in said.content.decode()
    assert Listing.objects.filter(title="New offer").count() == 0


def form(part, **values):
    return {
        "site": part.site.pk, "title": "New offer", "gpu_model": part.host.gpu_model_id, "visibility": "public", "currency": "USD",
        "on_demand_price": "2.49", "min_gpus": 1, "min_term_hours": 1, "max_term_days": 30, "upfront_permille": 0,
        "eviction_notice_s": 120,
        "flexible_hours_per_month": 40, "flexible_notice_s": 600, "maintenance_hours_per_month": 4, "fabric_gbps": 400, **values,
    }  # fmt: skip


def test_autocomplete(client, mine, theirs):
    for model, field in (("curtailment", "node"), ("powernode", "parent")):
        asked = {"app_label": "marketplace", "model_name": model, "field_name": field, "term": ""}
        found = client.get(reverse("operator:autocomplete"), asked).json()["results"]
        ids = {int(row["id"]) for row in found}
        assert ids == set(mine.site.power_nodes.values_list("pk", flat=True))


def test_filters(client, mine, theirs):
    factories.site(mine.home, name="Second Hall")  # a filter of one choice is not shown
    page = client.get(url("host", "changelist"))
    assert f'<option value="{mine.site.pk}"' in page.content.decode()
    assert theirs.site.name not in page.content.decode()
    foreign = client.get(url("host", "changelist"), {"site__id__exact": theirs.site.pk})
    assert theirs.host.name not in foreign.content.decode()


def test_overview(client, mine, theirs):
    page = client.get("/operator/", {"site": theirs.site.pk}).content.decode()
    assert mine.site.name in page
    assert theirs.site.name not in page


def test_a_subclass_cannot_widen_the_rows():
    with pytest.raises(TypeError, match="tenancy is applied in TenantAdmin alone"):

        class Wide(TenantAdmin):
            def get_queryset(self, request):
                return Listing.objects.all()


def test_a_table_without_an_owner_cannot_be_listed(mine):
    with pytest.raises(TypeError, match="no path to its operator"):
        own(User, factories.actor(mine.home))


# --- who gets in
def test_doors(mine):
    customer = factories.client(factories.organization(), "owner")
    nobody, loner = factories.client(), factories.client(user=factories.user())
    ours = factories.client(user=factories.staff())
    member = factories.client(mine.home, "viewer")
    assert nobody.get("/operator/").status_code == 302
    assert "login" in nobody.get("/operator/login/", {"next": "/operator/"})["Location"]
    assert {c.get("/operator/").status_code for c in (customer, loner, ours)} == {403}
    assert member.get("/operator/").status_code == 200
    assert {c.get("/staff/").status_code for c in (customer, loner, member)} == {404}
    assert ours.get("/staff/").status_code == 200
    for client in (customer, loner, ours):
        assert client.get(url("host", "changelist")).status_code == 403
        assert client.get(url("host", "drain", mine.host.pk)).status_code == 403


def test_a_person_of_two_organizations_acts_for_the_operator(mine, theirs):
    person = factories.user()
    factories.member(factories.organization(), "owner", person)
    factories.member(mine.home, "owner", person)
    client = factories.client(user=person)
    assert mine.site.name in client.get("/operator/").content.decode()
    factories.member(theirs.home, "viewer", person)
    session = client.session
    session["organization"] = theirs.home.pk
    session.save()
    page = client.get("/operator/").content.decode()
    assert theirs.site.name in page
    assert mine.site.name not in page


@pytest.mark.parametrize("role", ["viewer", "billing"])
def test_roles_that_only_read(mine, role):
    client = factories.client(mine.home, role)
    for noun in NOUNS:
        assert client.get(url(noun, "changelist")).status_code == 200
        assert client.get(url(noun, "change", getattr(mine, noun).pk)).status_code == 200
    for path in (
        url("host", "drain", mine.host.pk),
        url("site", "mode-off", mine.site.pk),
        url("site", "import", mine.site.pk),
    ):
        assert client.get(path).status_code == 403
        assert client.post(path, {"reason": "x"}).status_code == 403
    assert client.get(url("listing", "add")).status_code == 403
    assert client.get(url("auditevent", "changelist")).status_code == 403
    payouts = client.get(reverse("operator:billing_payout_changelist")).status_code
    assert payouts == (200 if role == "billing" else 403)


def test_every_answer_carries_the_admins_policy(client, staff, mine, theirs):
    for path in ("/operator/", url("host", "change", theirs.host.pk), "/staff/"):
        assert client.get(path)["Content-Security-Policy"] == POLICY
    assert staff.get("/staff/")["Content-Security-Policy"] == POLICY
    assert "unsafe" not in client.get("/accounts/password/change/").headers.get("Content-Security-Policy", "")


# --- every page of both
@pytest.mark.parametrize("site", [operator_site, staff_site], ids=lambda s: s.name)
def test_every_list_and_page_opens(site, mine, staff):
    """With one row of most nouns; a page that breaks is found here."""
    everything(mine)
    client = staff if site is staff_site else factories.client(mine.home, "owner")
    opened = 0
    for model, admin in site._registry.items():
        name = f"{site.name}:{model._meta.app_label}_{model._meta.model_name}"
        assert client.get(reverse(f"{name}_changelist")).status_code == 200, name
        row = model._default_manager.first() if site is staff_site else own(model, factories.actor(mine.home)).first()
        if row is None:
            continue
        opened += 1
        assert client.get(reverse(f"{name}_change", args=[row.pk])).status_code == 200, name
        assert client.get(reverse(f"{name}_history", args=[row.pk])).status_code == 200, name
        for move in admin.moves:
            assert client.get(reverse(f"{name}_{move.name}", args=[row.pk])).status_code in {200, 302}, (
                name,
                move.name,
            )
    assert opened >= 8
