"""What a hash, a watt and a GPU-hour are worth: hashprice, $/MWh, break-even, the value of a mode, the spot floor.

Pure integer arithmetic (sources: `research/power.md` section 4; formulas: `design/power.md`, Economics).

Units. Money: integer micro-USD (uUSD, 1e-6 USD). Energy price: uUSD per MWh. Hashprice: uUSD per PH/s per day. Hash
rate:
integer GH/s (a ladder's 39.2 TH/s = 39_200). Efficiency: mJ/TH (17.5 J/TH = 17_500). Pool fee: parts per million.
PUE: per
mille. Revenue rounds down and cost rounds up, so no rounding ever makes hashing look better than it is.

API::

    subsidy_sat(height) -> sat
    mean_reward_sat(total_reward_sat, blocks) -> sat per block       (feeds give strings; subsidy and fees together)
    expected_reward_sat(height, fees_sat, scheme) -> sat             what the pool's scheme pays for
    btc_per_ph_day_sat(difficulty, reward_sat) -> Fraction           satoshi per PH/s per day
    hashprice_uusd(difficulty, reward_sat, btc_price_uusd) -> int    uUSD per PH/s per day
    asic_uusd_per_mwh(hashprice, efficiency_mj_per_th) -> int        gross, at the machine
    break_even_uusd_per_mwh(hashprice, efficiency_mj_per_th, pool_fee_ppm, pue_permille) -> int      at the meter
    mode_value_uusd_h(hashprice, ghs, watts, energy_uusd_mwh, pool_fee_ppm, pue_permille) -> int     net of energy
    mode_values_uusd_h(hashprice, ghs[], watts[], energy_uusd_mwh, ...) -> int64[]                   the same for
    columns
    gpu_share_w(base_w, gpus, gpu_max_w) -> W
    spot_floor(gpu_share_w, pue_permille, energy_uusd_mwh, hashing_uusd_mwh, fee) -> millionths of a USD per GPU-hour
    checked(quote, now=, max_age_s=, signed=False) -> the value      or ZeroFeedError / StaleFeedError /
    FutureFeedError, all FeedError
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

SATOSHI = 100_000_000
HALVING_BLOCKS = 210_000
UUSD = 1_000_000


class FeedError(ValueError):
    """A feed's value that nothing may be decided on. The last plan stays; nothing increases. `feed` names it."""

    def __init__(self, feed: str, why: str) -> None:
        super().__init__(f"feed {feed}: {why}")
        self.feed = feed


class ZeroFeedError(FeedError):
    """Zero or negative where neither can be (a hash rate reads 0 while the feed's own node is down)."""


class StaleFeedError(FeedError):
    """Older than its consumer accepts."""


class FutureFeedError(FeedError):
    """Dated in the future: one of the two clocks is wrong, so its age means nothing."""


@dataclass(frozen=True)
class Quote:
    """A value as a feed gave it: `at` in seconds since the epoch, `source` for the record."""

    feed: str
    value: int
    at: int
    source: str


def checked(quote: Quote, *, now: int, max_age_s: int, ahead_s: int = 30, signed: bool = False) -> int:
    """The value, if it may be used. `signed`: zero and below are real (real-time energy clears there); otherwise they
    are refused.
    """
    if quote.at > now + ahead_s:
        raise FutureFeedError(quote.feed, f"dated {quote.at - now} s ahead ({quote.source})")
    if now - quote.at > max_age_s:
        raise StaleFeedError(quote.feed, f"{now - quote.at} s old, at most {max_age_s} s accepted ({quote.source})")
    if quote.value <= 0 and not signed:
        raise ZeroFeedError(quote.feed, f"value {quote.value} ({quote.source})")
    return quote.value


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ZeroFeedError(name, f"value {value}")


def subsidy_sat(height: int) -> int:
    """The block subsidy: 50 BTC, halved every 210,000 blocks, in whole satoshi as consensus has it."""
    halvings = height // HALVING_BLOCKS
    return 0 if halvings >= 64 else (50 * SATOSHI) >> halvings


def mean_reward_sat(total_reward_sat: int | str, blocks: int) -> int:
    """Subsidy plus fees of a mean block, from the reward statistics of the last `blocks` blocks."""
    total = int(total_reward_sat)
    _positive(total_reward=total, blocks=blocks)
    return total // blocks


def expected_reward_sat(height: int, fees_sat: int, scheme: str) -> int:
    """What a pool pays for a block's worth of work: with `fpps` the subsidy and the fees of a mean block, with `pps` the subsidy
    alone; `pplns` pays by the blocks found, on average as `fpps`. Raises ValueError for another scheme.
    """
    if scheme not in {"fpps", "pps", "pplns"}:
        raise ValueError(f"pool scheme {scheme!r} is none of fpps, pps, pplns")
    return subsidy_sat(height) + (0 if scheme == "pps" else fees_sat)


def btc_per_ph_day_sat(difficulty: int, reward_sat: int) -> Fraction:
    """Expected satoshi per PH/s per day: 1e15 * 86400 / (D * 2^32) blocks, each worth subsidy + fees."""
    _positive(difficulty=difficulty, reward=reward_sat)
    return Fraction(10**15 * 86_400 * reward_sat, difficulty << 32)


def hashprice_uusd(difficulty: int, reward_sat: int, btc_price_uusd: int) -> int:
    """Hashprice in uUSD per PH/s per day; `btc_price_uusd` is uUSD per BTC."""
    _positive(btc_price=btc_price_uusd)
    return int(btc_per_ph_day_sat(difficulty, reward_sat) * btc_price_uusd / SATOSHI)


def asic_uusd_per_mwh(hashprice: int, efficiency_mj_per_th: int) -> int:
    """Gross earnings of a MWh at the ASIC: hashprice / (0.024 * J/TH)."""
    _positive(hashprice=hashprice, efficiency=efficiency_mj_per_th)
    return hashprice * 1_000_000 // (24 * efficiency_mj_per_th)


def break_even_uusd_per_mwh(
    hashprice: int, efficiency_mj_per_th: int, *, pool_fee_ppm: int = 0, pue_permille: int = 1000
) -> int:
    """The energy price at the meter above which hashing loses: hashprice * (1 - fee) / (24 * J/TH * PUE), per MWh.

    It is also what a MWh at the meter earns hashing after the pool's fee.
    """
    _positive(hashprice=hashprice, efficiency=efficiency_mj_per_th, pue=pue_permille)
    return hashprice * (UUSD - pool_fee_ppm) * 1000 // (24 * efficiency_mj_per_th * pue_permille)


def mode_value_uusd_h(
    hashprice: int, ghs: int, watts: int, energy_uusd_mwh: int, *, pool_fee_ppm: int = 0, pue_permille: int = 1000
) -> int:
    """What a machine earns in an hour of one mode, after pool fee and energy; negative below break-even, 0 - energy
    when asleep.
    """
    _positive(hashprice=hashprice)
    revenue = hashprice * (UUSD - pool_fee_ppm) // UUSD * ghs // 24_000_000
    return revenue - -(-watts * pue_permille * energy_uusd_mwh // 1_000_000_000)


def mode_values_uusd_h(
    hashprice: int,
    ghs: npt.NDArray[np.int64],
    watts: npt.NDArray[np.int64],
    energy_uusd_mwh: int,
    *,
    pool_fee_ppm: int = 0,
    pue_permille: int | npt.NDArray[np.int64] = 1000,
) -> npt.NDArray[np.int64]:
    """`mode_value_uusd_h` over columns of any one shape; int64 holds it up to $9,000 a PH/s-day and $100,000 a MWh."""
    _positive(hashprice=hashprice)
    net = hashprice * (UUSD - pool_fee_ppm) // UUSD
    values: npt.NDArray[np.int64] = net * ghs // 24_000_000 + -watts * pue_permille * energy_uusd_mwh // 1_000_000_000
    return values


def gpu_share_w(base_w: int, gpus: int, gpu_max_w: int) -> int:
    """One GPU's part of its host at nameplate, rounded up."""
    return gpu_max_w + -(-base_w // gpus)


def spot_floor(gpu_share_w: int, pue_permille: int, energy_uusd_mwh: int, hashing_uusd_mwh: int, fee: int = 0) -> int:
    """The least a spot GPU-hour may cost, in millionths of a USD: what its watts cost, or would earn hashing, plus
    the fee.

    W x PUE x max(energy price, hashing earnings at the meter) + fee, rounded up. `hashing_uusd_mwh`:
    `break_even_uusd_per_mwh` of the
    machines that would hash instead; `fee`: millionths of a USD per GPU-hour. Never negative.
    """
    best = max(energy_uusd_mwh, hashing_uusd_mwh, 0)
    return -(-gpu_share_w * pue_permille * best // 1_000_000_000) + fee
