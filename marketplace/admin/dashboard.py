"""The two overviews: an operator's watts, money and machines; and what waits for our own people."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from django.db.models import Count, Q, QuerySet, Sum
from django.utils import timezone

from billing import ledger
from billing.models import BillingAccount, BillingCase, Invoice, StripeEvent
from marketplace.admin import charts, look
from marketplace.admin.charts import LAYERS, Slice
from marketplace.admin.tenancy import own
from marketplace.models import (
    Agent,
    Contract,
    Curtailment,
    Host,
    Job,
    Miner,
    OutboxMessage,
    Placement,
    PowerNode,
    Screening,
    Site,
    SiteMinute,
)
from marketplace.services import ai_revenue as revenue
from marketplace.services.conditions import SILENT
from marketplace.tenancy import Actor

WINDOWS = {"1h": (timedelta(minutes=60), timedelta(minutes=1)), "24h": (timedelta(hours=24), timedelta(minutes=10))}
COLUMNS = tuple(column for column, _ in LAYERS)


def operator(actor: Actor, query: Any) -> dict[str, Any]:
    """Context of the operator's overview. `query`: `window` = 1h | 24h, `site` = the id of one of its own."""
    now = timezone.now()
    sites = list(own(Site, actor).order_by("name"))
    window = window_of(query)
    chosen = next((s for s in sites if str(s.pk) == query.get("site")), None)
    shown = [chosen] if chosen else sites
    return {
        "all_sites": sites,
        "chosen": chosen,
        "window": window,
        "windows": [("1h", "60 minutes"), ("24h", "24 hours")],
        "chart": chart(own(SiteMinute, actor).filter(site__in=shown), window, now),
        "money": money(actor, shown, now - WINDOWS[window][0], now),
        "fleet": fleet(actor, shown),
        "site_rows": site_rows(actor, shown, now),
        "calls": own(Curtailment, actor)
        .filter(state__in=("announced", "active", "restoring"))
        .select_related("site", "node")
        .order_by("starts_at")[:10],
    }


def window_of(query: Any) -> str:
    """A key of WINDOWS."""
    asked = str(query.get("window"))
    return asked if asked in WINDOWS else "1h"


# --- the chart
def chart(minutes: QuerySet[Any], window: str, now: datetime) -> dict[str, Any]:
    """The power stack of these minutes' sites together, with its legend and a table of the same numbers."""
    length, step = WINDOWS[window]
    end = _floor(now, step) + step
    start = end - length
    slices = stack(minutes, start, end, step)
    whole = [s for s in slices if s.start + step <= now] or slices
    latest = whole[-1] if whole else None
    names = [name for _, name in LAYERS]
    return {
        "svg": charts.power_stack(slices, start=start, end=end, step=step) if slices else "",
        "legend": charts.legend(latest),
        "latest": latest,
        "heading": ["UTC", *names, "Metered", "Cap", "Headroom"],
        "rows": [
            [f"{s.start:%H:%M}", *map(look.watts, (*s.layers, s.metered, s.cap, s.headroom))]
            for s in reversed(slices[:: max(1, len(slices) // 24)])
        ],
    }


def _floor(at: datetime, step: timedelta) -> datetime:
    seconds = int(step.total_seconds())
    return datetime.fromtimestamp(int(at.timestamp()) // seconds * seconds, tz=at.tzinfo)


def stack(minutes: QuerySet[Any], start: datetime, end: datetime, step: timedelta) -> list[Slice]:
    """Averages a step; the sites' minutes are summed first."""
    rows = (
        minutes.filter(start__gte=start, start__lt=end)
        .order_by("start")
        .values("start")
        .annotate(
            **{f"sum_{c}": Sum(c) for c in (*COLUMNS, "cap_w", "metered_w")},
            silent=Count("id", filter=Q(metered_w=None)),
        )
    )
    buckets: dict[datetime, list[Any]] = defaultdict(list)
    for row in rows:
        buckets[_floor(row["start"], step)].append(row)
    return [
        Slice(
            start=at,
            layers=tuple(sum(r[f"sum_{c}"] for r in found) // len(found) for c in COLUMNS),
            cap=sum(r["sum_cap_w"] for r in found) // len(found),
            metered=None if any(r["silent"] for r in found) else sum(r["sum_metered_w"] for r in found) // len(found),
        )
        for at, found in sorted(buckets.items())
    ]


# --- money
def money(actor: Actor, sites: Sequence[Site], start: datetime, end: datetime) -> dict[str, Any]:
    """The operator's share of AI revenue, what hashing earned, what energy cost: millionths of the major unit."""
    sums = (
        own(SiteMinute, actor)
        .filter(site__in=sites, start__gte=start, start__lt=end)
        .aggregate(
            hashing=Sum("hashing_microusd"), energy=Sum("energy_microusd"), ai=Sum("ai_mwh"), mined=Sum("hashing_mwh")
        )
    )
    earned = ai_revenue(actor, sites, start, end)
    usd = earned.pop("USD", 0)
    hashing, cost = sums["hashing"] or 0, sums["energy"] or 0
    return {
        "ai": look.micro(usd),
        "ai_more": [look.micro(value, currency) for currency, value in sorted(earned.items())],
        "hashing": look.micro(hashing),
        "energy": look.micro(cost),
        "margin": look.micro(usd + hashing - cost),
        "loses": usd + hashing < cost,
        "ai_energy": look.energy(sums["ai"] or 0),
        "hashing_energy": look.energy(sums["mined"] or 0),
    }


def ai_revenue(actor: Actor, sites: Sequence[Site], start: datetime, end: datetime) -> dict[str, int]:
    """{currency: millionths} of the operator's own share, by the clock of now."""
    flows = revenue.flows(
        own(Placement, actor).filter(site__in=sites), own(Contract, actor).filter(site__in=sites), start, end
    )
    return revenue.earned(flows, start, end)


# --- machines
def fleet(actor: Actor, sites: Sequence[Site]) -> list[dict[str, Any]]:
    """Counts of states, to click through to the lists."""
    hosts, miners = own(Host, actor).filter(site__in=sites), own(Miner, actor).filter(site__in=sites)
    shapes = list(hosts.values_list("gpu_free", "gpu_count"))
    busy = sum(1 for free, _ in shapes for milli in free if milli < 1000)
    by_power = dict(hosts.order_by().values_list("power_state").annotate(n=Count("id")))
    states = miners.aggregate(
        hashing=Count("id", filter=Q(desired_mode__gt=0)),
        asleep=Count("id", filter=Q(desired_mode=0)),
        manual=Count("id", filter=Q(manual=True)),
        unresponsive=Count("id", filter=Q(state="unresponsive")),
    )
    return [
        {"name": "GPUs", "total": sum(count for _, count in shapes), "parts": [("busy", busy), ("free", sum(c for _, c in shapes) - busy)]},
        {"name": "Hosts", "url": "host", "total": len(shapes), "parts": _counts(hosts, "state")},
        {"name": "Hosts' power", "url": "host", "total": len(shapes), "parts": sorted(by_power.items())},
        {"name": "Miners", "url": "miner", "total": miners.count(), "parts": list(states.items())},
    ]  # fmt: skip


def _counts(rows: QuerySet[Any], column: str) -> list[tuple[str, int]]:
    return sorted(rows.order_by().values_list(column).annotate(n=Count("id")))


def site_rows(actor: Actor, sites: Iterable[Site], now: datetime) -> list[dict[str, Any]]:
    """One line a site: mode, watts now, and whether its agent speaks."""
    sites = list(sites)
    roots = {n.site_id: n for n in own(PowerNode, actor).filter(site__in=sites, parent=None)}
    heard: dict[int, datetime] = {}
    for site_id, at in own(Agent, actor).filter(site__in=sites, revoked_at=None).values_list("site_id", "last_sync_at"):
        if at is not None:
            heard[site_id] = max(at, heard.get(site_id, at))
    found = []
    for site in sites:
        root, at = roots.get(site.pk), heard.get(site.pk)
        booked = -(-root.reserved_mw // 1000) + root.fixed_w if root else 0
        found.append(
            {
                "site": site,
                "root": root,
                "measured": look.watts(root.measured_w if root else None),
                "booked": look.watts(booked),
                "cap": look.watts(root.cap_w if root else site.contract_power_w),
                "free": look.watts((root.allowed_mw - root.reserved_mw) // 1000 if root else None),
                "bar": bar(root) if root else "",
                "heard": look.ago(at),
                "alive": at is not None and now - at <= SILENT,
                "tone": look.TONES.get(site.mode, "info"),
            }
        )
    return found


def bar(node: PowerNode) -> Any:
    return charts.node_bar(
        cap=node.cap_w, limit=node.limit_w, fixed=node.fixed_w, booked=-(-node.reserved_mw // 1000), margin=node.margin_w,
        measured=node.measured_w,
    )  # fmt: skip


def tree(nodes: Iterable[PowerNode]) -> list[dict[str, Any]]:
    """A site's nodes depth first, each with its bar and numbers. `lines`: for each level above, whether its branch goes on below."""
    children: dict[int | None, list[PowerNode]] = defaultdict(list)
    for node in sorted(nodes, key=lambda n: (n.depth, n.name)):
        children[node.parent_id].append(node)
    rows: list[dict[str, Any]] = []

    def visit(node: PowerNode, lines: tuple[bool, ...], last: bool) -> None:
        rows.append(
            {
                "node": node,
                "lines": lines,
                "last": last,
                "bar": bar(node),
                "booked": look.watts(-(-node.reserved_mw // 1000) + node.fixed_w),
                "measured": look.watts(node.measured_w),
                "cap": look.watts(node.cap_w),
                "limit": None if node.limit_w is None else look.watts(node.limit_w),
                "free": look.watts((node.allowed_mw - node.reserved_mw) // 1000),
                "over": node.reserved_mw > node.allowed_mw,
            }
        )
        below = children[node.pk]
        for child in below:
            visit(child, (*lines, not last) if node.parent_id is not None else lines, child is below[-1])

    for root in children[None]:
        visit(root, (), True)
    return rows


# --- our own people
def staff() -> dict[str, Any]:
    """What waits for a person, and whether the books are even."""
    now = timezone.now()
    oldest = (
        OutboxMessage.objects.filter(parked_at=None)
        .order_by("available_at")
        .values_list("available_at", flat=True)
        .first()
    )
    silent = (
        Agent.objects.filter(revoked_at=None).filter(Q(last_sync_at=None) | Q(last_sync_at__lt=now - SILENT)).count()
    )
    return {
        "cards": [
            (
                "Open billing cases",
                _n(BillingCase, closed_at=None),
                "billing_billingcase",
                "closed_at__isempty=1",
                True,
            ),
            (
                "Screenings for us",
                _n(Screening, needs_person=True),
                "marketplace_screening",
                "needs_person__exact=1",
                True,
            ),
            (
                "Parked accounts",
                _n(BillingAccount, state="parked"),
                "billing_billingaccount",
                "state__exact=parked",
                True,
            ),
            (
                "Parked messages",
                _n(OutboxMessage, parked_at__isnull=False),
                "marketplace_outboxmessage",
                "parked_at__isempty=0",
                True,
            ),
            (
                "Stripe events waiting",
                _n(StripeEvent, handled_at=None),
                "billing_stripeevent",
                "handled_at__isempty=1",
                False,
            ),
            ("Open invoices", _n(Invoice, state="open"), "billing_invoice", "state__exact=open", False),
            ("Silent agents", silent, "marketplace_site", "", True),
            ("Jobs waiting", _n(Job, state__in=Job.WAITING), "marketplace_job", "state__exact=queued", False),
            ("Placements parked", _n(Placement, state="parked"), "marketplace_placement", "state__exact=parked", True),
            (
                "Curtailments now",
                _n(Curtailment, state__in=("active", "restoring")),
                "marketplace_curtailment",
                "",
                False,
            ),
        ],
        "outbox_oldest": look.ago(oldest) if oldest and oldest < now else "nothing waits",
        "books": [(c, look.minor(total, c), total == 0) for c, total in sorted(ledger.trial_balance().items())],
    }


def _n(model: Any, **which: Any) -> int:
    found: int = model.objects.filter(**which).count()
    return found
