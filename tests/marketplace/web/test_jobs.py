"""Jobs on the pages: submit, watch, read the log, see the cost, cancel."""

import re
from datetime import timedelta

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from billing import costs
from marketplace.models import BillingStanding, Contract, Curtailment, DeviceHour, Job, LogChunk
from marketplace.services import jobs
from scheduler import cycle
from tests import factories

pytestmark = pytest.mark.django_db
FORM = {"command": "echo one\necho two", "replicas": 2, "gpus": 4, "vcpu": 8, "ram_gib": 32}


def text(response) -> str:
    return response.content.decode()


def running(market, **fields):
    job = factories.job(market.contract(), state="running", started_at=timezone.now(), **fields)
    began = timezone.now() - timedelta(hours=2)
    placement = factories.placement(
        job, market.hosts[0], range(job.gpus), state="running", running_at=began, granted_at=began
    )
    return job, placement


def test_empty_states_teach_the_next_step(market, browser):
    client = browser(market.customer)
    assert "Jobs run under a contract" in text(client.get("/jobs"))
    assert "First, a contract" in text(client.get("/jobs/new"))
    market.contract()
    assert "No job yet" in text(client.get("/jobs"))


def test_submit(market, browser):
    contract = market.contract()
    client = browser(market.customer)
    response = client.post(
        "/jobs/new", {**FORM, "contract": contract.public_id, "env": "A=1\nB=two words", "secrets": "TOKEN=x"}
    )
    job = Job.objects.get()
    assert response["Location"] == f"/jobs/{job.public_id}"
    assert job.command == ["/bin/sh", "-c", "echo one\necho two"]
    assert (job.replicas, job.gpus, job.vcpu_milli, job.ram_mib) == (2, 4, 8000, 32_768)
    assert job.env == {"A": "1", "B": "two words"}
    page = text(client.get(response["Location"]))
    assert "Why it waits" in page
    assert "TOKEN" not in page


def test_rules_of_placing_are_asked_for_in_words_and_shown(market, browser):
    contract = market.contract()
    client = browser(market.customer)
    rules = {
        "topology": "spread", "topology_required": "on", "spread_level": "leaf", "max_per_domain": "2", "nvlink": "preferred",
        "labels": "app=train", "near": "leaf app=db tier=1", "apart": "host app=train\n\nsite app=batch", "price_limit": "9.5",
        "on_replica_loss": "shrink", "min_replicas": "1", "movable": "on",
    }  # fmt: skip
    response = client.post("/jobs/new", {**FORM, "contract": contract.public_id, **rules})
    job = Job.objects.get()
    assert (job.topology, job.spread_level, job.max_per_domain, job.nvlink) == ("spread", "leaf", 2, "preferred")
    assert (job.labels, job.price_limit, job.on_replica_loss, job.min_replicas) == (
        ["app=train"],
        9_500_000,
        "shrink",
        1,
    )
    assert [(r["rule"], r["level"], r["labels"]) for r in job.affinity] == [
        ("near", "leaf", ["app=db", "tier=1"]), ("apart", "host", ["app=train"]), ("apart", "site", ["app=batch"]),
    ]  # fmt: skip
    page = text(client.get(response["Location"]))
    assert "spread by leaf, at most 2 in one, NVLink preferred, required" in page
    assert "the rest goes on, from 1 up" in page
    for sentence in (
        "each replica at the same leaf switch as a job of yours with app=db and tier=1",
        "no replica on a host where a job of yours with app=train runs",
        "no replica at a site where a job of yours with app=batch runs",
        "may be moved to another host; not moved so far",
    ):
        assert sentence in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"apart": "moon app=a"}, "Rule 1 is not of the form"),
        ({"near": "leaf"}, "Rule 1 is not of the form"),
        ({"labels": "app=a b"}, "At most 16 labels"),
        ({"labels": "no pair"}, "Line 1 is not of the form"),
        ({"max_per_domain": "2"}, "needs topology spread"),
        ({"on_replica_loss": "shrink"}, "fewest replicas"),
        ({"price_limit": "0.000001"}, "costs"),
        ({"movable": "on", "checkpoint_grace_s": "0"}, "needs a checkpoint grace above 0"),
        (
            {"near": "\n".join(f"host a=n{i}" for i in range(5)), "apart": "\n".join(f"host b=n{i}" for i in range(4))},
            "at most 8 rules together",
        ),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_beside_its_field(market, browser, change, said):
    contract = market.contract()
    response = browser(market.customer).post("/jobs/new", {**FORM, "contract": contract.public_id, **change})
    assert response.status_code in {400, 422}
    assert said in text(response)
    assert not Job.objects.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"replicas": 100}, "the contract holds 16"),
        ({"gpus": 9, "replicas": 1}, "the largest has 8"),
        ({"env": "not a pair"}, "Line 1 is not of the form"),
        ({"command": ""}, "This field is required"),
    ],
)
def test_a_refused_job_says_why_and_queues_nothing(market, browser, change, said):
    contract = market.contract()
    response = browser(market.customer).post("/jobs/new", {**FORM, "contract": contract.public_id, **change})
    assert response.status_code in {400, 422}
    assert said in text(response)
    assert not Job.objects.exists()


def test_why_it_waits_and_why_it_stands_there(market, browser):
    """The page asks for the part that was tried once it stands; strangers get nothing."""
    now = timezone.now()
    factories.agent(market.listing.site, last_sync_at=now, lease_until=now + timedelta(hours=1))
    contract = market.contract()
    rival = factories.contract(market.listing, factories.organization("Secret Rival"), gpu_count=16)
    spec = {"command": ["true"], "gpus": 3, "vcpu_milli": 1000, "ram_mib": 1024}

    def submit(agreed, **more):
        return jobs.submit(factories.actor(agreed.organization), agreed, spec | more, now=timezone.now())

    placed = submit(contract)
    for host in market.hosts:
        submit(rival, gpus=host.gpu_count - 3)
    cycle.run(contract.cell_id)
    waiting = submit(contract, gpus=8)
    cycle.run(contract.cell_id)
    client = browser(market.customer)
    page = text(client.get(f"/jobs/{waiting.public_id}/why"))
    assert "Why it waits" in page
    assert "What would change it" in page
    assert "Secret Rival" not in page
    page = text(client.get(f"/jobs/{placed.public_id}/why"))
    assert "Why it stands there" in page
    assert "fragmentation" in page
    assert client.get(f"/jobs/{placed.public_id}/live")["HX-Trigger"] == "job-stands"
    assert browser(factories.organization()).get(f"/jobs/{placed.public_id}/why").status_code == 404


def test_a_job_under_somebody_elses_contract_is_not_even_a_choice(market, browser):
    theirs = factories.contract(market.listing)
    market.contract()
    response = browser(market.customer).post("/jobs/new", {**FORM, "contract": theirs.public_id})
    assert response.status_code == 400
    assert not Job.objects.exists()


def test_no_card_no_job(market, browser):
    contract = market.contract()
    BillingStanding.objects.filter(organization=market.customer).update(state="no_card")
    response = browser(market.customer).post("/jobs/new", {**FORM, "contract": contract.public_id})
    assert response.status_code == 402
    assert "/billing/card?next=/jobs/new" in text(response)


def test_the_price_as_it_is_typed(market, browser):
    contract = market.contract()
    client = browser(market.customer)
    page = text(client.get("/jobs/estimate", {"contract": contract.public_id, "gpus": 4, "replicas": 2}))
    assert "$20.00" in page  # 8 x 2.50
    page = text(client.get("/jobs/estimate", {"contract": contract.public_id, "gpus": 8, "replicas": 3}))
    assert "The contract holds 16 GPUs; this asks for 24." in page
    assert client.get("/jobs/estimate", {"contract": "nonsense", "gpus": "x"}).status_code == 200


def test_the_running_cost_is_what_the_timeline_bills(market):
    job, placement = running(market, gpus=4)
    now = placement.running_at + timedelta(minutes=90)
    cost = costs.of_job(Job.objects.select_related("contract").get(pk=job.pk), now=now)
    assert cost.used == 4000 * 5400
    assert cost.minor == 1500  # 4 GPUs x 1.5 h x 2.50
    assert cost.hourly == 1000
    placement.release_requested_at = placement.running_at + timedelta(minutes=30)
    placement.save()
    cost = costs.of_job(Job.objects.select_related("contract").get(pk=job.pk), now=now)
    assert (cost.minor, cost.hourly) == (500, 0)


def test_the_page_shows_where_it_runs_and_polls_while_it_lives(market, browser):
    job, placement = running(market)
    client = browser(market.customer)
    page = text(client.get(f"/jobs/{job.public_id}"))
    assert placement.host.name in page
    assert f'hx-get="/jobs/{job.public_id}/live" hx-trigger="every 2s"' in page
    live = client.get(f"/jobs/{job.public_id}/live", headers={"HX-Request": "true"})
    assert live.status_code == 200
    assert "<html" not in text(live)
    Job.objects.filter(pk=job.pk).update(state="succeeded", finished_at=timezone.now(), exit_code=0)
    assert client.get(f"/jobs/{job.public_id}/live", headers={"HX-Request": "true"}).status_code == 286
    assert "every 2s" not in text(client.get(f"/jobs/{job.public_id}"))


def write(placement, offset, data):
    LogChunk.objects.create(placement=placement, stream="stdout", offset=offset, size=len(data.encode()), data=data)


def test_the_log_follows_without_a_gap_and_ends_with_the_job(market, browser):
    job, placement = running(market)
    client = browser(market.customer)
    write(placement, 0, "one <script>\n")
    page = text(client.get(f"/jobs/{job.public_id}"))
    assert "one &lt;script&gt;" in page
    poll = re.search(r'hx-get="(/jobs/[^"]*/log\?offset=13[^"]*)"', page)[1].replace("&amp;", "&")
    assert text(client.get(poll)).count("offset=13") == 1  # nothing new: the same poller again
    write(placement, 13, "zwei ü\n")
    more = text(client.get(poll))
    assert more.startswith("zwei ü")
    assert "offset=21" in more
    placement.state, placement.finished_at = "released", timezone.now()
    placement.save()
    assert "hx-get" not in text(client.get(poll))


def test_cancel(market, browser):
    job = factories.job(market.contract())
    client = browser(market.customer)
    assert "Cancel the job" in text(client.get(f"/jobs/{job.public_id}"))
    client.post(f"/jobs/{job.public_id}/cancel")
    job.refresh_from_db()
    assert job.state == "cancelled"
    again = client.post(f"/jobs/{job.public_id}/cancel", follow=True)
    assert "The job is cancelled already" in text(again)


@pytest.mark.parametrize("path", ["", "/live", "/log", "/cancel"])
def test_strangers_find_nothing(market, browser, path):
    job = factories.job(market.contract())
    stranger = browser(factories.organization())
    send = stranger.post if path == "/cancel" else stranger.get
    assert send(f"/jobs/{job.public_id}{path}").status_code == 404
    assert job.public_id not in text(stranger.get("/jobs"))
    job.refresh_from_db()
    assert job.state == "queued"


def test_viewers_look_and_touch_nothing(market, browser):
    job = factories.job(market.contract())
    viewer = browser(market.customer, "viewer")
    page = text(viewer.get(f"/jobs/{job.public_id}"))
    assert "Cancel the job" not in page
    assert viewer.post(f"/jobs/{job.public_id}/cancel").status_code == 403
    assert viewer.get("/jobs/new").status_code == 403
    assert viewer.get("/invoices").status_code == 403


def test_lists_go_on_by_cursor_and_cost_the_same_queries_however_long(market, browser):
    contract = market.contract()
    client = browser(market.customer)

    def queries() -> int:
        with CaptureQueriesContext(
            connection,
        ) as seen:
            client.get("/jobs")
        return len(seen)

    factories.job(contract, name="the first")
    few = queries()
    for _ in range(30):
        factories.job(contract)
    assert queries() == few
    page = text(client.get("/jobs"))
    assert "the first" not in page
    older = re.search(r'href="\?(before=[^"]+)"', page)[1]
    assert "the first" in text(client.get(f"/jobs?{older}"))
    assert client.get("/jobs?before=nonsense").status_code == 400


def test_what_it_drew_stands_beside_each_replica(market, browser):
    job, placement = running(market)
    client = browser(market.customer)
    assert "none yet" in text(client.get(f"/jobs/{job.public_id}"))
    hour = placement.running_at.replace(minute=0, second=0, microsecond=0)
    DeviceHour.objects.create(
        site=placement.site,
        start=hour + timedelta(hours=1),
        of="placement",
        ids=[placement.pk],
        mj=[1_580_000 * 3_600],
        ms=[1_800_000],
    )
    page = text(client.get(f"/jobs/{job.public_id}"))
    assert "1.58 kWh" in page
    assert "3.16 kW on average" in page
    api = factories.client(market.customer)
    for found in (
        api.get(f"/api/v1/jobs/{job.public_id}").json()["placements"],
        api.get("/api/v1/placements").json()["data"],
    ):
        assert [(p["energy_wh"], p["average_w"]) for p in found] == [(1_580, 3_160)]


def test_pages_cost_few_queries(market, browser):
    """Committed ceilings, session and membership included. A page that needs more says why here."""
    # A listing: how reliable and verified it is, and its announced works. A contract and what is rated: resold
    # parts, works, credits, GPUs held lower; a contract also: GPUs of it that no host has now.
    job, _ = running(market)
    client = browser(market.customer)
    ceilings = {
        "/": 10, f"/listings/{market.listing.public_id}": 15, "/contracts": 6, f"/contracts/{job.contract.public_id}": 13, "/jobs": 5,
        "/jobs/new": 5, f"/jobs/{job.public_id}": 14, f"/jobs/{job.public_id}/live": 10, f"/jobs/{job.public_id}/log": 8,
        "/usage": 23, "/invoices": 22, "/team": 7, "/keys": 5,
    }  # fmt: skip
    spent = {}
    for path in ceilings:
        client.get(path)
        with CaptureQueriesContext(connection) as seen:
            assert client.get(path).status_code == 200
        spent[path] = len(seen)
    over = {path: n for path, n in spent.items() if n > ceilings[path]}
    assert not over


@pytest.mark.parametrize(
    ("kind", "call", "minutes"),
    [
        ("flexible", {}, 60),  # its start: the notice is over by then
        ("flexible", {"starts": 5}, 15),
        ("spot", {"starts": 5}, 5),
        ("reserved", {"emergency": True}, None),
        ("on_demand", {}, None),
        ("flexible", {"mandatory": False}, None),
        ("flexible", {"state": "cancelled"}, None),
    ],
)
def test_a_call_that_may_take_the_job_is_shown_before(market, browser, kind, call, minutes):
    contract = market.contract(
        kind=kind, flexible_hours_per_month=10, flexible_notice_s=900, limit_price=2_000_000 if kind == "spot" else None
    )
    job = factories.job(contract, state="running", started_at=timezone.now(), checkpoint_grace_s=90)
    now = timezone.now().replace(microsecond=0)
    begins = now + timedelta(minutes=call.pop("starts", 60))
    row = Curtailment.objects.create(
        site=market.site, node=factories.a_node(market.site), reference="grid-1", cap_w=1, starts_at=begins,
        ends_at=begins + timedelta(hours=2), created_by="grid", **call,
    )  # fmt: skip
    Curtailment.objects.update(created_at=now)
    Contract.objects.update(created_at=now - timedelta(days=1))
    client = browser(market.customer)
    shown = factories.client(market.customer).get(f"/api/v1/jobs/{job.public_id}").json()["grid_calls"]
    pages = [text(client.get(path)) for path in ("/jobs", f"/jobs/{job.public_id}", f"/jobs/{job.public_id}/live")]
    if minutes is None:
        assert shown == []
        assert not any("The grid calls" in page for page in pages)
        return
    leaves = now + timedelta(minutes=minutes)
    (answer,) = shown
    assert answer["id"] == row.public_id
    assert answer["leaves_from"] == leaves.isoformat().replace("+00:00", "Z")
    assert all("The grid calls" in page and f"{leaves:%H:%M}" in page for page in pages)
    Job.objects.update(state="succeeded", finished_at=now)
    assert factories.client(market.customer).get(f"/api/v1/jobs/{job.public_id}").json()["grid_calls"] == []
    assert "The grid calls" not in text(client.get("/jobs"))
