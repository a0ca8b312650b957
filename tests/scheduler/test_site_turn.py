"""What a turn of a site's loop reads: each thing once, and what it thinks on is what its rows say."""

from collections import Counter
from datetime import timedelta

import pytest
from django.db import connection

from marketplace.models import Curtailment, Host, Miner, PowerNode
from marketplace.services import curtailments, feeds
from marketplace.services.power import Ledger
from scheduler import cycle, site_loop
from tests import factories as f
from tests.faults.yard import Yard

pytestmark = pytest.mark.django_db


@pytest.fixture
def yard():
    made = Yard()
    made.turn(3)
    return made


def turn(yard):
    """A report, and the statements (text, parameters) of the turn that follows it; savepoints are the test's."""
    made = []

    def note(execute, sql, params, many, context):
        made.append((sql.strip(), repr(params)))
        return execute(sql, params, many, context)

    yard.control = False
    yard.turn()
    with connection.execute_wrapper(note):
        site_loop.run(yard.site.pk, now=yard.now)
    yard.obey()
    return [(sql, params) for sql, params in made if "SAVEPOINT" not in sql]


def reads(statements, *tables):
    return Counter(
        t for t in tables for s, _ in statements if s.startswith("SELECT") and f'FROM "marketplace_{t}"' in s
    )


def test_a_turn_reads_nothing_twice(yard):
    job = yard.submit()
    yard.until(lambda: yard.state(job) == "running", seconds=120)
    yard.turn(24)  # what was commanded is settled; the machines that gave their watts sleep
    made = turn(yard)
    selects = [row for row in made if row[0].startswith("SELECT")]
    assert len(set(selects)) == len(selects)
    assert reads(made, "site", "miner", "powernode", "curtailment", "shedclaim", "shedbatch") == Counter(
        ["site", "miner", "powernode", "curtailment", "shedclaim", "shedbatch"]
    )
    assert sum("marketplace_feedvalue" in s for s, _ in made) == 1
    assert reads(made, "host") == {"host": 2}  # whose hour to leave has come; all of them
    assert len(made) <= 27


def test_a_turn_of_a_site_at_which_nothing_runs_asks_little(yard):
    assert len(turn(yard)) <= 24


def test_a_turn_looks_again_only_where_it_commands(yard):
    """Under the lock that the commands are given in: whether they still fit."""
    yard.submit()
    yard.control = False
    yard.turn()
    cycle.run(yard.contract.cell_id, now=yard.now)
    made = turn(yard)
    assert Miner.objects.filter(desired_mode=0).exists()
    again = {s for (s, _), n in Counter(made).items() if n > 1 and s.startswith("SELECT")}
    may = ("powernode", "host", "noderesidual")  # does it fit; what is drawn before it
    assert all(any(f'FROM "marketplace_{table}"' in s for table in may) for s in again), again
    assert reads(made, "site", "curtailment", "placement") <= Counter(site=1, curtailment=1, placement=2)
    assert sum("marketplace_feedvalue" in s for s, _ in made) == 1


def test_the_rates_of_a_site_are_one_statement(django_assert_num_queries):
    yard = Yard()
    with django_assert_num_queries(1):
        assert feeds.rates(yard.site, now=yard.now).hashing is None
    yard.turn()
    with django_assert_num_queries(1):
        assert feeds.rates(yard.site, now=yard.now).hashing is not None
    with django_assert_num_queries(1):
        assert len(feeds.shown(yard.site, now=yard.now)) == 4


OF = {
    PowerNode: ("cap_w", "limit_w", "hashing_limit_w", "fixed_w", "margin_w", "reserved_mw", "measured_w", "measured_at"),
    Host: ("reserved_w", "measured_w", "beat_at", "desired_limits_w", "desired_generation", "applied_generation", "call_gpu_w"),
    Miner: ("state", "desired_mode", "desired_generation", "commanded_w", "confirmed_w", "reserved_w", "measured_w", "low_samples"),
}  # fmt: skip


def told(ledger):
    rows = {Host: ledger.hosts, Miner: ledger.miners, PowerNode: ledger.nodes}
    columns = {
        model: {pk: [getattr(r, c) for c in OF[model]] for pk, r in found.items()} for model, found in rows.items()
    }
    waiting = {
        pk: (c.state, c.attempts, c.votes) for pk, c in ledger.claims.items() if ledger.waits_for(ledger.miners[pk])
    }
    free = dict(zip(ledger.tree.keys, ledger.free.tolist(), strict=True))
    return columns, waiting, free, ledger.mode


def test_what_a_turn_thinks_on_is_what_its_rows_say(yard, monkeypatch):
    """Through all that changes the books: sheds and grants, who lies and who is silent, calls that hold GPUs, and ends."""
    think, compared = site_loop.think, []

    def checked(seen):
        rows = Ledger.of(yard.site.pk)
        assert told(seen.ledger) == told(rows)
        active = Curtailment.objects.filter(site=yard.site, state="active")
        assert {c.pk for c in seen.calls} == set(active.values_list("pk", flat=True))
        compared.append({c.state for c in seen.ledger.claims.values()})
        return think(seen)

    monkeypatch.setattr(site_loop, "think", checked)
    one = yard.submit()
    yard.turn()
    yard.fleet.set_fault(Miner.objects.filter(desired_mode=0).first().name, "phantom")
    yard.until(lambda: yard.state(one) == "running", seconds=120)
    yard.silent = {"h2", yard.under("pdu-2")[0]}
    two = yard.submit(gpus=4, contract=yard.book("flexible"))
    yard.turn(30)
    yard.silent = set()
    root = PowerNode.objects.get(kind="site")
    call = curtailments.announce(
        f.actor(yard.site.organization), root, cap_w=9_000, starts_at=yard.now, ends_at=yard.now + timedelta(minutes=6),
        reference="c", emergency=True, now=yard.now,
    )  # fmt: skip
    yard.turn(40)
    assert Host.objects.exclude(call_gpu_w=None).exists()
    yard.now = call.ends_at
    yard.turn(30)
    yard.end(one)
    yard.turn(30)
    assert not Host.objects.exclude(call_gpu_w=None).exists()
    assert two.pk
    assert {"confirmed", "failed", "commanded"} <= set().union(*compared)
