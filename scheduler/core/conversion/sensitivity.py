"""What the plan comes to if one thing turns out otherwise, the chosen schedule kept: who has begun to build does not choose again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from scheduler.core.conversion.inputs import Lease, Site
from scheduler.core.conversion.months import outcome

Change = Callable[[Site, int], Site]  # a site and a change in per mille (of the value, or as the name says)


@dataclass(frozen=True)
class Swing:
    """Gain over hashing on, cents, with the value at `low` and at `high` per mille of what is planned with."""

    name: str
    low: str
    high: str
    low_cents: int
    high_cents: int


def _income(site: Site, permille: int) -> Site:
    now = site.income
    if isinstance(now, Lease):
        return replace(site, income=replace(now, cents_per_kw_month=now.cents_per_kw_month * permille // 1000))
    return replace(site, income=replace(now, price_uusd=now.price_uusd * permille // 1000))


def _capex(site: Site, permille: int) -> Site:
    halls = (replace(h, capex_cents_per_mw=h.capex_cents_per_mw * permille // 1000) for h in site.halls)
    return replace(site, halls=tuple(halls))


def _hashprice(site: Site, permille: int) -> Site:
    return replace(site, market=replace(site.market, hashprice=max(1, site.market.hashprice * permille // 1000)))


def _energy(site: Site, permille: int) -> Site:
    return replace(site, market=replace(site.market, energy_uusd_mwh=site.market.energy_uusd_mwh * permille // 1000))


def _use(site: Site, permille: int) -> Site:
    return replace(site, target_permille=min(1000, site.target_permille * permille // 1000))


def _build(site: Site, permille: int) -> Site:
    halls = (replace(h, build_months=max(1, round(h.build_months * permille / 1000))) for h in site.halls)
    return replace(site, halls=tuple(halls))


def _wacc(site: Site, permille: int) -> Site:
    return replace(site, wacc_permille=site.wacc_permille * permille // 1000)


SWINGS: Final[tuple[tuple[str, int, int, Change], ...]] = (
    ("AI price", 800, 1200, _income),
    ("Capital a MW", 800, 1200, _capex),
    ("Time to build", 750, 1500, _build),
    ("Use of what is live", 800, 1000, _use),
    ("Hashprice", 700, 1300, _hashprice),
    ("Energy price", 700, 1300, _energy),
    ("Cost of capital", 800, 1200, _wacc),
)


def tornado(site: Site, starts: Sequence[int | None]) -> list[Swing]:
    """The widest swing first."""
    rows = [
        Swing(
            name,
            f"{low / 10 - 100:+.0f} %",
            f"{high / 10 - 100:+.0f} %",
            outcome(change(site, low), starts).gain_cents,
            outcome(change(site, high), starts).gain_cents,
        )
        for name, low, high, change in SWINGS
    ]
    return sorted(rows, key=lambda r: -abs(r.high_cents - r.low_cents))
