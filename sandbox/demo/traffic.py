"""Who uses the demo market while one watches. Filled with the road's steps in `sandbox.road`."""

import time
from pathlib import Path


def watch(house: Path, *, rounds: int = 0) -> int:
    """Stay until ended."""
    del house, rounds
    while True:
        time.sleep(3600)
