"""A source that is an OpenADR 3 programme: its VTN is polled, its events become calls, and each call's end becomes a report.

Calls are named by event, interval and start, so that reading an event again changes nothing; an event that has changed amends its
call, and one that is gone takes it back.
"""

import logging
from datetime import datetime
from typing import Any

from django.db import transaction

from marketplace.errors import MarketError
from marketplace.locks import Lock, acquire
from marketplace.models import Curtailment, GridSource
from marketplace.services import curtailment_reports, curtailments, secrets
from marketplace.services.grid import rules
from marketplace.services.grid.openadr_client import Client, Unavailable
from marketplace.services.grid.openadr_events import NotUnderstoodError, Span, Terms, spans

log = logging.getLogger(__name__)
REPORT = curtailment_reports.GRID_REPORT
MARK = "event"
REPORT_STEP_S = 60
_clients: dict[int, tuple[tuple[Any, ...], Client]] = {}  # with their tokens; of this process alone


def client_of(row: GridSource) -> Client:
    """A client for the source as it is configured now; it keeps its token."""
    made_of = (row.url, row.token_url, row.client_id, bytes(row.secret or b""))
    known = _clients.get(row.pk)
    if known is None or known[0] != made_of:
        secret = secrets.unseal(row.secret).get("client_secret", "")
        known = _clients[row.pk] = (made_of, Client(row.url, row.token_url, row.client_id, secret))
    return known[1]


def poll(row: GridSource, *, now: datetime) -> bool:
    """Ask the VTN once and bring our calls in line with its events. False: it did not answer, or not so that all was understood;
    then nothing is taken back.
    """
    wrong: list[str] = []
    try:
        programs, events = _read(row)
    except Unavailable as error:
        GridSource.objects.filter(pk=row.pk).update(error=str(error)[:200])
        return False
    terms = Terms(row.node.cap_w, row.cap_w, row.strike_uusd_mwh, row.ven_name)
    wanted: dict[str, Span] = {}
    for event in events:
        about = programs.get(str(event.get("programID")), {})
        try:
            found = spans(event, terms, descriptors=about.get("payloadDescriptors") or ())
        except NotUnderstoodError as error:
            wrong.append(str(error))
            continue
        wanted |= {_reference(row, span): span for span in found if span.end > now}
    _reconcile(row, wanted, keep=bool(wrong), now=now)
    heard = {"heard_at": now} if not wrong else {}
    GridSource.objects.filter(pk=row.pk).update(error="; ".join(wrong)[:200], **heard)
    return not wrong


def _read(row: GridSource) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Its programmes by id, and their events. Raises Unavailable."""
    client = client_of(row)
    shown = client.programs()
    programs = {str(p.get("id")): p for p in shown if not row.program or p.get("programName") == row.program}
    if row.program and not programs:
        raise Unavailable(f"there is no program {row.program[:60]!r}")
    return programs, [event for pk in programs for event in client.events(pk)]


def _reference(row: GridSource, span: Span) -> str:
    return f"{row.public_id} {MARK} {span.key[:140]} {span.start:%Y%m%dT%H%M%SZ}"


def _reconcile(row: GridSource, wanted: dict[str, Span], *, keep: bool, now: datetime) -> None:
    actor = rules.actor_of(row)
    with transaction.atomic():
        acquire((Lock.SITE, row.site_id))
        GridSource.objects.select_for_update(no_key=True).get(pk=row.pk)
        ours = Curtailment.objects.filter(origin=row, reference__startswith=f"{row.public_id} {MARK} ")
        known = {
            call.reference: call
            for call in ours.filter(reference__in=wanted) | ours.filter(state__in=curtailments.OPEN)
        }
        for reference, call in sorted(known.items()):
            if call.state in curtailments.OPEN and reference not in wanted and not keep:
                curtailments.cancel(actor, call, now=now)
        for reference, span in sorted(wanted.items()):
            if reference in known:
                _follow(actor, known[reference], span, now)
            else:
                curtailments.announce(
                    actor, row.node, cap_w=span.cap_w, starts_at=span.start, ends_at=span.end, mandatory=span.mandatory,
                    emergency=span.emergency, source=row.kind, reference=reference, origin=row, now=now,
                )  # fmt: skip


def _follow(actor: Any, call: Curtailment, span: Span, now: datetime) -> None:
    """As the event now says. One that somebody ended by hand stays ended."""
    if call.state in curtailments.OPEN and (call.cap_w, call.ends_at) != (span.cap_w, span.end):
        try:
            curtailments.amend(actor, call, now=now, cap_w=span.cap_w, ends_at=span.end)
        except MarketError as error:  # it has moved on since it was read
            log.warning("grid call %s: %s", call.public_id, error)


def send_report(curtailment_id: int) -> None:
    """What the call drew and its baseline, a value a minute, to its VTN. Raises Unavailable: the outbox tries again."""
    call = Curtailment.objects.select_related("origin", "site", "node").get(pk=curtailment_id)
    if call.origin is None or call.origin.kind != GridSource.Kind.OPENADR3 or MARK not in call.reference.split():
        return
    client = client_of(call.origin)
    event = client.event(call.reference.split()[2].rpartition("/")[0])
    if event is not None:  # of one that is gone nobody wants to know
        client.report(report_body(call, event))


def report_body(call: Curtailment, event: dict[str, Any]) -> dict[str, Any]:
    """The report of a call that is over, as OpenADR 3 has it: mean kW of each minute."""
    report = call.report
    assert call.origin is not None
    now = report.finished_at or call.over_at
    rows = curtailment_reports.series(report, call, now=now, step_s=REPORT_STEP_S)
    intervals = [
        {
            "id": number,
            "payloads": [
                {"type": "USAGE", "values": [row["watts"] / 1000]},
                {"type": "BASELINE", "values": [report.baseline_w / 1000]},
            ],
        }
        for number, row in enumerate(rows)
    ]
    kinds = ("USAGE", "BASELINE")
    return {
        "objectType": "REPORT",
        "programID": event.get("programID", ""),
        "eventID": event["id"],
        "clientName": call.origin.ven_name,
        "reportName": call.public_id,
        "payloadDescriptors": [
            {"objectType": "REPORT_PAYLOAD_DESCRIPTOR", "payloadType": k, "readingType": "MEAN", "units": "KW"}
            for k in kinds
        ],
        "resources": [
            {
                "resourceName": call.node.name,
                "intervalPeriod": {"start": f"{call.starts_at:%Y-%m-%dT%H:%M:%SZ}", "duration": f"PT{REPORT_STEP_S}S"},
                "intervals": intervals,
            }
        ],
    }
