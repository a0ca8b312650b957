"""Screening as it goes on: the sandbox's service on a socket, led by the run's clock, and our own people at their queue."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from random import Random
from typing import Any, Self

from django.conf import settings

from marketplace.models import Screening
from marketplace.services import contracts, screening
from marketplace.tenancy import Actor
from sandbox.market.clock import Clock, Diary
from sandbox.screening import Service

HOUR = timedelta(hours=1)
KEY = "market"
WAIT_S = 1_800  # an answer is waited for so long, ten times as long where the name is slow
FAULTS = ("down", "error", "garbled")
STAFF = Actor(kind="staff", label="screening desk")
# Names decide at the service (sandbox.screening): who is found there, and is somebody else.
DENIED, NAMESAKE, SLOW = "Denied Holdings", "Undenied Brothers", "Slow Paper Works"


class Screener:
    """The service, for as long as the run lasts."""

    def __init__(self, clock: Clock) -> None:
        self.service = Service(key=KEY, clock=lambda: clock().timestamp())

    def __enter__(self) -> Self:
        self.serving = self.service.httpd.beside()
        self.serving.__enter__()
        self.before = (settings.SCREENING_PROVIDER, settings.SCREENING_URL, settings.SCREENING_KEY)
        settings.SCREENING_PROVIDER, settings.SCREENING_URL, settings.SCREENING_KEY = (
            "http",
            self.service.httpd.url,
            KEY,
        )
        return self

    def __exit__(self, *_: object) -> None:
        settings.SCREENING_PROVIDER, settings.SCREENING_URL, settings.SCREENING_KEY = self.before
        self.serving.__exit__(None, None, None)

    def control(self, **said: Any) -> None:
        self.service.control(said)


class Reviewers:
    """Our own people: twice a day at the queue of what the service would not decide; who was rejected is closed out days later."""

    def __init__(self, screener: Screener, clock: Clock, diary: Diary, dice: Random, counts: Counter[str]) -> None:
        self.screener, self.clock, self.diary, self.dice, self.counts = screener, clock, diary, dice, counts

    def begin(self) -> None:
        self.screener.control(wait=WAIT_S)
        self.diary.every(self.clock.now + HOUR * 9, HOUR * 12, self.review)
        self.diary.put(self.clock.now + HOUR * self.dice.uniform(4, 60), self.breaks)

    def review(self) -> None:
        waiting = Screening.objects.filter(needs_person=True).select_related("organization").order_by("pk")
        for row in list(waiting):
            found = [match["name"] for match in _matches(row)]
            if any(DENIED in name for name in found):
                self._decide(row, "rejected", f"it is on the list: {found}")
                self.diary.put(self.clock.now + HOUR * 40, lambda pk=row.organization_id: self._close_out(pk))  # type: ignore[misc]
            elif not row.message and self.dice.random() < 0.4:
                self._decide(row, "review", "a second paper would help", "Send us the register's extract.")
            else:
                self._decide(row, "clear", f"somebody else of that name: {found}")

    def _decide(self, row: Screening, to: str, reason: str, message: str = "") -> None:
        screening.decide(STAFF, row.pk, to, seen=row.version, reason=reason, message=message, now=self.clock.now)
        self.counts[f"screenings decided by a person: {to}"] += 1

    def _close_out(self, organization: int) -> None:
        gone = contracts.close_out(STAFF, organization, now=self.clock.now, reason="the sanctions check did not pass")
        self.counts["contracts closed out after a rejection"] += len(gone)

    def breaks(self) -> None:
        """The service is gone, or says what nobody understands, for some hours."""
        self.screener.control(fault=self.dice.choice(FAULTS))
        self.counts["fault: the screening service answers badly"] += 1
        self.diary.put(self.clock.now + HOUR * self.dice.choice((2, 8)), lambda: self.screener.control(fault=""))
        self.diary.put(self.clock.now + HOUR * self.dice.uniform(80, 240), self.breaks)


def _matches(row: Screening) -> list[dict[str, Any]]:
    """What the service has found, of the round that waits."""
    event = row.events.filter(what="answered", round=row.round).order_by("-pk").first()
    return list(event.evidence.get("matches", [])) if event else []


def profile(name: str, country: str) -> dict[str, Any]:
    """What an organization tells of itself."""
    return {
        "legal_name": f"{name} Inc.", "registration_number": f"R-{len(name)}{ord(name[0])}", "address": f"1 {name} Street",
        "beneficial_owners": [f"Ada {name.split(maxsplit=1)[0]}"], "end_use": "training of models", "end_use_countries": [country],
    }  # fmt: skip
