"""Stripe's published test cards (docs.stripe.com/testing): number, what it is called as a `pm_card_*`, what it does."""

from __future__ import annotations

from dataclasses import dataclass

from sandbox.stripe.errors import ApiError, card_error

_MESSAGES = {
    "card_declined": "Your card was declined.",
    "insufficient_funds": "Your card has insufficient funds.",
    "expired_card": "Your card has expired.",
    "incorrect_cvc": "Your card's security code is incorrect.",
    "processing_error": "An error occurred while processing your card. Try again in a little bit.",
}


@dataclass(frozen=True, slots=True)
class TestCard:
    """One published number. `charge` and `setup` are decline codes (None: it works).

    `auth`: "" never, "unless_setup" (3155: not again once set up), "always" (3184), "on_session" (0446: set up already).
    """

    __test__ = False  # the name is Stripe's; pytest must not collect it

    number: str
    alias: str
    brand: str = "visa"
    charge: str | None = None
    setup: str | None = None
    auth: str = ""
    dispute: str | None = None
    refund: str = "succeeded"
    bypass_pending: bool = False
    funding: str = "credit"
    country: str = "US"

    @property
    def last4(self) -> str:
        return self.number[-4:]


def _dead(number: str, alias: str, code: str) -> TestCard:
    return TestCard(number, alias, charge=code, setup=code)


CARDS: tuple[TestCard, ...] = (
    TestCard("4242424242424242", "visa"),
    TestCard("4000056655665556", "visa_debit", funding="debit"),
    TestCard("5555555555554444", "mastercard", brand="mastercard"),
    TestCard("5200828282828210", "mastercard_debit", brand="mastercard", funding="debit"),
    TestCard("378282246310005", "amex", brand="amex"),
    TestCard("6011111111111117", "discover", brand="discover"),
    TestCard("4000002760000016", "de", country="DE"),
    TestCard("4000000000000077", "bypassPending", bypass_pending=True),
    _dead("4000000000000002", "chargeDeclined", "generic_decline"),
    _dead("4000000000009995", "chargeDeclinedInsufficientFunds", "insufficient_funds"),
    _dead("4000000000009987", "chargeDeclinedLostCard", "lost_card"),
    _dead("4000000000009979", "chargeDeclinedStolenCard", "stolen_card"),
    _dead("4000000000000069", "chargeDeclinedExpiredCard", "expired_card"),
    _dead("4000000000000127", "chargeDeclinedIncorrectCvc", "incorrect_cvc"),
    _dead("4000000000000119", "chargeDeclinedProcessingError", "processing_error"),
    TestCard("4000000000000341", "chargeCustomerFail", charge="generic_decline"),
    TestCard("4000002500003155", "authenticationRequiredOnSetup", auth="unless_setup"),
    TestCard("4000002760003184", "authenticationRequired", auth="always"),
    TestCard("4000003800000446", "authenticationRequiredSetupForOffSession", auth="on_session"),
    TestCard(
        "4000008260003178",
        "authenticationRequiredChargeDeclinedInsufficientFunds",
        charge="insufficient_funds",
        auth="always",
    ),
    TestCard("4000000000000259", "createDispute", dispute="fraudulent"),
    TestCard("4000000000002685", "createDisputeProductNotReceived", dispute="product_not_received"),
    TestCard("4000000000001976", "createDisputeInquiry", dispute="inquiry"),
    TestCard("4000000000007726", "pendingRefund", refund="pending"),
    TestCard("4000000000005126", "refundFail", refund="failed"),
)
BY_NUMBER = {c.number: c for c in CARDS}
BY_ALIAS = {f"pm_card_{c.alias}": c for c in CARDS} | {f"tok_{c.alias}": c for c in CARDS}


def decline(code: str, **extra: object) -> ApiError:
    """402 for a decline code; three of them are Stripe error codes of their own, the rest are `card_declined`."""
    own = code in ("expired_card", "incorrect_cvc", "processing_error")
    error_code = code if own else "card_declined"
    return card_error(_MESSAGES.get(code, _MESSAGES["card_declined"]), error_code, None if own else code, **extra)


def luhn(number: str) -> bool:
    digits = [int(d) for d in reversed(number)]
    return sum(d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits)) % 10 == 0
