"""Customers: each with habits of its own, a card, and a key. Whatever they do, they do through the API.

A refusal with a documented code is an answer; anything else (a 500, a code that the act cannot lead to) is a violation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import Any

from sandbox.client import RefusedError
from sandbox.market import ladders
from sandbox.market.clock import Clock, Diary
from sandbox.market.doors import Desk
from sandbox.market.screener import profile
from sandbox.market.trading import Trader

GOOD, FAILS, DEAD = "4242424242424242", "4000000000000341", "4000000000000002"
DAY, HOUR, MINUTE = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1)
# What the market may answer to an act that was meant well.
USUAL = {
    "capacity_gone", "no_capacity", "listing_unavailable", "card_required", "billing_suspended", "limit_exceeded", "quote_expired",
    "term_not_offered", "illegal_transition", "contract_inactive", "conflict", "too_many_holds", "payment_failed",
    "kind_not_offered", "over_ceiling", "never_fits", "in_use", "screening_required", "screening_rejected",
}  # fmt: skip
UNDER_FLOOR = ("limit", "book")  # a spot limit under the floor of the hour is an invalid_request


@dataclass(frozen=True)
class Habits:
    """What a kind of customer does: weights of its acts, hours between two of them, and how it answers."""

    name: str
    kinds: tuple[str, ...]
    every_h: float
    acts: dict[str, int]
    card: str = GOOD
    fails_from: float | None = None  # day of the run from which its card is declined
    mends_after: float | None = None  # days after that until it brings a good one; None: never
    rises: str = "accept"  # a price rise: accept, decline, silent
    gpus: tuple[int, ...] = (1, 2, 4, 8)


HOLDER = {
    "book": 3,
    "work": 8,
    "extend": 1,
    "resize": 1,
    "cancel": 1,
    "terminate": 0,
    "offer": 3,
    "withdraw": 1,
    "bid": 1,
}
BY_USE = {"book": 1, "work": 9, "cancel": 1}
HABITS = (
    Habits("Steady Models", ("on_demand",), 8, BY_USE),
    Habits("Ahead Labs", ("reserved",), 11, HOLDER, gpus=(4, 8, 16)),
    Habits("Flex Batch", ("flexible",), 8, {**HOLDER, "work": 12}, gpus=(8, 16)),
    Habits("Spot Hunters", ("spot",), 5, {"book": 1, "work": 10, "limit": 3, "cancel": 1}),
    Habits("Late Payers", ("on_demand", "reserved"), 13, BY_USE, fails_from=20, mends_after=18),
    Habits("Never Payers", ("on_demand", "flexible"), 13, BY_USE, fails_from=6),
    Habits("Fickle AI", ("reserved", "flexible"), 14, {**HOLDER, "terminate": 4}, gpus=(2, 4, 8)),
    Habits("Refusers", ("on_demand",), 11, {**BY_USE, "terminate": 1}, rises="decline"),
    Habits("Sleepers", ("on_demand", "spot"), 14, BY_USE, rises="silent"),
    Habits("Upfront Edge", ("reserved",), 16, HOLDER, fails_from=35, mends_after=6, gpus=(2, 4)),
    Habits("Bidders", ("reserved", "flexible"), 9, {"book": 1, "work": 4, "bid": 6, "offer": 1}, gpus=(1, 2, 4)),
    Habits("Carded Out", ("on_demand",), 96, {"book": 1}, card=DEAD),
    Habits("Bargain Spot", ("spot",), 6, {"book": 1, "work": 8, "limit": 2, "cancel": 1, "terminate": 1}),
)


@dataclass
class Customer(Trader):
    habits: Habits
    id: str
    desk: Desk
    clock: Clock
    diary: Diary
    dice: Random
    counts: Counter[str]
    wrong: list[str]
    prices: Random  # what it would pay at signing and bear
    busy: list[str] = field(default_factory=list)  # jobs of its own, newest last

    @property
    def gpus(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.habits.gpus

    def tell(self, name: str) -> None:
        """What screening asks for."""
        self.desk.put("verification", profile(name, "US"))

    def begin(self) -> None:
        self.diary.put(self.clock.now + HOUR * self.dice.randrange(1, 4), self.turn)

    def turn(self) -> None:
        """One act, and the hour of the next."""
        names = list(self.habits.acts)
        act = self.dice.choices(names, [self.habits.acts[n] for n in names])[0]
        if not self.live():
            act = "bid" if "bid" in names and self.dice.random() < 0.3 else "book"
        self.tried(act, getattr(self, act))
        if "on_demand" in self.habits.kinds and self.habits.rises != "silent" and self.dice.random() < 0.4:
            self.tried("answer", self.answer)
        wait = self.dice.expovariate(1 / self.habits.every_h)
        # To the hour: what several do falls on one instant.
        at = self.clock.now + max(HOUR, HOUR * wait)
        self.diary.put(at.replace(minute=0, second=0), self.turn)

    def tried(self, what: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except RefusedError as refused:
            self.counts[f"refused: {refused.code}"] += 1
            if refused.code == "terms_not_accepted":  # the refusal says how; the act comes again another time
                accept = refused.body["terms"]["accept"]
                return self.desk.post(accept["path"].removeprefix("/api/v1/"), accept["body"])
            if refused.code.startswith("screening_") and not self.unclear(refused.code):
                self.wrong.append(f"{self.habits.name} ({what}) is clear and was answered {refused}")
            if refused.code not in USUAL and not (
                refused.code == "invalid_request" and what in UNDER_FLOOR and "limit" in str(refused)
            ):
                self.wrong.append(f"{self.habits.name} ({what}) was answered {refused}")
        return None

    def unclear(self, code: str) -> bool:
        """Does one of its checks stand where such a refusal may come from?"""
        states = {check["state"] for check in self.desk.get("verification")["checks"]}
        return "rejected" in states if code == "screening_rejected" else states != {"clear"}

    def live(self, *kinds: str) -> list[dict[str, Any]]:
        """Its contracts in force, oldest first."""
        rows = self.desk.get("contracts", state="active", limit=50)["data"]
        return sorted((row for row in rows if not kinds or row["kind"] in kinds), key=lambda row: row["created_at"])

    def one(self, *kinds: str) -> dict[str, Any] | None:
        rows = self.live(*kinds)
        return self.dice.choice(rows) if rows else None

    # --- acts
    def book(self) -> None:
        """Search, a quote, and mostly its acceptance: at once, or when the hold has lapsed."""
        kind = self.dice.choice(self.habits.kinds)
        if len(self.live(kind)) >= (2 if kind in {"on_demand", "spot"} else 4):
            return self.work()
        found = self.desk.get("listings", kind=kind, limit=20)["data"]
        if kind in {"reserved", "flexible"}:
            found = self.of_others(found)
        if not found:
            return None
        listing = self.dice.choice(found)
        body = {"listing": listing["id"], "kind": kind, "gpu_count": self.dice.choice(self.habits.gpus)}
        if listing["resale"]:
            self.counts["quotes: of a resale"] += 1
        elif kind in {"reserved", "flexible"}:
            body |= self.window() | ladders.would(self.prices, kind)
        if kind == "spot":
            body["limit_price"] = listing["prices"]["spot"]["per_gpu_hour"] * self.dice.choice((105, 130, 200)) // 100
        quote = self.desk.post("quotes", body)
        self.counts[f"quotes: {kind}"] += 1
        fate = self.dice.random()
        if fate < 0.8:
            self.accept(quote, at_once=True)
        elif fate < 0.9:
            self.diary.put(self.clock.now + 10 * MINUTE, lambda: self.tried("late accept", lambda: self.accept(quote)))
        elif fate < 0.95:
            self.desk.post(f"quotes/{quote['id']}/release")
            self.counts["quotes released"] += 1
        return None

    def window(self) -> dict[str, str]:
        """At once or up to ten days ahead; for hours, or for days."""
        now = self.clock.now.replace(second=0, microsecond=0)
        now -= MINUTE * (now.minute % 30)
        ahead = self.dice.choice((0, 0, 3, 12, 40, 120, 240)) + self.dice.randrange(0, 2) / 2
        hours = self.dice.choice((4, 12, 30, 72, 72, 168, 400))
        starts = now + HOUR * (ahead + 0.5)
        ends = (starts + HOUR * hours).isoformat()
        return {"ends_at": ends} if ahead < 1 else {"starts_at": starts.isoformat(), "ends_at": ends}

    def accept(self, quote: dict[str, Any], *, at_once: bool = False) -> None:
        try:
            made = self.desk.post("contracts", quote["accept"]["body"])
        except RefusedError as refused:
            if at_once and refused.code == "capacity_gone":
                self.wrong.append(f"{quote['id']} held its capacity, and its acceptance was answered {refused}")
            raise
        self.counts[f"contracts: {made['kind']}"] += 1
        if made["kind"] in {"reserved", "flexible"} and self.dice.random() < 0.7:
            at = datetime.fromisoformat(made["starts_at"])
            self.diary.put(at, lambda: self.tried("claim", lambda: self.claim(made["id"])))

    def claim(self, contract: str) -> None:
        """All that was reserved is used, from the hour on; some for long."""
        row = self.desk.get(f"contracts/{contract}")
        if row["state"] != "active":
            return
        ends = datetime.fromisoformat(row["ends_at"])
        left = int((ends - self.clock.now).total_seconds())
        length = min(left, self.dice.choice((2 * 3600, 8 * 3600, left)))
        self.submit(row["id"], replicas=row["gpu_count"], seconds=max(300, length), name="claim")

    def work(self) -> None:
        row = self.one()
        if row is None or datetime.fromisoformat(row["starts_at"]) > self.clock.now:
            return
        gpus = self.dice.choice([n for n in (1, 1, 2, 4) if n <= row["gpu_count"]])
        hours = self.dice.choice((0.25, 1, 3, 6, 14))
        self.submit(row["id"], gpus=gpus, seconds=int(hours * 3600), name="work")

    def submit(self, contract: str, *, seconds: int, replicas: int = 1, gpus: int = 1, name: str = "") -> None:
        share = name == "work" and gpus == 1 and self.dice.random() < 0.2
        body = {
            "contract": contract, "command": ["sleep", str(seconds // 900 * 900 or 600)], "replicas": replicas, "gpus": gpus,
            "name": name, "vcpu_milli": 4_000, "ram_mib": 16_384, "checkpoint_grace_s": self.dice.choice((10, 30, 30)),
            "env": {"EXIT": "3"} if self.dice.random() < 0.04 else {}, "gpu_milli": 500 if share else 1000,
            "on_replica_loss": self.dice.choice(("restart_gang", "restart_gang", "replace_replica")),
            **({"max_seconds": seconds + 3600} if self.dice.random() < 0.7 else {}),
        }  # fmt: skip
        self.busy.append(self.desk.post("jobs", body)["id"])
        self.counts["jobs"] += 1

    def cancel(self) -> None:
        if self.busy:
            self.desk.post(f"jobs/{self.busy.pop()}/cancel")
            self.counts["jobs cancelled"] += 1

    def amend(self, body: dict[str, Any], contract: str) -> None:
        made = self.desk.post(f"contracts/{contract}/amendments", body)
        if self.dice.random() < 0.85:
            self.desk.post(f"contracts/{contract}/amendments/{made['id']}/accept")
            self.counts[f"amendments: {body['kind']}"] += 1

    def extend(self) -> None:
        row = self.one("reserved", "flexible")
        if row and row["ends_at"]:
            later = datetime.fromisoformat(row["ends_at"]).replace(second=0) + HOUR * self.dice.choice((2, 12, 48))
            self.amend({"kind": "extend", "ends_at": later.isoformat()}, row["id"])

    def resize(self) -> None:
        row = self.one("reserved", "flexible")
        if row:
            self.amend({"kind": "resize", "gpu_count": row["gpu_count"] + self.dice.choice((1, 2, 4))}, row["id"])

    def terminate(self) -> None:
        row = self.one()
        if row and "terminate" in row["actions"]:
            self.desk.post(f"contracts/{row['id']}/terminate", {})
            self.counts["terminated early"] += 1

    def limit(self) -> None:
        row = self.one("spot")
        if row:
            limit = row["limit_price"]["per_gpu_hour"] * self.dice.choice((85, 95, 110, 140)) // 100
            self.desk.patch(f"contracts/{row['id']}", {"limit_price": limit})
            self.counts["spot limits changed"] += 1

    # --- answers
    def answer(self) -> None:
        """Price rises that wait for it."""
        for row in self.live("on_demand"):
            for proposal in self.desk.get(f"contracts/{row['id']}/amendments", limit=20)["data"]:
                if self.habits.rises in proposal["actions"] and self.dice.random() < 0.3:
                    self.desk.post(f"contracts/{row['id']}/amendments/{proposal['id']}/{self.habits.rises}")
                    self.counts[f"price rises: {self.habits.rises}"] += 1

    def pay(self) -> None:
        """All that is open, with the card on file."""
        for row in self.desk.every("invoices", state="open"):
            if "pay" in row["actions"]:
                self.tried("pay", lambda row=row: self.desk.post(f"invoices/{row['id']}/pay"))  # type: ignore[misc]
