"""A customer at work while one watches: the main job once, told step by step, then a trickle of jobs that keeps the market alive."""

import json
import os
import random
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import stripe

from sandbox.client import Client, Person, RefusedError, add_card, fill_in, wait_for
from sandbox.demo.people import OPERATOR, STAFF

PAUSE_S = 20.0  # between two jobs of the trickle
# Long enough that 24 GPUs come to more than the least that a card can be charged (0.50 USD).
SCRIPT = (
    'i=0; while [ $i -lt 24 ]; do i=$((i+1)); echo step $i loss $(awk "BEGIN{print 3/$i}"); sleep 2; done; echo done'
)


def tell(step: str, words: str) -> None:
    print(f"  {datetime.now(UTC):%H:%M:%S}  {step:<9} {words}", flush=True)


class Show:
    """The demo customer, the operator and our staff, each with their own way in."""

    def __init__(self, house: Path) -> None:
        self.base = os.environ["PUBLIC_URL"]
        self.logins = json.loads((house / "logins.json").read_text())
        self.api = Client(self.base, (house / "demo-key").read_text().strip())
        self.random = random.Random(7)

    def person(self, mail: str) -> Person:
        return Person(self.base).sign_in(mail, self.logins[mail])

    def main_job(self) -> None:
        """Listed, booked, placed, shed, running, metered, invoiced, paid, paid out, hashing again."""
        listing = self._listed()
        self._card()
        contract = self._booked(listing)
        site = self.person(OPERATOR)
        before = self._at_full_power(site, listing)
        job = self.api.post(
            "jobs",
            {
                "contract": contract,
                "name": "first training run",
                "command": ["/bin/sh", "-c", SCRIPT],
                "gpus": 8,
                "replicas": 3,
            },
        )
        tell("submitted", f"{job['id']}: 3 replicas of 8 GPUs, all or nothing")
        self._follow(job["id"])
        text = self.api.get(f"jobs/{job['id']}/logs")["data"].strip().splitlines()
        tell("log", f"{text[0]} ... {text[-1]}" if text else "(empty)")
        self._money()
        after = wait_for("the miners", lambda: self._more_awake(site, listing, before), seconds=120, every=3)
        tell("hashing", f"{after['awake']} miners awake, {after['asleep']} asleep: the watts hash again")

    def _listed(self) -> dict[str, Any]:
        row = max(self.api.get("listings", gpu_model="H100-SXM")["data"], key=lambda r: r["stock"]["gpus"])
        price = row["prices"]["on_demand"]["text"] if "prices" in row else ""
        tell("listed", f"{row['title']}: {row['stock']['gpus']} GPUs free now {price}")
        return dict(row)

    def _card(self) -> None:
        if self.api.get("payment-methods")["standing"] != "good":
            add_card(self.api)
            wait_for("the card", lambda: self.api.get("payment-methods")["standing"] == "good", seconds=60)
        card = self.api.get("payment-methods")["card"]
        tell("card", f"{card['brand']} ending {card['last4']}, added on Stripe's page")

    def _booked(self, listing: dict[str, Any]) -> str:
        quote = self.api.post("quotes", {"listing": listing["id"], "kind": "on_demand", "gpu_count": 24})
        contract = self.api.post("contracts", quote["accept"]["body"])
        tell("booked", f"{contract['id']}: up to 24 GPUs on demand at {quote['price']['text']}")
        return str(contract["id"])

    def _follow(self, job: str) -> None:
        """Say each state of its placements as it comes."""
        words = {
            "shedding": "the watts are not free: miners go to sleep first, and their drop is awaited",
            "granted": "the drop is confirmed by meters: the watts are the GPUs' now",
            "running": "all replicas run",
        }
        told: set[str] = set()
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            row = self.api.get(f"jobs/{job}")
            for state in sorted({p["state"] for p in row["placements"]}):
                if state not in told and row["placements"]:
                    if not told:
                        tell("placed", ", ".join(sorted({f"{p['host']} at {p['site']}" for p in row["placements"]})))
                    told.add(state)
                    if state in words:
                        tell({"shedding": "shed", "granted": "granted", "running": "running"}[state], words[state])
            if row["state"] in {"succeeded", "failed", "cancelled"}:
                tell("ended", f"{row['state']}: {row['reason']}")
                return
            time.sleep(0.3)
        tell("waiting", self.api.get(f"jobs/{job}/explain")["text"])

    def _money(self) -> None:
        _top_up()
        preview = self.api.get("invoices/preview")
        milli = sum(line["milli_gpu_seconds"] for line in preview["lines"])
        tell("metered", f"{milli / 1000:.0f} GPU-seconds so far: {_usd(preview['total'])}")
        staff = self.person(STAFF)
        target = self.api.get("contracts", limit=1)["data"][0]["customer"]["id"]
        closed = staff.post("staff/close-period", {"organization": target, "through": datetime.now(UTC).isoformat()})[
            "invoice"
        ]
        if closed is None:
            return
        tell("invoiced", f"No. {closed['number']}: {_usd(closed['total'])}")
        wait_for("the payment", lambda: self.api.get(f"invoices/{closed['id']}")["state"] == "paid", seconds=90)
        tell("paid", "by card, through Stripe's webhook")
        self._pay_out()

    def _pay_out(self) -> None:
        operator = self.person(OPERATOR)
        if not operator.get("payouts/account")["transfers_enabled"]:
            fill_in(operator.post("payouts/account")["url"], {"registered_name": "Caprock Power", "result": "done"})
        payouts = wait_for(
            "the payout", lambda: [p for p in operator.get("payouts")["data"] if p["state"] == "sent"], seconds=90
        )
        tell("paid out", f"{_usd(payouts[0]['amount'])} to the operator")

    def _at_full_power(self, operator: Person, listing: dict[str, Any]) -> dict[str, int]:
        """Wait until the site hashes with what it has: only then is there something to see."""
        seen: list[int] = []

        def settled() -> bool:
            """Awake as many as this hour's prices make worth it: all but a few, or no more for ten looks in a row."""
            now = self._miners(operator, listing)
            seen.append(now["awake"])
            return now["asleep"] <= 6 or (len(seen) > 10 and 0 < now["awake"] <= seen[-11])

        tell("waking", "the site's miners are metered and woken in groups, under every cap")
        with suppress(TimeoutError):  # on a busy machine it takes longer: then with what is awake
            wait_for("the miners to wake", settled, seconds=180, every=2)
        found = self._miners(operator, listing)
        tell("hashing", f"{found['awake']} miners awake, {found['asleep']} asleep")
        return found

    def _miners(self, operator: Person, listing: dict[str, Any]) -> dict[str, int]:
        found: dict[str, int] = operator.get(f"sites/{listing['site']['id']}/power")["miners"]
        return found

    def _more_awake(self, operator: Person, listing: dict[str, Any], before: dict[str, int]) -> dict[str, int] | None:
        now = self._miners(operator, listing)
        return now if now["awake"] >= max(1, before["awake"] * 9 // 10) else None

    def trickle(self) -> None:
        """One small job under a contract that bills by use: what is reserved may only begin in days."""
        rows = self.api.get("contracts", limit=20)["data"]
        active = [c for c in rows if c["state"] == "active" and c["kind"] == "on_demand"]
        if not active:
            return
        seconds, gpus = self.random.randint(20, 90), self.random.choice([1, 2, 4, 8])
        command = [
            "/bin/sh",
            "-c",
            f"echo working for {seconds} s on $CUDA_VISIBLE_DEVICES; sleep {seconds}; echo done",
        ]
        job = self.api.post(
            "jobs",
            {
                "contract": active[0]["id"],
                "name": f"batch {datetime.now(UTC):%H:%M:%S}",
                "command": command,
                "gpus": gpus,
            },
        )
        tell("submitted", f"{job['id']}: {gpus} GPUs for {seconds} s")


def _top_up() -> None:
    """The company's float at Stripe: after Stripe's fee a first invoice of cents does not cover the operator's share of it."""
    sandbox = os.environ.get("STRIPE_BASE_URL")
    if not sandbox:
        return  # the owner of a real account tops it up there
    client = stripe.StripeClient(os.environ["STRIPE_SECRET_KEY"], base_addresses={"api": sandbox})
    if not client.v1.topups.list({"limit": 1}).data:
        client.v1.topups.create({"amount": 100_000, "currency": "usd", "description": "float of the demo company"})


def _usd(amount: dict[str, Any]) -> str:
    return f"{amount['amount_minor'] / 100:.2f} {amount['currency']}"


def watch(house: Path, *, rounds: int = 0) -> int:
    """The main job once, then the trickle until ended (or for `rounds`)."""
    show = Show(house)
    try:
        show.main_job()
    except (RefusedError, TimeoutError) as error:
        tell("stopped", str(error))
        return 1 if rounds else _stay(show, 0)
    return _stay(show, rounds)


def _stay(show: Show, rounds: int) -> int:
    done = 0
    while not rounds or done < rounds:
        time.sleep(PAUSE_S)
        try:
            show.trickle()
        except RefusedError as error:
            tell("refused", str(error))
        done += 1
    return 0
