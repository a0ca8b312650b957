"""Calls of the grid that may take jobs of a contract and are not over: what its people can read before it happens.

By the same rules as `services.sheds` takes them. No query where nothing gives way, one where no call stands.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

from marketplace.models import Contract, Curtailment, Host, Kind
from marketplace.services import sheds
from marketplace.services.curtailment_reports import below


@dataclass(frozen=True)
class Ahead:
    """`leaves_from`: none of the contract's jobs is asked to leave before, and perhaps none is at all."""

    call: Curtailment
    leaves_from: datetime


def ahead(contracts: Collection[Contract], now: datetime) -> dict[int, list[Ahead]]:
    """Contract -> the calls that may take jobs of it, in order of their start; contracts without any are left out."""
    willing = [c for c in contracts if c.kind in {Kind.SPOT, Kind.FLEXIBLE} or c.emergency_notice_s is not None]
    if not willing:
        return {}
    calls = Curtailment.objects.filter(
        site_id__in={c.site_id for c in willing}, state__in=("announced", "active"), mandatory=True, ends_at__gt=now
    ).select_related("node")
    found: dict[int, list[Ahead]] = defaultdict(list)
    for call in calls.order_by("starts_at", "pk"):
        hosts = Host.objects.filter(power_node__in=below(call.node), listing__in={c.listing_id for c in willing})
        reached = set(hosts.order_by().values_list("listing_id", flat=True))
        for contract in willing:
            if contract.site_id == call.site_id and contract.listing_id in reached:
                at = _leaves_from(contract, call, now)
                found[contract.pk] += [] if at is None else [Ahead(call, at)]
    return {pk: rows for pk, rows in found.items() if rows}


def _leaves_from(contract: Contract, call: Curtailment, now: datetime) -> datetime | None:
    """Spot at once, flexible after its notice while it has hours left, firm only in an emergency that its contract names."""
    if contract.kind == Kind.SPOT:
        return call.starts_at
    notices = (
        [contract.flexible_notice_s] if contract.kind == Kind.FLEXIBLE and sheds.hours_left(contract, call, now) else []
    )
    if call.emergency and contract.emergency_notice_s is not None:
        notices.append(contract.emergency_notice_s)
    if not notices:
        return None
    told = max(call.created_at, contract.created_at)  # who signs after it was announced is told by signing
    return max(call.starts_at, told + timedelta(seconds=min(notices)))


def shown(row: Ahead) -> dict[str, object]:
    """The resource."""
    return {
        "id": row.call.public_id,
        "object": "grid_call",
        "starts_at": row.call.starts_at,
        "ends_at": row.call.over_at,
        "emergency": row.call.emergency,
        "leaves_from": row.leaves_from,
    }
