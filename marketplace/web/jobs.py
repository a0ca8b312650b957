"""Jobs: list, submit, and one job as it lives: state, placements, why it waits, log, cost, cancel."""

from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone

from billing import costs
from marketplace.errors import MarketError
from marketplace.models import Contract, Job, Placement
from marketplace.services import calls_ahead, job_rules, job_views, placement_energy
from marketplace.services import jobs as service
from marketplace.services.availability import HOLDING
from marketplace.web import charts
from marketplace.web.base import actor_of, done, failed, listed, page, row_of
from marketplace.web.forms import JobForm, refuse
from scheduler import why

SHOWN_CONTRACTS = 50
SHOWN_PLACEMENTS = 64
TAIL_BYTES = 64_000  # of the log, on the page; the API has all of it
STREAMS = ("stdout", "stderr")
SHOWS = {"live": (*Job.WAITING, *Job.ON_HOSTS), "done": Job.FINAL}


@page(GET="jobs:read")
def jobs(request: HttpRequest) -> HttpResponse:
    rows = Job.objects.owned_by(actor_of(request).organization_id).select_related("contract__listing")
    show = request.GET.get("show", "")
    if show in SHOWS:
        rows = rows.filter(state__in=SHOWS[show])
    found = listed(request, rows, Job.PREFIX)
    live = {job.contract_id: job.contract for job in found.rows if job.state not in Job.FINAL}
    calls = calls_ahead.ahead(list(live.values()), timezone.now())
    context = {
        "page": found,
        "show": show,
        "contracts": bool(found.rows) or bool(_contracts(request)),
        "calls": [(live[pk], each) for pk, rows_ in calls.items() for each in rows_],
    }
    return render(request, "jobs.html", context)


def _contracts(request: HttpRequest) -> list[Contract]:
    """Those that a job can be submitted under now, newest first."""
    now = timezone.now()
    rows = Contract.objects.owned_by(actor_of(request).organization_id).filter(state=Contract.State.ACTIVE)
    found = rows.select_related("listing", "gpu_model").order_by("-pk")[:SHOWN_CONTRACTS]
    return [c for c in found if c.ends_at is None or c.ends_at > now]


@page(GET="jobs:write", POST="jobs:write")
def new(request: HttpRequest) -> HttpResponse:
    contracts = _contracts(request)
    if request.method == "GET":
        initial = {"contract": request.GET.get("contract") or (contracts[0].public_id if contracts else None)}
        return _form(request, JobForm(contracts=contracts, initial=initial), contracts)
    form = JobForm(request.POST, contracts=contracts)
    if not form.is_valid():
        return _form(request, form, contracts, status=400)
    chosen = next(c for c in contracts if c.public_id == form.cleaned_data["contract"])
    try:
        made = service.submit(actor_of(request), chosen, form.spec(), now=timezone.now())
    except MarketError as error:
        refuse(form, error, form.FIELDS_OF)
        return _form(request, form, contracts, error=error, status=error.kind.status)
    return done(request, "Queued.", reverse("web:job", args=[made.public_id]))


def _form(
    request: HttpRequest, form: JobForm, contracts: list[Contract], status: int = 200, **more: Any
) -> HttpResponse:
    asked = {name: form[name].value() for name in ("contract", "gpus", "replicas")}
    open_more = any(form.errors.get(field.name) for field in form.more())
    context = {"form": form, "contracts": contracts, "open_more": open_more, **_estimate(contracts, asked), **more}
    return render(request, "job_new.html", context, status=status)


@page(GET="jobs:write")
def estimate(request: HttpRequest) -> HttpResponse:
    """What the job would cost an hour, as it is typed."""
    return render(request, "part/estimate.html", _estimate(_contracts(request), request.GET))


def _estimate(contracts: list[Contract], asked: Any) -> dict[str, Any]:
    chosen = next((c for c in contracts if c.public_id == asked.get("contract")), None)
    try:
        gpus, replicas = int(asked.get("gpus") or 0), int(asked.get("replicas") or 0)
    except ValueError:
        gpus = replicas = 0
    total = gpus * replicas
    if chosen is None or not 0 < total <= 100_000:
        return {"estimate": None}
    return {
        "estimate": {
            "gpus": total,
            "contract": chosen,
            "hourly": costs.per_hour(total * 1000, chosen.price, chosen.currency),
            "over": total > chosen.gpu_count,
            "committed": chosen.kind in HOLDING,
        }
    }


def _job(request: HttpRequest, public_id: str) -> Job:
    rows = Job.objects.visible_to(actor_of(request)).select_related("contract__listing", "decision")
    found: Job = row_of(rows.prefetch_related("contract__price_versions"), Job.PREFIX, public_id)
    return found


@page(GET="jobs:read")
def job(request: HttpRequest, job: str) -> HttpResponse:
    row = _job(request, job)
    rules = [job_rules.sentence(rule) for rule in row.affinity]
    found = {
        **_live(row),
        **_log(request, row),
        "why": why.explain(row, deep=False),
        "rules": rules,
        "placement_words": job_rules.place(row),
    }
    return render(request, "job.html", found)


def _live(row: Job) -> dict[str, Any]:
    """What moves while the job lives."""
    now, final = timezone.now(), row.state in Job.FINAL
    rows = Placement.objects.owned_by(row.organization_id).filter(job=row).select_related("host", "site")
    found = list(rows.order_by("-attempt", "rank")[: SHOWN_PLACEMENTS + 1])
    drew = placement_energy.of_placements(found, now=now)
    placements = [
        {
            "row": p,
            "drew": drew[p.pk],
            "devices": charts.devices(p.host.gpu_count, p.gpu_indices, label=_device_words(p)),
        }
        for p in found
    ]
    return {
        "row": row,
        "events": job_views.events(row),
        "final": final,
        "calls": [] if final else calls_ahead.ahead([row.contract], now).get(row.contract_id, []),
        "waiting": row.state in Job.WAITING,
        "actions": job_views.shown(row)["actions"],
        "placements": placements[:SHOWN_PLACEMENTS],
        "more_placements": len(placements) > SHOWN_PLACEMENTS,
        "cost": costs.of_job(row, now=now),
        "ran_s": int(((row.finished_at or now) - row.started_at).total_seconds()) if row.started_at else None,
        "saved_s": int((now - row.checkpointed_at).total_seconds()) if row.checkpointed_at and not final else None,
        "watts": sum(p["row"].watts_delta for p in placements if p["row"].state not in Placement.FINAL),
    }


def _device_words(placement: Placement) -> str:
    numbers = ", ".join(str(i) for i in placement.gpu_indices)
    return f"GPUs {numbers} of {placement.host.gpu_count}" if numbers else "no GPU"


@page(GET="jobs:read")
def live(request: HttpRequest, job: str) -> HttpResponse:
    """The moving part of the page. 286 ends the polling of a job that is over."""
    row = _job(request, job)
    response = render(request, "part/job_live.html", _live(row), status=286 if row.state in Job.FINAL else 200)
    response["HX-Trigger"] = "job-waits" if row.state in Job.WAITING else "job-stands"  # the card that says why listens
    return response


@page(GET="jobs:read")
def why_part(request: HttpRequest, job: str) -> HttpResponse:
    """Why it waits or stands where it does, with what was tried: fetched once the page stands, for it may take a moment."""
    row = _job(request, job)
    found = {"row": row, "why": why.explain(row), "loaded": True}
    return render(
        request, "part/job_why.html", found | {"final": row.state in Job.FINAL, "waiting": row.state in Job.WAITING}
    )


def _log(request: HttpRequest, row: Job) -> dict[str, Any]:
    """The tail of one replica's output; `?replica=` names the placement, else rank 0 of the newest attempt."""
    rows = Placement.objects.owned_by(row.organization_id).filter(job=row).order_by("-attempt", "rank")
    wanted = request.GET.get("replica")
    placement = row_of(rows, Placement.PREFIX, wanted) if wanted else rows.first()
    stream = request.GET.get("stream", "stdout")
    if stream not in STREAMS:
        raise MarketError("invalid_request", "stream is stdout or stderr.")
    offset = request.GET.get("offset", "")
    if offset.isdigit():
        start = int(offset)
    else:
        last = placement.log_chunks.filter(stream=stream).order_by("-offset").first() if placement else None
        start = max(0, last.offset + last.size - TAIL_BYTES) if last else 0
    found = job_views.logs(placement, stream, start)
    return {
        "row": row,
        "log": found,
        "placement": placement,
        "stream": stream,
        "streams": STREAMS,
        "cut": start > 0 and not offset,
        "over": found["complete"] or (row.state in Job.FINAL and not found["data"]),
    }


@page(GET="jobs:read")
def log(request: HttpRequest, job: str) -> HttpResponse:
    """What came since `?offset=`, to be put where the poller stood, with the next poller at its end."""
    row = _job(request, job)
    return render(request, "part/log_more.html", _log(request, row))


@page(POST="jobs:write")
def cancel(request: HttpRequest, job: str) -> HttpResponse:
    row = _job(request, job)
    here = reverse("web:job", args=[row.public_id])
    try:
        fresh = service.cancel(actor_of(request), row, now=timezone.now())
    except MarketError as error:
        return failed(request, error, here)
    words = (
        "Cancelled."
        if fresh.state in Job.FINAL
        else "Stopping: it gets its checkpoint signal, and is billed no further."
    )
    return done(request, words, here)


urlpatterns = [
    path("jobs", jobs, name="jobs"),
    path("jobs/new", new, name="job-new"),
    path("jobs/estimate", estimate, name="job-estimate"),
    path("jobs/<str:job>", job, name="job"),
    path("jobs/<str:job>/live", live, name="job-live"),
    path("jobs/<str:job>/why", why_part, name="job-why"),
    path("jobs/<str:job>/log", log, name="job-log"),
    path("jobs/<str:job>/cancel", cancel, name="job-cancel"),
]
