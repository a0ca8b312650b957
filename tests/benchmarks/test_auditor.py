"""The auditor of `python -m benchmarks safety`: nothing to say of a sound cell, and each rule, broken by one statement, is named."""

from datetime import timedelta

import pytest
from django.db import connection

from benchmarks.audit_rules import Auctions
from benchmarks.auditor import Auditor
from marketplace.models import Host, Job, PowerNode
from marketplace.services import contracts, quotes
from scheduler import fleet
from tests import factories as f
from tests.factories import NOW
from tests.races.market import Market

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _nothing_kept():
    fleet.forget()


def sick(market):
    """One gang and one single running, one job waiting, a reservation ahead: all in order."""
    auditor = Auditor()
    gang, single = market.submit(gpus=2, replicas=2), market.submit(gpus=1, gpu_milli=500)
    market.cycle()
    market.report(gang, "running")
    market.report(single, "running")
    market.submit(gpus=8)
    buyer = f.actor(f.organization())
    wanted = quotes.Request("reserved", 1, starts_at=NOW + timedelta(hours=9), ends_at=NOW + timedelta(hours=12))
    contracts.accept(buyer, quotes.quote(buyer, market.contract.listing_id, wanted, now=NOW).pk, now=NOW)
    assert auditor.audit(NOW) == []
    return auditor, gang, single


TWICE = """
INSERT INTO marketplace_reservation (listing_id, starts_at, ends_at, claims_at, state)
  SELECT listing_id, starts_at, ends_at, claims_at, state FROM marketplace_reservation;
INSERT INTO marketplace_reservationblock (reservation_id, host_id, gpu_indices)
  SELECT (SELECT max(id) FROM marketplace_reservation), host_id, gpu_indices FROM marketplace_reservationblock
"""
# The rows of its events are written anew: it came after the reservation.
STRANGER = """
UPDATE marketplace_placement SET host_id = b.host_id, gpu_indices = b.gpu_indices FROM marketplace_reservationblock b;
UPDATE marketplace_placementevent SET actor = actor || ' '
"""
ILLS = {
    "sold on paper only": ("UPDATE marketplace_host SET gpu_free[1] = gpu_free[1] + 1", "milli"),
    "VRAM": ("UPDATE marketplace_host SET vram_free[8] = vram_free[8] - 1", "MiB free"),
    "CPU": ("UPDATE marketplace_host SET vcpu_free = vcpu_free + 1", "vcpu_milli"),
    "RAM": ("UPDATE marketplace_placement SET ram_mib = ram_mib + 1", "ram_mib"),
    "GPU sold twice": ("UPDATE marketplace_placement SET gpu_indices = '{0}'", "is sold"),
    "watts of a host": ("UPDATE marketplace_host SET reserved_w = 1100", "may draw"),
    "watts granted twice": ("UPDATE marketplace_host SET reserved_w = reserved_w + 700", "was raised to"),
    "watts of a node": ("UPDATE marketplace_powernode SET reserved_mw = reserved_mw + 1", "booked"),
    "cap": ("UPDATE marketplace_powernode SET cap_w = 6000", "sold of"),
    "sleep that nobody proved": ("UPDATE marketplace_miner SET reserved_w = 25", "last proved"),
    "watts not granted": ("UPDATE marketplace_powergrant SET state = 'shedding'", "its watts are"),
    "gang without a replica": ("UPDATE marketplace_placement SET rank = 7 WHERE rank = 1", "ranks"),
    "replica gone, the rest runs on": ("UPDATE marketplace_placement SET state = 'lost' WHERE rank = 1", "without a replica"),
    "job forgotten on its host": ("UPDATE marketplace_job SET state = 'queued' WHERE state = 'running'", "live placements"),
    "attempt": ("UPDATE marketplace_job SET attempt = attempt + 1 WHERE state = 'running'", "attempt"),
    "story": ("UPDATE marketplace_jobevent SET to_state = 'failed' WHERE to_state = 'placed'", "story"),
    "nobody told": ("DELETE FROM marketplace_outboxmessage", "no cycle was told"),
    "contract over": ("UPDATE marketplace_contract SET state = 'ended' WHERE kind = 'on_demand'", "nobody was told to end"),
    "ceiling": ("UPDATE marketplace_contract SET gpu_count = 2", "milli-GPU of 2"),
    "a handler that crashed": ("UPDATE marketplace_outboxmessage SET last_error = 'KeyError: 3'", "KeyError"),
    "promised twice": (
        TWICE,
        "is promised to contracts",
    ),
    "a stranger on closed GPUs": (
        STRANGER,
        "came onto GPUs",
    ),
    "a reservation that outlives its contract": (
        "UPDATE marketplace_contract SET state = 'terminated' WHERE kind = 'reserved'", "is over and holds GPUs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("ill", ILLS)
def test_the_auditor_names_what_is_wrong(ill):
    market = Market(hosts=2, miners=2)
    auditor, *_ = sick(market)
    statement, words = ILLS[ill]
    with connection.cursor() as cursor:
        cursor.execute(statement)
    found = auditor.audit(NOW)
    assert any(words in line for line in found), found


AFFINITY = """UPDATE marketplace_job SET labels = '{{app=db}}', affinity = '[{{"rule": "{}", "level": "host", "labels": ["{}"]}}]'"""
ELSEWHERE = "UPDATE marketplace_placement SET host_id = (SELECT {}(id) FROM marketplace_host) WHERE rank = {}"
GANG = "UPDATE marketplace_job SET on_replica_loss = 'replace_replica', {} WHERE replicas = 2"
RULES = {
    "NVLink": (
        "UPDATE marketplace_job SET nvlink = 'required'; UPDATE marketplace_host SET nvlink_domains = '{0,1,2,3,4,5,6,7}'",
        "needs one NVLink domain",
    ),
    "one of each host": (
        "UPDATE marketplace_job SET topology = 'spread', topology_required = true; " + ELSEWHERE.format("min", "rank"),
        "replicas in one host, 1 at most",
    ),
    "all in one host": (
        "UPDATE marketplace_job SET topology = 'host', topology_required = true WHERE replicas = 2; "
        + ELSEWHERE.format("max", 1),
        "must stand in one host",
    ),
    "apart": (AFFINITY.format("apart", "app=db"), "must be apart from"),
    "near": (AFFINITY.format("near", "app=web"), "must be near"),
    "taint": ("UPDATE marketplace_host SET taints = '{ssd=slow}'", "that it does not bear"),
    "site": (
        "UPDATE marketplace_job SET site_id = (SELECT max(id) FROM marketplace_site)", "its job asked for",
    ),
    "price": ("UPDATE marketplace_job SET price_limit = 1", "and would pay 1"),
    "limit of an organization": ("UPDATE marketplace_organization SET gpu_limit = 1", "1 GPUs at most"),
    "a replica that is done without": (GANG.format("lost_ranks = '{0}'"), "one of them stands"),
    "a replica ahead of its job": (
        GANG.format("epoch = 0") + "; UPDATE marketplace_placement SET epoch = 5", "are ahead of it",
    ),
    "a replica that nobody misses": (
        GANG.format("epoch = epoch") + "; UPDATE marketplace_placement SET state = 'lost' WHERE rank = 1", "does not know that ranks",
    ),
    "fewer than the least": (
        GANG.format("epoch = epoch") + "; UPDATE marketplace_job SET on_replica_loss = 'shrink', min_replicas = 2, lost_ranks = '{1}'"
        " WHERE replicas = 2", "must be left",
    ),
    "moved unasked": (
        "UPDATE marketplace_jobevent SET reason = 'moved to make room for job_x' WHERE to_state = 'placed'", "had not agreed to it",
    ),
}  # fmt: skip


def test_the_limit_of_a_spot_placement_is_the_one_that_counted_when_it_came():
    contract, five = {"id": 1, "listing_id": 2, "limit_price": 80}, timedelta(minutes=5)
    told = Auctions({(2, NOW): 100}, {(1, NOW): 120}, {1: [(NOW + five, 90)]}).told
    assert told(contract, NOW + timedelta(seconds=7)) == (100, 120)  # as it stood in the auction
    assert told(contract, NOW + five) is None  # nobody auctioned: nobody pays more than his limit
    told = Auctions({(2, NOW): 100}, {}, {1: [(NOW + five, 90)]}).told
    assert told(contract, NOW + timedelta(seconds=7)) == (100, 90)  # lowered afterwards


@pytest.mark.parametrize("rule", RULES)
def test_the_auditor_names_the_rule_that_is_broken(rule):
    sick(Market(hosts=2, miners=2))
    f.site()
    statement, words = RULES[rule]
    auditor = Auditor()
    with connection.cursor() as cursor:
        cursor.execute(statement)
    found = auditor.audit(NOW)
    assert any(words in line for line in found), found


def test_the_auditor_sees_work_come_to_a_host_that_is_closed():
    market = Market()
    auditor = Auditor()
    Host.objects.update(state="draining")
    auditor.audit(NOW)
    job = market.submit(gpus=1)
    f.placement(job, market.hosts[0], [0], state="granted")
    Job.objects.filter(pk=job.pk).update(state="placed", attempt=1)
    assert any("which is draining" in line for line in auditor.audit(NOW))


def test_the_auditor_sees_a_grant_over_a_curtailments_limit():
    Market(hosts=2)
    auditor = Auditor()
    limit = PowerNode.objects.get(parent=None).reserved_mw // 1000 + 50_000
    PowerNode.objects.filter(parent=None).update(limit_w=limit)
    assert auditor.audit(NOW) == []
    Host.objects.update(reserved_w=60_000)
    PowerNode.objects.filter(parent=None).update(reserved_mw=2 * 60_000 * 1250)
    PowerNode.objects.exclude(parent=None).update(reserved_mw=2 * 60_000 * 1000)
    assert any("granted hosts watts while" in line for line in auditor.audit(NOW))
    assert not any("granted hosts watts while" in line for line in auditor.audit(NOW))  # no more than before
