"""A line of an invoice before it is stored, and what it says."""

from __future__ import annotations

from dataclasses import dataclass

from billing import resales
from billing.core import metering, rating
from billing.core.rating import LineKind
from marketplace.models import Contract, Resale


@dataclass(frozen=True, slots=True)
class DraftLine:
    """A rated line before it is stored: amounts in minor units of the account's currency, seconds since 1970."""

    line: rating.Line
    contract: Contract
    month_s: int
    adjustment: bool
    operator_minor: int
    platform_minor: int
    seller_minor: int = 0
    resale: Resale | None = None
    note: str = ""  # ends the description

    @property
    def description(self) -> str:
        gpu = self.contract.gpu_model.name if self.contract.gpu_model is not None else "GPU"
        hours = f"{self.line.quantity / 3_600_000:,.3f}"
        kind = self.contract.kind.replace("_", "-")
        if self.line.kind in {LineKind.UPFRONT, LineKind.DRAWDOWN}:
            words = "due at signing" if self.line.kind == LineKind.UPFRONT else "paid at signing, drawn down"
            return f"{gpu} {kind}, {words}, {self.contract.public_id}"
        if self.line.kind == LineKind.RESALE and self.resale is not None:
            return f"{gpu} {kind}, {hours} GPU-hours {resales.words(self.resale)}, {self.contract.public_id}"
        if self.resale is not None:
            kind += f", resale {self.resale.public_id}"
        late = f", adjustment of {metering.instant(self.month_s):%Y-%m}" if self.adjustment else ""
        return f"{gpu} {kind}, {hours} GPU-hours {rating.WORDS[self.line.kind]}, {self.contract.public_id}{late}{self.note}"
