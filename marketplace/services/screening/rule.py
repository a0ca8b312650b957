"""The published rule: what an organization may do before it is screened, and which check each thing asks for.

Live organizations only; a test tenant buys nothing real and is asked for nothing.

    what                                                                        business  sanctions  export
    on demand and spot, at most SCREENING_FREE_GPUS (16) GPUs in all contracts     no        no        no
    reserved, flexible, or more GPUs than that                                     yes       yes       controlled models
    any size, from a country of EXPORT_RESTRICTED_COUNTRIES, controlled models     yes       yes       yes
    any size, from a country of SANCTIONED_COUNTRIES                               yes       yes       yes
    an operator's payouts                                                          yes       yes       no

After a rejection nothing new: no contract, no job, no payout; what runs goes on until one of our own people decides. (A rejected
export check stops what is new on controlled models alone.)

A GPU model is controlled unless EXPORT_FREE_GPU_MODELS names it: a model that nobody has looked at is controlled.
"""

from collections.abc import Collection, Iterable
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db.models import Q, Sum

from marketplace.errors import MarketError
from marketplace.models import Contract, Organization, Screening
from marketplace.services.availability import HOLDING

Kind, State = Screening.Kind, Screening.State
PAGE = "/verification"
BASIC = (Kind.BUSINESS.value, Kind.SANCTIONS.value)
# How long an answer counts, and how long before that it is asked for again.
VALID = {Kind.BUSINESS: timedelta(days=395), Kind.SANCTIONS: timedelta(days=60), Kind.EXPORT: timedelta(days=210)}
RENEW_BEFORE = timedelta(days=30)

ASKED = {
    Kind.BUSINESS: ("legal_name", "registration_number", "address"),
    Kind.SANCTIONS: ("legal_name", "beneficial_owners"),
    Kind.EXPORT: ("legal_name", "end_use", "end_use_countries"),
}  # what the organization must have told before the question can be asked


def controlled(gpu_model: str | None) -> bool:
    """Is this GPU model export controlled? No model named (any GPU of a listing) counts as one that is."""
    return gpu_model is None or gpu_model.upper() not in {name.upper() for name in settings.EXPORT_FREE_GPU_MODELS}


def needed(organization: Organization, kind: str, gpus: int, gpu_model: str | None) -> tuple[str, ...]:
    """The checks that a contract of that kind asks for; `gpus`: of all the organization's contracts, this one among them."""
    if not organization.livemode:
        return ()
    export = (Kind.EXPORT.value,) if controlled(gpu_model) else ()
    if organization.country in settings.SANCTIONED_COUNTRIES:
        return (*BASIC, Kind.EXPORT.value)
    if kind in HOLDING or gpus > settings.SCREENING_FREE_GPUS:
        return (*BASIC, *export)
    return (*BASIC, *export) if export and organization.country in settings.EXPORT_RESTRICTED_COUNTRIES else ()


def require(organization: Organization, kind: str, gpus: int, gpu_model: str | None, *, now: datetime) -> None:
    """May the organization sign this? MarketError screening_rejected, or screening_required with what is open and where to tell it.

    Called under the organization's lock, which every decision takes.
    """
    if not organization.livemode:
        return
    states = dict(Screening.objects.owned_by(organization.pk).values_list("kind", "state"))
    refuse_rejected([check for check, state in states.items() if state == State.REJECTED], gpu_model)
    asks = needed(organization, kind, _held(organization.pk, now) + gpus, gpu_model)
    if any(states.get(check) != State.CLEAR for check in asks):
        raise _required(asks, states)


def refuse_rejected(rejected: Collection[str], gpu_model: str | None) -> None:
    """MarketError("screening_rejected") where one of the rejected checks stands in the way of something new."""
    if any(check != Kind.EXPORT or controlled(gpu_model) for check in rejected):
        raise MarketError(
            "screening_rejected",
            f"The {' and the '.join(sorted(rejected))} check did not pass: nothing new can be booked or run. What runs goes on. "
            "Answer to the mail about it, or write to us.",
            extra={"screening": {"rejected": sorted(rejected), "page": PAGE}},
        )


def _held(organization_id: int, now: datetime) -> int:
    """GPUs of its live contracts, ceilings and commitments alike: a large contract in small parts is a large one."""
    rows = Contract.objects.filter(
        Q(ends_at__isnull=True) | Q(ends_at__gt=now), organization_id=organization_id, state__in=("active", "pending_payment")
    )  # fmt: skip
    return int(rows.aggregate(n=Sum("gpu_count"))["n"] or 0)


WORDS = {
    State.PENDING: "is not answered yet",
    State.REVIEW: "is being looked at by one of our own people",
    State.EXPIRED: "has expired and is asked again",
}


def _required(asks: Iterable[str], states: dict[str, str]) -> MarketError:
    open_ = {check: states.get(check, State.PENDING.value) for check in asks if states.get(check) != State.CLEAR}
    said = "; ".join(f"the {check} check {WORDS[State(state)]}" for check, state in open_.items())
    extra: dict[str, Any] = {
        "screening": {
            "needed": list(asks), "open": open_, "page": PAGE,
            "tell": {"method": "PUT", "path": "/api/v1/verification"},
        }
    }  # fmt: skip
    return MarketError(
        "screening_required",
        f"{said[:1].upper()}{said[1:]}. See {PAGE} for what is asked of you. Up to {settings.SCREENING_FREE_GPUS} GPUs on demand or "
        "on spot need no check in most countries.",
        extra=extra,
    )  # fmt: skip
