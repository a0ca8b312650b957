"""What Celery's beat starts, and how often. Read by the settings: nothing of ours is imported here.

A start that no worker has taken within its interval is dropped: the next one does its work.
"""

from typing import Any, Final

EVERY: Final = {  # name: (task, seconds)
    "drain-outbox": ("marketplace.tasks.drain_outbox", 2),
    "site-loops": ("scheduler.tasks.tick_sites", 5),
    "fair-share": ("scheduler.tasks.roll_usage", 60),
    "cells": ("scheduler.tasks.tick_cells", 5),
    "cycle-records": ("scheduler.tasks.forget_records", 60),
    "market-clock": ("marketplace.tasks.market_clock", 10),
    "maintenance": ("marketplace.tasks.tick_maintenance", 5),
    "grid": ("marketplace.tasks.tick_grid", 5),
    "feeds": ("marketplace.tasks.fetch_feeds", 60),
    "pool-payouts": ("marketplace.tasks.pull_payouts", 60),
    "profit": ("marketplace.tasks.roll_profit", 300),
    "usage": ("billing.tasks.meter", 30),
    "budgets": ("billing.tasks.measure_budgets", 60),
    "collect": ("billing.tasks.sweep", 60),
    "spot": ("marketplace.tasks.tick_spot", 5),
    "spot-record": ("marketplace.tasks.forget_spot", 60),
    "screening": ("marketplace.tasks.tick_screening", 30),
    "bids": ("marketplace.tasks.tick_bids", 30),
    "reliability": ("marketplace.tasks.roll_reliability", 900),
    "verifications": ("marketplace.tasks.tick_verifications", 10),
    "saved-searches": ("marketplace.tasks.follow_market", 10),
    "reconcile": ("billing.tasks.reconcile", 3600),
}


def schedule(*, defragment_s: int) -> dict[str, dict[str, Any]]:
    """CELERY_BEAT_SCHEDULE. `defragment_s`: how often moves are looked for that make room (scheduler.defrag); 0 never."""
    every = EVERY | ({"defragment": ("scheduler.tasks.tick_defrag", defragment_s)} if defragment_s else {})
    return {
        name: {"task": task, "schedule": float(seconds), "options": {"expires": seconds}}
        for name, (task, seconds) in every.items()
    }
