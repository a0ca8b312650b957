"""Template filters of the pages: money, prices, durations, badges. Integers in, words out."""

from datetime import UTC, datetime
from typing import Any

from django import template
from django.forms import BoundField
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString

from billing.core import money
from marketplace import ids
from marketplace.services import host_shape
from scheduler import words as said

register = template.Library()
LEVEL_WORDS = {"host": "one host", "leaf": "one leaf switch", "spine": "one fabric", "site": "anywhere at the site"}

SIGNS = {"USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥"}
TONES = {
    "good": {"running", "succeeded", "active", "paid", "firm", "published", "good", "placed", "granted", "accepted", "clear"},
    "wait": {
        "queued", "requeued", "preempting", "intended", "shedding", "starting", "draining", "pending_payment", "ending", "open",
        "draft", "past_due", "unreachable", "pending", "review", "expired",
    },
    "bad": {"failed", "lost", "defaulted", "uncollectible", "suspended", "no_card", "parked", "rejected"},
}  # fmt: skip
STATE_WORDS = {"requeued": "queued again", "pending_payment": "awaiting payment", "no_card": "no card"}


@register.filter
def price(millionths: int | None, currency: str = "USD") -> str:
    """`2490000` -> `$2.49`: at least the currency's digits, more where the price has more."""
    if millionths is None:
        return ""
    whole, rest = divmod(millionths, money.MILLIONTHS)
    digits = f"{rest:06d}".rstrip("0").ljust(money.exponent(currency), "0")
    return _signed(f"{whole:,}.{digits}" if digits else f"{whole:,}", currency)


@register.filter
def amount(minor: int | None, currency: str = "USD") -> str:
    """`1234` -> `$12.34`."""
    if minor is None:
        return ""
    digits = money.exponent(currency)
    whole, rest = divmod(abs(minor), 10**digits)
    text = _signed(f"{whole:,}.{rest:0{digits}d}" if digits else f"{whole:,}", currency)
    return f"−{text}" if minor < 0 else text


def _signed(text: str, currency: str) -> str:
    return f"{SIGNS[currency]}{text}" if currency in SIGNS else f"{text} {currency}"


@register.filter
def left(reason: str) -> str:
    """Why a job or a replica lost its place, without our own short words for it."""
    return said.left(reason)


@register.filter
def gpu_hours(milli_gpu_seconds: int | None) -> str:
    """Milli-GPU-seconds as GPU-hours, three digits."""
    thousandths = ((milli_gpu_seconds or 0) + 1800) // 3600  # as the lines of invoices round
    return f"{thousandths // 1000:,}.{thousandths % 1000:03d}"


@register.filter
def kwh(wh: int | None) -> str:
    """`1234` -> `1.2 kWh`."""
    return f"{(wh or 0) / 1000:,.1f} kWh"


@register.filter
def gib(mib: int | None) -> str:
    return f"{((mib or 0) + 512) // 1024} GiB"


@register.filter
def level_words(level: str) -> str:
    """`spine` -> `in one fabric`."""
    return LEVEL_WORDS[level] if level == "site" else f"in {LEVEL_WORDS[level]}"


@register.filter
def kind_words(kind: str) -> str:
    return {"on_demand": "On demand", "reserved": "Reserved", "flexible": "Flexible", "spot": "Spot"}.get(kind, kind)


@register.filter
def words(name: str) -> str:
    """`price_max` -> `price max`."""
    return str(name).replace("_", " ")


@register.filter
def public_id(pk: int | None, prefix: str) -> str:
    return ids.encode(prefix, pk) if pk is not None else ""


@register.filter
def badge(state: str) -> SafeString:
    tone = next((tone for tone, states in TONES.items() if state in states), "quiet")
    return format_html(
        '<span class="badge badge-{}">{}</span>', tone, STATE_WORDS.get(str(state), str(state).replace("_", " "))
    )


@register.filter
def moment(at: datetime | None) -> SafeString | str:
    """An instant in UTC, to the minute, readable for machines too."""
    if at is None:
        return ""
    return format_html('<time datetime="{}">{}</time>', at.isoformat(), at.strftime("%-d %b %Y %H:%M"))


@register.filter
def second(at: datetime | None) -> SafeString | str:
    if at is None:
        return ""
    return format_html('<time datetime="{}">{}</time>', at.isoformat(), at.strftime("%-d %b %H:%M:%S"))


@register.filter
def ago(at: datetime | None) -> str:
    """`12 s ago`; the largest unit alone."""
    if at is None:
        return "never"
    return f"{span(max(0, int((timezone.now() - at).total_seconds())))} ago"


@register.filter
def span(seconds: int | None) -> str:
    """`7320` -> `2 h 2 min`."""
    if seconds is None:
        return ""
    seconds = int(seconds)
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min"
    if seconds < 172_800:
        hours, rest = divmod(seconds, 3600)
        return f"{hours} h {rest // 60} min" if rest >= 60 else f"{hours} h"
    days, rest = divmod(seconds, 86_400)
    return f"{days} days {rest // 3600} h" if rest >= 3600 else f"{days} days"


@register.filter
def hours(value: int) -> str:
    """`720` -> `30 days`, `36` -> `36 h`."""
    return f"{value // 24} days" if value > 24 and value % 24 == 0 else f"{value} h"


@register.filter
def host_words(shape: dict[str, Any] | None) -> str:
    """What a host has: `8 GPUs, 96 vCPU, ...`."""
    return host_shape.words(shape)


@register.filter
def permille(value: int | None) -> str:
    """`150` -> `15 %`."""
    whole, rest = divmod(value or 0, 10)
    return f"{whole}.{rest} %" if rest else f"{whole} %"


@register.filter
def is_checkbox(field: BoundField) -> bool:
    return getattr(field.field.widget, "input_type", "") == "checkbox" and not hasattr(field.field, "choices")


@register.filter
def is_group(field: BoundField) -> bool:
    return bool(field.use_fieldset)


@register.filter
def may(actor: Any, action: str) -> bool:
    return bool(actor.may(action))


@register.simple_tag(takes_context=True)
def query(context: dict[str, Any], **changes: Any) -> str:
    """The present query string with `changes`; an empty value leaves a name out. The cursor is left out always."""
    params = context["request"].GET.copy()
    for name in ("before", "cursor"):
        params.pop(name, None)
    for name, value in changes.items():
        if value in {None, ""}:
            params.pop(name, None)
        else:
            params[name] = str(value)
    return params.urlencode()


@register.simple_tag(takes_context=True)
def here(context: dict[str, Any], *prefixes: str) -> SafeString | str:
    """`aria-current` where the page lies under one of the prefixes."""
    path = context["request"].path
    inside = any(path == prefix or (prefix != "/" and path.startswith(prefix)) for prefix in prefixes)
    return format_html(' aria-current="{}"', "page") if inside else ""


@register.filter
def instant(seconds: int) -> datetime:
    """Seconds since 1970 as an instant."""
    return datetime.fromtimestamp(seconds, UTC)


@register.filter
def minus(left: int, right: int) -> int:
    return left - right


@register.filter
def milli(value: int) -> str:
    """`2500` -> `2.5`."""
    whole, rest = divmod(value, 1000)
    return f"{whole}.{rest:03d}".rstrip("0") if rest else str(whole)


@register.filter
def energy(wh: int) -> str:
    """`1580` -> `1.58 kWh`."""
    return f"{watts(wh)}h"


@register.filter
def watts(value: int) -> str:
    """`1580` -> `1.58 kW`."""
    if value < 1000:
        return f"{value} W"
    whole, rest = divmod(value // 10, 100)
    return f"{whole:,}.{rest:02d} kW"
