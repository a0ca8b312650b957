"""What is assumed where nothing is given: value, where it is from, of when, and how far to trust it.

Confidence: high = read in a standard or a vendor's sheet; medium = computed from what companies published; low = our own estimate,
or what the trade says without a source to name. Reviewed 2026-11-22.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Confidence = Literal["high", "medium", "low", "given"]


@dataclass(frozen=True)
class Assumption:
    """`value`: a number of `unit`, or a choice's name; `source` and `date` of it. What the user gave has confidence `given`."""

    name: str
    value: int | str
    unit: str
    source: str
    date: str
    confidence: Confidence


def _table(*rows: tuple[str, int | str, str, str, str, Confidence]) -> dict[str, Assumption]:
    return {row[0]: Assumption(*row) for row in rows}


_DEALS = (
    "Five leases published at $122, $149, $154, $158 and $159 per kW of critical IT a month (Core Scientific-CoreWeave 2024, "
    "Cipher-Fluidstack, TeraWulf-Fluidstack, Galaxy-CoreWeave and Hut 8-Fluidstack 2025), contract value over power and term: the median"
)
_TERM = "Three conversions announced at 12 to 16 months from lease to power (Cipher, Bitfarms, TeraWulf); its parts are our split"

DEFAULTS: Final = _table(
    ("cooling", "liquid", "liquid or air",
     "Air cools about 30 kW a rack and liquid 50 to 80 and more; Bitfarms builds for up to 190", "2025-11", "medium"),
    ("income", "lease", "lease or rental",
     "Six of seven conversions with published terms are leases (Core Scientific, TeraWulf, Cipher twice, Hut 8, Galaxy); IREN rents GPUs",
     "2025-12", "medium"),
    ("energy_passed_on", 1, "1: the tenant pays its energy", "Hut 8's lease is triple net; the others do not say", "2025-12", "low"),
    ("keep_w", 0, "W of miners that stay in a hall",
     "Our choice: a mixed hall exists (IREN, Prince George), but none is assumed", "2025-12", "low"),
    ("capital_cents", "no limit", "cents", "Our choice: what a schedule needs is what a plan finds", "2026-11", "low"),
    ("usable_permille", 800, "per mille of the hall's power",
     "The 80 % rule for continuous loads (NEC, CEC), no second feed; with 2N give half", "2026", "high"),
    ("pue_permille.air", 1350, "PUE x 1000", "Air-cooled AI halls run at 1.25 to 1.5: the middle", "2026", "low"),
    ("pue_permille.liquid", 1200, "PUE x 1000", "Direct liquid cooling, 1.1 to 1.3; Bitfarms states 1.2 to 1.3", "2025-11", "medium"),
    ("rack_w.air", 30_000, "W", "What air cools in practice", "2026", "medium"),
    ("rack_w.liquid", 80_000, "W", "Direct liquid cooling, 50 to 80 kW and more", "2026", "medium"),
    ("mining_pue_permille", 1050, "PUE x 1000", "Air-cooled mining runs at 1.02 to 1.10", "2026", "low"),
    ("capex_cents_per_mw", 1_000_000_000, "cents a MW of critical IT",
     "TeraWulf $8M to $10M, Cipher $9M to $11M, Galaxy about $13M (computed from its financing)", "2025-11", "medium"),
    ("permit_months", 4, "months", _TERM, "2025-11", "low"),
    ("lead_months", 7, "months", f"{_TERM}; transformers and chillers alone take 9 to 18 when not ordered ahead", "2025-11", "low"),
    ("build_months", 5, "months", _TERM, "2025-11", "low"),
    ("commission_months", 2, "months", _TERM, "2025-11", "low"),
    ("cents_per_kw_month", 15_400, "cents a kW of critical IT a month", _DEALS, "2025-12", "medium"),
    ("lease_cost_permille", 150, "per mille of the rent",
     "TeraWulf states a net operating income of 85 %", "2025-08", "medium"),
    ("price_uusd", 2_350_000, "uUSD per GPU-hour", "H100 reserved for a year, as quoted of SemiAnalysis", "2026-03", "medium"),
    ("decline_permille", 150, "per mille a year", "Our estimate: a model loses rent as the next ones come", "2026-11", "low"),
    ("gpu_w", 1_275, "W of IT a GPU", "DGX H100: 10.2 kW for eight", "2026", "high"),
    ("gpu_cents", 3_700_000, "cents a GPU",
     "IREN-Dell: $5.8B for 200 MW, at 1,275 W a GPU", "2025-11", "low"),
    ("rental_cost_permille", 200, "per mille of the rent", "Our estimate: people, spares, network, support", "2026-11", "low"),
    ("hashprice", 39_530_000, "uUSD per PH/s per day", "Published hashprice index", "2026-01-12", "medium"),
    ("hashprice_permille_month", -10, "per mille a month",
     "Our estimate: difficulty outgrows the price. The halving due about April 2028 is not in it", "2026-11", "low"),
    ("energy_uusd_mwh", 45_000_000, "uUSD per MWh", "Our estimate for a Texas site's all-in tariff", "2026-11", "low"),
    ("energy_permille_year", 20, "per mille a year", "Our estimate", "2026-11", "low"),
    ("pool_fee_ppm", 10_000, "parts per million", "FPPS pools take 1 to 4 %", "2026", "low"),
    ("mining_cost_uusd_mwh", 5_000_000, "uUSD per MWh at the machine", "Our estimate: people, repairs, rent", "2026-11", "low"),
    ("resale_permille_month", 30, "per mille a month", "Our estimate", "2026-11", "low"),
    ("resale_cents", 0, "cents a machine", "No source found: nothing is counted", "2026-11", "low"),
    ("term_months", 144, "months", "The terms of the five leases are 10, 10, 12, 15 and 15 years: the median", "2025-12", "medium"),
    ("horizon_months", 180, "months", "Our choice: a first lease and the time to begin it", "2026-11", "low"),
    ("ramp_months", 6, "months", "Our estimate: tenants fill a hall in stages", "2026-11", "low"),
    ("target_permille.lease", 1000, "per mille", "Take or pay: what is delivered is paid for", "2025-12", "medium"),
    ("target_permille.rental", 750, "per mille", "Our estimate of GPU-hours sold of those there are", "2026-11", "low"),
    ("deposit_permille", 300, "per mille of the capital", "Our estimate of what orders ask for in advance", "2026-11", "low"),
    ("crews", 1, "halls at a time", "Our estimate", "2026-11", "low"),
    ("wacc_permille", 100, "per mille a year", "Our estimate", "2026-11", "low"),
)  # fmt: skip
