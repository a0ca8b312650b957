"""A PDU whose network is dead is told to those who run the site, once, and to nobody else."""

import uuid

import pytest

from marketplace import tasks
from marketplace.models import AgentEvent, OutboxMessage
from marketplace.services import agents, site_alerts
from tests import factories
from tests.factories import NOW

pytestmark = pytest.mark.django_db


def report(sequence, *events):
    rows = {kind: [] for kind in ("hosts", "miners", "meters", "placements")}
    return {"boot": "one", "sequence": sequence, "agent_time": NOW, "inventory": None, "events": list(events), **rows}


def fault(kind="pdu_network_fault", **data):
    data = {"silent": 8, "machines": 10, "names": ["m0001"], **data}
    return {"id": str(uuid.uuid4()), "at": NOW, "kind": kind, "subject": "pdu-1", "data": data}


@pytest.fixture
def agent():
    site = factories.site()
    for role in ("engineer", "billing"):
        factories.member(site.organization, role, factories.user(f"{role}@site.example"))
    factories.member(factories.organization(), "owner", factories.user("stranger@else.example"))
    return factories.agent(site)[0]


def waiting():
    return list(OutboxMessage.objects.filter(topic=site_alerts.ALERT))


def test_many_silent_machines_of_a_pdu_are_one_mail_to_the_engineers(agent, mailoutbox):
    event = fault()
    agents.observe(agent, report(1, event, fault("miner_not_answering"), fault("miner_shed")), now=NOW)
    (message,) = waiting()
    site_alerts.tell_operator(message.payload["agent"], message.payload["event"])
    assert [mail.to for mail in mailoutbox] == [["engineer@site.example"]], "not who pays, and no stranger"
    assert mailoutbox[0].subject == f"8 machines below pdu-1 at {agent.site.name} do not answer"
    assert "8 of the 10 machines" in mailoutbox[0].body


def test_an_event_that_is_delivered_again_is_told_once(agent, mailoutbox):
    event = fault()
    agents.observe(agent, report(1, event), now=NOW)
    agents.observe(agent, report(2, event), now=NOW)  # its acknowledgement was lost
    assert len(waiting()) == 1
    assert tasks.drain_outbox(topic=site_alerts.ALERT) == 1
    assert len(mailoutbox) == 1
    agents.observe(agent, report(3, event, fault()), now=NOW)
    assert len(waiting()) == 1, "another fault is another mail"
    assert AgentEvent.objects.filter(agent=agent).count() == 2


def test_an_event_with_nothing_in_it_is_told_all_the_same(agent, mailoutbox):
    event = fault() | {"data": {}, "subject": "pdu-1\nBcc: all"}
    agents.observe(agent, report(1, event), now=NOW)
    tasks.drain_outbox(topic=site_alerts.ALERT)
    assert mailoutbox[0].subject.startswith("some machines below pdu-1 Bcc: all at")
