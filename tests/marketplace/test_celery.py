"""What a worker does before it takes tasks."""

import subprocess
import sys

_START = """
from celery.signals import worker_init
import marketplace.celery
from scheduler.core import kernels, recheck
assert not kernels.place_run.signatures
worker_init.send(sender=None)
assert kernels.place_run.signatures and recheck.admit
"""


def test_a_worker_has_the_kernels_before_it_forks():
    """A fresh process: what its children inherit is there before the first of them starts."""
    subprocess.run([sys.executable, "-c", _START], check=True, timeout=300)
