"""What a call delivered: the node's meter second by second against what it drew before, who gave nothing and why, jobs, money.

Begun when the call begins (baseline, who was awake), finished when it is over; while it runs, the same is worked out anew each time.
The node's own meter speaks; without one, the books do.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from fractions import Fraction
from typing import Any

from django.db.models import Q, Sum

from billing.core import money
from marketplace import ids
from marketplace.models import (
    Contract,
    Curtailment,
    CurtailmentReport,
    MeterReading,
    Miner,
    Placement,
    PlacementEvent,
    PowerNode,
    ShedClaim,
    SiteMinute,
)
from marketplace.services import ai_revenue, feeds, held_lower, sheds, terms
from marketplace.services.availability import HOLDING
from scheduler.core import curtail, power

GRID_REPORT = "marketplace.grid_report"  # to whoever called, when it is over
DWELL = timedelta(seconds=60)
WH_UUSD = 1_000_000  # millionths of a USD per MWh x Wh


@dataclass(frozen=True)
class Found:
    """The columns of a CurtailmentReport that are worked out, as they are at one moment."""

    offsets_s: list[int]
    watts: list[int]
    delivered_wh: int
    under_after_s: int | None
    hashing_lost_microusd: int
    energy_saved_microusd: int
    paid_microusd: int
    misses: list[dict[str, Any]]
    jobs: list[dict[str, Any]]
    credits: list[dict[str, Any]]


def begin(row: Curtailment) -> CurtailmentReport:
    """What it found. Once: beginning it again answers the same report. A call that follows another takes its baseline over: the node
    is down already.
    """
    before = _before(row)
    awake = Miner.objects.filter(power_node__in=below(row.node), desired_mode__gt=0, state=Miner.State.OK, manual=False)
    just = [] if row.mandatory else awake.filter(changed_at__gt=row.starts_at - DWELL).values_list("pk", flat=True)
    if before is not None:
        taken = {
            "baseline_w": before.baseline_w, "baseline_how": before.baseline_how, "before": before.before,
            "dwelling": sorted(just),
        }  # fmt: skip
        return CurtailmentReport.objects.get_or_create(curtailment=row, defaults=taken)[0]
    readings = _readings(row.node, row.starts_at - timedelta(seconds=curtail.BASELINE_S), row.starts_at)
    start = int(row.starts_at.timestamp())
    metered = curtail.baseline_w([(start + at, w) for at, w in _offsets(readings, row.starts_at)], start)
    node = PowerNode.objects.get(pk=row.node_id)
    booked = -(-node.reserved_mw // 1000) + node.fixed_w
    made, _ = CurtailmentReport.objects.get_or_create(
        curtailment=row,
        defaults={
            "baseline_w": booked if metered is None else metered,
            "baseline_how": "books" if metered is None else "meter",
            "before": sorted(awake.values_list("pk", flat=True)),
            "dwelling": sorted(just),
        },
    )
    return made


def watch(rows: Iterable[Curtailment], *, now: datetime) -> None:
    """Where no meter says when a node came under its cap, the books do: once they stand under it."""
    open_reports = CurtailmentReport.objects.filter(
        curtailment__in=list(rows), baseline_how="books", under_after_s=None
    )
    for report in open_reports.select_related("curtailment__node"):
        call = report.curtailment
        if call.node.reserved_mw + 1000 * call.node.fixed_w <= 1000 * call.cap_w:
            after_s = int((now - call.starts_at).total_seconds())
            CurtailmentReport.objects.filter(pk=report.pk, under_after_s=None).update(under_after_s=after_s)


def _before(row: Curtailment) -> CurtailmentReport | None:
    """Of the call that held the same node until this one began, or holds it still."""
    others = CurtailmentReport.objects.filter(curtailment__node=row.node_id).exclude(curtailment=row)
    near = row.starts_at - timedelta(seconds=60)
    standing = Q(curtailment__ended_at=None, curtailment__ends_at__gte=near) | Q(curtailment__ended_at__gte=near)
    return others.filter(standing, curtailment__starts_at__lte=row.starts_at).order_by("-curtailment_id").first()


def finish(report: CurtailmentReport, row: Curtailment, *, restored_s: int | None, now: datetime) -> None:
    """Work it out for good."""
    for name, value in vars(found(report, row, now=now)).items():
        setattr(report, name, value)
    report.restored_s, report.finished_at = restored_s, now
    report.save()


def found(report: CurtailmentReport, row: Curtailment, *, now: datetime) -> Found:
    """As the meters and the books have it now; of a finished one, what was kept."""
    if report.finished_at is not None:
        return Found(**{name: getattr(report, name) for name in Found.__dataclass_fields__})
    end = min(row.over_at, now)
    seconds = seconds_of(row, now)
    readings = _offsets(_readings(row.node, row.starts_at, end), row.starts_at)
    wh = curtail.delivered_wh(curtail.by_second(readings, seconds, report.baseline_w), report.baseline_w)
    lost, price = _money(row, end, now)
    pays = row.origin.pays_uusd_mwh if row.origin is not None else 0
    return Found(
        [at for at, _ in readings],
        [w for _, w in readings],
        wh,
        _under_after(report, readings, row.cap_w),
        lost,
        wh * price // WH_UUSD,
        max(0, wh) * pays // WH_UUSD,
        _misses(report, row, end),
        touched(row, now=now),
        credited(row, now=now),
    )


def _under_after(report: CurtailmentReport, readings: list[tuple[int, int]], cap_w: int) -> int | None:
    """By the meter; where it was silent before the call, and is silent when the books come under, by these."""
    metered = curtail.under_after(readings, cap_w)
    return report.under_after_s if metered is None and report.baseline_how == "books" else metered


def seconds_of(row: Curtailment, now: datetime) -> int:
    """Seconds from its start to its end, or so far."""
    return max(0, int((min(row.over_at, now) - row.starts_at).total_seconds()))


def series(report: CurtailmentReport, row: Curtailment, *, now: datetime, step_s: int = 1) -> list[dict[str, Any]]:
    """One row for every `step_s` seconds: when, W drawn, W delivered against the baseline (means of the seconds in it)."""
    known = found(report, row, now=now)
    watts = curtail.by_second(
        list(zip(known.offsets_s, known.watts, strict=True)), seconds_of(row, now), report.baseline_w
    )
    rows = []
    for at in range(0, len(watts), step_s):
        part = watts[at : at + step_s]
        mean = round(sum(part) / len(part))
        rows.append(
            {"at": row.starts_at + timedelta(seconds=at), "watts": mean, "delivered_w": report.baseline_w - mean}
        )
    return rows


def seconds_csv(report: CurtailmentReport, row: Curtailment, *, now: datetime) -> str:
    """A line a second: at, drawn, baseline and delivered, W."""
    out = io.StringIO()
    lines = csv.writer(out)
    lines.writerow(["at", "watts", "baseline_w", "delivered_w"])
    for each in series(report, row, now=now):
        lines.writerow([each["at"].isoformat(), each["watts"], report.baseline_w, each["delivered_w"]])
    return out.getvalue()


def below(node: PowerNode) -> list[int]:
    """The node and all under it, by id."""
    rows = list(PowerNode.objects.filter(site=node.site_id).order_by("depth").values_list("pk", "parent_id"))
    found_ids = {node.pk}
    for pk, parent in rows:
        if parent in found_ids:
            found_ids.add(pk)
    return sorted(found_ids)


def touched(row: Curtailment, *, now: datetime) -> list[dict[str, Any]]:
    """Jobs that were asked to leave for it, or whose GPUs were held lower and for how long (`held_s`, of the placement that was held
    the longest); by job, in the order of time.
    """
    left = PlacementEvent.objects.filter(to_state="draining", reason=f"curtailment {row.public_id}")
    told = [
        (e.at, e.placement.job_id, e.placement.contract, _left(e.placement.contract))
        for e in left.select_related("placement__contract")
    ]
    held: dict[int, dict[int, timedelta]] = defaultdict(lambda: defaultdict(timedelta))  # by job and placement
    for spell in _spells(row, now):
        of = spell.placement
        told.append((spell.begins, of.job_id, of.contract, "held_lower"))
        held[of.job_id][of.pk] += spell.ends - spell.begins
    seen: dict[tuple[int, str], dict[str, Any]] = {}
    for at, job, contract, what in sorted(told, key=lambda t: (t[0], t[1])):
        longest = max(held[job].values(), default=timedelta())
        seen.setdefault(
            (job, what),
            {
                "job": ids.encode("job", job), "contract": contract.public_id, "kind": contract.kind, "what": what,
                "at": at.isoformat(), "held_s": round(longest.total_seconds()) if what == "held_lower" else 0,
            },
        )  # fmt: skip
    return list(seen.values())


def credited(row: Curtailment, *, now: datetime) -> list[dict[str, Any]]:
    """What customers do not pay because of it, by contract and the clock; their invoices say it to the second. `off_the_bill`: the
    contract is free for the whole call (ADR 21); `held_lower`: by the power withheld (ADR 23), where it is not free anyway.
    """
    found: dict[int, tuple[Contract, str, int, Fraction]] = {}
    end = min(row.over_at, now)
    for contract in Contract.objects.filter(pk__in=sheds.contracts_of(row), kind__in=HOLDING).order_by("pk"):
        begins = max(row.starts_at, contract.starts_at)
        ends = min(at for at in (end, contract.ends_at, contract.ended_at) if at is not None)
        if begins < ends:
            milli = contract.gpu_count * 1000 * int((ends - begins).total_seconds())
            found[contract.pk] = (
                contract,
                "off_the_bill",
                milli,
                Fraction(terms.commitment_minor(contract, begins, ends)),
            )
    whole = set(found)
    for spell, begins, ends, price in ai_revenue.priced(_spells(row, now)):
        of = spell.placement.contract
        if of.pk not in whole:
            milli = spell.milli * int((ends - begins).total_seconds())
            _, _, before, minor = found.get(of.pk, (of, "", 0, Fraction()))
            found[of.pk] = of, "held_lower", before + milli, minor + money.exact_amount(milli, price, of.currency)
    return [
        {
            "contract": of.public_id, "kind": of.kind, "why": why, "milli_gpu_seconds": milli,
            "amount_minor": money.round_half_away(minor), "currency": of.currency,
        }
        for of, why, milli, minor in found.values()
    ]  # fmt: skip


def _spells(row: Curtailment, now: datetime) -> list[held_lower.Spell]:
    return held_lower.spells(list(row.held_lower.all()), Placement.objects.filter(site=row.site_id), until=now)


def _left(contract: Contract) -> str:
    return "left" if contract.kind in {"spot", "flexible"} else "left_in_emergency"


def _readings(node: PowerNode, start: datetime, end: datetime) -> Iterable[tuple[datetime, int]]:
    rows = MeterReading.objects.filter(node=node, at__gte=start, at__lt=end)
    return rows.order_by("at").values_list("at", "watts")


def _offsets(readings: Iterable[tuple[datetime, int]], start: datetime) -> list[tuple[int, int]]:
    """The last reading of each second, by seconds from `start`."""
    return sorted({int((at - start).total_seconds() // 1): watts for at, watts in readings}.items())


def _money(row: Curtailment, end: datetime, now: datetime) -> tuple[int, int]:
    """(what the machines that were awake before would have earned more, millionths of a USD; the energy's price a MWh). By what hashing
    earned at the site in the minutes before and during; the energy at its price now.
    """
    price = feeds.rates(row.site, now=now).energy.uusd_mwh
    minutes = SiteMinute.objects.filter(site=row.site_id)
    before = minutes.filter(start__gte=row.starts_at - timedelta(minutes=5), start__lt=row.starts_at)
    during = minutes.filter(start__gte=row.starts_at, start__lt=end)
    count = before.count()
    if not count:
        return 0, price
    usual = (before.aggregate(x=Sum("hashing_microusd"))["x"] or 0) / count
    earned = during.aggregate(x=Sum("hashing_microusd"), n=Sum("energy_microusd"), w=Sum("metered_w"))
    minutes_long = (end - row.starts_at).total_seconds() / 60
    return max(0, round(usual * minutes_long - (earned["x"] or 0))), price


def _misses(report: CurtailmentReport, row: Curtailment, end: datetime) -> list[dict[str, Any]]:
    """Machines under the node that gave nothing, with the reason in the words of docs/power.md, and the W that they kept."""
    machines = Miner.objects.filter(power_node__in=below(row.node))
    claims = ShedClaim.objects.filter(miner__in=machines, commanded_at__gte=row.starts_at, commanded_at__lt=end)
    last = {claim.miner_id: claim for claim in claims.exclude(reason="superseded").order_by("pk")}
    rows = []
    for m in machines.order_by("name"):
        reason = _gave_nothing(last[m.pk]) if m.pk in last else _held_back(m, report)
        if reason:
            rows.append(
                {"miner": m.name, "reason": reason.replace("awaiting_sample", "stale_telemetry"), "watts": m.reserved_w}
            )
    return rows


def _gave_nothing(claim: ShedClaim) -> str:
    """Why a machine that was asked gave nothing: it was not seen to obey, or had nothing to give (dead boards, asleep by itself): what
    it drew already passed for sleep.
    """
    if claim.state != ShedClaim.State.CONFIRMED:
        return claim.reason
    drew_little = claim.drew_w is not None and 1000 * claim.drew_w <= power.ASLEEP_PERMILLE * claim.baseline_w
    return "below_minimum" if drew_little else ""


def _held_back(miner: Miner, report: CurtailmentReport) -> str:
    """Why it was not asked, if it draws: by hand or in maintenance, or it had just changed."""
    if miner.manual or miner.state == Miner.State.MAINTENANCE:
        return "maintenance" if miner.reserved_w > miner.mode_watts[0] else ""
    return "dwell" if miner.pk in report.dwelling else ""
