"""How far a host, a listing or an operator can be relied on: four shares of what was counted in 30 days, and one score of them.

Each share is good / all, drawn towards what is usual while little has been counted (the mean of a Beta distribution whose prior
is PRIORS: as if `weight` had been seen before, `usual` of it good). A new host is neither perfect nor damned, and one bad hour does
not end a name. The score is the product of the shares, each to the power of its weight:

    share_i = (good_i + usual_i * weight_i) / (all_i + weight_i)
    score   = availability^0.50 * starts^0.25 * gpus^0.15 * drains^0.10

so that it lies in [0, 1], rises with every good thing counted and falls with every bad one, and no share makes up for another that
is near nothing. A group (a listing's hosts, an operator's) is scored from the sums of its members' counts, not from their scores.
The same words are published in docs/reliability.md.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from math import prod
from typing import Final

WINDOW_DAYS: Final = 30
DRAIN_SLACK_S: Final = 60  # beyond the job's own grace, before a leave counts as late


@dataclass(frozen=True)
class Prior:
    """`usual`: the share before anything is counted; `weight`: how much must be counted to outweigh it; `power`: in the score."""

    usual: float
    weight: float
    power: float


PRIORS: Final = {
    "availability": Prior(0.97, 72.0, 0.50),  # hours
    "starts": Prior(0.97, 20.0, 0.25),
    "gpus": Prior(0.99, 40.0, 0.15),  # GPU-days
    "drains": Prior(0.97, 10.0, 0.10),
}


@dataclass(frozen=True)
class Counts:
    """What was counted. Seconds on offer; of these able to work, silent together with the site, and excused (announced work in due
    time); starts asked and failed by the host's fault; GPU-days on offer and those with an error; leaves asked and late.
    """

    offered_s: int = 0
    able_s: int = 0
    silent_s: int = 0
    excused_s: int = 0
    starts: int = 0
    failed_starts: int = 0
    gpu_days: int = 0
    sick_gpu_days: int = 0
    drains: int = 0
    late_drains: int = 0


@dataclass(frozen=True)
class Part:
    """One share: `good` of `of` (hours, starts, GPU-days, leaves), and what it comes to in [0, 1]."""

    name: str
    good: float
    of: float
    value: float


def total(counts: Iterable[Counts]) -> Counts:
    """The sums over a group."""
    return Counts(*map(sum, zip(*map(astuple, counts), strict=True))) if (counts := list(counts)) else Counts()


def parts(counts: Counts) -> tuple[Part, ...]:
    """The four shares in the order of PRIORS."""
    due_s = max(0, counts.offered_s - counts.excused_s)
    counted = {
        "availability": (min(counts.able_s, due_s) / 3600, due_s / 3600),
        "starts": (counts.starts - counts.failed_starts, counts.starts),
        "gpus": (counts.gpu_days - counts.sick_gpu_days, counts.gpu_days),
        "drains": (counts.drains - counts.late_drains, counts.drains),
    }
    return tuple(
        Part(name, good, of, (good + prior.usual * prior.weight) / (of + prior.weight))
        for name, prior in PRIORS.items()
        for good, of in (counted[name],)
    )


def score(counts: Counts) -> float:
    """In [0, 1]."""
    return min(1.0, float(prod(part.value ** PRIORS[part.name].power for part in parts(counts))))


def permille(counts: Counts) -> int:
    """The score in thousandths, rounded down: nobody is shown as better than counted."""
    return int(score(counts) * 1000)
