"""What customers do at the forward market: sell on what they hold, take it back, and stand in line for what is not there yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from random import Random
from typing import Any

from sandbox.market.clock import Clock, Diary
from sandbox.market.doors import Desk

DAY, HOUR, MINUTE = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1)
REGION, MODELS = "us-tx", ("H100-SXM", "L40S")


class Trader:
    """The acts; whoever has them is a customer."""

    desk: Desk
    clock: Clock
    diary: Diary
    dice: Random
    counts: Counter[str]
    tried: Callable[[str, Callable[[], Any]], Any]
    accept: Callable[..., None]
    live: Callable[..., list[dict[str, Any]]]
    gpus: tuple[int, ...]

    def offer(self) -> None:
        """Part of a contract in a window of it, at more or less than it cost; some of all of it."""
        rows = [row for row in self.live("reserved", "flexible") if "terminate" in row["actions"]]
        if not rows:
            return
        row = self.dice.choice(rows)
        first = max(self.clock.now, datetime.fromisoformat(row["starts_at"])) + HOUR * self.dice.choice((2, 6, 24))
        begins, ends = _half(first), _minute(datetime.fromisoformat(row["ends_at"]))
        ends = min(ends, begins + HOUR * self.dice.choice((3, 12, 48, 500)))
        if ends - begins < HOUR:
            return
        price = row["price"]["per_gpu_hour"] * self.dice.choice((50, 70, 90, 105)) // 100
        gpus = self.dice.choice([n for n in (1, 2, 4, row["gpu_count"]) if n <= row["gpu_count"]])
        asked = {"gpu_count": gpus, "starts_at": begins.isoformat(), "ends_at": ends.isoformat(), "price": price}
        terms = self.desk.get(f"contracts/{row['id']}/resale-terms", **asked)
        if gpus > terms["gpus"]:
            self.counts["resales not offered: its own jobs may need the GPUs"] += 1
            return
        self.desk.post("resales", {"contract": row["id"], **asked})
        self.counts["resales offered"] += 1

    def withdraw(self) -> None:
        rows = [row for row in self.desk.get("resales", state="open", limit=50)["data"] if "withdraw" in row["actions"]]
        if rows:
            self.desk.post(f"resales/{self.dice.choice(rows)['id']}/withdraw")
            self.counts["resales withdrawn"] += 1

    def bid(self) -> None:
        """For what somebody sells on, at its price or under it; or for days to come, at less than operators ask today."""
        kind = self.dice.choice(("reserved", "reserved", "flexible"))
        found = self.desk.get("listings", kind=kind, limit=20)["data"]
        resold = self.of_others(row for row in found if row["resale"])
        if resold and self.dice.random() < 0.5:
            row = self.dice.choice(resold)
            begins, ends = (datetime.fromisoformat(row["resale"][name]) for name in ("starts_at", "ends_at"))
            latest, percent = begins, self.dice.choice((80, 100, 110))
        elif found:
            row = self.dice.choice(found)
            begins = _half(self.clock.now) + HOUR * self.dice.choice((2, 30, 100))
            ends = begins + HOUR * self.dice.choice((4, 20, 60))
            latest, percent = begins + HOUR * self.dice.choice((0, 12, 72)), self.dice.choice((85, 95, 104))
        else:
            return
        if latest <= self.clock.now + MINUTE:
            return
        made = self.desk.post("bids", {
            "gpu_model": row["gpu_model"]["name"], "region": REGION, "kind": kind, "gpu_count": self.dice.choice(self.gpus), "min_gpus": 1,
            "earliest": begins.isoformat(), "latest": latest.isoformat(), "duration_s": int((ends - begins).total_seconds()),
            "limit_price": row["prices"][kind]["per_gpu_hour"] * percent // 100, "auto_accept": self.dice.random() < 0.6,
            "expires_at": (latest - MINUTE * self.dice.choice((0, 1))).isoformat(),
        })  # fmt: skip
        self.counts["bids placed"] += 1
        self.diary.put(self.clock.now + 2 * MINUTE, lambda: self.tried("answer", self.answer_quotes))
        if self.dice.random() < 0.15:
            at = self.clock.now + HOUR * 5
            self.diary.put(at, lambda: self.tried("cancel bid", lambda: self.desk.post(f"bids/{made['id']}/cancel")))

    def of_others(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Without its own offers."""
        mine = {row["listing"] for row in self.desk.get("resales", state="open", limit=50)["data"]}
        return [row for row in rows if row["id"] not in mine]

    def answer_quotes(self) -> None:
        """What its bids were quoted: mostly taken."""
        for quote in self.desk.get("quotes", state="open", limit=50)["data"]:
            if quote["bid"] and quote["accept"] and self.dice.random() < 0.7:
                self.accept(quote)
                self.counts["quotes of bids accepted"] += 1


def _half(at: datetime) -> datetime:
    """The next half hour."""
    at = at.replace(second=0, microsecond=0) + MINUTE * 29
    return at - MINUTE * (at.minute % 30)


def _minute(at: datetime) -> datetime:
    return at.replace(second=0, microsecond=0)
