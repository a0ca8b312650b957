"""The score of reliability: in [0, 1], monotone in all that is counted, and drawn to what is usual while that is little."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core.reliability import PRIORS, Counts, parts, permille, score, total

pytestmark = pytest.mark.serverless
DAY = 86_400


@st.composite
def counts(draw: st.DrawFn) -> Counts:
    def of(most: int) -> tuple[int, int]:
        every = draw(st.integers(0, most))
        return every, draw(st.integers(0, every))

    offered, away = of(30 * DAY)
    starts, failed = of(5000)
    gpu_days, sick = of(480)
    drains, late = of(500)
    excused = draw(st.integers(0, away))
    return Counts(
        offered, offered - away, draw(st.integers(0, away)), excused, starts, failed, gpu_days, sick, drains, late
    )


WORSE = {
    "able_s": lambda c: replace(c, able_s=c.able_s - 1) if c.able_s else c,
    "failed_starts": lambda c: replace(c, failed_starts=c.failed_starts + 1) if c.failed_starts < c.starts else c,
    "sick_gpu_days": lambda c: replace(c, sick_gpu_days=c.sick_gpu_days + 1) if c.sick_gpu_days < c.gpu_days else c,
    "late_drains": lambda c: replace(c, late_drains=c.late_drains + 1) if c.late_drains < c.drains else c,
    "one more failed start": lambda c: replace(c, starts=c.starts + 1, failed_starts=c.failed_starts + 1),
    "one more late leave": lambda c: replace(c, drains=c.drains + 1, late_drains=c.late_drains + 1),
    "one more hour away": lambda c: replace(c, offered_s=c.offered_s + 3600),
}
BETTER = {
    "one more start": lambda c: replace(c, starts=c.starts + 1),
    "one more hour able": lambda c: replace(c, offered_s=c.offered_s + 3600, able_s=c.able_s + 3600),
    "one more leave in time": lambda c: replace(c, drains=c.drains + 1),
    "an hour excused": lambda c: replace(c, excused_s=min(c.excused_s + 3600, c.offered_s - c.able_s)),
}


@given(counts())
def test_every_share_and_the_score_lie_between_nothing_and_one(found: Counts) -> None:
    assert all(0 <= part.value <= 1 and 0 <= part.good <= part.of for part in parts(found))
    assert 0 < score(found) <= 1
    assert permille(found) == int(score(found) * 1000)


@pytest.mark.parametrize("name", WORSE)
@given(found=counts())
def test_what_is_bad_never_helps(name: str, found: Counts) -> None:
    assert score(WORSE[name](found)) <= score(found)


@pytest.mark.parametrize("name", BETTER)
@given(found=counts())
def test_what_is_good_never_harms(name: str, found: Counts) -> None:
    assert score(BETTER[name](found)) >= score(found)


def test_a_new_host_is_neither_perfect_nor_damned() -> None:
    assert [part.value for part in parts(Counts())] == pytest.approx([p.usual for p in PRIORS.values()])
    assert 965 < permille(Counts()) < 980
    perfect = Counts(30 * DAY, 30 * DAY, starts=300, gpu_days=240, drains=50)
    assert permille(perfect) > 993
    one_bad_hour = Counts(3600, 0)
    assert 960 < permille(one_bad_hour) < permille(Counts())
    assert permille(Counts(30 * DAY, 0)) < 310  # never there, all month


def test_announced_work_does_not_count_against_a_host() -> None:
    ten_hours = 36_000
    away = Counts(30 * DAY, 30 * DAY - ten_hours)
    assert score(away) < score(replace(away, excused_s=ten_hours)) <= score(Counts(30 * DAY, 30 * DAY))


def test_a_group_is_scored_from_its_sums() -> None:
    good, bad = Counts(30 * DAY, 30 * DAY, starts=100), Counts(DAY, 0, starts=2, failed_starts=2)
    both = total([good, bad])
    assert both == Counts(31 * DAY, 30 * DAY, starts=102, failed_starts=2)
    assert score(bad) < score(both) < score(good)
    assert total([]) == Counts()
