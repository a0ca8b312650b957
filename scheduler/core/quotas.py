"""Limits that jobs share: a contract's ceiling, its organization's of GPUs, and its organization's of what they cost an hour. They are
feasibility: they refuse, they never order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from scheduler.core.types import Reason, Request

Key = tuple[str, int]
_REASON: Final = {
    "quota": Reason.OVER_QUOTA, "org": Reason.ORGANIZATION_LIMIT, "rate": Reason.HOURLY_LIMIT,
}  # fmt: skip


class Quotas:
    """What is still free under each limit: milli-GPU, or billionths of the major unit an hour. A job that waits gives back what it was
    charged; one with a promise keeps it.
    """

    def __init__(self, requests: Iterable[Request]) -> None:
        self.left: dict[Key, int] = {}
        for r in requests:
            for key, free, _ in _limits(r):
                self.left[key] = min(free, self.left.get(key, free))

    def charge(self, r: Request) -> Reason:
        """Takes the job off all its limits: OK; or says which has not that much left, and takes nothing."""
        if not r.quota_id and 0 <= r.quota_milli < r.milli:
            return Reason.OVER_QUOTA
        limits = _limits(r)
        bound = next((_REASON[key[0]] for key, _, need in limits if self.left[key] < need), Reason.OK)
        for key, _, need in limits if bound is Reason.OK else ():
            self.left[key] -= need
        return bound

    def refund(self, r: Request) -> None:
        """Undoes `charge`."""
        for key, _, need in _limits(r):
            self.left[key] += need


def _limits(r: Request) -> list[tuple[Key, int, int]]:
    """Limits that the job shares with others: key, what is free under it, what the job needs."""
    found = []
    if r.quota_id and r.quota_milli >= 0:
        found.append((("quota", r.quota_id), r.quota_milli, r.milli))
    if r.limit_milli >= 0:
        found.append((("org", r.org), r.limit_milli, r.milli))
    if r.rate_left >= 0:
        found.append((("rate", r.org), r.rate_left, r.milli * r.price))
    return found
