"""Makes the demo market through the services, once: two operators' sites, their listings, a customer, our own staff.

All of it is test mode (`livemode` false): its own cell, its own money. Log-ins are printed by `make run`.
"""

import json
import os
import secrets
from datetime import datetime
from pathlib import Path
from typing import Any

from django.db import transaction
from django.utils import timezone

from marketplace.models import Cell, GpuModel, Host, Listing, Organization, Site, User
from marketplace.services import accounts, inventory, listings, sites
from marketplace.tenancy import SCOPES, Actor
from sandbox.demo.config import agent_config
from sandbox.demo.people import CUSTOMER, OPERATOR, STAFF
from sandbox.site.spec import Spec, demo_site

SITES = (("bosque", "Bosque County", "us-tx", "ERCOT", 1), ("rockdale", "Rockdale", "us-tx", "ERCOT", 2))
PRICES = {
    "H100-SXM": {
        "on_demand_price": 2_490_000,
        "reserved_price": 1_990_000,
        "flexible_price": 1_690_000,
        "spot_floor": 990_000,
    },
    "L40S": {"on_demand_price": 890_000, "reserved_price": 690_000, "flexible_price": 590_000, "spot_floor": 390_000},
}
TIERS: tuple[tuple[str, int, dict[str, int]], ...] = (  # per cent of the plain price, and what is asked for it
    ("reserved", 90, {"min_term_hours": 30 * 24}),
    ("reserved", 80, {"min_term_hours": 30 * 24, "upfront_permille": 500}),
    ("reserved", 75, {"min_term_hours": 90 * 24, "upfront_permille": 500}),
    ("flexible", 85, {"flexible_hours_per_month": 120}),
)


def seed(house: Path, site_port: int) -> str:
    """Plant what is missing; returns the words for the terminal."""
    now = timezone.now()
    passwords = _passwords(house)
    with transaction.atomic():
        _person(STAFF, passwords, is_staff=True, is_superuser=True)
        operator = _organization("Caprock Power", OPERATOR, passwords, now=now, is_operator=True, is_customer=False)
        customer = _organization("Lumen Labs", CUSTOMER, passwords, now=now)
        cell, _ = Cell.objects.get_or_create(name="us-tx-test", defaults={"region": "us-tx", "livemode": False})
    for number, row in enumerate(SITES):
        _site(house, operator, cell, row, f"http://127.0.0.1:{site_port + number}", now)
    _key(house, customer, now)
    return _words(passwords)


def _passwords(house: Path) -> dict[str, str]:
    file = house / "logins.json"
    if not file.exists():
        made = {mail: secrets.token_urlsafe(9) for mail in (STAFF, OPERATOR, CUSTOMER)}
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as out:
            json.dump(made, out)
    return dict(json.loads(file.read_text()))


def _person(mail: str, passwords: dict[str, str], **fields: Any) -> User:
    from allauth.account.models import EmailAddress

    found = User.objects.filter(email=mail).first()
    if found is None:
        found = User.objects.create_user(mail, passwords[mail], **fields)
        EmailAddress.objects.create(user=found, email=mail, verified=True, primary=True)
    return found


def _organization(name: str, mail: str, passwords: dict[str, str], *, now: datetime, **fields: Any) -> Organization:
    person = _person(mail, passwords)
    found = Organization.objects.filter(name=name, memberships__user=person).first()
    return found or accounts.create_organization(person, name=name, livemode=False, now=now, **fields)


def _owner(organization: Organization) -> Actor:
    return accounts.actor_for(organization.memberships.select_related("user").get(role="owner").user, organization)


def _site(
    house: Path, operator: Organization, cell: Cell, row: tuple[str, str, str, str, int], url: str, now: datetime
) -> None:
    name, title, region, grid, number = row
    spec = demo_site(number, miner_port=int(url.rpartition(":")[2]) + 1000, name=name)
    folder = house / "sites" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    (folder / "agent.json").write_text(json.dumps(agent_config(name, url)))
    if Site.objects.filter(organization=operator, name=title).exists():
        return
    actor = _owner(operator)
    site = plant_site(actor, cell, title, region, grid, spec, now)
    publish_listings(actor, site, now)
    token = sites.create_enrolment_token(site, actor=actor, now=now)
    (folder / "token").write_text(token[1] if isinstance(token, tuple) else token)


def plant_site(actor: Actor, cell: Cell, title: str, region: str, grid: str, spec: Spec, now: datetime) -> Site:
    """The site with its power tree, hosts and miners as its operator would import them."""
    root, *below = spec["nodes"]
    assert actor.organization_id is not None
    organization = Organization.objects.get(pk=actor.organization_id)
    site = sites.create_site(
        organization, actor=actor, now=now, name=title, region=region, cell=cell, contract_power_w=root["cap_w"],
        timezone="America/Chicago", grid_operator=grid, pue_permille=root["overhead_gpu_permille"],
        miner_pue_permille=root["overhead_miner_permille"], fixed_w=root["fixed_w"], metering="meter",
    )  # fmt: skip
    nodes = {n.name: n for n in site.power_nodes.all()}
    for node in below:
        nodes[node["name"]] = sites.add_power_node(
            site, actor=actor, now=now, name=node["name"], parent=nodes[node["parent"]], kind=node["kind"], cap_w=node["cap_w"],
            fixed_w=node["fixed_w"], metering="meter" if node["metered"] else "firmware",
            overhead_gpu_permille=node["overhead_gpu_permille"], overhead_miner_permille=node["overhead_miner_permille"],
        )  # fmt: skip
    inventory.upsert_hosts(site, spec["hosts"], now=now, actor=actor)
    # The machines hash already, so their watts are a fact, not a wish: booked even where they leave no margin.
    inventory.upsert_miners(site, spec["miners"], now=now, actor=actor, strict=False)
    return site


def publish_listings(actor: Actor, site: Site, now: datetime) -> list[Listing]:
    """One public listing a GPU model."""
    made = []
    for model in GpuModel.objects.filter(hosts__site=site).distinct().order_by("name"):
        hosts = list(Host.objects.filter(site=site, gpu_model=model).values_list("pk", flat=True))
        fabric = (400, "InfiniBand NDR") if "H100" in model.name else (100, "Ethernet")
        fields = {
            "title": f"{model.name} at {site.name}",
            "gpu_model_id": model.pk,
            "fabric_gbps": fabric[0],
            "interconnect": fabric[1],
            **PRICES[model.name],
            "price_tiers": [
                {"kind": kind, "price": PRICES[model.name][f"{kind}_price"] * percent // 100, **asks}
                for kind, percent, asks in TIERS
            ],
        }
        listing = listings.draft(actor, site, fields, hosts=hosts, now=now)
        made.append(listings.publish(actor, listing, now=now))
    return made


def _key(house: Path, customer: Organization, now: datetime) -> None:
    file = house / "demo-key"
    if not file.exists():
        _, token = accounts.issue_key(
            customer, name="demo traffic", scopes=list(SCOPES), actor=_owner(customer), now=now
        )
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as out:
            out.write(token)


def _words(passwords: dict[str, str]) -> str:
    from django.conf import settings

    base = settings.PUBLIC_URL
    return (
        f"\n  market    {base}/            customer  {CUSTOMER}  {passwords[CUSTOMER]}"
        f"\n  operator  {base}/operator/   operator  {OPERATOR}  {passwords[OPERATOR]}"
        f"\n  staff     {base}/staff/      staff     {STAFF}  {passwords[STAFF]}"
        f"\n  API       {base}/api/v1/schema   Stripe (our sandbox)  {settings.STRIPE_BASE_URL}\n"
    )
