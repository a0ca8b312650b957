"""How things are shown: watts, money, states, times; and the two sites' navigation (named in settings)."""

from datetime import datetime
from typing import Any

from django.http import HttpRequest
from django.templatetags.static import static
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.decorators import display

from billing.core import money

GOOD = "active running published granted confirmed ok paid sent verified succeeded completed auto placed released firm good open_account"
WAIT = (
    "draft queued requeued intended shedding starting draining announced restoring pending pending_payment ending open maintenance hold "
    "preempting paused commanded waiting new past_due"
)
BAD = "failed lost unresponsive unreachable parked shed off defaulted terminated uncollectible void suspended refused never no_card"
TONES: dict[str, str] = {
    **dict.fromkeys(GOOD.split(), "success"),
    **dict.fromkeys(WAIT.split(), "warning"),
    **dict.fromkeys(BAD.split(), "danger"),
}
MICRO = 1_000_000


def watts(value: int | None) -> str:
    """`1250000` -> `1.25 MW`, `3500` -> `3.50 kW`."""
    if value is None:
        return "–"
    sign, size = ("−" if value < 0 else ""), abs(value)
    if size >= 1_000_000:
        return f"{sign}{size // 1_000_000}.{size % 1_000_000 // 10_000:02d} MW"
    if size >= 1_000:
        return f"{sign}{size // 1_000}.{size % 1_000 // 10:02d} kW"
    return f"{sign}{size} W"


def energy(milliwatt_hours: int) -> str:
    """`1500000000` (mWh) -> `1.50 MWh`."""
    wh = milliwatt_hours // 1000
    return watts(wh).replace("W", "Wh")


def minor(amount: int | None, currency: str) -> str:
    """`1234, USD` -> `12.34 USD`."""
    return "–" if amount is None else money.format_minor(amount, currency)


def micro(value: int, currency: str = "USD") -> str:
    """Millionths of the major unit, rounded down to cents: `2490000` -> `2.49 USD`."""
    sign, size = ("−" if value < 0 else ""), abs(value)
    return f"{sign}{size // MICRO:,}.{size % MICRO // 10_000:02d} {currency}"


def price(millionths: int | None, currency: str = "USD") -> str:
    """Per GPU-hour; as many digits as it has, at least two."""
    if millionths is None:
        return "–"
    whole, rest = divmod(millionths, MICRO)
    digits = f"{rest:06d}".rstrip("0").ljust(2, "0")
    return f"{whole:,}.{digits} {currency}"


def ago(at: datetime | None) -> str:
    if at is None:
        return "never"
    seconds = max(0, int((timezone.now() - at).total_seconds()))
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def permille(value: int) -> str:
    """`998` -> `99.8 %`."""
    return f"{value / 10:.1f} %"


def moment(at: datetime | None) -> SafeString | str:
    return "–" if at is None else format_html('<time datetime="{}">{:%Y-%m-%d %H:%M}</time>', at.isoformat(), at)


class Shown:
    """Columns that many nouns have."""

    @display(description="ID")
    def shown_id(self, row: Any) -> SafeString:
        return format_html('<code class="tr-id">{}</code>', row.public_id)

    @display(description="Node", ordering="power_node__name")
    def shown_node(self, row: Any) -> str:
        return str(row.power_node.name)

    @display(description="State", ordering="state", label=TONES)
    def shown_state(self, row: Any) -> str:
        return str(row.state)

    @display(description="Cap", ordering="cap_w")
    def shown_cap(self, row: Any) -> str:
        return watts(row.cap_w)

    @display(description="Amount", ordering="amount_minor")
    def shown_amount(self, row: Any) -> str:
        return minor(row.amount_minor, row.currency)

    @display(description="Per GPU-hour", ordering="price")
    def shown_price(self, row: Any) -> str:
        return price(row.price, row.currency)

    @display(description="At", ordering="at")
    def shown_at(self, row: Any) -> SafeString | str:
        return moment(row.at)


# --- navigation
def _item(site: str, title: str, icon: str, name: str, **more: Any) -> dict[str, Any]:
    return {"title": title, "icon": icon, "link": reverse(f"{site}:{name}"), **more}


def _model(site: str, title: str, icon: str, model: str) -> dict[str, Any]:
    def may(request: HttpRequest) -> bool:
        return any(
            f"{m._meta.app_label}_{m._meta.model_name}" == model and a.has_view_permission(request)
            for m, a in _registry(site)
        )

    return _item(site, title, icon, f"{model}_changelist", permission=may)


def _registry(site: str) -> Any:
    from marketplace.admin import sites

    return (sites.operator_site if site == "operator" else sites.staff_site)._registry.items()  # noqa: SLF001


def operator_navigation(request: HttpRequest) -> list[dict[str, Any]]:  # noqa: ARG001
    def m(title: str, icon: str, model: str) -> dict[str, Any]:
        return _model("operator", title, icon, model)

    return [
        {"items": [_item("operator", "Overview", "monitoring", "index")]},
        {
            "title": "Facilities",
            "separator": True,
            "items": [
                m("Sites", "factory", "marketplace_site"),
                m("Power nodes", "account_tree", "marketplace_powernode"),
                m("Hosts", "dns", "marketplace_host"),
                m("Miners", "memory", "marketplace_miner"),
                m("Agents", "sensors", "marketplace_agent"),
                m("Curtailments", "bolt", "marketplace_curtailment"),
                m("Grid signals", "cell_tower", "marketplace_gridsource"),
                m("Conversion plans", "event_upcoming", "marketplace_conversionplan"),
                m("Pool feeds", "account_balance_wallet", "marketplace_poolfeed"),
                m("Receipts of pools and grids", "receipt_long", "marketplace_receipt"),
                m("Maintenance", "engineering", "marketplace_maintenance"),
            ],
        },
        {
            "title": "Market",
            "separator": True,
            "items": [
                m("Listings", "storefront", "marketplace_listing"),
                m("Spot prices", "gavel", "marketplace_spotinterval"),
                m("Contracts sold", "contract", "marketplace_contract"),
                m("Sold on", "swap_horiz", "marketplace_resale"),
                m("Placements", "grid_view", "marketplace_placement"),
                m("Payouts", "payments", "billing_payout"),
            ],
        },
        {"separator": True, "items": [m("Audit events", "history", "marketplace_auditevent")]},
    ]


def staff_navigation(request: HttpRequest) -> list[dict[str, Any]]:  # noqa: ARG001
    def m(title: str, icon: str, model: str) -> dict[str, Any]:
        return _model("staff", title, icon, model)

    return [
        {"items": [_item("staff", "Overview", "monitoring", "index")]},
        {
            "title": "People",
            "separator": True,
            "items": [
                m("Organizations", "apartment", "marketplace_organization"),
                m("Users", "person", "marketplace_user"),
                m("Screenings", "verified_user", "marketplace_screening"),
                m("Audit log", "history", "marketplace_auditevent"),
            ],
        },
        {
            "title": "Market",
            "separator": True,
            "items": [
                m("Sites", "factory", "marketplace_site"),
                m("Hosts", "dns", "marketplace_host"),
                m("Listings", "storefront", "marketplace_listing"),
                m("Spot prices", "gavel", "marketplace_spotinterval"),
                m("Contracts", "contract", "marketplace_contract"),
                m("Resales", "swap_horiz", "marketplace_resale"),
                m("Standing bids", "pan_tool", "marketplace_standingbid"),
                m("Fills", "handshake", "marketplace_fill"),
                m("Jobs", "work", "marketplace_job"),
                m("Placements", "grid_view", "marketplace_placement"),
                m("Cycles", "cycle", "scheduler_cycle"),
                m("Decisions", "alt_route", "scheduler_decision"),
                m("Curtailments", "bolt", "marketplace_curtailment"),
                m("Maintenance", "engineering", "marketplace_maintenance"),
                m("Power freezes", "ac_unit", "marketplace_powerfreeze"),
            ],
        },
        {
            "title": "Money",
            "separator": True,
            "items": [
                m("Billing cases", "report", "billing_billingcase"),
                m("Billing accounts", "account_balance_wallet", "billing_billingaccount"),
                m("Invoices", "receipt_long", "billing_invoice"),
                m("Payments", "credit_card", "billing_payment"),
                m("Payouts", "payments", "billing_payout"),
                m("Ledger accounts", "account_balance", "billing_ledgeraccount"),
                m("Ledger transactions", "balance", "billing_ledgertransaction"),
                m("Postings", "list_alt", "billing_posting"),
            ],
        },
        {
            "title": "Queues",
            "separator": True,
            "items": [
                m("Outbox", "outbox", "marketplace_outboxmessage"),
                m("Stripe events", "webhook", "billing_stripeevent"),
            ],
        },
    ]


def operator_name(request: HttpRequest) -> str:
    organization = getattr(request, "operator_organization", None)
    return str(organization) if organization else "Operator"


def style(request: HttpRequest) -> str:  # noqa: ARG001
    return static("desk/admin.css")


def icon(request: HttpRequest) -> str:  # noqa: ARG001
    return static("desk/mark.svg")
