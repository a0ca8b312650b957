"""Thin: ids in, one domain call."""

import logging
from datetime import timedelta
from typing import Any

from celery import shared_task
from django.db import transaction
from django.utils import timezone

from marketplace import outbox
from marketplace.models import Site
from marketplace.services import leases, power
from marketplace.services.jobs import CYCLE, nudge_cell
from scheduler import cycle, defrag, promises, record, site_loop, usage

log = logging.getLogger(__name__)


@outbox.handler(CYCLE, one_at_a_time=True)
def run_cycle(payload: dict[str, Any]) -> None:
    cycle.attempt(payload["cell"], rest_s=cycle.REST_S)


@outbox.handler(defrag.TOPIC, one_at_a_time=True)
def run_defrag(payload: dict[str, Any]) -> None:
    defrag.run(payload["cell"])


@outbox.handler("scheduler.site_loop")
def run_site_loop(payload: dict[str, Any]) -> None:
    site_loop.run(payload["site"], now=timezone.now())


@shared_task
def tick_cells() -> None:
    """The safety net under the nudges: every cell in which something waits; and whoever was promised a start until the next
    tick but one is started in that second, by a message of its own.
    """
    now = timezone.now()
    with transaction.atomic():
        for cell_id in cycle.waiting_cells(now):
            nudge_cell(cell_id)
        for cell_id, start in promises.due(now, now + timedelta(seconds=outbox.NUDGED_S)):
            delay_s = (start - now).total_seconds()
            outbox.emit(CYCLE, key=f"{cell_id}@{start:%T}", payload={"cell": cell_id}, delay_s=delay_s)


@shared_task
def tick_defrag() -> None:
    """Every cell in which jobs wait looks for moves that make room, in its turn: after the cycle that runs there now."""
    defrag.ask()


@shared_task
def forget_records() -> int:
    """Recorded cycles that are too old or too many, and sheds that are long over."""
    now = timezone.now()
    return record.forget(now) + power.forget(now)


@shared_task
def roll_usage() -> None:
    """Brings the decayed usage of organizations up to date, so that cycles have little to add."""
    usage.roll(now=timezone.now())


@shared_task
def tick_sites() -> None:
    """Each site's power loop, and our own beat by which leases are counted."""
    leases.pulse(now=timezone.now())
    for site_id in Site.objects.order_by("id").values_list("id", flat=True):
        try:
            site_loop.run(site_id, now=timezone.now())
        except Exception:  # one site's trouble must not stop the others' loops
            log.exception("the loop of site %s failed", site_id)
