"""What money lets be placed: organizations that limit what they spend, what their running work costs, and what is left for more.

Only work that is paid by use counts, and only it is held back: under a reserved or flexible contract it costs nothing more. Rates
are billionths of the major unit an hour (`billing.core.budgets`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime

from billing.core import budgets
from marketplace import prepared
from scheduler import rules
from scheduler.core.types import Kind, Request, Running

PAID_BY_USE = frozenset({Kind.ON_DEMAND, Kind.SPOT})

_LIMITS = """
SELECT b.organization_id, o.currency, b.hourly_minor,
  coalesce(b.monthly_minor = 0 OR (b.monthly_minor <= b.spent_minor
    AND b.month = date_trunc('month', %s::timestamptz AT TIME ZONE 'UTC')::date), false)
FROM marketplace_budget b JOIN marketplace_organization o ON o.id = b.organization_id
WHERE b.organization_id = ANY(%s) AND (b.hourly_minor IS NOT NULL OR b.monthly_minor IS NOT NULL)
"""
_HELD = """
SELECT p.organization_id, p.contract_id, sum(cardinality(p.gpu_indices) * p.gpu_milli)::bigint FROM marketplace_placement p
JOIN marketplace_contract c ON c.id = p.contract_id
WHERE p.state NOT IN ('released', 'failed', 'lost') AND p.organization_id = ANY(%s) AND c.kind IN ('on_demand', 'spot') GROUP BY 1, 2
"""


@dataclass(frozen=True)
class Spending:
    """Of organizations with an hourly limit what their `running` work costs, and what is `left` of it, never below 0. `used_up`: whose
    month's budget is gone. `prices`: millionths per GPU-hour, by contract, where there is an hourly limit.
    """

    left: dict[int, int] = field(default_factory=dict)
    running: dict[int, int] = field(default_factory=dict)
    used_up: frozenset[int] = frozenset()
    prices: dict[int, int] = field(default_factory=dict)


def read(organizations: Collection[int], contracts: Iterable[int], *, now: datetime) -> Spending:
    """Of these organizations over all cells, with the prices of their running work and of `contracts`."""
    rows = prepared.rows(_LIMITS, [now, sorted(organizations)]) if organizations else []
    if not rows:
        return Spending()
    hourly = {org: budgets.billionths(minor, currency) for org, currency, minor, _ in rows if minor is not None}
    running, prices = _running(hourly, contracts, now) if hourly else (Counter[int](), {})
    return Spending(
        left={org: max(0, limit - running[org]) for org, limit in hourly.items()},
        running={org: running[org] for org in hourly},
        used_up=frozenset(org for org, _, _, gone in rows if gone),
        prices=prices,
    )


def running_rate(organization: int, *, now: datetime) -> int:
    """What its running work that is paid by use costs an hour."""
    return _running([organization], (), now)[0][organization]


def _running(
    organizations: Collection[int], contracts: Iterable[int], now: datetime
) -> tuple[Counter[int], dict[int, int]]:
    held = prepared.rows(_HELD, [sorted(organizations)])
    prices = rules.prices(sorted({*contracts, *(contract for _, contract, _ in held)}), int(now.timestamp()))
    running: Counter[int] = Counter()
    for organization, contract, milli in held:
        running[organization] += milli * prices[contract]
    return running, prices


def bind(requests: Iterable[Request], running: Iterable[Running], spending: Spending, mended: Collection[int]) -> None:
    """Gives requests what they cost and what is left for it, and running work what its end gives back. What a running gang lost
    (`mended`) is placed again whatever it costs: it is no new work.
    """
    if not (spending.left or spending.used_up):
        return
    for r in requests:
        if r.kind not in PAID_BY_USE or r.job in mended or not r.gpus:
            continue
        r.budget_ok = r.org not in spending.used_up
        if r.org in spending.left:
            r.price, r.rate_left = spending.prices.get(r.quota_id, 0), spending.left[r.org]
    for p in running:
        if p.kind in PAID_BY_USE and p.org in spending.left:
            p.price = spending.prices.get(p.quota_id, 0)
