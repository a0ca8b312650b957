"""The published protocol's own dice, so that any of its runs can be had again: arrivals and the order of nodes, from a seed.

The published simulator draws all that is random from one additive lagged Fibonacci generator (x[t] = x[t-607] + x[t-273]
mod 2^64, Go's math/rand), seeded by a seed XOR a table that is the generator's state after 7.8e12 steps. That state is
computed here by raising x to that power modulo the recurrence's polynomial (0.1 s); nothing is stored.

Protocol: one number is thrown away; the pods, sorted by name, are shuffled; clones of random pods follow until the GPU
demand would pass 130 % of the capacity (or random pods leave until it does not); the scheduler that the simulator then
starts draws `BETWEEN` numbers for its timers; a permutation gives each node the rank that breaks ties. With these ranks
our FGD gives the published figures of single runs to the last digit on most lists (`python -m benchmarks packing`).
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from scheduler.core.types import I64

LENGTH: Final = 607
TAP: Final = 273
LAG: Final = LENGTH - TAP
WARMED: Final = 7_800_000_000_000  # steps after which the table was taken
BETWEEN: Final = 10  # found on the one run whose node order is known (default, 42); it holds for the others

_U64 = npt.NDArray[np.uint64]
_WORD: Final = (1 << 64) - 1


def _seeds(seed: int, shifts: tuple[int, int]) -> list[int]:
    """The register's first fill: three numbers of a Lehmer generator to a word, the first 20 thrown away."""
    x, out = seed % (2**31 - 1) or 89_482_311, []
    for i in range(-20, LENGTH):
        x = 48_271 * x % (2**31 - 1)
        if i >= 0:
            word = x << shifts[0]
            x = 48_271 * x % (2**31 - 1)
            word ^= x << shifts[1]
            x = 48_271 * x % (2**31 - 1)
            out.append((word ^ x) & _WORD)
    return out


def _multiply(a: _U64, b: _U64) -> _U64:
    """Product of two polynomials modulo x^607 - x^334 - 1, coefficients modulo 2^64."""
    product = np.zeros(2 * LENGTH - 1, np.uint64)
    for i in np.flatnonzero(a):
        product[i : i + LENGTH] += a[i] * b
    for high in range(2 * LENGTH - 1, LENGTH, -TAP):  # x^607 = x^334 + 1, from the top
        low = max(LENGTH, high - TAP)
        product[low - LENGTH : high - LENGTH] += product[low:high]
        product[low - TAP : high - TAP] += product[low:high]
    return product[:LENGTH]


@cache
def _table() -> tuple[int, ...]:
    """The state after `WARMED` steps, by position in the register."""
    first = _seeds(1, (20, 10))
    # In the order of use, s[t + 607] = s[t] + s[t + 334]; the word at position p is s[t] with t = 333 - p modulo 607.
    s = np.zeros(2 * LENGTH, np.uint64)
    s[:LENGTH] = [first[(LAG - 1 - t) % LENGTH] for t in range(LENGTH)]
    for t in range(LENGTH):
        s[t + LENGTH] = s[t] + s[t + LAG]
    power, base, left = np.zeros(LENGTH, np.uint64), np.zeros(LENGTH, np.uint64), WARMED
    power[0] = base[1] = 1
    while left:
        if left & 1:
            power = _multiply(power, base)
        base, left = _multiply(base, base), left >> 1
    out = [0] * LENGTH
    for j in range(LENGTH):
        out[(LAG - 1 - WARMED - j) % LENGTH] = int((power * s[j : j + LENGTH]).sum(dtype=np.uint64))
    return tuple(out)


class Dice:
    """The generator, from a seed."""

    def __init__(self, seed: int) -> None:
        self.words = [a ^ b for a, b in zip(_seeds(seed, (40, 20)), _table(), strict=True)]
        self.feed, self.tap = LAG, 0

    def draw(self) -> int:
        """63 bits."""
        self.tap, self.feed = (self.tap - 1) % LENGTH, (self.feed - 1) % LENGTH
        self.words[self.feed] = word = (self.words[self.feed] + self.words[self.tap]) & _WORD
        return word & (_WORD >> 1)

    def below(self, n: int) -> int:
        """Even over 0..n-1: 31 bits, those beyond the last whole multiple of n drawn again."""
        most = (1 << 31) - 1 - (1 << 31) % n
        value = self.draw() >> 32
        while value > most:
            value = self.draw() >> 32
        return value % n

    def _scaled(self, n: int) -> int:
        """Even over 0..n-1, as the shuffle draws it: 32 bits times n, the upper word (Lemire)."""
        product = (self.draw() >> 31) * n
        while product % (1 << 32) < (1 << 32) % n:
            product = (self.draw() >> 31) * n
        return product >> 32

    def shuffle(self, items: list[int]) -> None:
        """In place, from the end."""
        for i in range(len(items) - 1, 0, -1):
            j = self._scaled(i + 1)
            items[i], items[j] = items[j], items[i]

    def permutation(self, n: int) -> list[int]:
        """Of 0..n-1, inside out."""
        out = [0] * n
        for i in range(n):
            j = self.below(i + 1)
            out[i], out[j] = out[j], i
        return out


def order(pods: I64, gpus: int, seed: int, nodes: int, ratio: float = 1.3) -> tuple[I64, list[int], list[int]]:
    """(arrivals as rows of `pods`, node permutation as the order files have it, rank of each node in the published run).

    `pods` [P, 5] in the order of their names (columns of `Trace.pods`); `gpus` of the cluster.
    """
    dice = Dice(seed)
    dice.draw()
    rows = list(range(len(pods)))
    dice.shuffle(rows)
    milli = np.where(pods[:, 2] > 0, pods[:, 3], 0).tolist()
    asked = (pods[:, 2] * pods[:, 3]).tolist()
    demand, most = sum(asked), ratio * gpus * 1000
    if demand > most:
        while demand > most:
            demand -= asked[rows.pop(dice.below(len(rows)))]
    elif demand < most:
        while demand + milli[i := dice.below(len(pods))] <= most:  # one GPU of it: so the simulator counts
            demand += asked[i]
            rows.append(i)
    arrivals = np.array(rows, np.int64)
    words, feed, tap = dice.words.copy(), dice.feed, dice.tap
    listed = dice.permutation(nodes)
    dice.words, dice.feed, dice.tap = words, feed, tap
    for _ in range(BETWEEN):
        dice.draw()
    return arrivals, listed, dice.permutation(nodes)
