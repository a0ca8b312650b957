"""The main job, step by step: listed, booked, placed, shed, run, metered, invoiced, paid, paid out, hashing again."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from sandbox.client import DECLINED_CARD, Client, Person, RefusedError, add_card, wait_for
from sandbox.servers import ports
from sandbox.site.spec import demo_site
from sandbox.smoke import checks
from sandbox.smoke.report import Report, expect, say
from sandbox.smoke.work import Arrivals, real_job
from sandbox.smoke.world import PlantedSite, Tenant, World

TENANTS = 20
RESERVED_GPUS = 16  # a tenant
REAL_JOBS = 50
DONE = {"succeeded", "failed", "cancelled"}
H100 = {"on_demand_price": 2_490_000, "reserved_price": 1_990_000, "spot_floor": 990_000}
L40S = {"on_demand_price": 890_000, "spot_floor": 390_000}
# Dear on purpose: a run of minutes must come to more than the least that a card can be charged.
MIXED = {"on_demand_price": 12_000_000, "reserved_price": 9_000_000, "spot_floor": 3_000_000}
JOBS_S = 170  # by then every job must be over


def walk(world: World, report: Report, work: Arrivals, *, pulse: Callable[[], None]) -> None:
    def watched(what: str, done: Callable[[], Any], *, seconds: float) -> Any:
        def look() -> Any:
            pulse()
            return done()

        return wait_for(what, look, seconds=seconds)

    with report.step("an operator signs up, plants two sites, enrols their agents, publishes listings") as seen:
        staff = world.staff()
        operator = world.tenant("Caprock Power", is_operator=True, is_customer=False)
        small = world.plant(
            operator,
            demo_site(3, miner_port=ports.free_port()),
            runtime="process",
            prices={"H100-SXM": H100, "L40S": L40S},
        )
        large = world.plant(operator, work.spec, runtime="virtual", prices={"": MIXED})
        for site in (small, large):
            watched("an agent's first sync", partial(_alive, operator, site), seconds=60)
        seen.append(work.said)
    with report.step(f"{TENANTS} customers sign up; one is declined, all add a card on Stripe's page") as seen:
        tenants = at_once(lambda i: world.tenant(f"Tenant {i:02d}"), range(TENANTS))
        declined = add_card(tenants[0].client, DECLINED_CARD)
        expect(declined.status_code == 402, f"a declined card answered {declined.status_code}")
        refused = _refusal(lambda: _book(tenants[0].client, large.listings[""], "on_demand", 8))
        expect(refused == "card_required", f"booking without a card answered {refused}")
        at_once(world.card, tenants)
        seen.append("declined card: 402; booking without a card: card_required")
    with report.step("they search, get quotes, and sign contracts") as seen:
        found = tenants[1].client.get("listings", gpu_model="H100-SXM", kind="on_demand")["data"]
        expect(small.listings["H100-SXM"] in {row["id"] for row in found}, "the search does not find the listing")

        def book(tenant: Tenant) -> None:
            tenant.contracts["trace"] = _book(tenant.client, large.listings[""], "on_demand", 1000)
            tenant.contracts["reserved"] = _book(tenant.client, large.listings[""], "reserved", RESERVED_GPUS)
            tenant.contracts["real"] = _book(tenant.client, small.listings["H100-SXM"], "on_demand", 16)

        at_once(book, tenants)
        tenants[0].contracts["spot"] = _book(tenants[0].client, small.listings["L40S"], "spot", 8)
        tenants[1].contracts["l40s"] = _book(tenants[1].client, small.listings["L40S"], "on_demand", 4)
        seen.append(f"{3 * TENANTS + 2} contracts, {TENANTS} of them reserved")
    with report.step("they submit their jobs") as seen:
        jobs = Submitted()
        jobs.submit_real(tenants)
        jobs.submit_trace(tenants, work, pulse)
        spot = tenants[0].client.post("jobs", {**_spot(), "contract": tenants[0].contracts["spot"]})["id"]
        never = _refusal(
            lambda: tenants[1].client.post(
                "jobs", {"contract": tenants[1].contracts["l40s"], "command": ["true"], "gpus": 8}
            )
        )
        expect(never in {"never_fits", "over_ceiling"}, f"a job that can never fit answered {never}")
        long_jobs = [_long(t, 60) for t in tenants[2:7]]
        seen.append(
            f"{len(jobs.real)} real, {len(jobs.trace)} of the trace; one that can never fit was refused: {never}"
        )
    with report.step("a spot job is preempted for an on-demand one, and comes back") as seen:
        watched("the spot job to run", lambda: _state(tenants[0], spot) == "running", seconds=90)
        claim = tenants[1].client.post(
            "jobs",
            {
                "contract": tenants[1].contracts["l40s"],
                "command": ["/bin/sh", "-c", "sleep 3; echo claimed"],
                "gpus": 4,
            },
        )["id"]
        watched("the claimant to end", lambda: _state(tenants[1], claim) in DONE, seconds=90)
        expect(_state(tenants[1], claim) == "succeeded", "the on-demand job did not succeed")
        moves = [e["to"] for e in tenants[0].client.get(f"jobs/{spot}/events", limit=100)["data"]]
        expect("preempting" in moves and "requeued" in moves, f"the spot job went {moves}")
        seen.append(" -> ".join(moves))
    with report.step("a worker and an agent are killed on the way; some jobs are cancelled") as seen:
        world.supervisor.kill("worker-1")
        world.supervisor.kill(f"agent-{small.files.name}")
        pulse()
        for tenant, job in zip(tenants[2:7], long_jobs, strict=True):
            watched("a job to cancel", partial(_cancellable, tenant, job), seconds=60)
            tenant.client.post(f"jobs/{job}/cancel")
        seen.append("both were started again; 5 jobs cancelled")
    with report.step("every job comes to an end") as seen:
        try:
            watched("every job to end", lambda: _all_over(tenants), seconds=JOBS_S)
        except TimeoutError:
            seen.extend(_still_there(tenants))
            raise
        seen.extend(_outcomes(tenants, jobs, long_jobs, spot))
    with report.step("every real process printed what it should") as seen:
        for tenant, job, wanted in jobs.real:
            text = tenant.client.get(f"jobs/{job}/logs")["data"]
            expect(text.endswith(wanted), f"{job} of {tenant.name} printed {text!r}, not {wanted!r}")
        seen.append(f"{len(jobs.real)} outputs")
    _money(world, report, staff, operator, tenants, watched)
    with report.step("no site was ever over any of its caps, by its own meters; the miners hash again") as seen:
        for site in (small, large):
            watched(f"the miners of {site.files.name} to wake", partial(_hashing, operator, site), seconds=120)
        seen.extend(checks.sites_stayed_under_their_caps(world))
        seen.extend(checks.hashing(operator, site) for site in (small, large))


def _money(
    world: World, report: Report, staff: Person, operator: Tenant, tenants: list[Tenant], watched: Callable[..., Any]
) -> None:
    with report.step("staff closes the period; invoices are paid by card through Stripe's webhooks") as seen:
        through = datetime.now(UTC).isoformat()
        for tenant in tenants:
            staff.post("staff/close-period", {"organization": tenant.id, "through": through})
        try:
            watched("the invoices to be paid", lambda: _collected(tenants), seconds=90)
        except TimeoutError:
            rows = [row for t in tenants for row in t.client.every("invoices") if row["state"] != "paid"]
            seen.extend(f"{r['state']} {r['due']} {r['last_error']}" for r in rows[:5])
            raise
        seen.append(f"{sum(len(t.client.every('invoices')) for t in tenants)} invoices paid")
    with report.step("every running second is billed once, and no other") as seen:
        seen.extend(checks.every_running_second_is_billed_once(tenants))
    with report.step("lines are quantity x price, rounded once; operator + platform = invoiced") as seen:
        sums = checks.invoices_add_up(tenants)
        seen.append("; ".join(f"{k} {v}" for k, v in sums.items()) + " (cents)")
    with report.step("the operator is onboarded and paid its share") as seen:
        world.onboard(operator)
        watched("the payout", lambda: _paid_out(operator) == sums["operator"], seconds=60)
        seen.append(f"{_paid_out(operator)} cents transferred")
    with report.step("ledger zero, Stripe equal, nothing waits") as seen:
        compared = staff.post("staff/reconcile")
        health = staff.get("staff/invariants")
        wrong = {k: v for k, v in health["invariants"].items() if v}
        expect(not wrong, f"invariants broken: {wrong}")
        expect(
            not health["open_cases"] and not health["parked"],
            f"open cases {health['open_cases']}, parked messages {health['parked']}",
        )
        expect(
            not any(health["ledger"].values()) or sum(health["ledger"].values()) == 0,
            f"the ledger sums to {health['ledger']}",
        )
        seen.extend([*checks.stripe_mirrors(world, tenants), f"compared {compared['compared']}"])


def at_once(act: Callable[[Any], Any], over: Iterable[Any]) -> list[Any]:
    """Several customers at the same time, answers in order."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(act, over))


class Submitted:
    """What was submitted, and what it must come to."""

    def __init__(self) -> None:
        self.real: list[tuple[Tenant, str, str]] = []
        self.trace: list[tuple[Tenant, str]] = []

    def submit_real(self, tenants: list[Tenant]) -> None:
        for number in range(REAL_JOBS):
            tenant = tenants[number % len(tenants)]
            spec, wanted = real_job(number)
            job = tenant.client.post("jobs", {**spec, "contract": tenant.contracts["real"]})["id"]
            self.real.append((tenant, job, wanted))

    def submit_trace(self, tenants: list[Tenant], work: Arrivals, pulse: Callable[[], None]) -> None:
        """In the order of arrival, 100 at a time, dealt round to the tenants."""
        for start in range(0, len(work.jobs), 100):
            tenant = tenants[start // 100 % len(tenants)]
            batch = [{**job, "contract": tenant.contracts["trace"]} for job in work.jobs[start : start + 100]]
            for answer in tenant.client.post("jobs/batch", {"jobs": batch})["data"]:
                expect("job" in answer, f"an arrival was refused: {answer.get('error')}")
                self.trace.append((tenant, answer["job"]["id"]))
            pulse()


def _book(api: Client, listing: str, kind: str, gpus: int) -> str:
    body: dict[str, Any] = {"listing": listing, "kind": kind, "gpu_count": gpus}
    if kind == "spot":
        body["limit_price"] = 2_000_000
    if kind == "reserved":
        body["ends_at"] = (datetime.now(UTC).replace(second=0, microsecond=0) + timedelta(hours=24)).isoformat()
    quote = api.post("quotes", body)
    return str(api.post("contracts", quote["accept"]["body"])["id"])


def _refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except RefusedError as refused:
        return refused.code
    return "accepted"


def _alive(operator: Tenant, site: PlantedSite) -> bool:
    agents = operator.client.get(f"sites/{site.id}/agents")["data"]
    return any(a.get("last_sync_at") for a in agents)


def _spot() -> dict[str, Any]:
    command = ["/bin/sh", "-c", "trap 'echo checkpoint; exit 143' TERM; echo begin; sleep 25 & wait $!; echo end"]
    return {"command": command, "gpus": 4, "replicas": 2, "checkpoint_grace_s": 5, "name": "spot"}


def _long(tenant: Tenant, seconds: int) -> str:
    body = {"contract": tenant.contracts["trace"], "command": ["sleep", str(seconds)], "gpus": 1, "name": "to cancel"}
    return str(tenant.client.post("jobs", body)["id"])


def _state(tenant: Tenant, job: str) -> str:
    return str(tenant.client.get(f"jobs/{job}")["state"])


def _cancellable(tenant: Tenant, job: str) -> bool:
    return _state(tenant, job) in {"running", "placed", "queued"}


def _all_over(tenants: list[Tenant]) -> bool:
    for tenant in tenants:
        for state in ("queued", "placed", "running", "preempting", "requeued"):
            if tenant.client.get("jobs", state=state, limit=1)["data"]:
                time.sleep(1)
                return False
    return True


def _still_there(tenants: list[Tenant]) -> list[str]:
    """Some of the jobs that are not over, and why."""
    found = []
    for tenant in tenants:
        for row in tenant.client.every("jobs"):
            if row["state"] not in DONE:
                detail = tenant.client.get(f"jobs/{row['id']}")["placements"][:3]
                why = tenant.client.get(f"jobs/{row['id']}/explain")["text"]
                at = [(p["site"], p["host"], p["state"], p["reason"]) for p in detail]
                found.append(f"{row['name']} {row['state']} {at} {why}")
    return [f"{len(found)} jobs are not over", *found[:6]]


def _outcomes(tenants: list[Tenant], jobs: Submitted, cancelled: list[str], spot: str) -> list[str]:
    rows = {row["id"]: row for tenant in tenants for row in tenant.client.every("jobs")}
    for row in rows.values():
        expect(
            row["state"] in DONE and (row["reason"] or row["state"] == "cancelled"),
            f"{row['id']} is {row['state']} without a reason",
        )
    for _, job, _ in jobs.real:
        expect(rows[job]["state"] == "succeeded", f"real job {job}: {rows[job]['state']}, {rows[job]['reason']}")
    bad = [rows[job] for _, job in jobs.trace if rows[job]["state"] != "succeeded"]
    expect(not bad, f"{len(bad)} jobs of the trace did not succeed, such as {bad[:1]}")
    expect(all(rows[job]["state"] == "cancelled" for job in cancelled), "a cancelled job is not cancelled")
    expect(rows[spot]["state"] == "succeeded", f"the spot job: {rows[spot]['state']}, {rows[spot]['reason']}")
    return [", ".join(f"{n} {s}" for s, n in sorted(Counter(r["state"] for r in rows.values()).items()))]


def _hashing(operator: Tenant, site: PlantedSite) -> bool:
    """Most of the machines that earn more than their energy costs, at the prices of this hour, are awake."""
    power = operator.client.get(f"sites/{site.id}/power")
    worth = sum(_pays(miner, power) for miner in site.spec["miners"])
    say(f"{site.files.name}: {power['miners']['awake']} miners awake, {worth} are worth their energy")
    time.sleep(2)
    return bool(power["miners"]["awake"] >= worth // 2)


def _pays(miner: dict[str, Any], power: dict[str, Any]) -> bool:
    """Does the top mode earn its energy with 5 % to spare? (Pool fee 1 %, overhead 5 %; micro-USD an hour.)"""
    _, watts, ghs = miner["modes"][-1]
    earned = power["hashprice_microusd_per_ph_day"] * 0.99 / 24_000_000 * ghs
    return bool(earned > 1.05 * watts * 1.05 * power["energy_microusd_per_mwh"] / 1_000_000)


def _collected(tenants: list[Tenant]) -> bool:
    """Each tenant has an invoice, and all are paid."""
    each = [t.client.every("invoices") for t in tenants]
    return all(rows and all(row["state"] == "paid" for row in rows) for rows in each)


def _paid_out(operator: Tenant) -> int:
    return sum(p["amount"]["amount_minor"] for p in operator.client.every("payouts") if p["state"] == "sent")
