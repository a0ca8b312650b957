"""What a GPU-hour of `reserved` and `flexible` costs by term, by what is due at signing, and by the curtailment that is borne.

A listing has a plain price of each kind, for its plain terms. A price tier is one more offer of the kind beside it: its own price for
terms of `min_term_hours` or more, with `upfront_permille` of the commitment due at signing and, flexible, up to
`flexible_hours_per_month` hours of curtailment. A buyer says how long, and at most what to pay at signing and to bear; of all that meets
this the cheapest is quoted. Who says nothing of the two is asked for no more than the plain price asks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from marketplace.errors import MarketError
from marketplace.models import Kind, Listing, Quote
from marketplace.services.availability import HOLDING

if TYPE_CHECKING:
    from marketplace.services.filters import Filters
    from marketplace.services.quote_terms import Request

LEFT_OUT: Final = {"min_term_hours": 1, "upfront_permille": 0, "flexible_hours_per_month": 0}
MOST: Final = 24  # tiers of one listing
LONGEST_HOURS: Final = 26_304  # three years
GRACE_S: Final = 60  # a window that began within this minute is as long as it was asked for
PRICE_MAX: Final = 1 << 50


@dataclass(frozen=True)
class Asked:
    """Of the buyer: how long (s; None: not known yet), and at most what. None as a limit: what the plain price asks."""

    term_s: int | None = None
    upfront_max_permille: int | None = None
    flexible_hours_max: int | None = None

    @property
    def limited(self) -> bool:
        return self.upfront_max_permille is not None or self.flexible_hours_max is not None

    @property
    def term_hours(self) -> int:
        """Whole hours that count as the term; 0 where it is not known."""
        return 0 if self.term_s is None else (self.term_s + GRACE_S - 1) // 3600


@dataclass(frozen=True, order=True)
class Option:
    """One price, millionths of the major unit per GPU-hour, and what it asks. In order: what a buyer would rather have first."""

    price: int
    upfront_permille: int = 0
    flexible_hours_per_month: int = 0
    min_term_hours: int = 0

    def meets(self, term_hours: int, upfront_permille: int, flexible_hours: int) -> bool:
        return (
            self.min_term_hours <= term_hours
            and self.upfront_permille <= upfront_permille
            and self.flexible_hours_per_month <= flexible_hours
        )

    def betters(self, other: "Option") -> bool:
        """Nobody who could have this one would take the other."""
        return self.price <= other.price and self.meets(
            other.min_term_hours, other.upfront_permille, other.flexible_hours_per_month
        )


def options(listing: Listing, kind: str) -> Iterator[Option]:
    """All offers of `kind`, the plain one first; none where the kind is not offered."""
    plain = listing.price_of(kind)
    if plain is None:
        return
    if kind not in HOLDING:
        yield Option(plain)
        return
    # The shortest term of all is the listing's, and checked as such.
    yield Option(plain, listing.upfront_permille, _hours(kind, listing.flexible_hours_per_month))
    for tier in listing.price_tiers:
        if tier["kind"] == kind:
            yield _option(tier)


def chosen(listing: Listing, kind: str, asked: Asked = Asked()) -> Option | None:
    """The cheapest that meets what is asked; None where nothing does."""
    if not (listing.price_tiers or asked.limited):  # the plain price, which most listings have alone
        return next(options(listing, kind), None)
    upfront, hours = asked.upfront_max_permille, asked.flexible_hours_max
    upfront = listing.upfront_permille if upfront is None else upfront
    hours = listing.flexible_hours_per_month if hours is None else hours
    return min((o for o in options(listing, kind) if o.meets(asked.term_hours, upfront, hours)), default=None)


def unasked(listing: Listing, kind: str) -> Iterator[Option]:
    """The offers of `kind` that ask no more than its plain price: those of somebody who says nothing of it."""
    plain = None
    for option in options(listing, kind):
        plain = plain or option
        if option.meets(LONGEST_HOURS, plain.upfront_permille, plain.flexible_hours_per_month):
            yield option


def all_chosen(listing: Listing, asked: Asked = Asked()) -> dict[str, Option]:
    """Kind -> what is chosen of it; kinds that are not offered, or not for so little, are left out."""
    return {kind: found for kind in Kind.values if (found := chosen(listing, kind, asked))}


def limits(asked: "Request | Quote | Filters") -> dict[str, int]:
    """What was asked of the two, by the name that asks for it again."""
    said = {name: getattr(asked, name) for name in ("upfront_max_permille", "flexible_hours_max")}
    return {name: value for name, value in said.items() if value is not None}


def completed(tiers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As a listing keeps them, with what was left out. MarketError("invalid_request") for one without a kind or a price."""
    for i, tier in enumerate(tiers):
        if missing := [name for name in ("kind", "price") if tier.get(name) is None]:
            pointer = f"/price_tiers/{i}/{missing[0]}"
            raise MarketError("invalid_request", f"{pointer}: is needed", {pointer: "is needed"})
    return [{**LEFT_OUT, **tier} for tier in tiers]


def wrong(listing: Listing) -> dict[str, str]:
    """What can never be right in its tiers, by pointer. Each must be one that somebody would be quoted."""
    tiers = listing.price_tiers
    if not isinstance(tiers, list) or len(tiers) > MOST:
        return {"/price_tiers": f"at most {MOST}"}
    found: dict[str, str] = {}
    for i, tier in enumerate(tiers):
        if problem := _problem(listing, tier):
            found[f"/price_tiers/{i}"] = f"tier {i + 1}: {problem}"
    if found:
        return found
    for i, tier in enumerate(tiers):
        rivals = [("the plain price", next(options(listing, tier["kind"])))]
        rivals += [(f"tier {j + 1}", _option(t)) for j, t in enumerate(tiers) if j != i and t["kind"] == tier["kind"]]
        better = next((name for name, rival in rivals if rival.betters(_option(tier))), None)
        if better:
            found[f"/price_tiers/{i}"] = f"tier {i + 1}: nobody would take it, {better} costs no more, and asks no more"
    return found


def _problem(listing: Listing, tier: Mapping[str, Any]) -> str | None:
    kind = tier["kind"]
    if kind not in HOLDING:
        return f"kind is {kind}: one of {', '.join(HOLDING)}"
    if listing.price_of(kind) is None:
        return f"{kind} has no plain price; set {kind}_price first"
    if not 1 <= tier["price"] <= PRICE_MAX:
        return "price must be positive"
    if not 1 <= tier["min_term_hours"] <= LONGEST_HOURS or tier["min_term_hours"] > 24 * listing.max_term_days:
        return f"min_term_hours is {tier['min_term_hours']}: 1 to the longest term, {24 * listing.max_term_days}"
    if not 0 <= tier["upfront_permille"] <= 1000:
        return "upfront_permille is a share of the commitment: 0 to 1000"
    hours = tier["flexible_hours_per_month"]
    if not 0 <= hours <= 720:
        return "flexible_hours_per_month: 0 to 720"
    if hours and kind != Kind.FLEXIBLE:
        return f"{kind} bears no curtailment: leave flexible_hours_per_month at 0"
    return None


def _option(tier: Mapping[str, Any]) -> Option:
    return Option(
        tier["price"], tier["upfront_permille"], _hours(tier["kind"], tier["flexible_hours_per_month"]), tier["min_term_hours"]
    )  # fmt: skip


def _hours(kind: str, hours: int) -> int:
    return hours if kind == Kind.FLEXIBLE else 0
