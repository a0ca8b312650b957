"""Has a machine really gone to sleep? Its own readings say so, and the meters above it must have nothing left to explain.

Pure; units as in `power`. The *residual* of a metered node is what its meter sees and no device below admits to:

    r(n) = meter(n) - fixed(n) - sum of k(n) * reading(d) over the devices d below n

Honest devices leave r where it was, whatever they do: a host that ramps raises the meter and its own reading alike. A
machine that reports sleep and goes on drawing raises r by what it hides. So a batch of sleeps keeps the residuals of the
moment before its command, and its claims hold when r has not risen by more than 20 % of them (and the meters' error)
since; what rose all the same stays in the node's margin while anybody of the batch still sleeps. See
docs/adr/0011-confirmed-by-meter.md for the lags, the noise and what a meter cannot see.

API::

    residuals_mw(tree, meters, devices)                 -> {node: mW} for the metered nodes given
    rise_mw(tree, now, before, devices, answered)       -> {node: mW} since `before`, devices that came back not counted
    error_mw(tree, devices)                             -> int64[nodes], what r may move by itself
    agrees(tree, claims, rise, error)                   -> {claim key: True | False}
    calm(tree, devices)                                 -> bool[nodes]: nothing below can hide a rise by its own ramp
    tally(votes, voted_at, agrees, calm, at)            -> Tally: two agreeing looks, or one in calm
    unexplained_mw(tree, [(rise, doubted load), ...])   -> int64[nodes], to be kept in the margin
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scheduler.core.power_tree import MINER, Ints, Load, PowerTree, reserved_mw

# The node's meter must see 80 % of a claim: so much of it may be the devices' own error.
LOST_PERMILLE = 200
# Of a node's cap: half of a metered node's margin (20 per mille), which is there for the meter's error.
ERROR_PERMILLE = 10
# Of the cooling's share: it follows the devices by tens of seconds, and so stands off by what changed lately.
COOLING_PERMILLE = 250
# A host's reading leads its meter by a second or two: looks this far apart are not misled by the same ramp.
APART_S = 4
NEEDED = 2  # agreeing looks
Node = int


@dataclass(frozen=True)
class Devices:
    """Devices as columns. `watts`: last reading. `known`: it is fresh. `stirs`: it may be ramping up, or on its way down
    (a host above its parked draw, a machine between two modes): for some seconds its reading and the meter differ.
    """

    key: tuple[Hashable, ...]
    node: Ints
    kind: Ints
    watts: Ints
    known: npt.NDArray[np.bool_]
    stirs: npt.NDArray[np.bool_]

    @staticmethod
    def of(rows: Iterable[tuple[Hashable, int, int, int, bool, bool]]) -> "Devices":
        """Rows of (key, position of its node, kind, watts, known, stirs)."""
        keys, nodes, kinds, watts, known, stirs = zip(*rows, strict=True) if (rows := list(rows)) else ((),) * 6
        return Devices(
            tuple(keys),
            np.array(nodes, np.int64),
            np.array(kinds, np.int64),
            np.array(watts, np.int64),
            np.array(known, np.bool_),
            np.array(stirs, np.bool_),
        )

    def load(self, tree: PowerTree, chosen: npt.NDArray[np.bool_]) -> Load:
        return Load.of(tree, self.node[chosen], self.kind[chosen], self.watts[chosen])

    def silent(self) -> list[Hashable]:
        return [key for key, known in zip(self.key, self.known.tolist(), strict=True) if not known]


@dataclass(frozen=True)
class Claim:
    """Watts that a lowered machine says are free. `low`: two fresh readings say so. `watts`: of the device, no overhead."""

    key: Hashable
    node: Node
    watts: int
    low: bool


@dataclass(frozen=True)
class Tally:
    votes: int
    voted_at: int | None
    proved: bool


def residuals_mw(tree: PowerTree, meters: Mapping[Node, int], devices: Devices) -> dict[Node, int]:
    """What each meter (node position -> W) sees and no device with a fresh reading admits to."""
    admitted = reserved_mw(tree, devices.load(tree, devices.known))
    return {n: 1000 * (watts - int(tree.fixed_w[n])) - int(admitted[n]) for n, watts in meters.items()}


def rise_mw(
    tree: PowerTree,
    now: Mapping[Node, int],
    before: Mapping[Node, int],
    devices: Devices,
    answered: Mapping[Hashable, int],
) -> dict[Node, int]:
    """How far the residuals stand above `before`, at the nodes with both.

    A device that was silent before and answers now admits to watts that were part of the residual then: they are added
    back, or it would hide as much. How many they were nobody knows; `answered` (device -> W) is its first reading since.
    What it draws now may be more: its meter and its own reading have risen alike since it speaks. One that fell silent
    since counts as drawing nothing: nobody says otherwise, and the rise is not believed away.
    """
    added = np.zeros(len(tree.keys), np.int64)
    if answered:
        first = np.fromiter((answered.get(key, 0) for key in devices.key), np.int64, len(devices.key))
        back = devices.known & (first > 0)
        added = reserved_mw(tree, Load.of(tree, devices.node[back], devices.kind[back], first[back]))
    return {n: now[n] - mw + int(added[n]) for n, mw in before.items() if n in now}


def error_mw(tree: PowerTree, devices: Devices) -> Ints:
    """By how much a residual moves without anybody lying: the meter's error, and the cooling's lag where the node feeds it."""
    load = devices.load(tree, devices.known)
    cooling = (load.watts * (tree.k - 1000)).sum(axis=1)
    error: Ints = tree.cap_w * ERROR_PERMILLE + cooling * COOLING_PERMILLE // 1000
    return error


def agrees(tree: PowerTree, claims: Iterable[Claim], rise: Mapping[Node, int], error: Ints) -> dict[Hashable, bool]:
    """For the claims of one batch that read low: whether every meter above them agrees with all of them together."""
    low = [claim for claim in claims if claim.low]
    claimed = reserved_mw(tree, Load.of(tree, *_columns(low)))
    fine = {n: mw <= int(claimed[n]) * LOST_PERMILLE // 1000 + int(error[n]) for n, mw in rise.items()}
    return {claim.key: all(fine.get(n, True) for n in tree.paths[claim.node]) for claim in low}


def _columns(claims: Sequence[Claim]) -> tuple[list[int], list[int], list[int]]:
    return [c.node for c in claims], [MINER] * len(claims), [c.watts for c in claims]


def calm(tree: PowerTree, devices: Devices) -> npt.NDArray[np.bool_]:
    """Nodes under which every device answers and none stirs: a single look at the meter is then the truth."""
    moving = np.bincount(devices.node, devices.stirs | ~devices.known, len(tree.keys)).astype(np.int64)
    for n in range(len(tree.keys) - 1, 0, -1):
        if tree.parent[n] >= 0:
            moving[tree.parent[n]] += moving[n]
    still: npt.NDArray[np.bool_] = moving == 0
    return still


def tally(votes: int, voted_at: int | None, agreed: bool, quiet: bool, at: int) -> Tally:
    """Count one look at the meter, taken at `at` (seconds), for or against a claim.

    A host that ramps up can hide a lie for a second or two, because its reading leads the meter; it cannot do so in two
    looks APART_S apart. In calm (`quiet`) there is nothing to hide behind, and one look decides.
    """
    if agreed and quiet:
        return Tally(NEEDED, at, proved=True)
    if voted_at is not None and at < voted_at + APART_S:
        return Tally(votes, voted_at, proved=False)
    votes = min(NEEDED, votes + 1) if agreed else max(0, votes - 1)
    return Tally(votes, at, proved=votes >= NEEDED)


def unexplained_mw(tree: PowerTree, rises: Iterable[tuple[Mapping[Node, int], Load]]) -> Ints:
    """What the meters have come to see beyond the readings since machines that sleep still were put to sleep.

    `rises`: per batch with confirmed sleepers its rise, and what the books hold above the readings since then anyway (of
    machines not believed, and of devices fallen silent): that much of the rise is booked already. The largest counts.
    """
    worst = np.zeros(len(tree.keys), np.int64)
    for rise, doubted in rises:
        held = reserved_mw(tree, doubted)
        for n, mw in rise.items():
            worst[n] = max(int(worst[n]), mw - int(held[n]))
    return worst
