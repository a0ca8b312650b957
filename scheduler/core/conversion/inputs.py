"""What a conversion is planned from: halls, their miners, what AI pays, the market. Units: the package's."""

from __future__ import annotations

from dataclasses import dataclass


class ConversionError(ValueError):
    """What is asked for makes no sense. `field` names it as the API does."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field, self.why = field, why


@dataclass(frozen=True)
class Batch:
    """Miners of one model: `count` of `watts` (IT) and `ghs` each; `resale_cents` each, today."""

    model: str
    count: int
    watts: int
    ghs: int
    resale_cents: int = 0


@dataclass(frozen=True)
class Hall:
    """A hall that may be converted. `usable_permille` of `gross_w` may feed AI after redundancy and the continuous rule; of that,
    IT gets 1 / PUE. `keep_w`: miners (IT) that stay beside the racks. `capex_cents_per_mw`: of IT power.
    """

    name: str
    gross_w: int
    usable_permille: int
    pue_permille: int
    mining_pue_permille: int
    capex_cents_per_mw: int
    permit_months: int
    lead_months: int
    build_months: int
    commission_months: int
    miners: tuple[Batch, ...] = ()
    keep_w: int = 0
    rack_w: int = 80_000

    @property
    def it_w(self) -> int:
        """Critical IT power once converted."""
        return self.gross_w * self.usable_permille // self.pue_permille

    @property
    def capex_cents(self) -> int:
        return -(-self.it_w * self.capex_cents_per_mw // 1_000_000)


@dataclass(frozen=True)
class Lease:
    """Colocation: so much a kW of delivered IT power a month, take or pay; of it `cost_permille` is ours to run it."""

    cents_per_kw_month: int
    cost_permille: int
    energy_passed_on: bool = True


@dataclass(frozen=True)
class Rental:
    """GPU-hours: `price_uusd` each, falling by `decline_permille` a year; a GPU needs `gpu_w` of IT power and costs `gpu_cents`,
    paid over the building with the hall.
    """

    price_uusd: int
    decline_permille: int
    gpu_w: int
    gpu_cents: int
    cost_permille: int


@dataclass(frozen=True)
class Market:
    """Today's prices and how they move: hashprice by `hashprice_permille_month`, energy by `energy_permille_year`."""

    hashprice: int
    hashprice_permille_month: int
    energy_uusd_mwh: int
    energy_permille_year: int
    pool_fee_ppm: int
    mining_cost_uusd_mwh: int
    resale_permille_month: int


@dataclass(frozen=True)
class Site:
    """A conversion to be planned. A live hall is used to `target_permille` after `ramp_months` and earns for `term_months`; then only
    its miners do. `capital_cents` None: no limit.
    """

    halls: tuple[Hall, ...]
    income: Lease | Rental
    market: Market
    horizon_months: int = 180
    term_months: int = 144
    ramp_months: int = 6
    target_permille: int = 1000
    deposit_permille: int = 300
    crews: int = 1
    capital_cents: int | None = None
    wacc_permille: int = 100

    def check(self) -> None:
        """Raises ConversionError for the first thing that makes no sense."""
        if not 1 <= len(self.halls) <= 12:
            raise ConversionError("halls", f"{len(self.halls)} given: 1 to 12 can be planned.")
        if not 12 <= self.horizon_months <= 240:
            raise ConversionError("horizon_months", "12 to 240 months can be planned.")
        if len({hall.name for hall in self.halls}) < len(self.halls):
            raise ConversionError("halls", "two have one name: give each its own.")
        for i, hall in enumerate(self.halls):
            if not 0 < hall.usable_permille <= 1000:
                raise ConversionError(f"halls/{i}/usable_permille", "must be 1 to 1000.")
            if hall.pue_permille < 1000 or hall.mining_pue_permille < 1000:
                raise ConversionError(f"halls/{i}/pue_permille", "a PUE is 1000 per mille or more.")
            fleet = sum(b.count * b.watts for b in hall.miners) * hall.mining_pue_permille // 1000
            if fleet > hall.gross_w:
                raise ConversionError(
                    f"halls/{i}/miners", f"they draw {fleet:,} W with their cooling, the hall has {hall.gross_w:,} W."
                )
