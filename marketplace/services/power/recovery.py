"""The way back of machines that were not believed: a test of their own under a meter that nothing else confuses."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from marketplace.models import Miner, PowerNode, ShedClaim
from marketplace.services.power.ledger import FRESH, Ledger
from marketplace.services.power.miners import SETTLE_S, Command

FIRST_TEST = timedelta(seconds=60)  # after the first failure; twice as long after each further one
MOST_WAITS = 64
MOST_DOUBLINGS = 10  # more than LONGEST has
RAMP = timedelta(seconds=180)  # a machine that has not woken by then is not being tested
# Told to wake and asleep still, it is told again after RAMP, then after twice as long each time, up to this. A turn of it takes its
# meter from all others there for RAMP: at an hour a dead machine takes a twentieth of that time, and one that somebody has mended is
# back within the shift in which it was. It waits for nothing when it wakes by itself, or late: its reading is seen at once.
LONGEST = timedelta(hours=1)
DAY = timedelta(days=1)


def tests_due(ledger: Ledger, *, now: datetime) -> list[Command]:
    """How an unresponsive machine comes back: by waking within the watts still booked for it, and sleeping before a meter
    that nothing else confuses. One at a time under each meter; after each failure it waits twice as long. Where the books or
    a meter stand over what is allowed none is woken, and the one that was woken sleeps. One that was told to wake and sleeps still (the
    site's own loop had latched it, say) is told again, when its turn comes: twice as late each time. Who could
    be told nothing that decides anything has no turn: who is silent, say.
    """
    miners = [m for m in ledger.miners.values() if m.state == Miner.State.UNRESPONSIVE and not m.manual]
    if not miners:
        return []
    failures: dict[int, list[datetime]] = defaultdict(list)
    doubted_at: dict[
        int, int
    ] = {}  # machine -> the generation that failed last; what it was told since has proved nothing either
    claims = ShedClaim.objects.filter(miner__in=miners, state=ShedClaim.State.FAILED).order_by("pk")
    for miner_id, at, generation in claims.values_list("miner_id", "settled_at", "generation"):
        doubted_at[miner_id] = generation
        if at is not None and at > now - DAY:
            failures[miner_id].append(at)
    in_vain = {m.pk: m.desired_generation - doubted_at.get(m.pk, m.desired_generation) for m in miners}
    tests = {m.pk: _test(m, in_vain[m.pk], now) for m in miners}
    judged = {m.pk for m in miners if ledger.waits_for(m)}
    being_tested = judged | {m.pk for m in miners if m.desired_mode and m.changed_at and now - m.changed_at < RAMP}
    over = {n for n in range(len(ledger.free)) if ledger.free[n] < 0} | ledger.hot(now)
    pressed = {m.pk for m in miners if over.intersection(_path(ledger, m))}
    taken: dict[int, int] = {}  # place -> whose turn it is
    for miner in sorted(miners, key=lambda m: (m.pk not in being_tested, len(failures[m.pk]), _told(m), m.pk)):
        wait = FIRST_TEST * min(MOST_WAITS, 2 ** max(0, len(failures[miner.pk]) - 1))
        due = now - max(failures[miner.pk], default=now - DAY) >= wait and tests[miner.pk] is not None
        if (due and miner.pk not in pressed) or miner.pk in being_tested:
            taken.setdefault(_place(ledger, miner), miner.pk)
    chosen = set(taken.values()) - judged - pressed
    back = [Command(m.pk, 0, m.desired_generation) for m in miners if m.pk in pressed and m.desired_mode]
    return back + [c for m in miners if m.pk in chosen and (c := tests[m.pk]) is not None]


def _told(miner: Miner) -> datetime:
    """When it was last told anything: of equals the turn goes round, so that one which does not wake keeps no other waiting."""
    return miner.changed_at or datetime.min.replace(tzinfo=UTC)


def _path(ledger: Ledger, miner: Miner) -> Sequence[int]:
    return ledger.tree.paths[ledger.tree.index[miner.power_node_id]]


def _place(ledger: Ledger, miner: Miner) -> int:
    path = _path(ledger, miner)
    return next((n for n in path if ledger.tree.metering[n] == PowerNode.Metering.METER), path[0])


def _test(miner: Miner, in_vain: int, now: datetime) -> Command | None:
    """What it would be told in its turn; None: nothing that could decide anything now. `in_vain`: how often it was told something since it
    failed last.
    """
    if miner.measured_at is None or miner.measured_w is None or now - miner.measured_at > FRESH:
        return None
    since = now - _told(miner)
    if 100 * miner.measured_w <= 15 * miner.mode_watts[-1]:
        if miner.desired_mode and since < min(LONGEST, RAMP * 2 ** min(max(0, in_vain - 1), MOST_DOUBLINGS)):
            return None
        mode = max(i for i, watts in enumerate(miner.mode_watts) if watts <= miner.reserved_w)
        return Command(miner.pk, mode, miner.desired_generation) if mode else None
    settled = since >= timedelta(seconds=SETTLE_S)
    runs = 100 * miner.measured_w >= 85 * (miner.commanded_w if miner.desired_mode else miner.mode_watts[1])
    return Command(miner.pk, 0, miner.desired_generation) if runs and settled else None
