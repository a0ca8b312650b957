"""State machines walked whole: every (from, to) pair either moves, with its event, or is refused and changes nothing."""

from datetime import timedelta

import pytest
from django.db import IntegrityError, connection, transaction

from marketplace.models import Contract, ContractEvent, Curtailment, Job, JobEvent, Placement, PlacementEvent
from marketplace.services import curtailments
from marketplace.services.transitions import legal_actions, record_created, transition, transition_many
from tests import factories as f
from tests.factories import NOW
from tests.marketplace.refusals import refused

pytestmark = pytest.mark.django_db
MACHINES = {
    Job: (JobEvent, "job"),
    Placement: (PlacementEvent, "placement"),
    Contract: (ContractEvent, "contract"),
}


@pytest.fixture
def rows():
    site = f.site()
    host = f.host(site)
    contract = f.contract(f.listing(site, hosts=[host]))
    job = f.job(contract)
    return {Job: job, Placement: f.placement(job, host), Contract: contract}


@pytest.mark.parametrize("model", MACHINES)
def test_the_table_is_complete_and_final_states_are_final(model):
    assert set(model.TRANSITIONS) == set(model.State.values)
    assert set().union(*model.TRANSITIONS.values()) <= set(model.State.values)
    finals = getattr(model, "FINAL", ("ended", "terminated", "cancelled", "defaulted"))
    assert {s for s, after in model.TRANSITIONS.items() if not after} == set(finals)
    reached, new = set(), {"draft", "queued"} if model is Job else {"intended", "pending_payment", "active"}
    while new - reached:
        reached |= new
        new = set().union(*(model.TRANSITIONS.get(s, set()) for s in reached))
    assert reached >= set(model.State.values)


@pytest.mark.parametrize("model", MACHINES)
def test_every_pair_moves_or_is_refused(rows, model):
    event, owner = MACHINES[model]
    pk, moves = rows[model].pk, 0
    for before in model.State.values:
        for after in model.State.values:
            model.objects.filter(pk=pk).update(state=before)
            last = event.objects.order_by("-id").values_list("id", flat=True).first()
            call = {"expected": [before], "to": after, "now": NOW, "actor": "me", "reason": "because"}
            with transaction.atomic():
                if after in model.TRANSITIONS[before]:
                    moves += 1
                    assert transition(model, pk, **call) == before
                else:
                    with refused("illegal_transition"):
                        transition(model, pk, **call)
            written = event.objects.filter(id__gt=last)
            if after in model.TRANSITIONS[before]:
                (row,) = written
                assert (getattr(row, f"{owner}_id"), row.from_state, row.to_state) == (pk, before, after)
                assert (row.at, row.actor, row.reason) == (NOW, "me", "because")
                assert model.objects.get(pk=pk).state == after
            else:
                assert not written.exists()
                assert model.objects.get(pk=pk).state == before
    assert moves == sum(len(after) for after in model.TRANSITIONS.values())


@pytest.mark.parametrize("model", MACHINES)
def test_only_rows_in_an_expected_state_move(rows, model):
    """`expected` narrows what the table allows: the guard of everything that races."""
    pk = rows[model].pk
    for before, allowed in model.TRANSITIONS.items():
        for after in allowed:
            others = [s for s in model.State.values if s != before]
            model.objects.filter(pk=pk).update(state=before)
            assert transition_many(model, [pk], expected=others, to=after, now=NOW, actor="me") == {}
            assert model.objects.get(pk=pk).state == before


def test_many_rows_move_by_one_statement(rows, django_assert_num_queries):
    jobs = [f.job(rows[Contract]) for _ in range(20)]
    Job.objects.filter(pk__in=[j.pk for j in jobs[:5]]).update(state="requeued")
    Job.objects.filter(pk=jobs[5].pk).update(state="cancelled")
    ids = [j.pk for j in jobs]
    with django_assert_num_queries(1):
        moved = transition_many(
            Job,
            [*ids, *ids],
            expected=Job.WAITING,
            to="placed",
            now=NOW,
            actor="me",
            set_columns={"reference": "x"},
            increment=("attempt",),
        )
    assert moved == {**dict.fromkeys(ids[:5], "requeued"), **dict.fromkeys(ids[6:], "queued")}
    assert set(Job.objects.filter(pk__in=moved).values_list("state", "reference", "attempt")) == {("placed", "x", 1)}
    assert JobEvent.objects.filter(to_state="placed").count() == 19
    assert transition_many(Job, [], expected=Job.WAITING, to="placed", now=NOW, actor="me") == {}


def test_a_reason_longer_than_its_column_is_cut_and_an_unknown_row_is_refused(rows):
    transition(Job, rows[Job].pk, expected=["queued"], to="failed", now=NOW, actor="a" * 500, reason="r" * 500)
    event = JobEvent.objects.latest("id")
    assert (len(event.actor), len(event.reason)) == (120, 300)
    with refused("illegal_transition"):
        transition(Job, 10**9, expected=["queued"], to="failed", now=NOW, actor="me")


def test_the_first_event_comes_from_nothing(rows):
    record_created(Job, [rows[Job].pk], state="queued", now=NOW, actor="me")
    event = JobEvent.objects.latest("id")
    assert (event.from_state, event.to_state) == ("", "queued")
    assert legal_actions(Job, "queued") == ["cancelled", "failed", "placed"]


@pytest.mark.parametrize(
    ("model", "columns"),
    [
        (Job, {"gpu_milli": 0}),
        (Job, {"gpu_milli": 1001}),
        (Job, {"gpu_milli": 500, "gpus": 2}),
        (Job, {"replicas": 0}),
        (Job, {"state": "sleeping"}),
        (Placement, {"state": "sleeping"}),
        (Contract, {"state": "sleeping"}),
        (Contract, {"ends_at": NOW - timedelta(days=1)}),
    ],
)
def test_the_database_refuses_what_no_row_may_be(rows, model, columns):
    with pytest.raises(IntegrityError), transaction.atomic():
        model.objects.filter(pk=rows[model].pk).update(**columns)


def test_one_placement_for_each_rank_of_an_attempt(rows):
    with pytest.raises(IntegrityError), transaction.atomic():
        f.placement(rows[Job], rows[Placement].host, [3], rank=0)


# --- curtailments have the same table, and their own mover
@pytest.fixture
def curtailment():
    site = f.site()
    window = {"starts_at": NOW, "ends_at": NOW + timedelta(hours=1)}
    return curtailments.announce(
        f.actor(site.organization), f.a_node(site), cap_w=1000, reference="ercot-1", now=NOW, **window
    )


def test_every_pair_of_a_curtailment(curtailment):
    assert set(Curtailment.TRANSITIONS) == set(Curtailment.State.values)
    for before in Curtailment.State.values:
        for after in Curtailment.State.values:
            Curtailment.objects.filter(pk=curtailment.pk).update(state=before, settled_at=None)
            row = Curtailment.objects.get(pk=curtailment.pk)
            with transaction.atomic():
                if after in Curtailment.TRANSITIONS[before]:
                    curtailments._move(row, after, NOW)
                    row.refresh_from_db()
                    assert row.state == after
                    assert (row.settled_at is not None) == (not Curtailment.TRANSITIONS[after])
                else:
                    with refused("illegal_transition"):
                        curtailments._move(row, after, NOW)
                    row.refresh_from_db()
                    assert row.state == before


def test_a_curtailment_that_has_moved_meanwhile_is_not_moved_by_an_older_view_of_it(curtailment):
    stale = Curtailment.objects.get(pk=curtailment.pk)
    Curtailment.objects.filter(pk=curtailment.pk).update(state="active")
    with refused("illegal_transition"):
        curtailments.cancel(f.actor(curtailment.site.organization), stale, now=NOW)
    curtailment.refresh_from_db()
    assert curtailment.state == "active"


def test_the_database_refuses_a_curtailment_that_is_none(curtailment):
    for columns in ({"state": "sleeping"}, {"ends_at": NOW}):
        with pytest.raises(IntegrityError), transaction.atomic():
            Curtailment.objects.filter(pk=curtailment.pk).update(**columns)


def test_events_of_a_job_are_append_only_in_order(rows):
    for to in ("placed", "running", "preempting", "requeued", "placed", "succeeded"):
        with transaction.atomic():
            transition(Job, rows[Job].pk, expected=list(Job.State.values), to=to, now=NOW, actor="me")
    assert [e.to_state for e in rows[Job].events.all()] == [
        "queued", "placed", "running", "preempting", "requeued", "placed", "succeeded",
    ]  # fmt: skip
    assert connection.in_atomic_block
