"""What an operator does in the admin: every write is a service's, audited; a refusal is shown and leaves nothing behind."""

from datetime import timedelta

import pytest
from django.urls import reverse
from django.utils import timezone

from marketplace.admin import dashboard
from marketplace.models import (
    Amendment,
    AuditEvent,
    Curtailment,
    EnrolmentToken,
    Host,
    Listing,
    OutboxMessage,
    PowerNode,
    Site,
)
from marketplace.services import tokens
from tests import factories
from tests.factories import NOW
from tests.marketplace.admin.test_tenancy import form, url
from tests.marketplace.test_imports import HOSTS, NODES

pytestmark = pytest.mark.django_db


def verbs(subject):
    return list(AuditEvent.objects.filter(subject=subject.public_id).order_by("pk").values_list("verb", flat=True))


# --- sites
def test_site_mode_asks_first(client, mine):
    path = url("site", "mode-shed", mine.site.pk)
    page = client.get(path)
    assert page.status_code == 200
    assert "sleep" in page.content.decode()
    mine.site.refresh_from_db()
    assert mine.site.mode == "auto"
    done = client.post(path)
    assert done["Location"] == url("site", "change", mine.site.pk)
    mine.site.refresh_from_db()
    assert (mine.site.mode, mine.site.safety_generation) == ("shed", 1)
    assert verbs(mine.site) == ["site.mode_changed"]
    assert OutboxMessage.objects.filter(topic="scheduler.site_loop", key=str(mine.site.pk)).exists()
    assert (
        url("site", "mode-shed", mine.site.pk) not in client.get(url("site", "change", mine.site.pk)).content.decode()
    )


def test_a_token_is_shown_once_with_its_command(client, mine):
    path = url("site", "token", mine.site.pk)
    assert EnrolmentToken.objects.count() == 0
    client.get(path)
    assert EnrolmentToken.objects.count() == 0
    page = client.post(path)
    assert "no-store" in page["Cache-Control"]
    text = page.content.decode()
    token = text.split("--token ")[1].split()[0]
    assert EnrolmentToken.objects.get(site=mine.site).digest == tokens.digest(token)
    assert "python -m agent enrol --url" in text
    assert token not in client.get(url("site", "change", mine.site.pk)).content.decode()


def test_a_new_site_and_its_settings(client, mine):
    values = {
        "name": "West Hall", "region": "us-tx", "country": "US", "timezone": "America/Chicago", "grid_operator": "ERCOT",
        "contract_power_w": 5_000_000, "pue_permille": 1300, "miner_pue_permille": 1050, "energy_price_microusd_per_kwh": 42_000,
        "pool_scheme": "fpps", "switch_cost_uusd": 20_000,
    }  # fmt: skip
    assert client.post(url("site", "add"), values).status_code == 302
    site = Site.objects.get(name="West Hall")
    assert (site.organization, site.contract_power_w) == (mine.home, 5_000_000)
    assert site.power_nodes.get().overhead_gpu_permille == 1300
    twice = client.post(url("site", "add"), values)
    assert twice.status_code == 200
    assert "choose another" in twice.content.decode()
    changed = {**values, "energy_price_microusd_per_kwh": 50_000}
    assert client.post(url("site", "change", site.pk), changed).status_code == 302
    site.refresh_from_db()
    assert site.energy_price_microusd_per_kwh == 50_000
    assert verbs(site) == ["site.created", "site.updated"]
    updated = AuditEvent.objects.get(verb="site.updated")
    assert (updated.before, updated.after) == (
        {"energy_price_microusd_per_kwh": 42_000},
        {"energy_price_microusd_per_kwh": 50_000},
    )


def test_a_cap_under_what_is_booked_is_refused_beside_the_form(client, mine):
    node = mine.node
    values = {
        "cap_w": 100,
        "fixed_w": 0,
        "metering": "meter",
        "overhead_gpu_permille": 1000,
        "overhead_miner_permille": 1000,
    }
    page = client.post(url("node", "change", node.pk), values)
    assert page.status_code == 200
    assert "over what it may carry" in page.content.decode()
    before = node.cap_w
    node.refresh_from_db()
    assert node.cap_w == before
    assert verbs(node) == []


def test_a_new_node_hangs_under_its_parent(client, mine):
    values = {
        "parent": mine.node.pk, "name": "rack-1", "kind": "pdu", "cap_w": 20_000, "fixed_w": 0, "metering": "meter",
        "overhead_gpu_permille": 1000, "overhead_miner_permille": 1000,
    }  # fmt: skip
    assert client.post(url("node", "add"), values).status_code == 302
    made = PowerNode.objects.get(name="rack-1")
    assert (made.parent, made.site, made.depth) == (mine.node, mine.site, mine.node.depth + 1)


# --- import
def test_a_broken_file_says_line_and_column_and_imports_nothing(client, mine):
    broken = HOSTS.replace("h2,H100-SXM,2", "h2,H100-SXM,two").replace("pdu-1,leaf-1", "nowhere,leaf-1")
    path = url("site", "import", mine.site.pk)
    for button in ("check", "import"):
        page = client.post(path, {"kind": "hosts", "text": broken, button: "1"}).content.decode()
        assert "nothing was imported" in page
        assert "is not a whole number" in page
        assert "h2,H100-SXM,two" in page  # the text stays, to be corrected
    assert not Host.objects.filter(name__in=("h1", "h2")).exists()


def test_dry_run_then_import(client, mine):
    path = url("site", "import", mine.site.pk)
    dry = client.post(path, {"kind": "power_nodes", "text": NODES, "check": "1"}).content.decode()
    assert "2 rows can be imported" in dry
    assert not PowerNode.objects.filter(name="hall-b").exists()
    assert client.post(path, {"kind": "power_nodes", "text": NODES, "import": "1"}).status_code == 302
    assert PowerNode.objects.get(name="pdu-b1").parent.name == "hall-b"


def test_what_a_node_cannot_carry_is_refused_whole(client, mine):
    small = "name,parent,kind,cap_w,fixed_w,metering\ntiny,,pdu,1500,,meter\n"
    path = url("site", "import", mine.site.pk)
    client.post(path, {"kind": "power_nodes", "text": small, "import": "1"})
    page = client.post(
        path, {"kind": "hosts", "text": HOSTS.replace("pdu-1", "tiny").replace("pdu-2", "tiny"), "import": "1"}
    )
    assert "over what it may carry" in page.content.decode()
    assert not Host.objects.filter(name="h1").exists()


# --- hosts and miners
def test_drain_and_back(client, mine):
    path = url("host", "drain", mine.host.pk)
    missing = client.post(path, {"reason": ""})
    assert missing.status_code == 200
    assert client.post(path, {"reason": "fan"}).status_code == 302
    mine.host.refresh_from_db()
    assert (mine.host.state, mine.host.state_reason) == ("draining", "fan")
    assert client.post(url("host", "undrain", mine.host.pk)).status_code == 302
    again = client.post(url("host", "undrain", mine.host.pk))
    assert "is active" in again.content.decode()
    assert verbs(mine.host) == ["host.drained", "host.undrained"]


def test_draining_many_is_all_or_nothing(client, mine, theirs):
    second = factories.host(mine.site, "second")
    gone = factories.host(mine.site, "gone", state="retired")
    path = url("host", "changelist")
    asked = {"action": "drain", "_selected_action": [mine.host.pk, second.pk]}
    page = client.post(path, asked).content.decode()
    assert 'name="confirmed"' in page
    refused = client.post(path, {**asked, "_selected_action": [second.pk, gone.pk], "confirmed": "1", "reason": "x"})
    assert "is retired" in refused.content.decode()
    second.refresh_from_db()
    assert second.state == "active"
    assert client.post(path, {**asked, "confirmed": "1", "reason": "x"}).status_code == 302
    assert set(Host.objects.filter(state="draining").values_list("pk", flat=True)) == {mine.host.pk, second.pk}
    client.post(path, {**asked, "_selected_action": [theirs.host.pk], "confirmed": "1", "reason": "x"})
    theirs.host.refresh_from_db()
    assert theirs.host.state == "active"


def test_a_miner_by_hand(client, mine):
    path = url("miner", "hold", mine.miner.pk)
    wrong = client.post(path, {"mode": "turbo"})
    assert wrong.status_code == 200
    assert "unknown, or the miner is not manual" in wrong.content.decode()
    mine.miner.refresh_from_db()
    assert not mine.miner.manual
    assert client.post(path, {"mode": "sleep"}).status_code == 302
    mine.miner.refresh_from_db()
    assert (mine.miner.manual, mine.miner.desired_mode) == (True, 0)
    client.post(url("miner", "release", mine.miner.pk))
    mine.miner.refresh_from_db()
    assert not mine.miner.manual


# --- listings
def test_draft_publish_pause_retire(client, mine):
    host = factories.host(mine.site, "fresh")
    partner = factories.organization()
    values = form(mine, hosts=[host.pk], spot_floor="1.000001", visibility="partners", partner_ids=partner.public_id)
    assert client.post(url("listing", "add"), values).status_code == 302
    row = Listing.objects.get(title="New offer")
    assert (row.on_demand_price, row.spot_floor, row.state) == (2_490_000, 1_000_001, "draft")
    assert list(row.hosts.all()) == [host]
    assert list(row.partners.all()) == [partner]
    for move, state in (("publish", "published"), ("pause", "paused"), ("publish", "published"), ("retire", "retired")):
        assert client.post(url("listing", move, row.pk)).status_code == 302, move
        row.refresh_from_db()
        assert row.state == state
    assert client.get(url("listing", "change", row.pk)).status_code == 200  # to read
    assert client.post(url("listing", "change", row.pk), values).status_code == 403
    assert "listing_incomplete" not in verbs(row)


def test_a_site_without_an_agent_says_what_comes_next(client, mine):
    from marketplace.models import Agent

    page = client.get(url("site", "change", mine.site.pk)).content.decode()
    assert "In these 60 minutes:" in page
    Agent.objects.filter(site=mine.site).delete()
    page = client.get(url("site", "change", mine.site.pk)).content.decode()
    assert "What comes next" in page
    assert "/operator/marketplace/listing/add/" in page


def test_publish_names_every_field_that_is_missing(client, mine):
    mine.draft.on_demand_price = mine.draft.reserved_price = mine.draft.flexible_price = mine.draft.spot_floor = None
    mine.draft.save()
    page = client.post(url("listing", "publish", mine.draft.pk))
    assert page.status_code == 200
    text = page.content.decode()
    assert "assign at least one host" in text
    assert "set at least one price" in text
    assert "/hosts" not in text  # the field's name, no pointer
    mine.draft.refresh_from_db()
    assert mine.draft.state == "draft"


def test_a_published_listing_keeps_what_it_needs(client, mine):
    """The refusal stands beside the field, and the host that the same request took out is still in."""
    values = form(mine, title="Still mine", hosts=[], on_demand_price="2.5", partner_ids="")
    page = client.post(url("listing", "change", mine.listing.pk), values)
    assert page.status_code == 200
    assert "assign at least one host" in page.content.decode()
    mine.listing.refresh_from_db()
    assert (mine.listing.title, mine.listing.version) == ("Caprock offer", 1)
    assert mine.listing.hosts.get() == mine.host


@pytest.mark.parametrize("text", ["-1", "0", "free", "1.0000001", "1e400", "NaN"])
def test_prices_that_are_none(client, mine, text):
    page = client.post(url("listing", "add"), form(mine, on_demand_price=text))
    assert page.status_code == 200
    assert not Listing.objects.filter(title="New offer").exists()


def test_prices_by_term_are_typed_as_a_table(client, mine):
    rows = {
        "price_tiers_kind": ["reserved", "flexible", "reserved"],
        "price_tiers_min_term_hours": ["720", "", ""],
        "price_tiers_upfront_permille": ["12.5", "", ""],
        "price_tiers_flexible_hours_per_month": ["", "100", ""],
        "price_tiers_price": ["1.234567", "1.1", ""],
    }
    values = form(mine, title="By term", reserved_price="1.99", flexible_price="1.5", **rows)
    page = client.post(url("listing", "add"), values)
    assert page.status_code == 302, page.context["adminform"].form.errors
    row = Listing.objects.get(title="By term")
    columns = ("kind", "min_term_hours", "upfront_permille", "flexible_hours_per_month", "price")
    assert [[tier[column] for column in columns] for tier in row.price_tiers] == [
        ["reserved", 720, 125, 0, 1_234_567],
        ["flexible", 1, 0, 100, 1_100_000],
    ]
    page = client.get(url("listing", "change", row.pk)).content.decode()
    assert 'value="1.234567"' in page
    assert 'value="12.5"' in page
    kept = {name: value for name, value in values.items() if name != "hosts"}
    assert client.post(url("listing", "change", row.pk), {**kept, "title": "Still"}).status_code == 302
    row.refresh_from_db()
    assert (row.title, len(row.price_tiers)) == ("Still", 2)
    for column, value, told in (
        ("price", "3", "nobody would take it"), ("price", "", "the price is needed"), ("min_term_hours", "x", "Row 1")
    ):  # fmt: skip
        wrong = {**kept, f"price_tiers_{column}": [value, *kept[f"price_tiers_{column}"][1:]]}
        page = client.post(url("listing", "change", row.pk), wrong)
        assert page.status_code == 200
        assert told in page.content.decode()
    client.post(url("listing", "retire", row.pk))
    assert "12.5 % at signing" in client.get(url("listing", "change", row.pk)).content.decode()


# --- curtailments
def test_announce_and_cancel(client, mine, theirs):
    starts = timezone.now().replace(microsecond=0) + timedelta(minutes=5)
    ends = starts + timedelta(hours=1)
    values = {
        "node": mine.node.pk, "cap_w": 50_000, "starts_at_0": f"{starts:%Y-%m-%d}", "starts_at_1": f"{starts:%H:%M:%S}",
        "ends_at_0": f"{ends:%Y-%m-%d}", "ends_at_1": f"{ends:%H:%M:%S}", "mandatory": "on", "reference": "grid-7",
    }  # fmt: skip
    assert client.post(url("curtailment", "add"), {**values, "node": theirs.node.pk}).status_code == 200
    too_much = client.post(url("curtailment", "add"), {**values, "cap_w": mine.node.cap_w + 1})
    assert "out of range" in too_much.content.decode()
    assert Curtailment.objects.count() == 0
    assert client.post(url("curtailment", "add"), values).status_code == 302
    call = Curtailment.objects.get()
    assert (call.site, call.cap_w, call.starts_at, call.state) == (mine.site, 50_000, starts, "announced")
    assert client.post(url("curtailment", "change", call.pk), values).status_code == 403
    assert client.post(url("curtailment", "cancel", call.pk)).status_code == 302
    call.refresh_from_db()
    assert call.state == "cancelled"
    assert "it cannot become" in client.post(url("curtailment", "cancel", call.pk)).content.decode()


def test_an_agents_key_is_revoked(client, mine):
    assert client.post(url("agent", "revoke", mine.agent.pk)).status_code == 302
    mine.agent.refresh_from_db()
    assert mine.agent.revoked_at is not None


def test_history_is_the_audit_trail(client, mine):
    client.post(url("host", "drain", mine.host.pk), {"reason": "fan noise"})
    page = client.get(url("host", "history", mine.host.pk)).content.decode()
    assert "host.drained" in page
    assert "fan noise" in page
    assert (
        reverse("operator:marketplace_host_history", args=[mine.host.pk])
        in client.get(url("host", "change", mine.host.pk)).content.decode()
    )


def test_the_form_of_taints_begins_with_those_that_stand(client, mine):
    path = url("host", "taints", mine.host.pk)
    client.post(path, {"taints": "dedicated=nlp crew=night"})
    assert 'value="crew=night dedicated=nlp"' in client.get(path).content.decode()


def test_revenue_counts_gpus_that_joined_a_commitment_from_then_on_at_their_price(db):
    site = factories.site()
    day = timedelta(days=1)
    contract = factories.contract(
        factories.listing(site), kind="reserved", gpu_count=6, ends_at=NOW + 10 * day, price=2_000_000, fee_permille=0
    )
    Amendment.objects.create(
        contract=contract, kind="resize", state="accepted", added_gpus=4, price=3_000_000, proposed_by="x", created_at=NOW,
        answer_by=NOW, effective_at=NOW + day,
    )  # fmt: skip
    found = dashboard.ai_revenue(factories.actor(site.organization), [site], NOW, NOW + 2 * day)
    assert found == {"USD": (2 * 48 * 2 + 4 * 24 * 3) * 1_000_000}


def test_a_price_is_proposed_from_the_contracts_page(client, mine):
    contract = factories.contract(mine.listing, factories.organization())
    page = reverse("operator:marketplace_contract_change", args=[contract.pk])
    assert "Propose a price" in client.get(page).content.decode()
    form = reverse("operator:marketplace_contract_price", args=[contract.pk])
    soon = client.post(form, {"price": "3.25", "effective_at": "2026-01-02T00:00", "reason": "x"})
    assert "at least 30 days ahead" in soon.content.decode()
    later = (timezone.now() + timedelta(days=40)).strftime("%Y-%m-%dT%H:%M")
    assert client.post(form, {"price": "3.25", "effective_at": later, "reason": "dearer power"}).status_code == 302
    asked = contract.amendments.get()
    assert (asked.state, asked.price, asked.reason) == ("open", 3_250_000, "dearer power")
    again = client.post(form, {"price": "3.5", "effective_at": later})
    assert "A price is proposed already" in again.content.decode()
    reserved = factories.contract(mine.listing, factories.organization(), kind="reserved", ends_at=timezone.now())
    other = reverse("operator:marketplace_contract_change", args=[reserved.pk])
    assert "Propose a price" not in client.get(other).content.decode()
