"""Operators: what they do to their listings, their prices, their hosts and, when the grid calls, their watts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from random import Random
from typing import Any

from sandbox.client import RefusedError
from sandbox.market import ladders
from sandbox.market.clock import Clock, Diary
from sandbox.market.plant import Operator
from sandbox.market.site import Facility

WEEK, HOUR, MINUTE = timedelta(days=7), timedelta(hours=1), timedelta(minutes=1)
USUAL = {"illegal_transition", "conflict", "listing_incomplete", "invalid_request"}
PRICED = ("on_demand_price", "reserved_price", "flexible_price", "spot_floor")


class Desk:
    """One operator at work."""

    def __init__(
        self, owner: Operator, clock: Clock, diary: Diary, dice: Random, counts: Counter[str], wrong: list[str], prices: Random,
        grid: Random,
    ) -> None:  # fmt: skip
        self.owner, self.clock, self.diary, self.counts, self.wrong = owner, clock, diary, counts, wrong
        self.dice, self.prices, self.grid = dice, prices, grid
        self.calls = 0

    def begin(self, start: datetime) -> None:
        """Acts recur in their own rhythms; the first of each comes early enough for a run of a few days."""
        for act, hours in ((self.reprice, 40), (self.pause, 90), (self.rise, 220), (self.maintain, 60), (self.curtail, 26),
                           (self.replace, 500), (self.plan, 45)):  # fmt: skip
            self._again(act, start + HOUR * self.dice.uniform(2, min(60, hours)), hours, self.dice)
        self._again(self.price_anew, start + HOUR / 2, 36, self.prices)
        self._again(self.curtail_deep, start + HOUR * self.grid.uniform(3, 9), 10, self.grid)

    def _again(self, act: Callable[[], None], at: datetime, hours: float, dice: Random) -> None:
        def turn() -> None:
            self.tried(act)
            self._again(act, self.clock.now + HOUR * dice.uniform(0.5, 1.5) * hours, hours, dice)

        self.diary.put(at.replace(minute=at.minute // 30 * 30, second=0), turn)

    def tried(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except RefusedError as refused:
            self.counts[f"refused: {refused.code}"] += 1
            if refused.code not in USUAL:
                self.wrong.append(f"{self.owner.name} ({act.__name__}) was answered {refused}")

    # --- listings
    def reprice(self) -> None:
        """Other prices for who comes next; what is signed keeps its own."""
        listing = self._listing()
        row = self.owner.desk.get(f"listings/{listing}")
        kinds = {"on_demand_price": "on_demand", "reserved_price": "reserved", "flexible_price": "flexible"}
        name = self.dice.choice(list(kinds))
        percent = self.dice.choice((90, 96, 104, 112))
        price = row["prices"][kinds[name]]["per_gpu_hour"] * percent // 100
        tiers = ladders.scaled(row["price_tiers"], kinds[name], percent)
        self.owner.desk.patch(f"listings/{listing}", {name: price, "price_tiers": tiers})
        self.counts["listings edited"] += 1

    def price_anew(self) -> None:
        """Other prices by term, by share at signing and by curtailment, all at once; sometimes none."""
        listing = self.prices.choice(sorted(self.owner.listings))
        row = self.owner.desk.get(f"listings/{listing}")
        prices = {kind: row["prices"][kind]["per_gpu_hour"] for kind in ("reserved", "flexible")}
        tiers = ladders.ladder(self.prices, prices, row["terms"])
        self.owner.desk.patch(f"listings/{listing}", {"price_tiers": tiers})
        self.counts["prices by term, share and curtailment set"] += 1

    def pause(self) -> None:
        listing = self._listing()
        self.owner.desk.post(f"listings/{listing}/pause")
        self.counts["listings paused"] += 1
        back = self.clock.now + HOUR * self.dice.choice((2, 9, 20))
        self.diary.put(back, lambda: self.tried(lambda: self.owner.desk.post(f"listings/{listing}/publish")))

    def replace(self) -> None:
        """A listing is retired, another takes over its hosts; where contracts hold them it waits, and is published again later."""
        listing = self._listing()
        old = self.owner.desk.get(f"listings/{listing}")
        hosts = [row["id"] for row in self.owner.desk.every("hosts", listing=listing)]
        prices = {k: old["prices"][k]["per_gpu_hour"] for k in old["prices"]}
        body = {
            "site": old["site"]["id"], "title": old["title"], "gpu_model": self.owner.listings[listing], "min_term_hours": 2,
            "max_term_days": 40, "flexible_hours_per_month": 6, "on_demand_price": prices["on_demand"],
            "reserved_price": prices["reserved"], "flexible_price": prices["flexible"], "spot_floor": prices["spot"],
        }  # fmt: skip
        plain = {"upfront_permille": 0, "flexible_hours_per_month": body["flexible_hours_per_month"]}
        body["price_tiers"] = ladders.ladder(self.prices, prices, plain)
        self.owner.desk.post(f"listings/{listing}/retire")
        self.counts["listings retired"] += 1
        made = self.owner.desk.post("listings", body)["id"]
        self.owner.listings[made] = self.owner.listings.pop(listing)
        self._take_over(made, hosts)

    def _take_over(self, listing: str, hosts: list[str]) -> None:
        """Hosts move as what is promised of them ends."""
        mine = {row["id"] for row in self.owner.desk.every("hosts", listing=listing)}
        for each in [h for h in hosts if h not in mine]:
            try:
                self.owner.desk.patch(f"listings/{listing}", {"hosts": sorted({*mine, each})})
                mine.add(each)
            except RefusedError as refused:
                if refused.code not in USUAL:
                    raise
        if mine and self.owner.desk.get(f"listings/{listing}")["state"] == "draft":
            self.owner.desk.post(f"listings/{listing}/publish")
        if mine != set(hosts):
            self.diary.put(self.clock.now + 24 * HOUR, lambda: self.tried(lambda: self._take_over(listing, hosts)))

    def rise(self) -> None:
        """Another price of a contract by use: a higher one asks for its customer's consent, a lower one counts at once."""
        rows = [
            r
            for r in self.owner.desk.get("contracts", state="active", kind="on_demand", limit=50)["data"]
            if not r["ends_at"]
        ]
        if not rows:
            return
        row = self.dice.choice(rows)
        price = row["price"]["per_gpu_hour"] * self.dice.choice((85, 110, 120)) // 100
        at = (self.clock.now + timedelta(days=30, minutes=self.dice.randrange(2, 600))).replace(second=0, microsecond=0)
        body = {"kind": "price", "price": price, "effective_at": at.isoformat(), "reason": "energy"}
        self.owner.desk.post(f"contracts/{row['id']}/amendments", body)
        self.counts["prices proposed"] += 1

    # --- sites
    def maintain(self) -> None:
        """A host leaves at an hour that is told ahead, and comes back."""
        site = self.dice.choice(self.owner.sites)
        rows = [r for r in self.owner.desk.every("hosts", site=site.public_id) if r["state"] == "active"]
        if not rows:
            return
        host = self.dice.choice(rows)
        by = self.clock.now.replace(second=0, microsecond=0) + HOUR * self.dice.choice((4, 24, 170))
        until = by + HOUR * self.dice.choice((2, 6))
        body = {"reason": "fans", "category": "hardware", "by": by.isoformat(), "until": until.isoformat()}
        self.owner.desk.post(f"hosts/{host['id']}/drain", body)
        self.counts["maintenance drains"] += 1
        self.diary.put(until, lambda: self.tried(lambda: self.owner.desk.post(f"hosts/{host['id']}/undrain")))

    def plan(self) -> None:
        """Work on a host, a rack, a branch of the power tree or the whole site, mostly with its week of notice. Where too little is
        left, it is put off, declared an emergency, or given up.
        """
        site: Facility = self.dice.choice(self.owner.sites)
        starts = self.clock.now.replace(second=0, microsecond=0) + HOUR * self.dice.choice((3, 30, 175, 200, 260))
        ends = starts + HOUR * self.dice.choice((1, 3, 8))
        body = self._scope(site) | {
            "site": site.public_id, "starts_at": starts.isoformat(), "ends_at": ends.isoformat(), "text": "work on the hall",
        }  # fmt: skip
        made = self.owner.desk.post("maintenances", body)
        path = f"maintenances/{made['id']}"
        impact = self.owner.desk.get(f"{path}/impact")
        if impact["firm_contracts"] and starts - self.clock.now < WEEK:
            fate = self.dice.random()
            if fate < 0.2:
                self.owner.desk.post(f"{path}/cancel")
                self.counts["maintenance: drafts given up"] += 1
                return
            if fate < 0.5:
                self.owner.desk.patch(path, {"emergency": True, "emergency_reason": "a pump fails"})
                self.counts["maintenance: emergencies"] += 1
            else:
                starts, ends = starts + WEEK, ends + WEEK
                self.owner.desk.patch(path, {"starts_at": starts.isoformat(), "ends_at": ends.isoformat()})
        self.owner.desk.post(f"{path}/announce")
        self.counts["maintenance: announced"] += 1
        self._then(path, starts, ends)

    def _scope(self, site: Facility) -> dict[str, Any]:
        scope = self.dice.choice(("hosts", "hosts", "hosts", "domain", "node", "site"))
        if scope == "hosts":
            rows = [r["id"] for r in self.owner.desk.every("hosts", site=site.public_id)]
            return {
                "scope": scope,
                "hosts": self.dice.sample(rows, self.dice.choice((1, 1, 2))),
                "category": "hardware",
            }
        if scope == "domain":
            return {"scope": scope, "domain": f"leaf-{self.dice.randrange(2)}", "category": "network"}
        nodes = self.owner.desk.get(f"sites/{site.public_id}/power-nodes")["data"]
        node = self.dice.choice([n for n in nodes if (n["parent"] is None) == (scope == "site")])
        named = {"node": node["id"]} if scope == "node" else {}
        capped = {"cap_w": node["cap_w"] * 6 // 10} if self.dice.random() < 0.4 else {}
        return {"scope": scope, "category": "power", **named, **capped}

    def _then(self, path: str, starts: datetime, ends: datetime) -> None:
        """What becomes of announced work before and during its window; most of it is done in time."""
        fate = self.dice.random()
        middle = starts + (ends - starts) / 2
        later, until = (
            {"ends_at": (ends + HOUR * 2).isoformat(), "reason": "a part is missing"},
            {"text": "more work on the hall"},
        )
        inside = {"ends_at": (ends - MINUTE * 30).isoformat()}
        before = self.clock.now + (starts - self.clock.now) / 2
        for share, at, verb, body in (
            (0.12, before, "cancel", None), (0.22, before, "change", until), (0.3, before, "change", inside),
            (0.5, middle, "extend", later), (0.7, middle, "finish", None),
        ):  # fmt: skip
            if fate < share:
                self.diary.put(at, lambda verb=verb, body=body: self.tried(lambda: self._step(path, verb, body)))  # type: ignore[misc]
                return

    def _step(self, path: str, verb: str, body: dict[str, Any] | None) -> None:
        if verb == "change":
            self.owner.desk.patch(path, body or {})
        else:
            self.owner.desk.post(f"{path}/{verb}", body)
        self.counts[f"maintenance: {verb}"] += 1

    def curtail(self) -> None:
        """The grid calls: down to a part of the site's power for an hour or more, at once or soon. Some calls are taken back."""
        site: Facility = self.dice.choice(self.owner.sites)
        nodes = self.owner.desk.get(f"sites/{site.public_id}/power-nodes")["data"]
        root = next(n for n in nodes if n["parent"] is None)
        self.calls += 1
        starts = self.clock.now + MINUTE * self.dice.choice((0, 0, 10, 45))
        body = {
            "node": root["id"], "cap_w": root["cap_w"] * self.dice.choice((25, 35, 50, 70)) // 100, "starts_at": starts.isoformat(),
            "ends_at": (starts + MINUTE * self.dice.choice((30, 60, 120, 240))).isoformat(),
            "reference": f"{self.owner.name} {self.calls}",
        }  # fmt: skip
        made = self.owner.desk.post("curtailments", body)
        self.counts["curtailments"] += 1
        if self.dice.random() < 0.15:
            at = self.clock.now + MINUTE * 20
            self.diary.put(at, lambda: self.tried(lambda: self.owner.desk.post(f"curtailments/{made['id']}/cancel")))

    def curtail_deep(self) -> None:
        """The grid calls for some of the power that the GPUs in use may draw now: what hashes, spot and flexible work are not always
        enough for it, and whoever stays runs on fewer watts a GPU.
        """
        site: Facility = self.grid.choice(self.owner.sites)
        nodes = self.owner.desk.get(f"sites/{site.public_id}/power-nodes")["data"]
        root = next(n for n in nodes if n["parent"] is None)
        hosts = site.machines.values()
        room = sum(limit - m.min_w for m in hosts if m.state != "parked" for limit in m.limits)
        if not room:
            return
        kept = sum(m.watts for m in hosts) - room * self.grid.choice((20, 40, 60, 80)) // 100
        asleep = sum(a.ladder[0] for a in site.asics.values())
        tree = site.nodes[root["name"]]
        cap_w = (kept * tree.k_gpu + asleep * tree.k_miner) // 1000 + root["margin_w"] + tree.fixed_w
        self.calls += 1
        starts = self.clock.now + MINUTE * self.grid.choice((0, 10))
        body = {
            "node": root["id"], "cap_w": min(cap_w, root["cap_w"]), "starts_at": starts.isoformat(),
            "ends_at": (starts + MINUTE * self.grid.choice((30, 60, 120))).isoformat(), "reference": f"{self.owner.name} {self.calls}",
        }  # fmt: skip
        made = self.owner.desk.post("curtailments", body)
        self.counts["curtailments, below what work draws"] += 1
        if self.grid.random() < 0.2:
            at = self.clock.now + MINUTE * 20
            self.diary.put(at, lambda: self.tried(lambda: self.owner.desk.post(f"curtailments/{made['id']}/cancel")))

    def _listing(self) -> str:
        return self.dice.choice(sorted(self.owner.listings))
