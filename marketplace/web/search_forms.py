"""The market's filters as a form and as a query string, and what is asked when a search is kept."""

from decimal import Decimal
from typing import Any

from django import forms
from django.http import QueryDict

from billing.core import money
from marketplace.models import Kind
from marketplace.services import search
from marketplace.web.forms import Instant, millionths, percent, permille
from marketplace.web.tags import LEVEL_WORDS, kind_words
from scheduler.core.capacity import LEVELS

SORT_WORDS = {
    "price": "Price", "-price": "Price, highest first", "-vram": "GPU memory", "-fabric": "Fabric speed", "carbon": "Carbon",
    "newest": "Newest", "-reliability": "Reliability", "-benchmark": "Benchmark", "term": "Shortest term",
}  # fmt: skip


FIRM = "emergency_clause=0"  # the comparison that a tick stands for


class SearchForm(forms.Form):
    """The market's filters. Facets come as repeated parameters."""

    count = forms.IntegerField(label="GPUs in one block", required=False, min_value=1, max_value=1_000_000)
    level = forms.ChoiceField(
        label="All of them in", required=False, choices=[(v, LEVEL_WORDS[v]) for v in reversed(LEVELS)]
    )
    start = Instant(label="From (UTC)", required=False)
    end = Instant(label="Until (UTC)", required=False)
    price_max = forms.DecimalField(
        label="Up to, per GPU-hour", required=False, min_value=0, max_digits=9, decimal_places=4
    )
    upfront_max = forms.DecimalField(
        label="Due at signing up to, %", required=False, min_value=0, max_value=100, max_digits=4, decimal_places=1,
        help_text="Of a commitment. Empty: what each offer plainly asks.",
    )  # fmt: skip
    flexible_hours_max = forms.IntegerField(
        label="Curtailment up to, hours a month", required=False, min_value=0, max_value=720, help_text="Flexible only."
    )
    vram_min = forms.IntegerField(label="GPU memory from, GiB", required=False, min_value=0, max_value=10_000)
    fabric_gbps_min = forms.IntegerField(label="Fabric from, Gb/s", required=False, min_value=0, max_value=100_000)
    carbon_max_g = forms.IntegerField(label="Carbon up to, g/kWh", required=False, min_value=0, max_value=10_000)
    verified = forms.BooleanField(label="Verified by benchmark only", required=False)
    never_leaves = forms.BooleanField(label="Firm in grid emergencies too", required=False)
    reliability_min = forms.DecimalField(
        label="Reliability from, %", required=False, min_value=0, max_value=100, max_digits=4, decimal_places=1
    )
    sort = forms.ChoiceField(label="Sort by", required=False, choices=list(SORT_WORDS.items()))
    kind = forms.ChoiceField(
        label="Contract", required=False, choices=[("", "Any contract"), *((k, kind_words(k)) for k in Kind.values)]
    )
    resale = forms.ChoiceField(
        label="Sold by", required=False,
        choices=[("", "Anybody"), ("no", "Operators"), ("yes", "Customers who sell on")],
    )  # fmt: skip
    where = forms.CharField(required=False, max_length=2000, widget=forms.HiddenInput)  # comparisons of a saved search

    def filters(self) -> search.Filters:
        """What `services.search` is asked; call it on a valid form."""
        asked = self.cleaned_data
        facets: dict[str, Any] = {name: tuple(v for v in self.data.getlist(name) if v)[:20] for name in search.FACETS}  # type: ignore[attr-defined]
        return search.Filters(
            **facets,
            count=asked["count"],
            level=asked["level"] or "site",
            start=asked["start"],
            end=asked["end"],
            price_max=millionths(asked["price_max"]),
            upfront_max_permille=permille(asked["upfront_max"]),
            flexible_hours_max=asked["flexible_hours_max"],
            vram_min_mib=None
            if asked["vram_min"] is None
            else max(0, asked["vram_min"] * 1024 - 512),  # as `gib` rounds
            fabric_gbps_min=asked["fabric_gbps_min"],
            carbon_max_g=asked["carbon_max_g"],
            verified=asked["verified"],
            reliability_min=permille(asked["reliability_min"]),
            kind=asked["kind"] or None,
            resale={"yes": True, "no": False}.get(asked["resale"]),
            where=tuple(
                dict.fromkeys(search.comparisons(asked["where"] + ("," + FIRM if asked["never_leaves"] else "")))
            ),
        )

    @staticmethod
    def query_of(wanted: search.Filters, sort: str) -> QueryDict:
        """The market's query string that asks for the same."""
        query = QueryDict(mutable=True)
        for name in search.FACETS:
            if getattr(wanted, name):
                query.setlist(name, getattr(wanted, name))
        given = {
            "count": wanted.count, "level": wanted.level if wanted.level != "site" else None, "kind": wanted.kind,
            "start": wanted.start and f"{wanted.start:%Y-%m-%dT%H:%M}", "end": wanted.end and f"{wanted.end:%Y-%m-%dT%H:%M}",
            "price_max": None if wanted.price_max is None else f"{Decimal(wanted.price_max) / money.MILLIONTHS:f}",
            "vram_min": None if wanted.vram_min_mib is None else -(-wanted.vram_min_mib // 1024),
            "fabric_gbps_min": wanted.fabric_gbps_min, "carbon_max_g": wanted.carbon_max_g,
            "verified": "on" if wanted.verified else None,
            "resale": None if wanted.resale is None else "yes" if wanted.resale else "no",
            "reliability_min": percent(wanted.reliability_min), "upfront_max": percent(wanted.upfront_max_permille),
            "flexible_hours_max": wanted.flexible_hours_max,
            "never_leaves": "on" if FIRM in map(str, wanted.where) else None,
            "where": ",".join(text for text in map(str, wanted.where) if text != FIRM), "sort": sort if sort != "price" else None,
        }  # fmt: skip
        query.update({name: str(value) for name, value in given.items() if value not in {None, ""}})
        return query


class SavedForm(forms.Form):
    name = forms.CharField(label="Name", max_length=80)
    cadence = forms.ChoiceField(label="Tell me", choices=[("at_once", "at once"), ("daily", "once a day, 07:00 UTC")])
    pause_minutes = forms.TypedChoiceField(
        label="At most", coerce=int,
        choices=[(0, "each time"), (60, "once an hour"), (360, "every 6 hours"), (1440, "once a day"), (10_080, "once a week")],
    )  # fmt: skip
