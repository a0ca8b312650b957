"""Watts of miners: commanded, confirmed by readings and meters, or never granted on."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.conf import settings
from django.db import connection
from django.db.models import F

from marketplace import prepared
from marketplace.models import Miner, ShedBatch, ShedClaim, Site
from marketplace.services.power.ledger import FRESH, FRESH_S, Ledger, may_wake
from marketplace.services.power.meters import Look, baseline
from scheduler.core import power as core
from scheduler.core import power_proof as proof

STALE_METER = "stale_meter"  # told as stale_telemetry, but not the machine's fault
SETTLE_S = 20  # a lowering not confirmed by then is commanded once more, then the miner counts as unresponsive
FORGOTTEN = 1000  # batches that are deleted at a time
AGREEING_S = 60  # while the meters agree now and then (hosts ramp under them), it is waited for so long


@dataclass(frozen=True)
class Command:
    """Put a miner into `mode`; `seen_generation` guards against a rival that commanded it meanwhile."""

    miner_id: int
    mode: int
    seen_generation: int


def command_miners(site_id: int, commands: Sequence[Command], *, now: datetime) -> int:
    """Command modes. A wake books its target at once, and is refused where it does not fit or nothing may rise; a lowering
    keeps the old watts booked, and claims the difference.
    """
    wanted = {c.miner_id: c for c in commands}
    miners = list(Miner.objects.filter(pk__in=wanted, site_id=site_id).order_by("pk").select_for_update(no_key=True))
    ledger = Ledger.of(site_id)
    held = ledger.hot(now) if may_wake(ledger, now=now) else None  # the mode may have changed since it was thought
    batch: ShedBatch | None = None
    changed: list[Miner] = []
    claims: list[ShedClaim] = []
    for miner in miners:
        command = wanted[miner.pk]
        again = miner.state == Miner.State.UNRESPONSIVE  # what it was told before may be what it did not do
        if miner.desired_generation != command.seen_generation or (miner.desired_mode == command.mode and not again):
            continue
        target = miner.mode_watts[command.mode]
        if target > miner.commanded_w:
            path = ledger.tree.paths[ledger.tree.index[miner.power_node_id]]
            if held is None or held.intersection(path):
                continue
        if target > miner.reserved_w:
            if ledger.refuses(miner.power_node_id, target - miner.reserved_w, core.MINER) is not None:
                continue
            ledger.book(miner.power_node_id, target - miner.reserved_w, core.MINER)
            miner.reserved_w = target
        if target < miner.reserved_w:
            batch = batch or baseline(ledger, now=now)
            claims.append(_claim(batch, miner, target, now))
        miner.desired_mode = command.mode
        miner.commanded_w = target
        miner.desired_generation += 1
        miner.changed_at = now
        miner.low_samples = 0
        changed.append(miner)
    ledger.save()
    _save_miners(changed)
    if batch is not None:
        batch.save()
        ShedClaim.objects.filter(miner__in=changed, state=ShedClaim.State.COMMANDED).update(
            state=ShedClaim.State.FAILED, reason="superseded", settled_at=now
        )
        ShedClaim.objects.bulk_create(claims)
    if changed:
        Site.objects.filter(pk=site_id).update(safety_generation=F("safety_generation") + 1)
    return len(changed)


def _claim(batch: ShedBatch, miner: Miner, target: int, now: datetime) -> ShedClaim:
    return ShedClaim(
        site_id=miner.site_id,
        miner=miner,
        batch=batch,
        generation=miner.desired_generation + 1,
        baseline_w=max(miner.measured_w or 0, miner.confirmed_w, 1),
        drew_w=miner.measured_w if miner.measured_at is not None and now - miner.measured_at <= FRESH else None,
        target_w=target,
        commanded_at=now,
    )


def _save_miners(miners: Collection[Miner]) -> None:
    if not miners:
        return
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


def settle_miners(ledger: Ledger, *, now: datetime) -> dict[str, int]:
    """Bring the books in line with readings and meters: confirm lowerings, fail what does not drop, follow what draws more
    than booked, and keep in the margins what the meters see and nobody admits to.

    Returns counts by outcome, and `freed_w`.
    """
    claims, miners = ledger.claims, list(ledger.miners.values())
    look = Look.of(ledger, miners, now=now)
    look.remember()
    batches = {b.pk: b for b in ShedBatch.objects.filter(site_id=ledger.site_id, closed_at=None)}
    look.hear(batches.values())
    for waiting in claims.values():
        if waiting.batch_id in batches:
            waiting.batch = batches[waiting.batch_id]
    told = {c.pk: _settled(c) for c in claims.values()}
    agreed = _agreed(look, ledger.miners, claims, now)
    counts: dict[str, int] = defaultdict(int)
    changed: list[Miner] = []
    for miner in miners:
        before = (miner.reserved_w, miner.confirmed_w, miner.state, miner.desired_generation)
        claim = claims.get(miner.pk)
        if claim is not None:
            counts[_settle_claim(look, miner, claim, agreed.get(miner.pk), now)] += 1
        elif miner.state == Miner.State.OK and _reads_as_commanded(look, miner, now):
            miner.confirmed_w = miner.commanded_w
        _rebook(ledger, miner, now)
        if before != (miner.reserved_w, miner.confirmed_w, miner.state, miner.desired_generation):
            counts["freed_w"] += max(0, before[0] - miner.reserved_w)
            changed.append(miner)
    ledger.save()
    _save_miners(changed)
    ShedClaim.objects.bulk_update([c for c in claims.values() if _settled(c) != told[c.pk]], _SETTLED)
    _margins(look, miners, _sleeping(batches, now))
    return dict(counts)


_SETTLED = ("state", "reason", "attempts", "settled_at", "commanded_at", "generation", "votes", "voted_at")


def _settled(claim: ShedClaim) -> tuple[object, ...]:
    return tuple(getattr(claim, name) for name in _SETTLED)


def _reads_as_commanded(look: Look, miner: Miner, now: datetime) -> bool:
    """A wake that has ramped, or a machine that slept before anybody told it to, where the nearest meter sees no more than
    is admitted to. (A commanded lowering is a claim.)
    """
    if miner.measured_w is None or miner.measured_at is None or now - miner.measured_at > FRESH:
        return False
    if miner.applied_generation < miner.desired_generation:
        return False
    if miner.desired_mode > 0:
        return miner.measured_w <= miner.commanded_w
    if miner.low_samples < 2:
        return False
    nearest = next(iter(look.metered_above(miner.power_node_id)), None)
    return nearest is None or miner.confirmed_w == miner.commanded_w or _nothing_hidden(look, miner, nearest)


def _nothing_hidden(look: Look, miner: Miner, n: int) -> bool:
    """The meter sees nothing beyond the readings, and what the books hold for silent devices, that could be this machine's
    draw: nobody was there to see it fall, so there is no earlier look to compare with.
    """
    if n not in look.residual:
        return False
    claimed = (miner.confirmed_w - miner.commanded_w) * int(look.ledger.tree.k[n, core.MINER])
    allowed = claimed * proof.LOST_PERMILLE // 1000 + int(look.error[n]) + int(look.held_mw[n])
    return look.residual[n] <= allowed


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


def _agreed(look: Look, miners: dict[int, Miner], claims: dict[int, ShedClaim], now: datetime) -> dict[int, bool]:
    """Of the claims that read low: whether the meters above agree with all of their batch together."""
    batches: dict[int, list[ShedClaim]] = defaultdict(list)
    for claim in claims.values():
        if claim.batch_id is not None:
            batches[claim.batch_id].append(claim)
    found: dict[int, bool] = {}
    for rows in batches.values():
        batch = rows[0].batch
        assert batch is not None
        table = [
            proof.Claim(
                c.miner_id,
                look.ledger.tree.index[miners[c.miner_id].power_node_id],
                max(0, c.baseline_w - c.target_w),
                low=not _own_word(miners[c.miner_id], c, now),
            )
            for c in rows
        ]
        rise = look.rise(batch, look.residual)
        found |= proof.agrees(look.ledger.tree, table, rise, look.error)  # type: ignore[arg-type]
        for claim in rows:
            above = look.metered_above(miners[claim.miner_id].power_node_id)
            if claim.miner_id in found and above and above[0] not in rise and above[0] in look.residual:
                found[claim.miner_id] = False  # no reading of that meter before the command: nothing to compare with
    return found


def _own_word(miner: Miner, claim: ShedClaim, now: datetime) -> str:
    """Empty when the machine's own readings say that it has obeyed, else why not."""
    since = int(claim.commanded_at.timestamp()) - 1
    samples = []
    if miner.measured_at and miner.measured_w is not None:
        at = int(miner.measured_at.timestamp())
        samples = [core.Sample(at - i, miner.measured_w) for i in range(min(2, max(1, miner.low_samples)))]
    if claim.target_w <= miner.mode_watts[0]:
        return core.confirmed_drop(
            samples, claim.baseline_w, since=since, now=int(now.timestamp()) + 1, fresh_s=FRESH_S
        )
    if not samples or samples[0].at <= since or miner.applied_generation < miner.desired_generation:
        return "unreachable"
    return "" if samples[0].watts <= claim.target_w * 103 // 100 else "acknowledged_no_drop"


def _settle_claim(look: Look, miner: Miner, claim: ShedClaim, agrees: bool | None, now: datetime) -> str:
    """Confirmed, still waiting, again, or failed; the claim and the miner are changed in place."""
    reason = _own_word(miner, claim, now) or _meters_word(look, miner, claim, agrees)
    if not reason:
        miner.confirmed_w, miner.state = claim.target_w, Miner.State.OK
        claim.state, claim.reason, claim.settled_at = ShedClaim.State.CONFIRMED, "", now
        return "confirmed"
    claim.reason = "stale_telemetry" if reason == STALE_METER else reason
    waited = now - claim.commanded_at
    if waited < timedelta(seconds=SETTLE_S) or reason == STALE_METER:
        return "waiting"
    if claim.votes and waited < timedelta(seconds=AGREEING_S):
        return "waiting"
    if claim.attempts < 2:
        claim.attempts += 1
        claim.commanded_at = now
        miner.desired_generation += 1
        claim.generation = miner.desired_generation
        return "again"
    claim.state, claim.settled_at = ShedClaim.State.FAILED, now
    miner.state = Miner.State.UNRESPONSIVE
    miner.confirmed_w = max(miner.confirmed_w, miner.mode_watts[-1])
    return "failed"


def _meters_word(look: Look, miner: Miner, claim: ShedClaim, agrees: bool | None) -> str:
    """Empty when the meters have agreed often enough; the claim's votes are counted in place."""
    above = look.metered_above(miner.power_node_id)
    if any(n not in look.residual for n in above):
        return STALE_METER
    read_at = min((look.at[n] for n in above), default=miner.measured_at)
    assert read_at is not None
    if read_at <= claim.commanded_at:
        return STALE_METER
    asleep = claim.target_w <= miner.mode_watts[0]  # its readings are two, and far below; of an eco mode there is one
    agreed = not above if agrees is None else agrees
    voted_at = int(claim.voted_at.timestamp()) if claim.voted_at else None
    quiet = asleep and (not above or bool(look.calm[above[0]]))
    tally = proof.tally(claim.votes, voted_at, agreed, quiet, int(read_at.timestamp()))
    if tally.voted_at != voted_at:
        claim.votes, claim.voted_at = tally.votes, read_at
    if tally.proved:
        return ""
    return "awaiting_sample" if agreed else "phantom_load"


_LEFT = """
SELECT c.batch_id, bool_or(c.state = 'confirmed') FROM marketplace_shedclaim c JOIN marketplace_miner m ON m.id = c.miner_id
WHERE c.batch_id = ANY(%s::bigint[])
  AND (c.state = 'commanded' OR (c.state = 'confirmed' AND c.generation = m.desired_generation))
GROUP BY 1
"""


def _sleeping(batches: dict[int, ShedBatch], now: datetime) -> list[ShedBatch]:
    """Of the open batches those of which a machine sleeps; one is over when none of its machines waits or sleeps on it any more."""
    if not batches:
        return []
    left = dict(prepared.rows(_LEFT, [list(batches)]))
    if over := batches.keys() - left.keys():
        ShedBatch.objects.filter(pk__in=over).update(closed_at=now)
    return [batch for pk, batch in batches.items() if left.get(pk)]


def forget(now: datetime) -> int:
    """Deletes batches that have been over for longer than the settings allow, with their claims; how many went. Those by which
    a machine is still doubted stay (`_doubts`). Needs no lock: nobody reads what is over.
    """
    cut = now - timedelta(days=settings.SHED_RECORD_DAYS)
    doubted = ShedClaim.objects.filter(state=ShedClaim.State.FAILED, miner__state=Miner.State.UNRESPONSIVE)
    old = ShedBatch.objects.filter(closed_at__lt=cut).exclude(claims__in=doubted).order_by("pk")
    batches = list(old.values_list("pk", flat=True)[:FORGOTTEN])
    ShedBatch.objects.filter(pk__in=batches).delete()
    return len(batches)


def _margins(look: Look, miners: Sequence[Miner], sleeping: Iterable[ShedBatch]) -> None:
    """margin(n) = the larger of the metering's share and what the meter sees unexplained since the sleepers below lay down."""
    ledger, residual = look.ledger, look.settled()
    share = {n: core.margin_w(int(ledger.tree.cap_w[n]), how) for n, how in enumerate(ledger.tree.metering)}
    rises = []
    doubts: dict[int, datetime] | None = None
    for batch in sleeping:
        # No more than the meter sees and nobody admits to now: it may have seen less than was read before the command (an
        # outage, a machine that reads too much), and readings that have come down since are no watts that somebody draws.
        rise = {n: min(mw, residual[n]) for n, mw in look.rise(batch, residual).items()}
        if all(mw <= 1000 * share[n] for n, mw in rise.items()):
            continue
        if doubts is None:
            doubts = _doubts(ledger.site_id)
        rises.append((rise, look.doubted(batch.commanded_at, batch.silent, miners, doubts)))
    hidden = proof.unexplained_mw(ledger.tree, rises)
    changed: dict[int, int] = {}
    for pk, node in ledger.nodes.items():
        n = ledger.tree.index[pk]
        # In steps of 100 W: a meter's noise is no reason to write a row.
        margin = max(share[n], -(-int(hidden[n]) // 100_000) * 100)
        if margin != node.margin_w:
            changed[pk] = margin
    ledger.set_margins(changed)


def _doubts(site_id: int) -> dict[int, datetime]:
    """Machine -> the batch since which it is not believed: its claim is open, or has failed and was not made good."""
    rows = ShedClaim.objects.filter(site_id=site_id, batch__isnull=False).order_by("id")
    open_rows = rows.filter(state=ShedClaim.State.COMMANDED)
    failed = rows.filter(state=ShedClaim.State.FAILED, miner__state=Miner.State.UNRESPONSIVE)
    return dict(
        [
            *failed.values_list("miner_id", "batch__commanded_at"),
            *open_rows.values_list("miner_id", "batch__commanded_at"),
        ]
    )
