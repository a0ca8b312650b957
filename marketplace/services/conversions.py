"""Plans to convert a site: what is not given is read off the site, then taken from `scheduler.core.conversion.defaults`.

`make` keeps what was given, what was used and where each value is from, and the outcome. A plan is advice: nothing at the site
changes by it.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from django.db import transaction
from django.db.models import Avg, Min

from marketplace.errors import MarketError
from marketplace.models import ConversionPlan, FeedValue, Miner, PowerNode, Site
from marketplace.services import audit, feeds
from marketplace.tenancy import Actor
from scheduler.core import tariffs
from scheduler.core.conversion.defaults import DEFAULTS, Assumption, Confidence
from scheduler.core.conversion.inputs import Batch, ConversionError, Hall, Lease, Market, Rental
from scheduler.core.conversion.inputs import Site as Inputs
from scheduler.core.conversion.months import Month, Outcome
from scheduler.core.conversion.schedule import plan
from scheduler.core.conversion.sensitivity import tornado

COOLING = ("liquid", "air")
WEEK_HOURS = 168
INCOME = ("lease", "rental")
MARKET = (
    "hashprice", "hashprice_permille_month", "energy_uusd_mwh", "energy_permille_year", "pool_fee_ppm", "mining_cost_uusd_mwh",
    "resale_permille_month",
)  # fmt: skip
TERMS = ("horizon_months", "term_months", "ramp_months", "deposit_permille", "crews", "wacc_permille")
HALL = (
    "usable_permille", "mining_pue_permille", "capex_cents_per_mw", "permit_months", "lead_months", "build_months",
    "commission_months",
)  # fmt: skip
SAID = ("name", "value", "unit", "source", "date", "confidence")
COLUMNS = (
    "month", "ai_w", "hashing_w", "works_w", "ai_cents", "hashing_cents", "energy_cents", "running_cents", "capital_cents",
    "resale_cents",
)  # fmt: skip


def make(actor: Actor, site: Site, *, name: str, now: datetime, **given: Any) -> ConversionPlan:
    """Plan and keep it. `given`: any of the inputs, as the API has them; nothing is needed.

    Raises MarketError `invalid_request` with the field that makes no sense.
    """
    inputs, assumptions, used = _inputs(site, given, now)
    try:
        found = plan(inputs)
    except ConversionError as error:
        raise MarketError("invalid_request", str(error), {f"/{error.field}": error.why}) from None
    with transaction.atomic():
        row = ConversionPlan.objects.create(
            site=site,
            name=name,
            given=given,
            used=used,
            assumptions=[asdict(a) for a in assumptions],
            outcome=_outcome(inputs, found),
            npv_cents=found.npv_cents,
            npv_hashing_on_cents=found.npv_hashing_on_cents,
            irr_permille=None if found.irr is None else round(1000 * found.irr),
            payback_months=found.payback_months,
            capital_cents=-sum(m.capital_cents for m in found.months),
            created_by=actor.label[:120],
            created_at=now,
        )
        audit.record(actor, "conversion.planned", row.public_id, now=now, organization_id=site.organization_id)
    return row


def halls_of(site: Site) -> list[dict[str, Any]]:
    """The site's halls as its power tree has them, with their miners: its buildings, else what hangs below its root, else itself."""
    nodes = list(PowerNode.objects.filter(site=site).order_by("depth", "id"))
    buildings = [n for n in nodes if n.kind == PowerNode.Kind.BUILDING]
    chosen = (buildings or [n for n in nodes if n.depth == 1] or nodes[:1])[:12]
    above = {n.pk: n.parent_id for n in nodes}
    fleet: dict[int, dict[tuple[str, int, int], int]] = defaultdict(lambda: defaultdict(int))
    picked = {n.pk for n in chosen}
    for node, model, watts, ghs in Miner.objects.filter(site=site).values_list(
        "power_node_id", "model", "mode_watts", "mode_ghs"
    ):
        at: int | None = node
        while at is not None and at not in picked:
            at = above[at]
        if at is not None and watts[-1]:
            fleet[at][model, watts[-1], ghs[-1]] += 1
    return [
        {
            "name": n.name,
            "gross_w": n.cap_w,
            "miners": [
                {"model": model, "count": count, "watts": watts, "ghs": ghs}
                for (model, watts, ghs), count in sorted(fleet[n.pk].items())
            ],
        }
        for n in chosen
    ]


def months_csv(row: ConversionPlan) -> str:
    """Its months, one a line, with each hall's phase."""
    out = io.StringIO()
    halls = row.outcome["halls"]
    lines = csv.writer(out)
    lines.writerow([*COLUMNS, "cash_cents", "hashing_on_cents", *(_cell(h["name"]) for h in halls)])
    for t, values in enumerate(row.outcome["months"]):
        lines.writerow([*values, sum(values[4:]), row.outcome["hashing_on"][t], *(phase_at(h, t) for h in halls)])
    return out.getvalue()


def assumptions_csv(row: ConversionPlan) -> str:
    """Every value of the plan, one a line, with its source, date and confidence."""
    out = io.StringIO()
    lines = csv.writer(out)
    lines.writerow(SAID)
    for each in row.assumptions:
        lines.writerow([_cell(str(each[name])) if name in {"name", "source"} else each[name] for name in SAID])
    return out.getvalue()


def phase_at(hall: Mapping[str, Any], month: int) -> str:
    """What the hall is in then; `phases` are (first month, phase)."""
    return next(str(phase) for first, phase in reversed(hall["phases"]) if first <= month)


def _cell(text: str) -> str:
    """A name that a spreadsheet must not take for a formula."""
    return f"'{text}" if text[:1] in "=+-@\t\r" else text


class _Values:
    """Looks a value up: as given, off the site, or by default; remembers which."""

    def __init__(self, site: Site, now: datetime) -> None:
        self.assumptions: dict[str, Assumption] = {}
        prices = feeds.rates(site, now=now).hashing
        self.known: dict[str, tuple[int, str, Confidence]] = {
            "mining_pue_permille": (site.miner_pue_permille, f"{site.name}, as its operator says", "high"),
            "energy_uusd_mwh": _usual_energy(site, now),
        }
        if prices:
            self.known["hashprice"] = prices.hashprice_uusd, "This market's own feed", "high"
        self.day = f"{now:%F}"

    def of(self, name: str, given: Mapping[str, Any], *, default: str = "", label: str = "") -> int:
        """A number."""
        return int(self._found(name, given, default, label))

    def choice(self, name: str, given: Mapping[str, Any], *, default: str = "", label: str = "") -> str:
        """The name of one of several, or of a default that is no number."""
        return str(self._found(name, given, default, label))

    def _found(self, name: str, given: Mapping[str, Any], default: str, label: str) -> int | str:
        value = given.get(name)
        key = default or name
        standard = DEFAULTS[key]
        if value is not None:
            value = int(value) if isinstance(value, bool) else value
            found = Assumption(label or key, value, standard.unit, "Given", self.day, "given")
        elif key in self.known:
            known, source, confidence = self.known[key]
            found = Assumption(label or key, known, standard.unit, source, self.day, confidence)
        else:
            found = Assumption(label or key, *list(asdict(standard).values())[1:])
        self.assumptions[found.name] = found
        return found.value


def _usual_energy(site: Site, now: datetime) -> tuple[int, str, Confidence]:
    """(micro-USD of a MWh over all hours, source, confidence). A plan is for years: not this interval's price but the mean of what
    the zone's feed has shown, where that is a week at least, else the site's own price; with what the tariff adds in a week's mean.
    """
    hours = [now.astimezone(ZoneInfo(site.timezone)) + timedelta(hours=n) for n in range(WEEK_HOURS)]
    parts = tariffs.parse(site.tariff)
    added = sum(tariffs.added_uusd_mwh(parts, hour) for hour in hours) // WEEK_HOURS
    for zone in dict.fromkeys((site.region, "")):
        shown = FeedValue.objects.filter(
            kind=FeedValue.Kind.ENERGY, scope=zone, observed_at__lte=now, observed_at__gt=now - timedelta(days=365)
        ).aggregate(mean=Avg("value"), since=Min("observed_at"))
        days = (now - shown["since"]).days if shown["since"] else 0
        if days >= WEEK_HOURS // 24:
            source = f"Mean of the energy feed's last {days} days, with the site's tariff"
            return int(shown["mean"]) + added, source, "high" if days >= 360 else "medium"
    return site.energy_price_microusd_per_kwh * 1000 + added, f"Tariff of {site.name}, as its operator says", "medium"


def _inputs(site: Site, given: Mapping[str, Any], now: datetime) -> tuple[Inputs, Sequence[Assumption], dict[str, Any]]:
    values = _Values(site, now)
    halls = []
    for hall in given.get("halls") or halls_of(site):
        name = hall["name"]
        cooling = values.choice("cooling", hall, label=f"{name}: cooling")
        rest = {field: values.of(field, hall, label=f"{name}: {field}") for field in HALL}
        halls.append(
            Hall(
                name=name,
                gross_w=hall["gross_w"],
                pue_permille=values.of("pue_permille", hall, default=f"pue_permille.{cooling}", label=f"{name}: pue_permille"),
                rack_w=values.of("rack_w", hall, default=f"rack_w.{cooling}", label=f"{name}: rack_w"),
                keep_w=values.of("keep_w", hall, label=f"{name}: keep_w"),
                miners=tuple(
                    Batch(
                        m["model"], m["count"], m["watts"], m["ghs"],
                        values.of("resale_cents", m, label=f"{m['model']}: resale_cents"),
                    )
                    for m in hall.get("miners") or ()
                ),
                **rest,
            )
        )  # fmt: skip
    income = given.get("income") or {}
    kind = values.choice("kind", income, default="income", label="income")
    ours: Lease | Rental
    if kind == "lease":
        ours = Lease(
            values.of("cents_per_kw_month", income),
            values.of("cost_permille", income, default="lease_cost_permille"),
            bool(values.of("energy_passed_on", income)),
        )
    else:
        ours = Rental(
            **{name: values.of(name, income) for name in ("price_uusd", "decline_permille", "gpu_w", "gpu_cents")},
            cost_permille=values.of("cost_permille", income, default="rental_cost_permille"),
        )
    market = given.get("market") or {}
    limit = values.choice("capital_cents", given)
    inputs = Inputs(
        tuple(halls),
        ours,
        Market(*(values.of(name, market) for name in MARKET)),
        **{name: values.of(name, given) for name in TERMS},
        target_permille=values.of("target_permille", given, default=f"target_permille.{kind}"),
        capital_cents=int(limit) if limit != DEFAULTS["capital_cents"].value else None,
    )
    return inputs, list(values.assumptions.values()), {**asdict(inputs), "income": {"kind": kind, **asdict(ours)}}


def _outcome(inputs: Inputs, found: Outcome) -> dict[str, Any]:
    return {
        "halls": [
            {
                "name": hall.name,
                "start": start,
                "it_w": hall.it_w if start is not None else 0,
                "racks": hall.it_w // hall.rack_w if start is not None else 0,
                "phases": list(_turns(phases)),
            }
            for hall, start, phases in zip(inputs.halls, found.starts, found.phases, strict=True)
        ],
        "months": [_row(m) for m in found.months],
        "hashing_on": list(found.hashing_on),
        "sensitivity": [asdict(swing) for swing in tornado(inputs, found.starts)],
    }


def _row(month: Month) -> list[int]:
    return [getattr(month, name) for name in COLUMNS]


def _turns(phases: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(first month, phase) of each phase that follows another."""
    before = ""
    for month, phase in enumerate(phases):
        if phase != before:
            yield month, phase
        before = phase
