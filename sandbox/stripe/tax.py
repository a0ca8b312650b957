"""Tax calculations. The rates are a small table for show, not tax advice and not Stripe Tax's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sandbox.stripe.app import Call, listing, route
from sandbox.stripe.errors import invalid
from sandbox.stripe.store import Obj, new_id


@dataclass(frozen=True, slots=True)
class Rate:
    """`percent_1000` is thousandths of a percent: 7,250 is 7.25 %."""

    percent_1000: int
    kind: str
    country: str
    state: str | None
    reason: str = "standard_rated"

    @property
    def decimal(self) -> str:
        whole, part = divmod(self.percent_1000, 1000)
        return f"{whole}.{part:03d}".rstrip("0").rstrip(".")


NO_TAX = Rate(0, "sales_tax", "", None, "not_collecting")
_COUNTRIES = {"DE": 19_000, "FR": 20_000, "GB": 20_000, "IE": 23_000, "NO": 25_000, "SE": 25_000, "NL": 21_000}
_STATES = {"CA": 7_250, "NY": 4_000, "TX": 6_250, "WA": 6_500}


def rate_for(address: dict[str, Any], *, exempt: str) -> Rate | None:
    """The rate at an address; None where the place is unknown; zero where the customer is exempt or reverse-charged."""
    country = (address.get("country") or "").upper()
    if not country:
        return None
    state = (address.get("state") or "").upper() or None
    kind = "sales_tax" if country == "US" else "vat"
    if exempt in ("exempt", "reverse"):
        return Rate(0, kind, country, state, "customer_exempt" if exempt == "exempt" else "reverse_charge")
    percent = _STATES.get(state or "", 0) if country == "US" else _COUNTRIES.get(country, 0)
    return Rate(percent, kind, country, state, "standard_rated" if percent else "not_collecting")


def amount(base: int, rate: Rate) -> int:
    """Exclusive tax on a base in minor units, rounded half away from zero."""
    product = abs(base) * rate.percent_1000
    rounded = (product + 50_000) // 100_000
    return rounded if base >= 0 else -rounded


def line_tax(rate: Rate, base: int, tax: int) -> Obj:
    return {
        "amount": tax,
        "tax_behavior": "exclusive",
        "tax_rate_details": None,
        "taxability_reason": rate.reason,
        "taxable_amount": base if rate.percent_1000 else 0,
        "type": "tax_rate_details",
    }


@route("POST", "/v1/tax/calculations", "tax.CalculationCreateParams")
def create_calculation(call: Call) -> Obj:
    p = call.params
    details = p.get("customer_details", {})
    exempt = "reverse" if details.get("taxability_override") == "reverse_charge" else "none"
    if details.get("taxability_override") == "customer_exempt":
        exempt = "exempt"
    if "customer" in p:
        customer = call.load("customer", p["customer"], param="customer")
        address, exempt = customer.get("address") or {}, customer["tax_exempt"]
    else:
        address = details.get("address") or {}
    rate = rate_for(address, exempt=exempt)
    if rate is None:
        raise invalid(
            "We could not determine the customer's tax location.",
            code="customer_tax_location_invalid",
            param="customer_details",
        )
    id_ = new_id("taxcalc")
    lines = [_line(i, item, rate) for i, item in enumerate(p["line_items"])]
    exclusive = sum(line["amount_tax"] for line in lines)
    base = sum(line["amount"] for line in lines)
    percent = {
        "country": rate.country,
        "flat_amount": None,
        "percentage_decimal": rate.decimal,
        "rate_type": "percentage",
        "state": rate.state,
        "tax_type": rate.kind,
    }
    calculation: Obj = {
        "id": id_,
        "object": "tax.calculation",
        "amount_total": base + exclusive,
        "currency": p["currency"].lower(),
        "customer": p.get("customer"),
        "customer_details": {
            "address": address,
            "address_source": details.get("address_source", "billing"),
            "ip_address": None,
            "tax_ids": details.get("tax_ids", []),
            "taxability_override": details.get("taxability_override", "none"),
        },
        "expires_at": call.now + 90 * 86_400,
        "livemode": False,
        "tax_amount_exclusive": exclusive,
        "tax_amount_inclusive": 0,
        "tax_breakdown": [
            {
                "amount": exclusive,
                "inclusive": False,
                "tax_rate_details": percent,
                "taxability_reason": rate.reason,
                "taxable_amount": base if rate.percent_1000 else 0,
            }
        ],
        "tax_date": p.get("tax_date", call.now),
    }
    calculation["_lines"] = lines
    call.save(calculation)
    return calculation


def _line(index: int, item: dict[str, Any], rate: Rate) -> Obj:
    if item.get("tax_behavior", "exclusive") != "exclusive":
        raise invalid("The sandbox calculates exclusive tax only.", param=f"line_items[{index}][tax_behavior]")
    return {
        "id": new_id("tax_li"),
        "object": "tax.calculation_line_item",
        "amount": item["amount"],
        "amount_tax": amount(item["amount"], rate),
        "livemode": False,
        "metadata": item.get("metadata"),
        "product": item.get("product"),
        "quantity": item.get("quantity", 1),
        "reference": item.get("reference", f"L{index + 1}"),
        "tax_behavior": "exclusive",
        "tax_code": item.get("tax_code", "txcd_10000000"),
    }


@route("GET", "/v1/tax/calculations/{calculation}", "tax.CalculationRetrieveParams")
def retrieve_calculation(call: Call) -> Obj:
    return call.load("tax.calculation", call.ids["calculation"])


@route("GET", "/v1/tax/calculations/{calculation}/line_items", "tax.CalculationLineItemListParams")
def list_calculation_lines(call: Call) -> Obj:
    calculation = call.load("tax.calculation", call.ids["calculation"])
    return listing(calculation["_lines"], f"/v1/tax/calculations/{calculation['id']}/line_items")


@route("POST", "/v1/tax/transactions/create_from_calculation", "tax.TransactionCreateFromCalculationParams")
def create_from_calculation(call: Call) -> Obj:
    p = call.params
    calculation = call.load("tax.calculation", p["calculation"], param="calculation")
    if call.store.find("tax.transaction", account=call.account, reference=p["reference"]):
        raise invalid(f"A tax transaction with reference {p['reference']} already exists.", param="reference")
    return call.save(
        {
            "id": new_id("tax"),
            "object": "tax.transaction",
            "created": call.now,
            "currency": calculation["currency"],
            "customer": calculation["customer"],
            "customer_details": calculation["customer_details"],
            "livemode": False,
            "metadata": p.get("metadata", {}),
            "posted_at": p.get("posted_at", call.now),
            "reference": p["reference"],
            "tax_date": calculation["tax_date"],
            "type": "transaction",
        }
    )
