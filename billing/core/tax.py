"""What a quote says of tax. Nothing collects tax here: prices are without it, and invoices carry none.

All customers are organizations, and what they buy is a service supplied by electronic means. Where the law of the buyer's country has
its business buyers account for tax on services from abroad by themselves, what we charge is nought by that rule. Where the seller is of
the same country, or no such rule is known to us, it is nought because the house is registered for tax nowhere; what is due by law is the
buyer's to find out. Rules change: this table is of November 2026, and no tax advice.
"""

from dataclasses import dataclass
from typing import Final

EU: Final = (
    "AT", "BE", "BG", "CY", "CZ", "DE", "DK", "EE", "ES", "FI", "FR", "GR", "HR", "HU", "IE", "IT", "LT", "LU", "LV", "MT", "NL", "PL",
    "PT", "RO", "SE", "SI", "SK",
)  # fmt: skip
# Country -> where its law says that the business that buys accounts for the tax.
REVERSE_CHARGE: Final = {
    **dict.fromkeys(EU, "Directive 2006/112/EC, articles 44 and 196"),
    "GB": "Value Added Tax Act 1994, section 8",
    "NO": "merverdiavgiftsloven, sections 3-30 and 11-3",
    "CH": "MWSTG, article 45",
}


@dataclass(frozen=True)
class Estimate:
    """`minor`: of tax that would be charged on top of the price. `rule`: reverse_charge | not_collected."""

    minor: int
    rule: str
    text: str
    source: str = ""


def estimate(seller_country: str, buyer_country: str) -> Estimate:
    """For a business buyer, by ISO 3166 countries. The same whatever the amount, for nothing is charged."""
    source = REVERSE_CHARGE.get(buyer_country)
    if source is not None and seller_country != buyer_country:
        said = f"None is charged: a business in {buyer_country} accounts for tax on services from abroad by itself (reverse charge)."
        return Estimate(0, "reverse_charge", said, source)
    return Estimate(
        0,
        "not_collected",
        "None is charged: we collect no tax. What is due by your country's or state's law is yours to declare.",
    )
