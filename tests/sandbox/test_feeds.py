"""The sandbox feeds: shapes of the real ones, seeded, and able to fail."""

import asyncio
from datetime import datetime

import httpx
import pytest

from sandbox.feeds import Feeds, Market

pytestmark = pytest.mark.serverless
NOW = 1_795_000_000.0
PATHS = (
    "/api/v1/mining/hashrate/3d",
    "/api/v1/mining/reward-stats/144",
    "/api/v1/prices",
    "/api/v1/difficulty-adjustment",
    "/energy",
)


def drive(check, clock=lambda: NOW):
    async def go():
        feeds = Feeds(7, 0, clock)
        await feeds.httpd.start()
        async with httpx.AsyncClient(base_url=feeds.httpd.url, trust_env=False) as client:
            await check(feeds, client)
        await feeds.httpd.stop()

    asyncio.run(go())


def test_shapes():
    async def check(_feeds, client):
        found = {path: (await client.get(path)).json() for path in PATHS}
        rate, rewards, prices, _, energy = found.values()
        assert rate["currentDifficulty"] > 1e14
        assert rate["currentHashrate"] == pytest.approx(rate["currentDifficulty"] * 2**32 / 600, rel=0.05)
        assert all(isinstance(rewards[k], str) for k in ("totalReward", "totalFee", "totalTx")), "theirs are strings"
        blocks = rewards["endBlock"] - rewards["startBlock"] + 1
        assert blocks == 144
        assert int(rewards["totalReward"]) - int(rewards["totalFee"]) == 144 * 312_500_000
        assert prices["time"] == int(NOW)
        assert 50_000 < prices["USD"] < 150_000
        zones = {row["zone"] for row in energy["prices"]}
        assert {"", "HB_WEST"} <= zones
        begun = [row for row in energy["prices"] if datetime.fromisoformat(row["start"]).timestamp() <= NOW]
        assert {row["market"] for row in begun} == {"day_ahead", "real_time"}
        height = (await client.get("/api/blocks/tip/height")).json()
        assert height == rewards["endBlock"]

    drive(check)


def test_a_hashprice_of_the_published_order():
    market = Market(7)
    reward = int(market.rewards(NOW, 144)["totalReward"]) / 144 / 1e8
    usd = 1e15 * 86_400 / (market.difficulty(NOW) * 2**32) * reward * market.price(NOW)
    assert 30 < usd < 50


def test_seeded_and_moving():
    assert Market(1).energy(NOW) == Market(1).energy(NOW)
    assert Market(1).price(NOW) != Market(2).price(NOW)
    assert Market(1).price(NOW) != Market(1).price(NOW + 86_400)


def test_faults():
    now = [NOW]

    async def check(_feeds, client):
        for fault in ("zero", "stale", "down"):
            await client.post("/control/fault", json={"fault": fault})
            now[0] += 7200
            answer = await client.get("/api/v1/prices")
            if fault == "zero":
                assert answer.json()["USD"] == 0
                assert (await client.get("/api/v1/mining/hashrate/3d")).json()["currentDifficulty"] == 0
                assert all(row["usd_per_mwh"] == 0 for row in (await client.get("/energy")).json()["prices"])
            elif fault == "stale":
                assert answer.json()["time"] == int(now[0]) - 7200
            else:
                assert answer.status_code == 503
        await client.post("/control/fault", json={"fault": ""})
        assert (await client.get("/api/v1/prices")).json()["time"] == int(now[0])
        assert (await client.post("/control/fault", json={"fault": "odd"})).status_code == 400
        assert (await client.get("/nothing")).status_code == 404

    drive(check, lambda: now[0])
