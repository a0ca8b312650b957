"""What a host's benchmark must show to be verified, and the score that its figures come to. Pure; published in docs/verification.md.

A figure of a GPU is held against what its model can do at most (EXPECTED, of the vendors' data sheets): at least `floor` of it, and at
most CEILING, beyond which it is another device than stated. The slowest GPU of a host counts, and the slowest link.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

FLOORS: Final = {"matmul_gflops": 550, "memory_mb_s": 750, "fabric_mb_s": 600}  # thousandths of the data sheet's figure
CEILING: Final = 1080
DISK_MB_S: Final = 200  # write, and read
NETWORK_KB_S: Final = 12_500  # down, and up: 100 Mbit/s
REFERENCE: Final = "H100-SXM"
SCORE_POWERS: Final = {"matmul_gflops": 0.6, "memory_mb_s": 0.4}


@dataclass(frozen=True)
class Expected:
    """Of one GPU, by its vendor's data sheet: dense BF16 (FP16 where there is no BF16) GFLOP/s, memory MB/s, link to the next GPU in one
    direction MB/s (0: no link but PCIe).
    """

    matmul_gflops: int
    memory_mb_s: int
    fabric_mb_s: int = 0
    source: str = ""


EXPECTED: Final = {
    "H100-SXM": Expected(989_400, 3_350_000, 450_000, "NVIDIA H100 data sheet: 1,979 TFLOP/s sparse BF16, 3.35 TB/s, NVLink 900 GB/s"),
    "H200": Expected(989_400, 4_800_000, 450_000, "NVIDIA H200 data sheet: 1,979 TFLOP/s sparse BF16, 4.8 TB/s, NVLink 900 GB/s"),
    "B200": Expected(2_250_000, 8_000_000, 900_000, "NVIDIA B200 data sheet: 4.5 PFLOP/s sparse BF16, 8 TB/s, NVLink 1.8 TB/s"),
    "A100-80": Expected(312_000, 2_039_000, 300_000, "NVIDIA A100 80GB SXM data sheet: 312 TFLOP/s BF16, 2,039 GB/s, NVLink 600 GB/s"),
    "L40S": Expected(362_050, 864_000, 0, "NVIDIA L40S data sheet: 733 TFLOP/s sparse BF16, 864 GB/s, PCIe"),
    "A10": Expected(125_000, 600_000, 0, "NVIDIA A10 data sheet: 125 TFLOP/s BF16, 600 GB/s, PCIe"),
    "T4": Expected(65_000, 320_000, 0, "NVIDIA T4 data sheet: 65 TFLOP/s FP16, 320 GB/s, PCIe"),
    "V100M16": Expected(125_000, 900_000, 150_000, "NVIDIA V100 SXM2 data sheet: 125 TFLOP/s FP16, 900 GB/s, NVLink 300 GB/s"),
    "V100M32": Expected(125_000, 900_000, 150_000, "NVIDIA V100 SXM2 data sheet: 125 TFLOP/s FP16, 900 GB/s, NVLink 300 GB/s"),
    "P100": Expected(21_200, 732_000, 80_000, "NVIDIA P100 SXM2 data sheet: 21.2 TFLOP/s FP16, 732 GB/s, NVLink 160 GB/s"),
}  # fmt: skip
WORDS: Final = {
    "gpus": ("GPUs that answered", 1, ""),
    "matmul_gflops": ("Matrix multiplication, slowest GPU", 1000, "TFLOP/s"),
    "memory_mb_s": ("Device memory, slowest GPU", 1000, "GB/s"),
    "fabric_mb_s": ("Between GPUs, slowest link", 1000, "GB/s"),
    "disk_write_mb_s": ("Disk, writing", 1, "MB/s"),
    "disk_read_mb_s": ("Disk, reading", 1, "MB/s"),
    "network_down_kb_s": ("Network, from us", 1000, "MB/s"),
    "network_up_kb_s": ("Network, to us", 1000, "MB/s"),
}
FIGURES: Final = tuple(WORDS)


@dataclass(frozen=True)
class Bound:
    """What a figure may be: [low, high]; high 0 is no bound."""

    figure: str
    low: int
    high: int = 0


def bounds(model: str, gpus: int, *, linked: bool) -> tuple[Bound, ...]:
    """What a host of `gpus` GPUs of `model` must show; `linked`: two or more of them share an NVLink domain. Empty for a model that is
    not in EXPECTED: it can be measured, and not verified.
    """
    found = EXPECTED.get(model)
    if found is None:
        return ()
    devices = [
        Bound(name, getattr(found, name) * FLOORS[name] // 1000, getattr(found, name) * CEILING // 1000)
        for name in ("matmul_gflops", "memory_mb_s")
    ]
    if linked and found.fabric_mb_s:
        devices.append(Bound("fabric_mb_s", found.fabric_mb_s * FLOORS["fabric_mb_s"] // 1000))
    rest = [Bound(name, DISK_MB_S) for name in ("disk_write_mb_s", "disk_read_mb_s")]
    rest += [Bound(name, NETWORK_KB_S) for name in ("network_down_kb_s", "network_up_kb_s")]
    return (Bound("gpus", gpus, gpus), *devices, *rest)


def shortcomings(figures: Mapping[str, int], wanted: tuple[Bound, ...]) -> tuple[str, ...]:
    """What is wrong with the figures, each in words that say what was found, what is wanted, and what to look at. Empty: verified."""
    if not wanted:
        return ("there is no published figure for this GPU model: ask us to add its data sheet",)
    return tuple(text for bound in wanted if (text := _wrong(figures.get(bound.figure, 0), bound)))


def _wrong(value: int, bound: Bound) -> str:
    if bound.figure == "gpus":
        return (
            ""
            if value == bound.low
            else f"{value} of {bound.low} GPUs answered: look at the driver and at lost devices"
        )
    if value < bound.low:
        return f"{said(bound.figure, value)}, and at least {_amount(bound.figure, bound.low)} is wanted: {_ADVICE[bound.figure]}"
    if bound.high and value > bound.high:
        most = _amount(bound.figure, bound.high)
        return f"{said(bound.figure, value)} is more than this model can do ({most}): it is another device than stated"
    return ""


_ADVICE: Final = {
    "matmul_gflops": "look at power limits, throttling and whether it is the model stated",
    "memory_mb_s": "look at its memory clock, ECC retirements and whether it is the model stated",
    "fabric_mb_s": "look at NVLink (`nvidia-smi nvlink -s`) and the fabric manager",
    "disk_write_mb_s": "look at the drive that the agent's state folder is on",
    "disk_read_mb_s": "look at the drive that the agent's state folder is on",
    "network_down_kb_s": "look at the site's line to us",
    "network_up_kb_s": "look at the site's line to us",
}


def said(figure: str, value: int) -> str:
    """`Disk, writing: 210 MB/s`."""
    return f"{WORDS[figure][0]}: {_amount(figure, value)}"


def bound_said(bound: Bound) -> str:
    """`544.2 to 1,068.6 TFLOP/s`, or `at least 270 GB/s`."""
    low = _amount(bound.figure, bound.low)
    return f"{low} to {_amount(bound.figure, bound.high)}" if bound.high else f"at least {low}"


def _amount(figure: str, value: int) -> str:
    _, unit, words = WORDS[figure]
    number = f"{value / unit:,.1f}".removesuffix(".0") if unit > 1 else f"{value:,}"
    return f"{number} {words}".rstrip()


def score(figures: Mapping[str, int]) -> int:
    """Of one GPU, 1000 = an H100-SXM by its data sheet: (matmul / its)^0.6 * (memory / its)^0.4 * 1000, rounded down."""
    product = 1.0
    for name, power in SCORE_POWERS.items():
        product *= (max(0, figures.get(name, 0)) / getattr(EXPECTED[REFERENCE], name)) ** power
    return int(product * 1000)
