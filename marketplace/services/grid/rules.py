"""What a source's signal means for its site: calls announced, prolonged, taken back. Every function may run twice.

One call at a time for each source and reason: `economic` while the price stands, `low` while the frequency does, `silent` while
the source says nothing and its policy is to curtail.
"""

from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import QuerySet

from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Curtailment, FeedValue, GridSource
from marketplace.services import curtailments
from marketplace.tenancy import Actor
from scheduler.core import curtail

AHEAD = timedelta(hours=4)  # a call by a rule is announced for so long, and prolonged while its reason stands
SOON = timedelta(hours=1)
SILENT = "silent"


def actor_of(row: GridSource) -> Actor:
    return Actor(kind="system", organization_id=row.site.organization_id, label=f"{row.kind} {row.public_id}")


def standing(row: GridSource, reason: str) -> Curtailment | None:
    """The open call of the source for this reason."""
    rows = Curtailment.objects.filter(
        origin=row, state__in=curtailments.OPEN, reference__startswith=f"{row.public_id} {reason} "
    )
    return rows.order_by("-pk").first()


def call(
    row: GridSource, reason: str, until: datetime, *, now: datetime, mandatory: bool, emergency: bool = False
) -> None:
    """Hold the node to the source's cap until then: a new call, or the standing one prolonged."""
    found = standing(row, reason)
    if found is not None:
        if until > found.ends_at:
            curtailments.amend(actor_of(row), found, now=now, ends_at=until)
        return
    curtailments.announce(
        actor_of(row), row.node, cap_w=row.cap_w, starts_at=now, ends_at=until, source=row.kind, origin=row, mandatory=mandatory,
        emergency=emergency, reference=f"{row.public_id} {reason} {now:%Y-%m-%dT%H:%M:%S}", now=now,
    )  # fmt: skip


def take_back(row: GridSource, reason: str, *, now: datetime) -> None:
    found = standing(row, reason)
    if found is not None:
        curtailments.cancel(actor_of(row), found, now=now)


# --- price: economic curtailment
def judge_price(row: GridSource, *, now: datetime) -> None:
    """By the newest intervals of the energy feed. The caller holds the source's row."""
    rule = curtail.PriceRule(
        row.strike_uusd_mwh or 0, row.resume_uusd_mwh or 0, row.windows, row.resume_windows, row.urgent_uusd_mwh
    )
    most = max(rule.windows, rule.resume_windows)
    newest = list(_feed(row, now)[:most])
    if not newest:
        return
    row.reading, row.heard_at, row.error = int(newest[0].value), newest[0].observed_at, ""
    GridSource.objects.filter(pk=row.pk).update(reading=row.reading, heard_at=row.heard_at, error="")
    if silent(row, now):
        return  # the last plan stays
    found = standing(row, "price")
    said = curtail.price_says(rule, [int(v.value) for v in reversed(newest)], holding=found is not None)
    if said == "resume":
        take_back(row, "price", now=now)
    elif said == "curtail" or (found is not None and found.ends_at - now < SOON):
        call(row, "price", now + AHEAD, now=now, mandatory=False)


def _feed(row: GridSource, now: datetime) -> QuerySet[FeedValue]:
    values = FeedValue.objects.filter(kind=FeedValue.Kind.ENERGY, observed_at__lte=now).order_by("-observed_at")
    zone = row.zone or row.site.region
    of_zone = values.filter(scope=zone)
    return of_zone if of_zone.exists() else values.filter(scope="")


# --- frequency
def take_frequency(row: GridSource, *, millihertz: int, at: datetime, now: datetime) -> Curtailment | None:
    """A reading of the grid's frequency, once by its time; older ones change nothing. Answers the call that stands for it."""
    if row.kind != GridSource.Kind.FREQUENCY:
        raise MarketError("invalid_request", f"{row.name} is a {row.kind} source; readings are of a frequency one.")
    if not row.enabled:
        raise MarketError("illegal_transition", f"{row.name} is switched off.")
    if abs(now - at) > timedelta(seconds=30):
        raise MarketError(
            "clock_skew", f"The reading is of {at:%F %T}, it is {now:%F %T}.", {"/at": "more than 30 s off"}
        )
    with transaction.atomic():
        acquire((Lock.SITE, row.site_id))
        row = (
            GridSource.objects.select_for_update(no_key=True, of=("self",))
            .select_related("site", "node")
            .get(pk=row.pk)
        )
        if row.heard_at is None or row.heard_at < at:
            GridSource.objects.filter(pk=row.pk).update(heard_at=at, reading=millihertz, error="")
            row.heard_at = at
            held = standing(row, "low")
            low = (row.back_mhz if held else row.trip_mhz) or 0
            if millihertz < low:
                call(row, "low", at + timedelta(seconds=row.hold_s), now=now, mandatory=True, emergency=True)
        return standing(row, "low")


# --- silence
def silent(row: GridSource, now: datetime) -> bool:
    """Nothing was understood of it for longer than it allows. One never heard is silent since it was made."""
    return now - (row.heard_at or row.created_at) > timedelta(seconds=row.stale_after_s)


def judge_silence(row: GridSource, *, now: datetime) -> None:
    """`hold` is read where machines would be woken (`grid.holds`); `curtail` calls until it speaks again."""
    if not silent(row, now):
        take_back(row, SILENT, now=now)
        return
    if row.stale_policy == GridSource.Stale.CURTAIL:
        found = standing(row, SILENT)
        if found is None or found.ends_at - now < SOON:
            call(row, SILENT, now + AHEAD, now=now, mandatory=True)
    else:
        take_back(row, SILENT, now=now)
