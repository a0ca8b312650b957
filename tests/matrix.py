"""Every route and what it asks for: the table that tests/contracts/test_matrix.py walks with every kind of actor.

To add a route, add a line to ROUTES; a route without one fails the suite.

    R("api/v1/jobs/<str:job>/cancel", "POST", "jobs:write", job),
      path as the resolver has it   method  action        makes what the path names (left out: a collection)

- action: a key of tenancy.ACTIONS, or
      "public"  anybody            "person"  any signed-in person, no key
      "agent"   a site's agent     "staff"   our own people; for all others there is nothing (404)
- make: a function below: World -> {path parameter: value}. Objects belong to `world.organization` (customer and operator).
- stranger="sees": strangers of the same mode may see it too (a published listing). Otherwise a stranger gets 404.
- outside=True: with rights, it calls a part outside (Stripe), which this test keeps away: 503 is a fine answer.
- Pages (anything not under api/v1/) have the same actions; there, nobody is sent to the log-in page instead of 401.
- A whole admin or a package's own pages stand in PREFIXES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

from billing.models import BillingAccount, Invoice
from marketplace.models import (
    Amendment,
    CalendarFeed,
    Curtailment,
    CurtailmentReport,
    Invitation,
    Maintenance,
    MaintenanceHost,
    SavedSearch,
)
from marketplace.services import conversions, documents, grid, maintenance, pool_payouts, saved, verifications
from marketplace.tenancy import ROLES, Actor
from tests import factories
from tests.factories import NOW

Make = Callable[["World"], dict[str, str]]


@dataclass(frozen=True)
class R:
    path: str
    method: str
    action: str
    make: Make | None = None
    stranger: str = "404"
    outside: bool = False

    @property
    def id(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def is_api(self) -> bool:
        return self.path.startswith("api/")


class World:
    """One organization that is customer and operator, with one of each thing."""

    def __init__(self, *, livemode: bool = True) -> None:
        self.organization = factories.organization(is_customer=True, is_operator=True, livemode=livemode)
        self.members = {role: factories.member(self.organization, role) for role in ROLES}

    @cached_property
    def site(self) -> Any:
        return factories.site(self.organization)

    @cached_property
    def host(self) -> Any:
        return factories.host(self.site)

    @cached_property
    def miner(self) -> Any:
        return factories.miner(self.site)

    @cached_property
    def agent(self) -> Any:
        return factories.agent(self.site)[0]

    @cached_property
    def listing(self) -> Any:
        return factories.listing(self.site, hosts=[self.host])

    @cached_property
    def draft(self) -> Any:
        return factories.listing(self.site, state="draft")

    @cached_property
    def quote(self) -> Any:
        return factories.quote(self.listing, self.organization)

    @cached_property
    def contract(self) -> Any:
        return factories.contract(self.listing, self.organization)

    @cached_property
    def amendment(self) -> Any:
        day = NOW + timedelta(days=40)
        return Amendment.objects.create(
            contract=self.contract, kind="price", price=3_000_000, old_price=2_500_000, proposed_by="x", created_at=NOW,
            answer_by=day, effective_at=day,
        )  # fmt: skip

    @cached_property
    def resale(self) -> Any:
        return factories.resale(self.listing, self.organization)

    @cached_property
    def bid(self) -> Any:
        return factories.bid(self.organization, self.site)

    @cached_property
    def job(self) -> Any:
        return factories.job(self.contract, state="running")

    @cached_property
    def placement(self) -> Any:
        return factories.placement(self.job, self.host, state="running", running_at=NOW)

    @cached_property
    def key(self) -> Any:
        return factories.key(self.organization)[0]

    @cached_property
    def invitation(self) -> Any:
        return Invitation.objects.create(
            organization=self.organization, email="x@example.org", role="viewer", digest=f"invitation-{self.organization.pk}",
            expires_at=NOW + timedelta(days=7),
        )  # fmt: skip

    @cached_property
    def curtailment(self) -> Any:
        made = Curtailment.objects.create(
            site=self.site, node=self.site.power_nodes.get(name="site"), reference=f"call-{self.site.pk}", cap_w=500_000,
            starts_at=NOW + timedelta(days=30), ends_at=NOW + timedelta(days=30, hours=1), created_by="x",
        )  # fmt: skip
        CurtailmentReport.objects.create(curtailment=made, baseline_w=900_000, baseline_how="books", before=[])
        return made

    @cached_property
    def grid_source(self) -> Any:
        actor = Actor(kind="user", organization_id=self.organization.pk, role="owner", label="x")
        node = self.site.power_nodes.get(name="site")
        values = {"name": "grid", "cap_w": 500_000, "trip_mhz": 59_700, "back_mhz": 59_900}
        return grid.add(actor, node, kind="frequency", now=NOW, **values)

    @cached_property
    def pool_feed(self) -> Any:
        actor = Actor(kind="user", organization_id=self.organization.pk, role="owner", label="x")
        return pool_payouts.add(actor, self.site, name="a pool", url="https://pool.example/payouts", now=NOW)

    @cached_property
    def conversion(self) -> Any:
        actor = Actor(kind="user", organization_id=self.organization.pk, role="owner", label="x")
        return conversions.make(actor, self.site, name="Plan", now=NOW)

    @cached_property
    def work(self) -> Any:
        """A draft of maintenance on the host."""
        made = Maintenance.objects.create(
            site=self.site, scope="hosts", starts_at=NOW + timedelta(days=1000), ends_at=NOW + timedelta(days=1000, hours=4),
            text="New fans.", created_by="x", created_at=NOW,
        )  # fmt: skip
        MaintenanceHost.objects.create(maintenance=made, host=self.host)
        return made

    @cached_property
    def feed(self) -> Any:
        return CalendarFeed.objects.create(
            organization=self.organization, name="x", digest=f"calendar-{self.organization.pk}", created_by="x", created_at=NOW,
        )  # fmt: skip

    @cached_property
    def invoice(self) -> Any:
        account, _ = BillingAccount.objects.get_or_create(
            organization=self.organization, defaults={"currency": "USD", "created_at": NOW}
        )
        return Invoice.objects.create(
            account=account, organization=self.organization, kind="period", legal_entity="Tailrace Inc.", currency="USD",
            period_start=NOW - timedelta(days=30), period_end=NOW, created_at=NOW,
        )  # fmt: skip

    @cached_property
    def search(self) -> Any:
        return SavedSearch.objects.create(
            organization=self.organization, name="x", gpu_models=["*"], regions=["*"], created_at=NOW, touched_at=NOW
        )

    def everything(self) -> list[Any]:
        """All of it is made; these are the rows that lists may show to their owner alone."""
        names = ("site", "host", "miner", "agent", "listing", "draft", "quote", "contract", "job", "placement")
        rows = [
            getattr(self, name)
            for name in (
                *names,
                "search",
                "amendment",
                "resale",
                "bid",
                "key",
                "invitation",
                "curtailment",
                "grid_source",
                "pool_feed",
                "conversion",
                "invoice",
                "work",
                "feed",
            )
        ]
        return [self.organization, *self.members.values(), *rows, *self.site.power_nodes.all()]


def _one(parameter: str, attribute: str | None = None) -> Make:
    return lambda world: {parameter: getattr(world, attribute or parameter).public_id}


organization, site, host, miner, agent = (_one(n) for n in ("organization", "site", "host", "miner", "agent"))
listing, quote, contract, job, placement = (_one(n) for n in ("listing", "quote", "contract", "job", "placement"))
key, invitation, curtailment, invoice = (_one(n) for n in ("key", "invitation", "curtailment", "invoice"))
grid_source, pool_feed = _one("grid_source"), _one("pool_feed")
draft, conversion, search = _one("listing", "draft"), _one("plan", "conversion"), _one("search")
resale, bid = _one("resale"), _one("bid")
work, feed = _one("work"), _one("feed")


def amendment(world: World) -> dict[str, str]:
    return {"contract": world.contract.public_id, "amendment": world.amendment.public_id}


def document(world: World) -> dict[str, str]:
    paper = documents.keep_order_form(world.contract, now=NOW) if not world.contract.documents.exists() else None
    return {"contract": world.contract.public_id, "document": (paper or world.contract.documents.get()).public_id}


def unsubscribing(world: World) -> dict[str, str]:
    return {"token": saved.unsubscribe_token(world.search)}


def order_form(world: World) -> dict[str, str]:
    return {"contract": document(world)["contract"]}


def version(_world: World) -> dict[str, str]:
    return {"version": documents.CURRENT}


def member(world: World) -> dict[str, str]:
    return {"member": world.members["viewer"].public_id}


def node(world: World) -> dict[str, str]:
    return {"node": world.site.power_nodes.get(name="pdu-1").public_id}


def probe(world: World) -> dict[str, str]:
    return {"token": verifications._probe_url(world.host).rpartition("/")[2]}


def calendar(world: World) -> dict[str, str]:
    return {"token": maintenance.feeds.issue(factories.actor(world.organization), "x", now=NOW)[1]}


ROUTES: tuple[R, ...] = (
    R("api/v1/health", "GET", "public"),
    R("api/v1/schema", "GET", "public"),
    # --- organizations, people, keys
    R("api/v1/organizations", "GET", "person"),
    R("api/v1/organizations", "POST", "person"),
    R("api/v1/organizations/<str:organization>", "GET", "organization:read", organization),
    R("api/v1/organizations/<str:organization>", "PATCH", "organization:write", organization),
    R("api/v1/organizations/<str:organization>/switch", "POST", "person", organization),
    R("api/v1/verification", "GET", "screening:read"),
    R("api/v1/verification", "PUT", "screening:write"),
    R("api/v1/audit-events", "GET", "audit:read"),
    R("api/v1/members", "GET", "members:read"),
    R("api/v1/members/<str:member>", "GET", "members:read", member),
    R("api/v1/members/<str:member>", "PATCH", "members:write", member),
    R("api/v1/members/<str:member>", "DELETE", "members:write", member),
    R("api/v1/invitations", "GET", "members:read"),
    R("api/v1/invitations", "POST", "members:write"),
    R("api/v1/invitations/accept", "POST", "person"),
    R("api/v1/invitations/<str:invitation>", "DELETE", "members:write", invitation),
    R("api/v1/keys", "GET", "keys:read"),
    R("api/v1/keys", "POST", "keys:write"),
    R("api/v1/keys/<str:key>", "GET", "keys:read", key),
    R("api/v1/keys/<str:key>", "DELETE", "keys:write", key),
    # --- sites
    R("api/v1/sites", "GET", "sites:read"),
    R("api/v1/sites", "POST", "sites:write"),
    R("api/v1/sites/<str:site>", "GET", "sites:read", site),
    R("api/v1/sites/<str:site>", "PATCH", "sites:write", site),
    R("api/v1/sites/<str:site>/mode", "POST", "power:write", site),
    R("api/v1/sites/<str:site>/drain", "POST", "sites:write", site),
    R("api/v1/sites/<str:site>/undrain", "POST", "sites:write", site),
    R("api/v1/sites/<str:site>/power-nodes", "GET", "sites:read", site),
    R("api/v1/sites/<str:site>/power-nodes", "POST", "sites:write", site),
    R("api/v1/sites/<str:site>/import", "POST", "sites:write", site),
    R("api/v1/sites/<str:site>/enrolment-tokens", "POST", "sites:write", site),
    R("api/v1/sites/<str:site>/agents", "GET", "sites:read", site),
    R("api/v1/sites/<str:site>/conversion-plans", "POST", "sites:write", site),
    R("api/v1/sites/<str:site>/profit", "GET", "payouts:read", site),
    R("api/v1/sites/<str:site>/profit.csv", "GET", "payouts:read", site),
    R("api/v1/sites/<str:site>/energy", "GET", "power:read", site),
    R("api/v1/sites/<str:site>/receipts", "GET", "payouts:read", site),
    R("api/v1/sites/<str:site>/receipts", "POST", "payouts:write", site),
    R("api/v1/sites/<str:site>/receipts/import", "POST", "payouts:write", site),
    R("api/v1/conversion-plans", "GET", "sites:read"),
    R("api/v1/conversion-plans/<str:plan>", "GET", "sites:read", conversion),
    R("api/v1/conversion-plans/<str:plan>/months.csv", "GET", "sites:read", conversion),
    R("api/v1/conversion-plans/<str:plan>/assumptions.csv", "GET", "sites:read", conversion),
    R("api/v1/agents/<str:agent>", "GET", "sites:read", agent),
    R("api/v1/agents/<str:agent>", "DELETE", "sites:write", agent),
    R("api/v1/power-nodes/<str:node>", "GET", "sites:read", node),
    R("api/v1/power-nodes/<str:node>", "PATCH", "sites:write", node),
    R("api/v1/hosts", "GET", "sites:read"),
    R("api/v1/hosts/<str:host>", "GET", "sites:read", host),
    R("api/v1/hosts/<str:host>/drain", "POST", "sites:write", host),
    R("api/v1/hosts/<str:host>/undrain", "POST", "sites:write", host),
    R("api/v1/hosts/<str:host>/taints", "POST", "sites:write", host),
    R("api/v1/hosts/<str:host>/reliability", "GET", "sites:read", host),
    R("api/v1/hosts/<str:host>/conditions", "GET", "sites:read", host),
    R("api/v1/hosts/<str:host>/verification", "GET", "sites:read", host),
    R("api/v1/hosts/<str:host>/verifications", "GET", "sites:read", host),
    R("api/v1/hosts/<str:host>/verifications", "POST", "sites:write", host),
    R("api/v1/probe/<str:token>", "GET", "public", probe, stranger="sees"),  # by its token
    R("api/v1/probe/<str:token>", "POST", "public", probe, stranger="sees"),
    R("api/v1/miners", "GET", "sites:read"),
    R("api/v1/miners/<str:miner>", "GET", "sites:read", miner),
    R("api/v1/miners/<str:miner>", "PATCH", "power:write", miner),
    # --- power
    R("api/v1/sites/<str:site>/power", "GET", "power:read", site),
    R("api/v1/sites/<str:site>/minutes", "GET", "power:read", site),
    R("api/v1/curtailments", "GET", "power:read"),
    R("api/v1/curtailments", "POST", "power:write"),
    R("api/v1/curtailments/<str:curtailment>", "GET", "power:read", curtailment),
    R("api/v1/curtailments/<str:curtailment>/cancel", "POST", "power:write", curtailment),
    R("api/v1/curtailments/<str:curtailment>/report", "GET", "power:read", curtailment),
    R("api/v1/curtailments/<str:curtailment>/seconds.csv", "GET", "power:read", curtailment),
    R("api/v1/pool-feeds", "GET", "payouts:read"),
    R("api/v1/pool-feeds", "POST", "payouts:write"),
    R("api/v1/pool-feeds/<str:pool_feed>", "GET", "payouts:read", pool_feed),
    R("api/v1/pool-feeds/<str:pool_feed>", "PATCH", "payouts:write", pool_feed),
    R("api/v1/pool-feeds/<str:pool_feed>", "DELETE", "payouts:write", pool_feed),
    R("api/v1/grid-sources", "GET", "power:read"),
    R("api/v1/grid-sources", "POST", "power:write"),
    R("api/v1/grid-sources/<str:grid_source>", "GET", "power:read", grid_source),
    R("api/v1/grid-sources/<str:grid_source>", "PATCH", "power:write", grid_source),
    R("api/v1/grid-sources/<str:grid_source>", "DELETE", "power:write", grid_source),
    R("api/v1/grid-sources/<str:grid_source>/readings", "POST", "power:write", grid_source),
    # --- maintenance
    R("api/v1/maintenances", "GET", "maintenance:read"),
    R("api/v1/maintenances", "POST", "maintenance:write"),
    R("api/v1/maintenances/<str:work>", "GET", "maintenance:read", work),
    R("api/v1/maintenances/<str:work>", "PATCH", "maintenance:write", work),
    R("api/v1/maintenances/<str:work>/impact", "GET", "maintenance:write", work),
    R("api/v1/maintenances/<str:work>/announce", "POST", "maintenance:write", work),
    R("api/v1/maintenances/<str:work>/extend", "POST", "maintenance:write", work),
    R("api/v1/maintenances/<str:work>/finish", "POST", "maintenance:write", work),
    R("api/v1/maintenances/<str:work>/cancel", "POST", "maintenance:write", work),
    R("api/v1/calendar-feeds", "GET", "maintenance:read"),
    R("api/v1/calendar-feeds", "POST", "maintenance:write"),
    R("api/v1/calendar-feeds/<str:feed>", "GET", "maintenance:read", feed),
    R("api/v1/calendar-feeds/<str:feed>", "DELETE", "maintenance:write", feed),
    R("maintenance", "GET", "maintenance:read"),
    R("maintenance", "POST", "maintenance:write"),
    R("maintenance/<str:work>", "GET", "maintenance:read", work),
    R("calendar-feeds/<str:feed>/revoke", "POST", "maintenance:write", feed),
    R("calendar/<str:token>.ics", "GET", "public", calendar, stranger="sees"),  # by its token
    # --- market
    R("api/v1/listings", "GET", "listings:read", stranger="sees"),
    R("api/v1/listings", "POST", "listings:write"),
    R("api/v1/listings/<str:listing>", "GET", "listings:read", listing, stranger="sees"),
    R("api/v1/listings/<str:listing>", "PATCH", "listings:write", draft),
    R("api/v1/calendar", "GET", "listings:read", stranger="sees"),
    R("api/v1/listings/<str:listing>/calendar", "GET", "listings:read", listing, stranger="sees"),
    R("api/v1/listings/<str:listing>/publish", "POST", "listings:write", draft),
    R("api/v1/listings/<str:listing>/pause", "POST", "listings:write", draft),
    R("api/v1/listings/<str:listing>/retire", "POST", "listings:write", draft),
    R("api/v1/saved-searches", "GET", "searches:read"),
    R("api/v1/saved-searches", "POST", "searches:write"),
    R("api/v1/saved-searches/<str:search>", "GET", "searches:read", search),
    R("api/v1/saved-searches/<str:search>", "PATCH", "searches:write", search),
    R("api/v1/saved-searches/<str:search>", "DELETE", "searches:write", search),
    R("api/v1/saved-searches/<str:search>/pause", "POST", "searches:write", search),
    R("api/v1/saved-searches/<str:search>/resume", "POST", "searches:write", search),
    R("api/v1/saved-searches/<str:search>/matches", "GET", "searches:read", search),
    R("api/v1/quotes", "GET", "quotes:read"),
    R("api/v1/quotes", "POST", "quotes:write"),
    R("api/v1/quotes/<str:quote>", "GET", "quotes:read", quote),
    R("api/v1/quotes/<str:quote>/release", "POST", "quotes:write", quote),
    R("api/v1/contracts", "GET", "contracts:read"),
    R("api/v1/contracts", "POST", "contracts:write"),
    R("api/v1/contracts/<str:contract>", "GET", "contracts:read", contract),
    R("api/v1/contracts/<str:contract>", "PATCH", "contracts:write", contract),
    R("api/v1/contracts/<str:contract>/spot-results", "GET", "contracts:read", contract),
    R("api/v1/spot-prices", "GET", "public"),
    R("api/v1/resales", "GET", "contracts:read"),
    R("api/v1/resales", "POST", "contracts:write"),
    R("api/v1/resales/<str:resale>", "GET", "contracts:read", resale),
    R("api/v1/resales/<str:resale>/withdraw", "POST", "contracts:write", resale),
    R("api/v1/contracts/<str:contract>/resale-terms", "GET", "contracts:read", contract),
    R("api/v1/bids", "GET", "quotes:read"),
    R("api/v1/bids", "POST", "quotes:write"),
    R("api/v1/bids/<str:bid>", "GET", "quotes:read", bid),
    R("api/v1/bids/<str:bid>/cancel", "POST", "quotes:write", bid),
    R("api/v1/book", "GET", "public"),
    R("api/v1/fills", "GET", "public"),
    R("api/v1/contracts/<str:contract>/terminate", "POST", "contracts:write", contract),
    R("api/v1/contracts/<str:contract>/termination", "GET", "contracts:read", contract),
    R("api/v1/contracts/<str:contract>/amendments", "GET", "contracts:read", contract),
    R("api/v1/contracts/<str:contract>/amendments", "POST", "contracts:write", contract),
    R("api/v1/contracts/<str:contract>/amendments/<str:amendment>", "GET", "contracts:read", amendment),
    R("api/v1/contracts/<str:contract>/amendments/<str:amendment>/accept", "POST", "contracts:write", amendment),
    R("api/v1/contracts/<str:contract>/amendments/<str:amendment>/decline", "POST", "contracts:write", amendment),
    R("api/v1/contracts/<str:contract>/documents", "GET", "contracts:read", contract),
    R("api/v1/contracts/<str:contract>/documents/<str:document>/pdf", "GET", "contracts:read", document),
    R("api/v1/contracts/<str:contract>/order-form.pdf", "GET", "contracts:read", order_form),
    R("api/v1/terms", "GET", "contracts:read"),
    R("api/v1/terms", "POST", "contracts:write"),
    R("api/v1/contracts/<str:contract>/events", "GET", "contracts:read", contract),
    # --- jobs
    R("api/v1/jobs", "GET", "jobs:read"),
    R("api/v1/jobs", "POST", "jobs:write"),
    R("api/v1/jobs/batch", "POST", "jobs:write"),
    R("api/v1/jobs/<str:job>", "GET", "jobs:read", job),
    R("api/v1/jobs/<str:job>/cancel", "POST", "jobs:write", job),
    R("api/v1/jobs/<str:job>/explain", "GET", "jobs:read", job),
    R("api/v1/jobs/<str:job>/cost", "GET", "jobs:read", job),
    R("api/v1/jobs/<str:job>/events", "GET", "jobs:read", job),
    R("api/v1/jobs/<str:job>/logs", "GET", "jobs:read", job),
    R("api/v1/placements", "GET", "jobs:read"),
    # --- money
    R("api/v1/usage", "GET", "usage:read"),
    R("api/v1/invoices", "GET", "billing:read"),
    R("api/v1/invoices/preview", "GET", "billing:read"),
    R("api/v1/invoices/<str:invoice>", "GET", "billing:read", invoice),
    R("api/v1/invoices/<str:invoice>/pay", "POST", "billing:write", invoice, outside=True),
    R("api/v1/invoices/<str:invoice>/usage", "GET", "billing:read", invoice),
    R("api/v1/payment-methods", "GET", "billing:read", outside=True),
    R("api/v1/payment-methods", "POST", "billing:write", outside=True),
    R("api/v1/payment-methods/portal", "POST", "billing:write", outside=True),
    R("api/v1/budget", "GET", "billing:read"),
    R("api/v1/budget", "PATCH", "billing:write"),
    R("api/v1/payouts", "GET", "payouts:read"),
    R("api/v1/payouts/account", "GET", "payouts:read", outside=True),
    R("api/v1/payouts/account", "POST", "payouts:write", outside=True),
    # --- agents, staff, other systems
    R("api/v1/agent/enrol", "POST", "public"),  # by its token
    R("api/v1/agent/sync", "POST", "agent"),
    R("api/v1/agent/logs", "POST", "agent"),
    R("api/v1/staff/close-period", "POST", "staff"),
    R("api/v1/staff/invariants", "GET", "staff"),
    R("api/v1/staff/reconcile", "POST", "staff", outside=True),
    R("api/v1/webhooks/stripe", "POST", "public"),  # by its signature
    # --- pages
    R("", "GET", "public", stranger="sees"),
    R("reliability", "GET", "public", stranger="sees"),
    R("compare", "GET", "public", stranger="sees"),
    R("listings/<str:listing>", "GET", "public", listing, stranger="sees"),
    R("searches", "GET", "searches:read"),
    R("searches", "POST", "searches:write"),
    R("searches/unsubscribe/<str:token>", "GET", "public", unsubscribing, stranger="sees"),
    R("searches/unsubscribe/<str:token>", "POST", "public", unsubscribing, stranger="sees"),
    R("searches/<str:search>", "GET", "searches:read", search),
    R("searches/<str:search>/change", "POST", "searches:write", search),
    R("searches/<str:search>/pause", "POST", "searches:write", search),
    R("searches/<str:search>/resume", "POST", "searches:write", search),
    R("searches/<str:search>/delete", "POST", "searches:write", search),
    R("listings/<str:listing>/quote", "GET", "quotes:write", listing, stranger="sees"),
    R("listings/<str:listing>/quote", "POST", "quotes:write", listing, stranger="sees"),
    R("quotes/<str:quote>", "GET", "quotes:read", quote),
    R("quotes/<str:quote>/accept", "POST", "contracts:write", quote),
    R("quotes/<str:quote>/release", "POST", "quotes:write", quote),
    R("contracts", "GET", "contracts:read"),
    R("contracts/<str:contract>", "GET", "contracts:read", contract),
    R("contracts/<str:contract>/amend", "POST", "contracts:write", contract),
    R("contracts/<str:contract>/amendments/<str:amendment>", "GET", "contracts:read", amendment),
    R("contracts/<str:contract>/amendments/<str:amendment>/accept", "POST", "contracts:write", amendment),
    R("contracts/<str:contract>/amendments/<str:amendment>/decline", "POST", "contracts:write", amendment),
    R("contracts/<str:contract>/documents/<str:document>", "GET", "contracts:read", document),
    R("contracts/<str:contract>/documents/<str:document>/pdf", "GET", "contracts:read", document),
    R("terms/<str:version>/pdf", "GET", "public", version, stranger="sees"),
    R("terms", "GET", "public", stranger="sees"),
    R("terms/<str:version>", "GET", "public", version, stranger="sees"),
    R("contracts/<str:contract>/terminate", "POST", "contracts:write", contract),
    R("contracts/<str:contract>/limit", "POST", "contracts:write", contract),
    R("contracts/<str:contract>/resell", "GET", "contracts:write", contract),
    R("contracts/<str:contract>/resell", "POST", "contracts:write", contract),
    R("book", "GET", "public", stranger="sees"),
    R("resales", "GET", "contracts:read"),
    R("resales/<str:resale>", "GET", "contracts:read", resale),
    R("resales/<str:resale>/withdraw", "POST", "contracts:write", resale),
    R("bids", "GET", "quotes:read"),
    R("bids/new", "GET", "quotes:write"),
    R("bids/new", "POST", "quotes:write"),
    R("bids/<str:bid>", "GET", "quotes:read", bid),
    R("bids/<str:bid>/cancel", "POST", "quotes:write", bid),
    R("jobs", "GET", "jobs:read"),
    R("jobs/new", "GET", "jobs:write"),
    R("jobs/new", "POST", "jobs:write"),
    R("jobs/estimate", "GET", "jobs:write"),
    R("jobs/<str:job>", "GET", "jobs:read", job),
    R("jobs/<str:job>/live", "GET", "jobs:read", job),
    R("jobs/<str:job>/why", "GET", "jobs:read", job),
    R("jobs/<str:job>/log", "GET", "jobs:read", job),
    R("jobs/<str:job>/cancel", "POST", "jobs:write", job),
    R("usage", "GET", "usage:read"),
    R("invoices", "GET", "billing:read"),
    R("invoices/<str:invoice>", "GET", "billing:read", invoice),
    R("invoices/<str:invoice>/usage.csv", "GET", "billing:read", invoice),
    R("invoices/<str:invoice>/pay", "POST", "billing:write", invoice, outside=True),
    R("billing/card", "GET", "billing:read"),
    R("billing/card", "POST", "billing:write", outside=True),
    R("billing/budget", "GET", "billing:read"),
    R("billing/budget", "POST", "billing:write"),
    R("billing/portal", "POST", "billing:write", outside=True),
    R("organizations/new", "GET", "person"),
    R("organizations/new", "POST", "person"),
    R("organizations/<str:organization>/switch", "POST", "person", organization),
    R("join", "GET", "person"),
    R("join", "POST", "person"),
    R("verification", "GET", "screening:read"),
    R("verification", "POST", "screening:write"),
    R("team", "GET", "members:read"),
    R("team/invite", "POST", "members:write"),
    R("team/<str:member>/role", "POST", "members:write", member),
    R("team/<str:member>/remove", "POST", "members:write", member),
    R("team/invitations/<str:invitation>/withdraw", "POST", "members:write", invitation),
    R("keys", "GET", "keys:read"),
    R("keys", "POST", "keys:write"),
    R("keys/<str:key>/revoke", "POST", "keys:write", key),
)

# What the stream process answers by itself (marketplace.stream); it knows keys and agents, no sessions.
STREAM: tuple[R, ...] = (
    R("api/v1/health", "GET", "public"),
    R("api/v1/agent/sync", "POST", "agent"),
    R("api/v1/jobs/<str:job>/logs/follow", "GET", "jobs:read", job),
)

# Path prefix -> whose. "package": pages of a package that brings its own tests; "operator", "staff": the two admins.
PREFIXES: dict[str, str] = {
    "accounts/": "package",
    "metrics": "package",
    "static/": "package",
    "operator/": "operator",
    "staff/": "staff",
}
