"""Watts of miners: commanded, confirmed by readings, or never granted on."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db import connection
from django.db.models import F

from marketplace.models import Miner, PowerNode, ShedClaim, Site
from marketplace.services.power.ledger import FRESH_S, Ledger
from scheduler.core import power as core

SETTLE_S = 20  # a sleep not confirmed by then is commanded once more, then the miner counts as unresponsive


@dataclass(frozen=True)
class Command:
    """Put a miner into `mode`; `seen_generation` guards against a rival that commanded it meanwhile."""

    miner_id: int
    mode: int
    seen_generation: int
    claim: bool = False  # its watts are awaited by a pending grant or a limit


def command_miners(site_id: int, commands: Sequence[Command], *, now: datetime) -> int:
    """Command modes. A wake books its target at once and is refused where it does not fit; a sleep keeps the old watts booked."""
    wanted = {c.miner_id: c for c in commands}
    miners = list(Miner.objects.filter(pk__in=wanted, site_id=site_id).order_by("pk").select_for_update(no_key=True))
    ledger = Ledger.of(site_id)
    changed: list[Miner] = []
    claims: list[ShedClaim] = []
    for miner in miners:
        command = wanted[miner.pk]
        if miner.desired_generation != command.seen_generation or miner.desired_mode == command.mode:
            continue
        target = miner.mode_watts[command.mode]
        if target > miner.reserved_w:
            if ledger.refuses(miner.power_node_id, target - miner.reserved_w, core.MINER) is not None:
                continue
            ledger.book(miner.power_node_id, target - miner.reserved_w, core.MINER)
            miner.reserved_w = target
        if command.claim:
            claims.append(_claim(ledger, miner, now))
        miner.desired_mode = command.mode
        miner.commanded_w = target
        miner.desired_generation += 1
        miner.changed_at = now
        miner.low_samples = 0
        changed.append(miner)
    ledger.save()
    _save_miners(changed)
    ShedClaim.objects.bulk_create(claims, ignore_conflicts=True)
    if changed:
        Site.objects.filter(pk=site_id).update(safety_generation=F("safety_generation") + 1)
    return len(changed)


def _claim(ledger: Ledger, miner: Miner, now: datetime) -> ShedClaim:
    meter = _nearest_meter(ledger, miner.power_node_id, now)
    return ShedClaim(
        site_id=miner.site_id,
        miner=miner,
        generation=miner.desired_generation + 1,
        baseline_w=max(miner.measured_w or 0, miner.confirmed_w, 1),
        node_baseline_w=meter.measured_w if meter else None,
        commanded_at=now,
    )


def _nearest_meter(ledger: Ledger, node_id: int, now: datetime) -> PowerNode | None:
    """The closest node at or above with a fresh meter."""
    for n in ledger.tree.paths[ledger.tree.index[node_id]]:
        node = ledger.nodes[ledger.tree.keys[n]]  # type: ignore[index]
        if (
            node.metering == PowerNode.Metering.METER
            and node.measured_at
            and now - node.measured_at < timedelta(seconds=FRESH_S)
        ):
            return node
    return None


def _save_miners(miners: Iterable[Miner]) -> None:
    with connection.cursor() as cursor:
        cursor.executemany(
            "UPDATE marketplace_miner SET desired_mode = %s, commanded_w = %s, desired_generation = %s, changed_at = %s,"
            " low_samples = %s, reserved_w = %s, confirmed_w = %s, state = %s WHERE id = %s",
            [
                (
                    m.desired_mode,
                    m.commanded_w,
                    m.desired_generation,
                    m.changed_at,
                    m.low_samples,
                    m.reserved_w,
                    m.confirmed_w,
                    m.state,
                    m.pk,
                )
                for m in miners
            ],
        )


def settle_miners(site_id: int, *, now: datetime) -> dict[str, int]:
    """Bring the books in line with readings: confirm sleeps, fail what does not drop, follow what draws more than booked.

    Returns counts by outcome, and `freed_w`.
    """
    ledger = Ledger.of(site_id)
    miners = list(Miner.objects.filter(site_id=site_id).order_by("pk").select_for_update(no_key=True))
    claims = {c.miner_id: c for c in ShedClaim.objects.filter(site_id=site_id, state=ShedClaim.State.COMMANDED)}
    drops = _meter_drops(ledger, [m for m in miners if m.pk in claims], claims)
    counts: dict[str, int] = defaultdict(int)
    changed: list[Miner] = []
    for miner in miners:
        before = (miner.reserved_w, miner.confirmed_w, miner.state, miner.desired_generation)
        claim = claims.get(miner.pk)
        if claim is not None:
            counts[_settle_claim(miner, claim, drops.get(miner.pk), now)] += 1
        elif _reads_as_commanded(miner, now):
            miner.confirmed_w = miner.commanded_w
        _rebook(ledger, miner, now)
        if before != (miner.reserved_w, miner.confirmed_w, miner.state, miner.desired_generation):
            counts["freed_w"] += max(0, before[0] - miner.reserved_w)
            changed.append(miner)
    ledger.save()
    _save_miners(changed)
    ShedClaim.objects.bulk_update(
        claims.values(), ["state", "reason", "attempts", "settled_at", "commanded_at", "generation"]
    )
    return dict(counts)


def _reads_as_commanded(miner: Miner, now: datetime) -> bool:
    """Two fresh readings near what was commanded: a sleep without a claim, or a wake that has ramped."""
    if miner.measured_w is None or miner.measured_at is None or now - miner.measured_at > timedelta(seconds=FRESH_S):
        return False
    if miner.applied_generation < miner.desired_generation:
        return False
    if miner.desired_mode == 0:
        return miner.low_samples >= 2
    return miner.measured_w <= miner.commanded_w


def _rebook(ledger: Ledger, miner: Miner, now: datetime) -> None:
    age = int((now - miner.measured_at).total_seconds()) if miner.measured_at else None
    asleep_and_confirmed = miner.desired_mode == 0 and miner.confirmed_w == miner.commanded_w
    # A sleeping machine's own fans and board draw a little around its nameplate: noise is not a watt to re-book.
    noise = asleep_and_confirmed and miner.measured_w is not None and miner.measured_w <= 2 * miner.mode_watts[0]
    measured = min(miner.measured_w or 0, miner.commanded_w) if noise else miner.measured_w
    target = core.miner_reserved_w(
        miner.commanded_w, miner.confirmed_w, measured, age, miner.mode_watts[-1], fresh_s=FRESH_S
    )
    if target != miner.reserved_w:
        ledger.book(miner.power_node_id, target - miner.reserved_w, core.MINER)
        miner.reserved_w = target


def _meter_drops(ledger: Ledger, miners: list[Miner], claims: dict[int, ShedClaim]) -> dict[int, core.MeterDrop]:
    """For each claimed miner with a metered node above it: that meter before and now, and all that was claimed under it then."""
    groups: dict[tuple[int, datetime], list[Miner]] = defaultdict(list)
    for miner in miners:
        claim = claims[miner.pk]
        for n in ledger.tree.paths[ledger.tree.index[miner.power_node_id]]:
            node = ledger.nodes[ledger.tree.keys[n]]  # type: ignore[index]
            if node.metering == PowerNode.Metering.METER and claim.node_baseline_w is not None:
                groups[node.pk, claim.commanded_at].append(miner)
                break
    found: dict[int, core.MeterDrop] = {}
    for (node_id, commanded_at), members in groups.items():
        node = ledger.nodes[node_id]
        if node.measured_at is None or node.measured_w is None:
            continue
        dropped = [
            m for m in members if m.low_samples >= 2
        ]  # those that say they sleep: the meter must agree with them
        claim_w = sum(claims[m.pk].baseline_w - m.mode_watts[0] for m in dropped)
        for miner in dropped:
            found[miner.pk] = core.MeterDrop(
                before_w=claims[miner.pk].node_baseline_w or 0,
                after_w=node.measured_w,
                after_at=int(node.measured_at.timestamp()),
                claim_w=claim_w,
            )
        assert commanded_at
    return found


def _settle_claim(miner: Miner, claim: ShedClaim, drop: core.MeterDrop | None, now: datetime) -> str:
    """Confirmed, still waiting, or failed; the claim and the miner are changed in place."""
    samples = []
    if miner.measured_at and miner.measured_w is not None:
        at = int(miner.measured_at.timestamp())
        samples = [core.Sample(at - i, miner.measured_w) for i in range(min(2, max(1, miner.low_samples)))]
    since = int(claim.commanded_at.timestamp()) - 1
    reason = core.confirmed_drop(
        samples, claim.baseline_w, since=since, now=int(now.timestamp()) + 1, fresh_s=FRESH_S, meter=drop
    )
    if not reason:
        miner.confirmed_w = miner.mode_watts[0]
        claim.state, claim.reason, claim.settled_at = ShedClaim.State.CONFIRMED, "", now
        return "confirmed"
    claim.reason = reason
    if now - claim.commanded_at < timedelta(seconds=SETTLE_S):
        return "waiting"
    if claim.attempts < 2:
        claim.attempts += 1
        claim.commanded_at = now
        miner.desired_generation += 1
        claim.generation = miner.desired_generation
        return "again"
    claim.state, claim.settled_at = ShedClaim.State.FAILED, now
    miner.state = Miner.State.UNRESPONSIVE
    return "failed"
