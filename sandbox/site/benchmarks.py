"""What devices sustain in the benchmark, as a simulated site knows it: (GFLOP/s, MB/s of memory, MB/s to the next GPU).

About 70 % of the data sheet's matrix figure and 90 % of its memory and link figures, which well kept devices reach.
"""

from typing import Final

SUSTAINED: Final = {
    "H100-SXM": (690_000, 3_000_000, 400_000),
    "H200": (700_000, 4_300_000, 400_000),
    "B200": (1_560_000, 7_200_000, 800_000),
    "A100-80": (240_000, 1_820_000, 265_000),
    "L40S": (230_000, 770_000, 22_000),
    "A10": (85_000, 530_000, 22_000),
    "T4": (42_000, 270_000, 11_000),
    "V100M16": (92_000, 800_000, 135_000),
    "V100M32": (92_000, 800_000, 135_000),
    "P100": (17_500, 600_000, 68_000),
}
UNKNOWN: Final = (100_000, 800_000, 22_000)
