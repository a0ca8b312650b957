"""Every refusal has a stable code. One table, shown the same way by API, pages, admin, agent and command line."""

from dataclasses import dataclass, field
from typing import Any, Final, Literal

Retry = Literal["never", "after", "same_key"]


@dataclass(frozen=True)
class Kind:
    status: int
    title: str
    retry: Retry = "never"


CATALOGUE: Final[dict[str, Kind]] = {
    # --- shape and access
    "invalid_request": Kind(400, "The request is not valid"),
    "unknown_field": Kind(400, "The request has a field that we do not know"),
    "not_authenticated": Kind(401, "Who is asking is not known"),
    "key_invalid": Kind(401, "The API key is unknown, expired or revoked"),
    "enrolment_token_invalid": Kind(401, "The enrolment token is unknown, used or expired"),
    "forbidden": Kind(403, "Your role or key does not allow this"),
    "scope_missing": Kind(403, "The API key lacks the scope"),
    "not_found": Kind(404, "There is no such thing, or it is not yours"),
    "method_not_allowed": Kind(405, "This method is not offered here"),
    "conflict": Kind(409, "The state has changed meanwhile", "after"),
    "busy": Kind(409, "Somebody else is changing this; try again", "after"),
    "idempotency_mismatch": Kind(422, "The idempotency key was used with another body"),
    "idempotency_in_flight": Kind(409, "A request with this idempotency key is still running", "same_key"),
    "rate_limited": Kind(429, "Too many requests", "after"),
    "service_unavailable": Kind(503, "A part that we depend on does not answer", "same_key"),
    "clock_skew": Kind(409, "The agent's clock is more than 30 s off", "after"),
    # --- organizations
    "organization_required": Kind(409, "Create or choose an organization first"),
    "last_owner": Kind(409, "An organization keeps at least one owner"),
    "already_member": Kind(409, "This person is a member already"),
    "invitation_invalid": Kind(410, "The invitation is unknown, used or expired"),
    # --- sites and listings
    "import_invalid": Kind(422, "The file has errors; nothing was imported"),
    "illegal_transition": Kind(409, "This is not possible in the present state"),
    "verification_not_now": Kind(409, "The host cannot be verified now", "after"),
    "gpu_sick": Kind(409, "A GPU of the host is sick"),
    "listing_incomplete": Kind(422, "The listing cannot be published yet"),
    "over_power_cap": Kind(409, "The watts are not there"),
    # --- market
    "listing_unavailable": Kind(409, "The listing is not on offer"),
    "kind_not_offered": Kind(422, "The listing does not offer this kind of contract"),
    "term_not_offered": Kind(422, "The listing does not offer this term"),
    "no_capacity": Kind(409, "There is not enough free capacity in that window", "after"),
    "in_use": Kind(409, "Running work may still need these GPUs then"),
    "too_many_holds": Kind(409, "The organization holds three live quotes already", "after"),
    "quote_expired": Kind(409, "The quote is no longer firm"),
    "capacity_gone": Kind(409, "The capacity went to somebody else", "after"),
    "terms_not_accepted": Kind(409, "The terms of service are to be accepted first"),
    "screening_required": Kind(409, "A check of your organization must pass first"),
    "screening_rejected": Kind(403, "A check of your organization did not pass"),
    "notice_too_short": Kind(409, "Firm contracts are touched, and their notice is too short"),
    "card_required": Kind(402, "Add a card first"),
    "payment_failed": Kind(402, "The payment was declined"),
    "billing_suspended": Kind(402, "The account is suspended until its invoices are paid"),
    "limit_exceeded": Kind(409, "A limit of the organization would be crossed"),
    # --- jobs
    "contract_inactive": Kind(409, "The contract is not active"),
    "never_fits": Kind(422, "The job can never fit what the contract holds"),
    "over_ceiling": Kind(422, "The job asks for more GPUs than the contract's ceiling"),
    # --- billing
    "usage_conflict": Kind(409, "The event id was used with another payload"),
    "signature_invalid": Kind(400, "The webhook's signature is missing or wrong"),
    "invoice_immutable": Kind(409, "A finalized invoice cannot be changed"),
    "account_parked": Kind(409, "The account is parked until a person has looked at it"),
}


@dataclass
class MarketError(Exception):
    """A refusal: `code` from the catalogue, `detail` naming the noun, the value and what to do.

    `fields` maps a JSON pointer to a message; `extra` goes into the problem document as it is (alternatives, limits).
    """

    code: str
    detail: str = ""
    fields: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.code, self.detail)
        assert self.code in CATALOGUE, self.code

    @property
    def kind(self) -> Kind:
        return CATALOGUE[self.code]

    def __str__(self) -> str:
        return f"{self.kind.title}. {self.detail}".strip()
