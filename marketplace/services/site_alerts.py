"""What an agent reports that its operator has to see to: by mail, once for each event."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from django.conf import settings
from django.core.mail import send_mail

from marketplace import outbox
from marketplace.models import Agent, AgentEvent, Membership

ALERT: Final = "marketplace.site_alert"
_DEAD_PDU: Final = (
    "{silent} of the {machines} machines below {subject} at {site} fell silent together: look at the switch and the cabling there "
    "first, not at the machines. Until they answer each counts at its nameplate, and nobody is granted their watts.\n"
)
# Event kind -> subject and text, with the event's subject, the site and the counts.
KINDS: Final[Mapping[str, tuple[str, str]]] = {
    "pdu_network_fault": ("{silent} machines below {subject} at {site} do not answer", _DEAD_PDU),
}


def raise_new(agent: Agent, events: Iterable[Mapping[str, Any]]) -> None:
    """Alerts for those of `events` that are not stored yet. Call it before they are, in the same transaction."""
    ids = {str(e["id"]) for e in events if e["kind"] in KINDS}
    if not ids:
        return
    known = AgentEvent.objects.filter(agent=agent, event_id__in=ids).values_list("event_id", flat=True)
    for event_id in sorted(ids - {str(key) for key in known}):
        outbox.emit(ALERT, key=event_id, payload={"agent": agent.pk, "event": event_id})


def tell_operator(agent_id: int, event_id: str) -> None:
    """By mail to those who run the site. Twice is no harm."""
    event = AgentEvent.objects.select_related("agent__site").get(agent_id=agent_id, event_id=event_id)
    site = event.agent.site
    people = Membership.objects.filter(organization=site.organization_id, role__in=("owner", "admin", "engineer"))
    addresses = sorted(people.values_list("user__email", flat=True).distinct())
    counts = {name: event.data.get(name, "some") for name in ("silent", "machines")}
    subject, text = (part.format(**counts, subject=event.subject, site=site.name) for part in KINDS[event.kind])
    for address in addresses:  # nobody reads the others' addresses
        send_mail(" ".join(subject.split())[:200], text, settings.DEFAULT_FROM_EMAIL, [address])
