"""What must be true at the end, from what can be seen from outside alone."""

import csv
import io
import json
import urllib.request
from collections import defaultdict
from datetime import UTC, datetime
from fractions import Fraction
from itertools import pairwise
from typing import Any

from sandbox.smoke.report import expect
from sandbox.smoke.world import PlantedSite, Tenant, World

FINAL = {"released", "failed", "lost"}
CHECKPOINT_GRACE_S = 5  # of every job that the smoke run submits


def sites_stayed_under_their_caps(world: World) -> list[str]:
    """By each site's own physics: no breaker tripped, no node over its cap at any instant."""
    said = []
    for site in world.sites:
        truth = world.truth(site)
        expect(not truth["trips"], f"{site.files.name}: breakers tripped: {truth['trips'][:3]}")
        expect(not truth["over_instants"], f"{site.files.name}: over cap: {truth['over_instants'][:3]}")
        tightest = max(n["max_w"] / n["cap_w"] for n in truth["nodes"].values())
        said.append(
            f"{site.files.name}: fullest node {100 * tightest:.1f} % of its cap, hashing {truth['hashing_wh'] / 1000:.1f} kWh"
        )
    return said


def placements_of(tenant: Tenant) -> list[dict[str, Any]]:
    return tenant.client.every("placements")


def every_running_second_is_billed_once(tenants: list[Tenant]) -> list[str]:
    """Placement timelines against the usage behind the invoices, second by second, and no record twice."""
    seconds = milli = free = 0
    for tenant in tenants:
        expected = {}
        notice = {
            c["id"]: c["terms"]["eviction_notice_s"] for c in tenant.client.every("contracts") if c["kind"] == "spot"
        }
        for p in placements_of(tenant):
            expect(p["state"] in FINAL, f"{p['id']} of {tenant.name} is {p['state']}")
            span = _billed(p)
            if span is not None and p["contract"] in notice and _preempted(tenant, p):
                kept = max(span[0], span[1] - max(0, notice[p["contract"]] - CHECKPOINT_GRACE_S))
                free += span[1] - kept
                span = (span[0], kept) if kept > span[0] else None
            if span is not None and p["gpus"]:
                expected[p["id"]] = (*span, len(p["gpus"]) * p["gpu_milli"])
        seen = _records(tenant)
        expect(
            set(seen) == set(expected),
            f"{tenant.name}: billed and run placements differ: {len(set(seen) ^ set(expected))}",
        )
        for placement, (start, end, rate) in expected.items():
            spans = sorted(seen[placement])
            expect(
                all(a[1] <= b[0] for a, b in pairwise(spans)),
                f"{placement}: a second is billed twice",
            )
            got = sum(e - s for s, e, _ in spans)
            expect(got == end - start, f"{placement} of {tenant.name}: ran {end - start} s, billed {got} s")
            expect(all(r == rate for _, _, r in spans), f"{placement}: billed at another share")
            seconds += got
            milli += got * rate
    return [
        f"{seconds} placement-seconds, {milli / 3_600_000:.1f} GPU-hours, each billed once; {free} s free for spot's short notice"
    ]


def _preempted(tenant: Tenant, p: dict[str, Any]) -> bool:
    """Whether it was asked to leave for somebody else, without notice: what is missing of its contract's notice is free."""
    events = tenant.client.every(f"jobs/{p['job']}/events")
    return any(e["to"] == "preempting" and e["at"] == p["release_requested_at"] for e in events)


def _billed(p: dict[str, Any]) -> tuple[int, int] | None:
    """[start, end) in whole UTC seconds: from running confirmed to the first of release requested and finished."""
    if p["running_at"] is None:
        return None
    ends = [_second(p[k]) for k in ("release_requested_at", "finished_at") if p[k]]
    start, end = _second(p["running_at"]), min(ends)
    return (start, end) if end > start else None


def _second(text: str) -> int:
    return int(datetime.fromisoformat(text).astimezone(UTC).timestamp())


def _records(tenant: Tenant) -> dict[str, list[tuple[int, int, int]]]:
    found: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for invoice in tenant.client.every("invoices"):
        text = tenant.client.get(f"invoices/{invoice['id']}/usage")
        for row in csv.DictReader(io.StringIO(text)):
            found[row["placement"]].append((int(row["start"]), int(row["end"]), int(row["milli_gpu"])))
    return found


def invoices_add_up(tenants: list[Tenant]) -> dict[str, int]:
    """Each line is its quantity times its price rounded once; lines sum to the total; operator + platform = line. Sums in cents."""
    total = operator = platform = count = 0
    for tenant in tenants:
        for row in tenant.client.every("invoices"):
            invoice = tenant.client.get(f"invoices/{row['id']}")
            expect(
                invoice["state"] == "paid" or not invoice["total"]["amount_minor"],
                f"{invoice['id']} is {invoice['state']}: {invoice['last_error']}",
            )
            amounts = [_line_holds(line) for line in invoice["lines"]]
            expect(
                sum(a for a, _, _ in amounts) == invoice["total"]["amount_minor"],
                f"{invoice['id']}: lines do not sum to the total",
            )
            total += sum(a for a, _, _ in amounts)
            operator += sum(o for _, o, _ in amounts)
            platform += sum(f for _, _, f in amounts)
            count += 1
    return {"invoices": count, "invoiced": total, "operator": operator, "platform": platform}


def _line_holds(line: dict[str, Any]) -> tuple[int, int, int]:
    amount, operator, fee = (line[k]["amount_minor"] for k in ("amount", "operator_share", "platform_fee"))
    exact = Fraction(line["milli_gpu_seconds"] * line["price_millionths_per_gpu_hour"], 3_600_000 * 10_000)
    rounded = int(exact + Fraction(1, 2)) if exact >= 0 else -int(-exact + Fraction(1, 2))
    expect(amount == rounded, f"{line['id']}: {amount}, but quantity x price is {float(exact):.3f}")
    expect(operator + fee == amount, f"{line['id']}: {operator} + {fee} is not {amount}")
    return amount, operator, fee


def stripe_mirrors(world: World, tenants: list[Tenant]) -> list[str]:
    """Asked of Stripe itself: each of our invoices once, the same amount, paid."""
    ours = {
        i["stripe_invoice"]: i["total"]["amount_minor"]
        for t in tenants
        for i in t.client.every("invoices")
        if i["stripe_invoice"]
    }
    theirs: dict[str, int] = {}
    after = ""
    while True:
        url = f"{world.env['STRIPE_BASE_URL']}/v1/invoices?limit=100{after}"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {world.env['STRIPE_SECRET_KEY']}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            page = json.load(answer)
        for row in page["data"]:
            expect(row["status"] == "paid", f"Stripe's {row['id']} is {row['status']}")
            theirs[row["id"]] = row["total"]
        if not page["has_more"]:
            break
        after = f"&starting_after={page['data'][-1]['id']}"
    expect(ours == theirs, f"Stripe holds {len(theirs)} invoices, we {len(ours)}; or amounts differ")
    return [f"{len(theirs)} invoices, the same amounts, all paid"]


def hashing(operator: Tenant, site: PlantedSite) -> str:
    """The control plane's own account of the site, for the report."""
    sums = operator.client.get(f"sites/{site.id}/minutes", minutes=60)["sums"]
    hashed, ai, dollars = (sums[k] / 1e6 for k in ("hashing_mwh", "ai_mwh", "hashing_microusd"))
    return f"{site.files.name}, as the platform counts it: hashing {hashed:.2f} kWh (${dollars:.4f}), AI {ai:.2f} kWh"
