"""What a job has used and costs up to now, from the same timeline that is billed; reads only."""

from dataclasses import dataclass
from datetime import datetime

from billing import usage
from billing.core import metering, money
from billing.models import PriceVersion
from marketplace.models import Job, Placement
from marketplace.services.availability import HOLDING

MAX_PLACEMENTS = 2000  # of the newest attempts; a page is no invoice


@dataclass(frozen=True)
class JobCost:
    """`used`: billable milli-GPU-seconds up to now. `minor`: their price in minor units of `currency`, rounded once; the same
    seconds lie inside the commitment where `committed`. `hourly`: minor units an hour while it runs as it does now.
    """

    used: int
    minor: int
    hourly: int
    currency: str
    committed: bool


def of_job(job: Job, *, now: datetime) -> JobCost:
    """Three queries, whatever the job's size. `job` comes with its contract."""
    contract = job.contract
    versions = sorted(
        (v.valid_from_s, v.millionths) for v in contract.price_versions.all() if v.kind == PriceVersion.Kind.RATE
    ) or [(0, contract.price)]
    rows = Placement.objects.owned_by(job.organization_id).filter(job=job, running_at__isnull=False)
    used, cost, live = 0, money.exact_amount(0, 0, contract.currency), 0
    for placement in rows.prefetch_related("events").order_by("-attempt", "rank")[:MAX_PLACEMENTS]:
        pieces = usage.billable(placement, placement.events.all(), until=placement.finished_at or now)
        for piece in metering.cut(pieces, [at for at, _ in versions]):
            price = max((v for v in versions if v[0] <= piece.start), default=versions[0])[1]
            quantity = piece.seconds * placement.milli_gpus
            used += quantity
            cost += money.exact_amount(quantity, price, contract.currency)
        if placement.state in {"running", "draining"} and placement.release_requested_at is None:
            live += placement.milli_gpus
    hourly = money.exact_amount(live * 3600, versions[-1][1], contract.currency)
    return JobCost(
        used=used,
        minor=money.round_half_away(cost),
        hourly=money.round_half_away(hourly),
        currency=contract.currency,
        committed=contract.kind in HOLDING,
    )


def per_hour(milli_gpus: int, price: int, currency: str) -> int:
    """Minor units an hour of `milli_gpus` at `price` (millionths per GPU-hour)."""
    return money.round_half_away(money.exact_amount(milli_gpus * 3600, price, currency))
