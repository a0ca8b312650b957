"""The market's own workers: the outbox, the clock, the feeds."""

from datetime import datetime
from typing import Any

from celery import shared_task
from django.utils import timezone

from marketplace import outbox
from marketplace.models import Site
from marketplace.services import (
    contracts,
    curtailment_notices,
    drains,
    feeds,
    gpu_health,
    grid,
    jobs,
    maintenance,
    pool_payouts,
    profit,
    reliability,
    saved,
    saved_matches,
    saved_notices,
    screening,
    site_alerts,
    sites,
    spot,
    spot_record,
    verifications,
)
from marketplace.services.forward import bids, notices, sales, topics
from marketplace.services.power import freeze


@shared_task
def drain_outbox(topic: str | None = None) -> int:
    return outbox.drain(topic=topic)


@shared_task
def market_clock() -> None:
    """What happens because time passes: quotes expire, contracts begin and end."""
    contracts.clock(now=timezone.now())


@shared_task
def roll_reliability() -> int:
    """Days counted and scored, from what is on record."""
    return reliability.roll_up(now=timezone.now())


@shared_task
def tick_verifications() -> dict[str, int]:
    """Benchmarks of hosts: taken back, concluded, expired, begun."""
    return verifications.clock(now=timezone.now())


@shared_task
def tick_maintenance() -> None:
    """Announced work: its hosts are emptied in time, taken, and given back."""
    maintenance.clock(timezone.now())


@outbox.handler(maintenance.NOTICE)
def maintenance_notice(payload: dict[str, Any]) -> None:
    maintenance.send_notice(payload["maintenance"], payload["organization"], payload["version"])


@outbox.handler(drains.PUT_BACK)
def hosts_put_back(payload: dict[str, Any]) -> None:
    maintenance.put_back(payload["cell"], now=timezone.now())


@shared_task
def fetch_feeds() -> None:
    feeds.fetch_all(now=timezone.now())


@shared_task
def pull_payouts() -> int:
    """What pools say that they paid: a message for every feed that is due."""
    return pool_payouts.tick(timezone.now())


@outbox.handler(pool_payouts.ASK, one_at_a_time=True)
def ask_pool(payload: dict[str, Any]) -> None:
    pool_payouts.ask(payload["feed"], now=timezone.now())


@outbox.handler(pool_payouts.TROUBLE)
def pool_trouble(payload: dict[str, Any]) -> None:
    pool_payouts.tell_operator(payload["feed"])


@shared_task
def roll_profit() -> int:
    """The last hours' P&L of every site, made anew."""
    return profit.clock(now=timezone.now())


@outbox.handler(profit.TOPIC, one_at_a_time=True)
def profit_of(payload: dict[str, Any]) -> None:
    start, end = (datetime.fromisoformat(payload[name]) for name in ("start", "end"))
    profit.rebuild(Site.objects.get(pk=payload["site"]), start, end)


@shared_task
def tick_grid() -> int:
    """Every signal that may call a site down: a message for each, to be asked and judged, and what it says announced or taken back."""
    return grid.tick()


@outbox.handler(grid.ASK, one_at_a_time=True)
def ask_grid(payload: dict[str, Any]) -> None:
    grid.ask(payload["source"], now=timezone.now())


@outbox.handler(grid.REPORT)
def grid_report(payload: dict[str, Any]) -> None:
    grid.send_report(payload["curtailment"])


@outbox.handler(freeze.TOLD, one_at_a_time=True)
def tell_sites_of_freeze(payload: dict[str, Any]) -> None:  # noqa: ARG001
    sites.tell_all()


@outbox.handler(curtailment_notices.NOTICE)
def curtailment_notice(payload: dict[str, Any]) -> None:
    curtailment_notices.send(payload)


@shared_task
def tick_bids() -> None:
    """Standing bids: those that are over, and every book in which some stand."""
    bids.tick(now=timezone.now())


@shared_task
def tick_spot() -> None:
    """Every spot market: prices that are due, and who has lost leaves."""
    spot.ask()


@shared_task
def forget_spot() -> int:
    """Spot intervals that are older than they are kept."""
    return spot_record.forget(timezone.now())


@shared_task
def tick_screening() -> None:
    """What time brings to screenings: questions are asked again, old answers renewed or expired."""
    screening.tick(timezone.now())


@outbox.handler(screening.ASK, one_at_a_time=True)
def ask_screening(payload: dict[str, Any]) -> None:
    screening.ask(payload["screening"], now=timezone.now())


@outbox.handler(screening.NOTICE)
def screening_notice(payload: dict[str, Any]) -> None:
    screening.send_notice(payload["organization"], payload["what"])


@outbox.handler(spot.TOPIC, one_at_a_time=True)
def run_spot(payload: dict[str, Any]) -> None:
    spot.run(payload["cell"], now=timezone.now())


@outbox.handler("marketplace.end_contract_jobs")
def end_contract_jobs(payload: dict[str, Any]) -> None:
    jobs.end_contract(payload["contract"], now=timezone.now())


@outbox.handler(topics.UNDO)
def undo_sale(payload: dict[str, Any]) -> None:
    sales.undo(payload["contract"], now=timezone.now())


@outbox.handler(topics.MATCH, one_at_a_time=True)
def match_bids(payload: dict[str, Any]) -> None:
    bids.run(payload["livemode"], payload["gpu_model"], payload["region"], now=timezone.now())


@outbox.handler(topics.TOLD)
def forward_notice(payload: dict[str, Any]) -> None:
    notices.send(payload)


@outbox.handler(contracts.NOTICE)
def contract_notice(payload: dict[str, Any]) -> None:
    contracts.send_notice(payload["contract"], payload["what"], payload["detail"])


@outbox.handler(gpu_health.TOLD)
def tell_gpu_sick(payload: dict[str, Any]) -> None:
    gpu_health.tell_operator(payload["host"])


@outbox.handler(site_alerts.ALERT)
def site_alert(payload: dict[str, Any]) -> None:
    site_alerts.tell_operator(payload["agent"], payload["event"])


@outbox.handler(verifications.FAILED_TWICE)
def tell_not_verified(payload: dict[str, Any]) -> None:
    verifications.tell_operator(payload["verification"])


@shared_task
def follow_market() -> None:
    """What has changed in the market is compared with the searches that were saved; idle ones expire."""
    now = timezone.now()
    saved_matches.follow(now=now)
    saved.clock(now)


@outbox.handler(saved_matches.NOTICE)
def saved_notice(payload: dict[str, Any]) -> None:
    saved_notices.tell(payload["search"], now=timezone.now())


@outbox.handler(saved_notices.MAIL)
def saved_mail(payload: dict[str, Any]) -> None:
    saved_notices.mail(payload["search"], payload["listings"], now=timezone.now())


@outbox.handler(saved.IDLE_NOTICE)
def saved_idle(payload: dict[str, Any]) -> None:
    saved_notices.warn(payload["search"])
