"""Limits that jobs share: a contract's ceiling and its organization's own. They are feasibility: they refuse, they never order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from scheduler.core.types import Reason, Request

Key = tuple[str, int]
_REASON: Final = {"quota": Reason.OVER_QUOTA, "org": Reason.ORGANIZATION_LIMIT}


class Quotas:
    """What is still free under each limit, milli-GPU. A job that waits gives back what it was charged; one with a promise keeps it."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self.left: dict[Key, int] = {}
        for r in requests:
            for key, free in _limits(r):
                self.left[key] = min(free, self.left.get(key, free))

    def charge(self, r: Request) -> Reason:
        """Takes the job off all its limits: OK; or says which has not that much left, and takes nothing."""
        if not r.quota_id and 0 <= r.quota_milli < _need(r):
            return Reason.OVER_QUOTA
        keys = [key for key, _ in _limits(r)]
        bound = next((_REASON[key[0]] for key in keys if self.left[key] < _need(r)), Reason.OK)
        for key in keys if bound is Reason.OK else ():
            self.left[key] -= _need(r)
        return bound

    def refund(self, r: Request) -> None:
        """Undoes `charge`."""
        for key, _ in _limits(r):
            self.left[key] += _need(r)


def _need(r: Request) -> int:
    return r.replicas * r.gpus * r.gpu_milli


def _limits(r: Request) -> list[tuple[Key, int]]:
    """Limits that the job shares with others, and the milli-GPU free under each."""
    found = [(("quota", r.quota_id), r.quota_milli)] if r.quota_id and r.quota_milli >= 0 else []
    return [*found, (("org", r.org), r.limit_milli)] if r.limit_milli >= 0 else found
