"""Spot on the customers' pages: the price now, its last day as a chart, and the form for a contract's limit."""

from datetime import datetime
from typing import Any

from django import forms

from billing.core import money
from marketplace.models import Listing
from marketplace.services import spot_prices
from marketplace.web import charts
from marketplace.web.tags import price


def shown(listing: Listing, now: datetime) -> dict[str, Any] | None:
    """The interval in force, the next one's price, and the chart of the last day; None before the first."""
    rows = spot_prices.history(listing, now)
    begun = [row for row in rows if row.start <= now]
    if not begun:
        return None
    last = begun[-1]
    return {
        "row": last,
        "next": rows[-1] if rows[-1].start > now else None,
        "low": min(row.price for row in rows),
        "high": max(row.price for row in rows),
        "free_gpus": (last.supply_milli - last.sold_milli) // 1000,
        "chart": charts.steps(
            [(row.start, row.price) for row in rows],
            floor=last.floor,
            label=f"Spot price of the last day: now {price(last.price, last.currency)} per GPU-hour",
            show=lambda value: price(value, last.currency),
        ),
    }


class LimitForm(forms.Form):
    limit_price = forms.DecimalField(
        label="Your limit per GPU-hour", min_value=0, max_digits=9, decimal_places=6,
        help_text="Counts from the next auction on. You pay the price of all winners, never more than this.",
    )  # fmt: skip
    seen = forms.IntegerField(widget=forms.HiddenInput)

    @classmethod
    def of(cls, limit: int | None) -> "LimitForm":
        """The form as it stands for a contract with this limit, millionths."""
        whole = None if limit is None else f"{limit / money.MILLIONTHS:.6f}".rstrip("0").rstrip(".")
        return cls(initial={"limit_price": whole, "seen": limit})
