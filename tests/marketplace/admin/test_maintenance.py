"""Maintenance at the operator's desk: drafted, looked at, announced, extended, cancelled; a stranger's is not there."""

from datetime import timedelta

import pytest
from django.urls import reverse
from django.utils import timezone

from marketplace.admin.tenancy import own
from marketplace.models import Maintenance, MaintenanceNotice
from tests import factories

pytestmark = pytest.mark.django_db


def url(what, *args):
    return reverse(f"operator:marketplace_maintenance_{what}", args=args)


def body(site, start, **fields):
    form = {"site": site.pk, "scope": "site", "category": "cooling", "text": "New fans.", **fields}
    for name, at in (("starts_at", start), ("ends_at", start + timedelta(hours=4))):
        form[f"{name}_0"], form[f"{name}_1"] = at.strftime("%Y-%m-%d"), at.strftime("%H:%M:%S")
    return form


@pytest.fixture
def start():
    return (timezone.now() + timedelta(days=10)).replace(second=0, microsecond=0)


def test_it_is_drafted_looked_at_announced_extended_and_cancelled(client, mine, start):
    form = body(mine.site, start, scope="hosts", hosts=mine.host.name)
    assert client.post(url("add"), form).status_code == 302
    row = Maintenance.objects.get()
    page = client.get(url("change", row.pk)).content.decode()
    assert "Dry run" in page
    assert "1 host with 8 GPUs; 0 contracts touched, no GPU of a firm contract short" in page
    assert client.post(url("announce", row.pk)).status_code == 302
    row.refresh_from_db()
    assert row.state == "announced"
    later = (start + timedelta(hours=6)).strftime("%Y-%m-%dT%H:%M")
    assert client.post(url("extend", row.pk), {"ends_at": later}).status_code == 302
    assert client.post(url("cancel", row.pk)).status_code == 302
    row.refresh_from_db()
    assert (row.state, row.ends_at) == ("cancelled", start + timedelta(hours=6))
    assert client.get(url("change", row.pk)).status_code == 200
    assert client.get(url("changelist")).status_code == 200


def test_its_words_are_edited_and_what_is_wrong_is_said_beside_the_field(client, mine, theirs, start):
    wrong = client.post(url("add"), body(mine.site, start, scope="hosts", hosts=theirs.host.name))
    assert f"Not at {mine.site.name}: {theirs.host.name}" in wrong.content.decode()
    assert "in the past" in client.post(url("add"), body(mine.site, start - timedelta(days=20))).content.decode()
    assert client.post(url("add"), body(theirs.site, start)).status_code == 200  # no choice of the field
    assert not Maintenance.objects.exists()
    assert client.post(url("add"), body(mine.site, start)).status_code == 302
    row = Maintenance.objects.get()
    assert client.post(url("change", row.pk), body(mine.site, start, text="Other fans.")).status_code == 302
    row.refresh_from_db()
    assert (row.text, row.version) == ("Other fans.", 2)


def test_the_dry_run_warns_of_short_notice(client, mine):
    contract = factories.contract(
        mine.listing, kind="reserved", ends_at=timezone.now() + timedelta(days=30), starts_at=timezone.now()
    )
    held = contract.reservations.create(
        listing=mine.listing,
        state="firm",
        starts_at=contract.starts_at,
        ends_at=contract.ends_at,
        claims_at=contract.starts_at,
    )
    held.blocks.create(host=mine.host, gpu_indices=list(range(8)))
    soon = (timezone.now() + timedelta(days=2)).replace(second=0, microsecond=0)
    client.post(url("add"), body(mine.site, soon))
    row = Maintenance.objects.get()
    page = client.get(url("change", row.pk)).content.decode()
    assert "1 contract touched, 8 GPUs short from" in page
    assert contract.public_id in page
    assert "in less than a week" in page
    refused = client.post(url("announce", row.pk))
    assert "the earliest is" in refused.content.decode()
    assert not MaintenanceNotice.objects.exists()


def test_a_strangers_is_not_there(client, mine, theirs, start, staff):
    client.post(url("add"), body(mine.site, start))
    row = Maintenance.objects.get()
    stranger = factories.client(theirs.home, "owner")
    for what in ("change", "announce", "extend", "finish", "cancel"):
        assert stranger.get(url(what, row.pk)).status_code == 404, what
        assert stranger.post(url(what, row.pk)).status_code == 404, what
    assert not own(Maintenance, factories.actor(theirs.home)).exists()
    assert factories.client(mine.home, "viewer").post(url("announce", row.pk)).status_code == 403
    assert staff.get(reverse("staff:marketplace_maintenance_change", args=[row.pk])).status_code == 200
