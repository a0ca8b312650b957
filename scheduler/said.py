"""What a job's rows say of it by themselves: the last decision in words, how it lost a place, how it ended, what keeps it out."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

from django.db.models import F, Max, Min, Sum
from django.utils import timezone

from billing.core import budgets
from billing.core.money import format_minor
from billing.models import PriceVersion
from marketplace.models import BillingStanding, Budget, Contract, Job, Organization, Placement
from marketplace.models.spot import INTERVAL
from marketplace.services import spot_prices
from scheduler import spending, words
from scheduler.core.types import WHOLE, Reason
from scheduler.models import Decision


def answer(job: Job, decision: Decision | None, *, staff: bool) -> dict[str, Any]:
    """The explanation without what must be computed. `binding` and `suggestion` of a customer name nothing of the operator's."""
    base: dict[str, Any] = {
        "object": "explanation",
        "job": job.public_id,
        "state": job.state,
        "stages": [],
        "changes": [],
        "placed": None,
    }
    waits = queues(job)
    if decision is None:
        text = end(job) or (
            "The job is not waiting." if not waits else outside(job) or "No cycle has looked at the job yet."
        )
        return {**base, "outcome": job.state, "reason": None, "text": text}
    outcome = "waiting" if waits else decision.outcome
    if job.state == Job.State.PREEMPTING:
        outcome, text = "leaving", _leaves(job)
    elif waits:
        text = " ".join(part for part in (outside(job) or _waits(job, decision), _left(job)) if part)
    elif outcome == "placed":
        text = " ".join(part for part in (end(job), "The job has been placed.") if part)
    else:
        text = f"{end(job)} It ended before it was placed.".strip()
    return {
        **base,
        "outcome": outcome,
        "reason": decision.reason.lower(),
        "binding": decision.binding if staff else words.REASONS[words.reason(decision.reason)][0],
        "stages": [
            {"stage": s, "label": words.stage(s), "hosts_left": n}
            for s, n in zip(decision.stages, decision.candidates, strict=False)
        ],
        "suggestion": decision.suggestion if staff else "",
        "earliest_start": decision.earliest_start if waits else None,
        "at": decision.at,
        "text": text,
    }


def queues(job: Job) -> bool:
    """Whether all of it, or replicas that it lost, wait for a place."""
    return job.state in Job.WAITING or (
        job.repair_since is not None and job.lost_ranks != [] and job.state in Job.ON_HOSTS
    )


def end(job: Job) -> str:
    """How a job that is over ended, or ''."""
    return f"The job {_ENDED[job.state]}: {words.left(job.state_reason)}." if job.state in Job.FINAL else ""


_ENDED = {"succeeded": "succeeded", "failed": "failed", "cancelled": "was cancelled"}


# --- it waits
def _waits(job: Job, decision: Decision) -> str:
    if lost := spot_prices.barred([job.pk], timezone.now()).get(job.pk):
        when = words.moment(lost.start + INTERVAL)
        return f"The job waits: {spot_prices.why(lost, job.contract.currency)}. The next auction is for {when}."
    if decision.outcome == "placed":  # it stood somewhere, and queues again
        return "The job waits: no cycle has looked at it since it was queued again."
    found, lead = words.reason(decision.reason), "The job waits:"
    if ceiling := _ceiling(job, found):
        text = ceiling
    elif found is Reason.PRICE_LIMIT and job.price_limit is not None:
        now, unit = words.amount(price(job.contract)), f"{job.contract.currency} per GPU-hour"
        text = f"it costs {now} {unit} now, above its limit of {words.amount(job.price_limit)}"
    else:
        head, _, short = decision.binding.partition(", short by ")
        name = head.partition(" at power node ")[0].upper()
        text = words.binds(found, words.reason(name) if name in Reason.__members__ else found, int(short or 0))
        lead = "The job waits for" if found in words.LACKS else lead
    if decision.held_hosts and (room := _room(job)):
        text += f". For it, {room}"
    broken = _broken(job)
    return f"{lead} {text}." + (f" {broken[0].upper()}{broken[1:]}." if broken else "")


# Reasons behind which a reservation may stand: its host's open row shows what goes with reserved GPUs as taken.
ROOM: Final = {Reason(n) for n in range(Reason.NO_CPU, Reason.NO_VRAM + 1)} | {Reason.TOPOLOGY, Reason.GANG_INCOMPLETE}


def reserved(job: Job, *, staff: bool) -> dict[str, Any]:
    """What is said in place of the decision's own words where reservations of others are all that stands in the way."""
    found = Reason.HOST_RESERVED_FOR_OWNER
    text = f"The job waits: {words.REASONS[found][0]}."
    return {
        "reason": found.name.lower(),
        "text": " ".join(part for part in (text, _left(job)) if part),
        **({} if staff else {"binding": words.REASONS[found][0]}),
    }


def _room(job: Job) -> str:
    """What the job's history says last, if that is of room being made for it."""
    told = job.events.order_by("-id").values_list("reason", flat=True).first() or ""
    return told if told.startswith(words.ROOM) else ""


def _broken(job: Job) -> str:
    """The last start that was promised to the job since it queues, and could not be kept."""
    told = job.events.filter(reason__startswith=words.BROKEN).order_by("-id")
    told = told.filter(at__gte=job.queued_at) if job.queued_at else told
    return told.values_list("reason", flat=True).first() or ""


def _ceiling(job: Job, found: Reason) -> str:
    """The limit that stops it, with its figures; '' when it does not by now, and for any other reason."""
    if found in {Reason.HOURLY_LIMIT, Reason.BUDGET_USED}:
        return _money(job, found)
    live = Placement.objects.exclude(state__in=Placement.FINAL).annotate(milli=F("gpu_indices__len") * F("gpu_milli"))
    if found is Reason.OVER_QUOTA:
        most = Contract.objects.values_list("gpu_count", flat=True).get(pk=job.contract_id)
        held, limit = live.filter(contract=job.contract_id), "its contract's ceiling"
    elif found is Reason.ORGANIZATION_LIMIT:
        most = Organization.objects.values_list("gpu_limit", flat=True).get(pk=job.organization_id)
        held, limit = live.filter(organization=job.organization_id), "the organization limit"
    else:
        return ""
    used, need = held.aggregate(sum=Sum("milli"))["sum"] or 0, job.total_gpus * job.gpu_milli
    if used + need <= most * WHOLE:
        return ""
    return f"{limit} is {words.count(most, 'GPU')}; {used / WHOLE:g} are in use, and it needs {need / WHOLE:g}"


def _money(job: Job, found: Reason) -> str:
    row = Budget.objects.filter(organization=job.organization_id).first()
    currency, money = job.contract.currency, spending.read({job.organization_id}, {job.contract_id}, now=timezone.now())
    if found is Reason.BUDGET_USED and row and row.monthly_minor is not None and money.used_up:
        budget, spent = (format_minor(n, currency) for n in (row.monthly_minor, row.spent_minor))
        return f"the organization's budget of {budget} for this month is used up ({spent} are spent)"
    if found is Reason.HOURLY_LIMIT and row and row.hourly_minor is not None:
        need = job.total_gpus * job.gpu_milli * money.prices[job.contract_id]
        if need > money.left[job.organization_id]:
            rates = money.running[job.organization_id], need
            runs, more = (format_minor(budgets.minor(rate, currency), currency) for rate in rates)
            limit = format_minor(row.hourly_minor, currency)
            return f"the organization's hourly limit is {limit}; what runs costs {runs} an hour, and it would cost {more} more"
    return ""


def outside(job: Job) -> str:
    """Why no cycle considers the job at all, or ''."""
    contract = Contract.objects.get(pk=job.contract_id)
    now = timezone.now()
    if job.cancel_requested_at:
        return "The job is being cancelled."
    if contract.state != "active":
        return f"The job waits: its contract is {contract.state.replace('_', ' ')}."
    if contract.starts_at > now:
        return f"The job waits: its contract begins at {words.moment(contract.starts_at)}."
    if contract.ends_at and contract.ends_at <= now:
        return "The job waits: its contract is over."
    if BillingStanding.objects.filter(organization=job.organization_id, state="suspended").exists():
        return "The job waits: the organization is suspended until its invoices are paid."
    return ""


# --- it loses its place
def _leaves(job: Job) -> str:
    last = Placement.objects.filter(job=job, attempt=job.attempt).aggregate(asked=Max("release_requested_at"))["asked"]
    by = f" until {words.moment(last + timedelta(seconds=job.checkpoint_grace_s))}" if last else ""
    return f"The job gives way: {words.left(job.state_reason)}. It has{by} to save its work, is not billed, and queues again."


def _left(job: Job) -> str:
    """How a job that queues again lost its last place, and what of its work with it."""
    if job.state != Job.State.REQUEUED:
        return ""
    rows = Placement.objects.filter(job=job, attempt=job.attempt)
    seen = rows.aggregate(began=Min("running_at"), ended=Max("finished_at"))
    began, ended = seen["began"], seen["ended"]
    if ended is None:
        return ""
    text = f"It left its last place at {words.moment(ended)}: {words.left(job.state_reason)}."
    return text if began is None else f"{text} {_work(job, began, ended)}"


def _work(job: Job, began: datetime, ended: datetime) -> str:
    saved = job.checkpointed_at
    if saved is None or saved < began:
        return f"It told of no checkpoint in the {words.span((ended - began).total_seconds())} that it ran there."
    return f"Its newest checkpoint is of {words.span((ended - saved).total_seconds())} before that."


def price(contract: Contract) -> int:
    """What a GPU-hour costs under it now, millionths: what its jobs' limits are compared with."""
    now = timezone.now()
    if (spot := spot_prices.now_under(contract, now)) is not None:
        return spot
    now_s = int(now.timestamp())
    rows = PriceVersion.objects.filter(contract=contract, kind=PriceVersion.Kind.RATE, valid_from_s__lte=now_s)
    newest = rows.order_by("-valid_from_s").values_list("millionths", flat=True).first()
    return int(contract.price if newest is None else newest)
