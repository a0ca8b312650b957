"""A schedule, month by month: megawatts and cash of every hall, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Final, Literal

from scheduler.core import economics
from scheduler.core.conversion.inputs import Batch, Hall, Lease, Market, Rental, Site
from scheduler.core.conversion.returns import annual_rate, npv, payback

HOURS: Final = 730  # of a month: 8,760 / 12
CENTS_UUSD: Final = 10_000
Phase = Literal["hashing", "permit and orders", "building", "commissioning", "live", "term over"]


@dataclass(frozen=True)
class Month:
    """A month of the whole site. Watts at the meter; cents; costs are negative."""

    month: int
    ai_w: int
    hashing_w: int
    works_w: int  # stands still: under works
    ai_cents: int = 0
    hashing_cents: int = 0  # revenue less pool fee, energy and the cost of running the miners
    energy_cents: int = 0  # of AI
    running_cents: int = 0  # of AI
    capital_cents: int = 0
    resale_cents: int = 0

    @property
    def cash_cents(self) -> int:
        ai = self.ai_cents + self.energy_cents + self.running_cents
        return ai + self.hashing_cents + self.capital_cents + self.resale_cents


@dataclass(frozen=True)
class Outcome:
    """What the plan comes to. `starts`: the month in which each hall's permit is applied for, None: it stays as it is.

    `gain` is beside hashing on with every hall: its rate of return and payback are those of the difference in cash.
    """

    starts: tuple[int | None, ...]
    phases: tuple[tuple[Phase, ...], ...]  # [halls][months]
    months: tuple[Month, ...]
    hashing_on: tuple[int, ...]  # cents a month, nothing converted
    npv_cents: int
    npv_hashing_on_cents: int
    irr: float | None  # a year
    payback_months: int | None

    @property
    def gain_cents(self) -> int:
        return self.npv_cents - self.npv_hashing_on_cents


def outcome(site: Site, starts: Sequence[int | None]) -> Outcome:
    """What these starts come to."""
    lives = [Life(site, hall) for hall in site.halls]
    paths = [life.path(start) for life, start in zip(lives, starts, strict=True)]
    months = tuple(_sum(t, [path[t] for path in paths]) for t in range(site.horizon_months))
    stays = tuple(sum(row) for row in zip(*([m.cash_cents for m in life.path(None)] for life in lives), strict=True))
    cash = [m.cash_cents for m in months]
    more = [a - b for a, b in zip(cash, stays, strict=True)]
    return Outcome(
        tuple(starts),
        tuple(
            tuple(phase(hall, start, t, site.term_months) for t in range(site.horizon_months))
            for hall, start in zip(site.halls, starts, strict=True)
        ),
        months,
        stays,
        round(npv(cash, site.wacc_permille)),
        round(npv(stays, site.wacc_permille)),
        annual_rate(more),
        payback(more),
    )


def phase(hall: Hall, start: int | None, month: int, term: int) -> Phase:
    """What the hall is in, in that month; `term`: months that it is live."""
    if start is None or month < start:
        return "hashing"
    age = month - start - max(hall.permit_months, hall.lead_months)
    if age < 0:
        return "permit and orders"
    if age < hall.build_months:
        return "building"
    age -= hall.build_months + hall.commission_months
    if age < 0:
        return "commissioning"
    return "live" if age < term else "term over"


class Life:
    """One hall over the horizon, for any start: what it draws and earns, month by month."""

    def __init__(self, site: Site, hall: Hall) -> None:
        self.site, self.hall = site, hall
        self.fleet = tuple(sorted(hall.miners, key=lambda b: (Fraction(b.watts, b.ghs), b.model)))
        self.kept, self.sold = _split(self.fleet, hall.keep_w)
        self.capital_cents = hall.capex_cents + _gpus(
            site.income, hall.it_w
        )  # the hall, and the GPUs where they are ours
        # A month is the same whatever the start: only how far the ramp has come tells them apart.
        self._hashes, self._lives = lru_cache(maxsize=None)(self._hashes_on), lru_cache(maxsize=None)(self._live_at)

    def path(self, start: int | None) -> list[Month]:
        """Its months, when permits are applied for in month `start`; None: it hashes on."""
        return [self._month(start, t) for t in range(self.site.horizon_months)]

    def _month(self, start: int | None, t: int) -> Month:
        hall, site = self.hall, self.site
        now = phase(hall, start, t, site.term_months)
        if now in ("hashing", "permit and orders"):
            capital = self._capital(start, t)
            return replace(self._hashes(t), capital_cents=-capital) if capital else self._hashes(t)
        assert start is not None
        built = start + max(hall.permit_months, hall.lead_months)
        if now in ("building", "commissioning"):
            resale = self._resale(t) if t == built else 0
            return Month(t, 0, 0, hall.gross_w, capital_cents=-self._capital(start, t), resale_cents=resale)
        if now == "term over":
            return self._lives(t, 0)
        live = built + hall.build_months + hall.commission_months
        return self._lives(t, min(t - live + 1, max(1, site.ramp_months)))

    def _hashes_on(self, t: int) -> Month:
        """Month t with the whole fleet."""
        watts, cents = self._hashing(self.fleet, self.hall.gross_w, t)
        return Month(t, 0, watts, 0, hashing_cents=cents)

    def _live_at(self, t: int, step: int) -> Month:
        """Month t, live, `step` months into its ramp; 0: its term is over."""
        hall, site = self.hall, self.site
        it = hall.it_w * site.target_permille * step // (1000 * max(1, site.ramp_months))
        drawn = -(-it * hall.pue_permille // 1000)
        watts, cents = self._hashing(self.kept, hall.gross_w - drawn, t)
        earned, running, pays_energy = _income(site.income, hall.it_w, it, t)
        price = energy_uusd_mwh(site.market, t)
        energy = _cents(Fraction(drawn * HOURS * price, 10**6 * CENTS_UUSD)) if pays_energy else 0
        return Month(t, drawn, watts, 0, earned, cents, -energy, -running)

    def _capital(self, start: int | None, t: int) -> int:
        """Cents paid in month t: the deposit at the start, the rest in equal parts over the building."""
        if start is None:
            return 0
        hall = self.hall
        total = self.capital_cents
        deposit = total * self.site.deposit_permille // 1000
        built = start + max(hall.permit_months, hall.lead_months)
        paid = deposit if t == start else 0
        parts = max(1, hall.build_months)
        if built <= t < built + parts:
            n = t - built
            paid += (total - deposit) * (n + 1) // parts - (total - deposit) * n // parts
        return paid

    def _resale(self, t: int) -> int:
        keeps = Fraction(1000 - self.site.market.resale_permille_month, 1000) ** t
        return _cents(sum(b.count * b.resale_cents for b in self.sold) * keeps)

    def _hashing(self, fleet: tuple[Batch, ...], meter_w: int, t: int) -> tuple[int, int]:
        """(watts at the meter, cents) of the machines that earn more than they cost, the most efficient first."""
        market, pue = self.site.market, self.hall.mining_pue_permille
        price, energy = hashprice(market, t), energy_uusd_mwh(market, t)
        room, watts, cents = meter_w * 1000 // pue, 0, Fraction(0)
        for batch in fleet:
            value = economics.mode_value_uusd_h(
                price, batch.ghs, batch.watts, energy + market.mining_cost_uusd_mwh,
                pool_fee_ppm=market.pool_fee_ppm, pue_permille=pue,
            )  # fmt: skip
            count = min(batch.count, room // batch.watts)
            if value <= 0 or not count:
                continue
            room -= count * batch.watts
            watts += count * batch.watts
            cents += Fraction(count * value * HOURS, CENTS_UUSD)
        return -(-watts * pue // 1000), _cents(cents)


def hashprice(market: Market, t: int) -> int:
    """Hashprice in month t, at least 1."""
    moved = Fraction(1000 + market.hashprice_permille_month, 1000) ** t
    return max(1, int(market.hashprice * moved))


def energy_uusd_mwh(market: Market, t: int) -> int:
    """Energy price in month t; it moves once a year."""
    return int(market.energy_uusd_mwh * Fraction(1000 + market.energy_permille_year, 1000) ** (t // 12))


def _income(income: Lease | Rental, it_w: int, used_w: int, t: int) -> tuple[int, int, bool]:
    """(cents earned, cents that running costs, whether AI's energy is ours to pay) of a live hall in month t."""
    if isinstance(income, Lease):
        earned = _cents(Fraction(used_w * income.cents_per_kw_month, 1000))
        return earned, _cents(Fraction(earned * income.cost_permille, 1000)), not income.energy_passed_on
    price = income.price_uusd * Fraction(1000 - income.decline_permille, 1000) ** (t // 12)
    earned = _cents(it_w // income.gpu_w * Fraction(used_w, it_w or 1) * HOURS * price / CENTS_UUSD)
    return earned, _cents(Fraction(earned * income.cost_permille, 1000)), True


def _gpus(income: Lease | Rental, it_w: int) -> int:
    return 0 if isinstance(income, Lease) else it_w // income.gpu_w * income.gpu_cents


def _split(fleet: tuple[Batch, ...], keep_w: int) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """(kept, sold): the most efficient stay, up to `keep_w` of IT power."""
    kept, sold = [], []
    for batch in fleet:
        stay = min(batch.count, keep_w // batch.watts)
        keep_w -= stay * batch.watts
        kept += [replace(batch, count=stay)] if stay else []
        sold += [replace(batch, count=batch.count - stay)] if batch.count > stay else []
    return tuple(kept), tuple(sold)


def _sum(t: int, rows: Sequence[Month]) -> Month:
    names = [name for name in Month.__dataclass_fields__ if name != "month"]
    return Month(t, **{name: sum(getattr(row, name) for row in rows) for name in names})


def _cents(value: Fraction | int) -> int:
    """Half away from zero."""
    whole = abs(Fraction(value))
    rounded = (2 * whole.numerator + whole.denominator) // (2 * whole.denominator)
    return rounded if value >= 0 else -rounded
