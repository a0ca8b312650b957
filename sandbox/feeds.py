"""Market feeds on loopback: `python -m sandbox.feeds --port P [--seed S]`.

The shapes of mempool.space (strings where theirs are strings) and an energy price:

    GET /api/v1/mining/hashrate/3d        {"hashrates", "difficulty", "currentHashrate", "currentDifficulty"}
    GET /api/v1/mining/reward-stats/144   {"startBlock", "endBlock", "totalReward", "totalFee", "totalTx"}  (strings of sat)
    GET /api/v1/difficulty-adjustment
    GET /api/v1/prices                    {"time", "USD", "EUR", ...}
    GET /api/blocks/tip/height            a number
    GET /pool/payouts?since=T[&phs=N]     {"payouts": [{"id", "start", "end", "sat", "usd"}]}  of each day that is over, for N PH/s
    GET /energy                           {"source", "prices": [{"zone", "start", "end", "market", "usd_per_mwh"}]}
    POST /control/fault                   {"fault": "" | "zero" | "stale" | "down"}

Values are a pure function of seed and time, so that two runs at one instant agree. `zero` answers a hashrate of 0 (as
theirs does while its node is down) and payouts of 0, `stale` answers what was true when it was set, `down` answers 503,
`restated` answers other figures for payouts that were told before. With a bearer the pool's payouts want that token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from random import Random
from typing import Any

from sandbox.site.httpd import Httpd, Request

FAULTS = ("", "zero", "stale", "down", "restated")
DAY = 86_400
POOL_FEE = 0.02
BLOCK_S = 600
# A plausible state of the network (research/power.md, section 4), from which seeded walks start.
EPOCH = 1_767_225_600  # 2026-01-01T00:00:00Z
HEIGHT = 930_300
DIFFICULTY = 148.26e12
BTC_USD = 91_132.0
SUBSIDY = 5_000_000_000
# Base price by zone; the nameless zone is the system price, for a site whose zone the feed does not carry. `us-tx` is where
# the demo's mines stand: a windy corner behind a bottleneck, as mines choose, where hashing pays at almost every hour.
ZONES = {"": 39.0, "us-tx": 20.0, "HB_WEST": 34.0, "HB_NORTH": 41.0, "LZ_HOUSTON": 45.0}


def wave(seed: int, name: str, at: float, period_s: float) -> float:
    """A smooth, seeded value in about -1..1: three sines of unlike periods."""
    rng = Random(f"{seed}:{name}")
    parts = [(period_s * k, rng.uniform(0, 2 * math.pi)) for k in (1.0, 0.37, 2.71)]
    return sum(math.sin(2 * math.pi * at / p + phase) for p, phase in parts) / 3


class Market:
    def __init__(self, seed: int = 1) -> None:
        self.seed = seed

    def height(self, at: float) -> int:
        return HEIGHT + int((at - EPOCH) // BLOCK_S)

    def difficulty(self, at: float) -> float:
        period = self.height(at) // 2016
        return DIFFICULTY * (1 + 0.04 * wave(self.seed, "difficulty", period * 2016 * BLOCK_S, 200 * 86_400))

    def price(self, at: float) -> int:
        return round(
            BTC_USD
            * (1 + 0.06 * wave(self.seed, "btc", at, 12 * 86_400) + 0.004 * wave(self.seed, "btc-min", at, 1800))
        )

    def hashrate(self, at: float) -> float:
        """Hashes a second that solve the difficulty every ten minutes, give or take luck."""
        return self.difficulty(at) * 2**32 / BLOCK_S * (1 + 0.03 * wave(self.seed, "luck", at, 86_400))

    def hashrates(self, at: float) -> dict[str, Any]:
        day = int(at // 86_400) * 86_400
        days = [day - 86_400 * k for k in (2, 1, 0)]
        difficulty = self.difficulty(at)
        return {
            "hashrates": [{"timestamp": d, "avgHashrate": round(self.hashrate(d))} for d in days],
            "difficulty": [
                {"time": days[0], "height": self.height(days[0]), "difficulty": difficulty, "adjustment": 1.0}
            ],
            "currentHashrate": round(self.hashrate(at)),
            "currentDifficulty": difficulty,
        }

    def rewards(self, at: float, blocks: int) -> dict[str, Any]:
        end = self.height(at)
        subsidy = SUBSIDY >> (end // 210_000)
        fee = round(blocks * subsidy * 0.006 * (1 + 0.5 * wave(self.seed, "fees", at, 43_200)))
        return {
            "startBlock": end - blocks + 1,
            "endBlock": end,
            "totalReward": str(blocks * subsidy + fee),
            "totalFee": str(fee),
            "totalTx": str(blocks * 3100),
        }

    def adjustment(self, at: float) -> dict[str, Any]:
        height = self.height(at)
        done = height % 2016
        remaining = 2016 - done
        return {
            "progressPercent": done / 20.16,
            "difficultyChange": 100 * (self.difficulty(at + remaining * BLOCK_S) / self.difficulty(at) - 1),
            "estimatedRetargetDate": int((at + remaining * BLOCK_S) * 1000),
            "remainingBlocks": remaining,
            "remainingTime": remaining * BLOCK_S * 1000,
            "previousRetarget": 0.0,
            "nextRetargetHeight": height + remaining,
            "timeAvg": BLOCK_S * 1000,
            "adjustedTimeAvg": BLOCK_S * 1000,
            "timeOffset": 0,
            "expectedBlocks": float(done),
        }

    def prices(self, at: float) -> dict[str, Any]:
        usd = self.price(at)
        return {
            "time": int(at),
            "USD": usd,
            "EUR": round(usd * 0.86),
            "GBP": round(usd * 0.75),
            "CAD": round(usd * 1.38),
        }

    def payouts(self, since: float, at: float, phs: float) -> list[dict[str, Any]]:
        """FPPS for the UTC days in [since, at), a payout a day: subsidy and fees of the shares at the day's difficulty, less the fee."""
        rows = []
        for day in range(int(since // DAY) * DAY, int(at // DAY) * DAY, DAY):
            paid = self.rewards(day, 144)
            reward = int(paid["totalReward"]) / 144
            sat = round(phs * 1e15 * DAY / (self.difficulty(day) * 2**32) * reward * (1 - POOL_FEE))
            begin, end = (datetime.fromtimestamp(t, UTC) for t in (day, day + DAY))
            usd = f"{sat * self.price(day + DAY) / 1e8:.2f}"
            rows.append(
                {"id": f"{begin:%Y%m%d}", "start": begin.isoformat(), "end": end.isoformat(), "sat": sat, "usd": usd}
            )
        return rows

    def day_ahead(self, hour: float, zone: str) -> float:
        """USD per MWh of the hour: an evening peak, a solar valley and a swing over days. Raises KeyError for an unknown zone."""
        of_day = (hour % 86_400) / 3600
        evening = 1.1 * math.exp(-((((of_day + 11) % 24) - 12) ** 2) / 6)  # 19 h in Texas is 01 h UTC
        solar = -0.55 * math.exp(-((of_day - 19.0) ** 2) / 10)
        swing = 0.25 * wave(self.seed, zone, hour, 5 * 86_400)
        return ZONES[zone] * (1 + evening + solar + swing)

    def real_time(self, five: float, zone: str) -> float:
        """USD per MWh of a five-minute interval: around the day-ahead price, with rare spikes."""
        spike = 4.0 if wave(self.seed, f"{zone}-spike", five, 7 * 86_400) > 0.93 else 1.0
        return (
            self.day_ahead(five // 3600 * 3600, zone) * spike * (1 + 0.15 * wave(self.seed, f"{zone}-rt", five, 5400))
        )

    def energy(self, at: float, *, zero: bool = False) -> dict[str, Any]:
        """24 day-ahead hours from the current one, and the current five-minute interval, for every zone."""
        hour, five = at // 3600 * 3600, at // 300 * 300
        rows = []
        for zone in ZONES:
            hours = [(hour + 3600 * k, 3600, "day_ahead", self.day_ahead(hour + 3600 * k, zone)) for k in range(24)]
            for start, length, market, price in (*hours, (five, 300, "real_time", self.real_time(five, zone))):
                begin, end = (datetime.fromtimestamp(t, UTC).isoformat() for t in (start, start + length))
                value = 0.0 if zero else round(price, 2)
                rows.append({"zone": zone, "start": begin, "end": end, "market": market, "usd_per_mwh": value})
        return {"source": "tailrace-sandbox", "prices": rows}


class Feeds:
    def __init__(self, seed: int = 1, port: int = 0, clock: Callable[[], float] = time.time, bearer: str = "") -> None:
        self.market, self.clock, self.bearer = Market(seed), clock, bearer
        self.fault, self.fault_at = "", 0.0
        self.httpd = Httpd(self.handle, port)

    def set_fault(self, fault: str) -> None:
        """Raises ValueError for an unknown fault."""
        if fault not in FAULTS:
            raise ValueError(f"unknown fault {fault!r}; known: {', '.join(f for f in FAULTS if f)}")
        self.fault, self.fault_at = fault, self.clock()

    async def handle(self, request: Request) -> tuple[int, Any]:
        if request.path == "/control/fault" and request.method == "POST":
            self.set_fault(str(request.json()["fault"]))
            return 200, {}
        if self.fault == "down":
            return 503, {"error": {"code": "unavailable", "message": "the feed is down"}}
        at = self.fault_at if self.fault == "stale" else self.clock()
        market = self.market
        match [p for p in request.path.split("/") if p]:
            case ["api", "v1", "mining", "hashrate", "3d"]:
                value = market.hashrates(at)
                if self.fault == "zero":
                    value |= {"currentHashrate": 0, "currentDifficulty": 0}
                return 200, value
            case ["api", "v1", "mining", "reward-stats", count]:
                value = market.rewards(at, max(1, min(int(count), 2016)))
                return 200, value | ({"totalReward": "0", "totalFee": "0"} if self.fault == "zero" else {})
            case ["api", "v1", "difficulty-adjustment"]:
                return 200, market.adjustment(at)
            case ["api", "v1", "prices"]:
                value = market.prices(at)
                return 200, value | ({"USD": 0, "EUR": 0} if self.fault == "zero" else {})
            case ["api", "blocks", "tip", "height"]:
                return 200, market.height(at)
            case ["pool", "payouts"]:
                return self.payouts(request, at)
            case ["energy"]:
                return 200, market.energy(at, zero=self.fault == "zero")
        return 404, {"error": {"code": "not_found", "message": request.path}}

    def payouts(self, request: Request, at: float) -> tuple[int, Any]:
        if self.bearer and request.headers.get("authorization") != f"Bearer {self.bearer}":
            return 401, {"error": "who are you?"}
        since = datetime.fromisoformat(request.query.get("since", "1970-01-01T00:00:00Z")).timestamp()
        rows = self.market.payouts(max(since, at - 60 * DAY), at, float(request.query.get("phs", "1")))
        if self.fault in {"zero", "restated"}:
            less = 0 if self.fault == "zero" else 1
            rows = [row | {"sat": row["sat"] * less - less, "usd": "0" if not less else row["usd"]} for row in rows]
        return 200, {"payouts": rows}


async def serve(feeds: Feeds) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await feeds.httpd.start()
    print(f"feeds: {feeds.httpd.url}", flush=True)
    await stop.wait()
    await feeds.httpd.stop()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sandbox.feeds", description="hashprice inputs and energy prices on loopback"
    )
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve(Feeds(args.seed, args.port)))
    except OSError as error:
        print(f"feeds: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
