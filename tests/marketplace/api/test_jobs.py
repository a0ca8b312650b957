"""/jobs over HTTP: submit one or many, once; list, explain, follow, read and cancel one's own, and nobody else's."""

from datetime import UTC, datetime, timedelta

import pytest

from marketplace.models import (
    BillingStanding,
    Contract,
    IdempotencyKey,
    Job,
    JobEvent,
    LogChunk,
    OutboxMessage,
    Placement,
)
from marketplace.services import jobs as job_service
from scheduler import cycle
from tests import factories as f

pytestmark = pytest.mark.django_db
URL = "/api/v1/jobs"


@pytest.fixture
def contract():
    site = f.site(pdus=1)
    host = f.host(site, power_node="pdu-1")
    f.agent(site, last_sync_at=datetime.now(UTC), lease_until=datetime.now(UTC) + timedelta(minutes=15))
    return f.contract(f.listing(site, hosts=[host]), f.organization())


@pytest.fixture
def api(contract):
    return f.client(contract.organization, "engineer")


def body(contract, **fields):
    return {"contract": contract.public_id, "command": ["python3", "train.py"], **fields}


def submit(api, contract, **fields):
    headers = {k: fields.pop(k) for k in list(fields) if k.startswith("HTTP_")}
    return api.post(URL, body(contract, **fields), format="json", **headers)


def error(answer, status, code):
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.json()
    return {e["pointer"]: e["message"] for e in answer.json().get("errors", [])}


# --- submit
def test_a_job_is_queued_as_it_was_asked_for(api, contract):
    spec = {
        "name": "train", "gpus": 4, "replicas": 2, "vcpu_milli": 4000, "ram_mib": 2048, "env": {"A": "1"}, "priority": 3,
        "reference": "run-7", "metadata": {"team": "nlp", "deep": [1, {"x": None}]}, "gpu_models": ["H100-SXM"],
        "secrets": {"TOKEN": "s3cret"},
    }  # fmt: skip
    answer = submit(api, contract, **spec)
    assert answer.status_code == 201
    shown = answer.json()
    assert {k: shown[k] for k in spec if k != "secrets"} == {k: v for k, v in spec.items() if k != "secrets"}
    assert (shown["state"], shown["actions"], shown["contract"]) == ("queued", ["cancel"], contract.public_id)
    assert "s3cret" not in answer.content.decode()
    assert b"s3cret" not in bytes(Job.objects.get().secrets)
    (event,) = JobEvent.objects.all()
    assert (event.from_state, event.to_state) == ("", "queued")
    assert OutboxMessage.objects.get(topic="scheduler.run_cycle").payload == {"cell": contract.cell_id}


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"command": []}, "/command"),
        ({"command": "ls"}, "/command"),
        ({"gpus": 17}, "/gpus"),
        ({"gpus": -1}, "/gpus"),
        ({"gpu_milli": 500, "gpus": 2}, "/gpu_milli"),
        ({"replicas": 0}, "/replicas"),
        ({"topology": "moon"}, "/topology"),
        ({"env": {"A": {"b": 1}}}, "/env/A"),
        ({"contract": "job_000000000000"}, "/contract"),
        ({"colour": "red"}, "/colour"),
        ({"max_seconds": 10**12}, "/max_seconds"),
        ({"gpus": 0, "vram_mib": 10**12}, "/vram_mib"),
        ({"nvme_gib": 10**12}, "/nvme_gib"),
        ({"metadata": {"k": "nul \x00"}}, "/metadata"),
        ({"metadata": {"k": [{"nul \x00": 1}]}}, "/metadata"),
        ({"env": {"nul \x00": "1"}}, "/env"),
    ],
)
def test_a_bad_body_is_refused_by_name(api, contract, fields, pointer):
    answer = api.post(URL, body(contract) | fields, format="json")
    assert answer.status_code == 400, answer.content
    assert pointer in {e["pointer"] for e in answer.json()["errors"]}
    assert not Job.objects.exists()


def test_standing_and_contract_are_looked_at(api, contract):
    standing = BillingStanding.objects.filter(organization=contract.organization)
    standing.update(state="no_card")
    error(submit(api, contract), 402, "card_required")
    standing.update(state="suspended")
    error(submit(api, contract), 402, "billing_suspended")
    standing.update(state="good")
    Contract.objects.update(state="ending")
    error(submit(api, contract), 409, "contract_inactive")
    assert not Job.objects.exists()


def test_what_never_fits_is_refused_with_the_dimension(api, contract):
    assert error(submit(api, contract, gpus=9), 422, "over_ceiling") == {"/replicas": "at most 8 GPUs in all"}
    assert error(submit(api, contract, ram_mib=3_000_000), 422, "never_fits") == {"/ram_mib": "the largest has 2097152"}
    assert error(submit(api, contract, gpu_models=["B200"]), 422, "never_fits") == {"/gpu_models": "offered: H100-SXM"}


def test_somebody_elses_contract_is_no_contract(contract):
    stranger = f.client(f.organization())
    assert error(submit(stranger, contract), 404, "not_found") == {"/contract": "unknown"}
    operator = f.client(contract.operator)  # it sees the contract, and holds it not
    error(submit(operator, contract), 404, "not_found")


# --- once
def test_the_same_key_is_the_same_job(api, contract):
    first = submit(api, contract, HTTP_IDEMPOTENCY_KEY="k1")
    again = submit(api, contract, HTTP_IDEMPOTENCY_KEY="k1")
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["Idempotent-Replayed"] == "true"
    error(submit(api, contract, gpus=2, HTTP_IDEMPOTENCY_KEY="k1"), 422, "idempotency_mismatch")
    other_route = api.post(f"{URL}/batch", {"jobs": [body(contract)]}, format="json", HTTP_IDEMPOTENCY_KEY="k1")
    error(other_route, 422, "idempotency_mismatch")
    assert Job.objects.count() == 1
    assert OutboxMessage.objects.filter(topic="scheduler.run_cycle").count() == 1


def test_a_key_is_its_organizations_own_and_a_refusal_spends_none(api, contract):
    error(submit(api, contract, gpus=9, HTTP_IDEMPOTENCY_KEY="k1"), 422, "over_ceiling")
    assert not IdempotencyKey.objects.exists()
    assert submit(api, contract, HTTP_IDEMPOTENCY_KEY="k1").status_code == 201
    other = f.contract(contract.listing, f.organization())
    assert submit(f.client(other.organization), other, HTTP_IDEMPOTENCY_KEY="k1").status_code == 201
    error(submit(api, contract, HTTP_IDEMPOTENCY_KEY="k" * 121), 400, "invalid_request")


# --- batch
def test_each_item_of_a_batch_answers_for_itself(api, contract):
    foreign = f.contract(contract.listing, f.organization())
    items = [
        body(contract, reference="a"), body(contract, gpus=99), body(contract, gpus=9), body(foreign), {"command": ["x"]},
        body(contract, reference="b", replicas=8),
    ]  # fmt: skip
    answer = api.post(f"{URL}/batch", {"jobs": items}, format="json")
    assert answer.status_code == 200
    data = answer.json()["data"]
    assert [d.get("error", {}).get("code") for d in data] == [
        None, "invalid_request", "over_ceiling", "not_found", "invalid_request", None,
    ]  # fmt: skip
    assert [d["job"]["reference"] for d in data if "job" in d] == ["a", "b"]
    assert Job.objects.count() == 2
    for wrong in ({"jobs": []}, {"jobs": [body(contract)] * 101}, {}):
        assert api.post(f"{URL}/batch", wrong, format="json").status_code == 400


def test_a_batch_of_a_hundred_is_a_handful_of_statements(api, contract, django_assert_max_num_queries):
    items = [body(contract, reference=str(i)) for i in range(100)]
    with django_assert_max_num_queries(25):
        answer = api.post(f"{URL}/batch", {"jobs": items}, format="json")
    assert [d["job"]["reference"] for d in answer.json()["data"]] == [str(i) for i in range(100)]


# --- list
def test_jobs_are_paged_newest_first_and_filtered(api, contract, django_assert_max_num_queries):
    for i in range(5):
        submit(api, contract, reference=f"r{i % 2}")
    seen, cursor = [], {}
    while True:
        page = api.get(URL, {"limit": 2, **cursor}).json()
        seen += [j["id"] for j in page["data"]]
        if not page["has_more"]:
            break
        cursor = {"cursor": page["cursor"]}
    assert seen == [j.public_id for j in Job.objects.order_by("-id")]
    assert len(api.get(URL, {"reference": "r1"}).json()["data"]) == 2
    assert api.get(URL, {"state": "running"}).json()["data"] == []
    assert len(api.get(URL, {"contract": contract.public_id}).json()["data"]) == 5
    error(api.get(URL, {"colour": "red"}), 400, "unknown_field")
    error(api.get(URL, {"cursor": "rubbish"}), 400, "invalid_request")
    for limit in ("0", "101", "x", "²"):
        error(api.get(URL, {"limit": limit}), 400, "invalid_request")
    with django_assert_max_num_queries(6):
        api.get(URL)


# --- one job
def place(contract, job_id):
    job = Job.objects.get()
    cycle.run(job.cell_id)
    return Placement.objects.get(job=job)


def test_a_job_with_its_placements_events_and_explanation(api, contract):
    job = submit(api, contract, gpus=8).json()["id"]
    assert api.get(f"{URL}/{job}/explain").json()["text"] == "No cycle has looked at the job yet."
    place(contract, job)
    waiting = submit(api, contract, gpus=8).json()["id"]
    cycle.run(contract.cell_id)
    shown = api.get(f"{URL}/{job}").json()
    assert (shown["state"], [p["gpus"] for p in shown["placements"]]) == ("placed", [list(range(8))])
    assert [(e["from"], e["to"]) for e in api.get(f"{URL}/{job}/events").json()["data"]] == [
        ("", "queued"),
        ("queued", "placed"),
    ]
    assert api.get(f"{URL}/{job}/explain").json()["outcome"] == "placed"
    why = api.get(f"{URL}/{waiting}/explain").json()
    assert (why["outcome"], why["reason"]) == ("waiting", "over_quota")
    assert "ceiling is 8 GPUs; 8 are in use" in why["text"]


def test_logs_by_offset(api, contract):
    job = submit(api, contract).json()["id"]
    empty = api.get(f"{URL}/{job}/logs").json()
    assert (empty["data"], empty["next"], empty["complete"]) == ("", 0, False)
    placement = place(contract, job)
    for offset, text in ((0, "héllo\n"), (7, "world\n")):
        LogChunk.objects.create(placement=placement, stream="stdout", offset=offset, size=len(text.encode()), data=text)
    read = lambda **q: api.get(f"{URL}/{job}/logs", q).json()  # noqa: E731
    assert (read()["data"], read()["next"], read()["complete"]) == ("héllo\nworld\n", 13, False)
    assert (read(offset=7)["data"], read(offset=9)["data"], read(offset=13)["data"]) == ("world\n", "rld\n", "")
    assert read(offset=13)["next"] == 13
    assert read(offset=99)["next"] == 99
    assert read(stream="stderr")["data"] == ""
    assert read(placement=placement.public_id)["data"] == "héllo\nworld\n"
    Placement.objects.update(state="released")
    assert read()["complete"] is True
    for query in ({"offset": "-1"}, {"offset": "x"}, {"offset": "²"}, {"stream": "stdin"}):
        error(api.get(f"{URL}/{job}/logs", query), 400, "invalid_request")
    error(api.get(f"{URL}/{job}/logs", {"placement": "plc_000000000000"}), 404, "not_found")


def test_cancel_while_waiting_and_twice(api, contract):
    job = submit(api, contract).json()["id"]
    done = api.post(f"{URL}/{job}/cancel").json()
    assert (done["state"], done["actions"], done["reason"]) == ("cancelled", [], "cancelled by the customer")
    error(api.post(f"{URL}/{job}/cancel"), 409, "illegal_transition")


def test_cancel_on_a_host_drains(api, contract):
    job = submit(api, contract).json()["id"]
    placement = place(contract, job)
    shown = api.post(f"{URL}/{job}/cancel").json()
    assert (shown["state"], shown["actions"]) == ("placed", [])
    placement.refresh_from_db()
    assert (placement.state, placement.desired) == ("draining", "drain")
    asked = placement.release_requested_at
    assert api.post(f"{URL}/{job}/cancel").status_code == 200  # again is no harm, and moves no bill
    placement.refresh_from_db()
    assert placement.release_requested_at == asked
    Placement.objects.update(state="released", finished_at=datetime.now(UTC), exit_code=143)
    job_service.settle([placement.job_id], now=datetime.now(UTC))
    over = api.get(f"{URL}/{job}").json()
    assert (over["state"], over["reason"]) == (
        "cancelled",
        "cancelled by the customer",
    )  # not "placed", what it was before


def test_nobody_elses_job_is_there(contract, api):
    job = submit(api, contract).json()["id"]
    strangers = [f.client(f.organization()), f.client(contract.operator)]
    for stranger in strangers:
        assert stranger.get(URL).json()["data"] == []
        for path in ("", "/explain", "/events", "/logs"):
            error(stranger.get(f"{URL}/{job}{path}"), 404, "not_found")
        error(stranger.post(f"{URL}/{job}/cancel"), 404, "not_found")
    for wrong in ("job_000000000000", "ctr_000000000000", "nothing", job.upper()):
        error(api.get(f"{URL}/{wrong}"), 404, "not_found")
    viewer = f.client(contract.organization, "viewer")
    assert viewer.get(f"{URL}/{job}").status_code == 200
    error(viewer.post(f"{URL}/{job}/cancel"), 403, "forbidden")
    assert Job.objects.get().state == "queued"


def test_placements_are_seen_by_both_sides(api, contract):
    job = submit(api, contract).json()["id"]
    placement = place(contract, job)
    for who in (api, f.client(contract.operator)):
        (row,) = who.get("/api/v1/placements", {"job": job}).json()["data"]
        assert (row["id"], row["state"], row["host"]) == (placement.public_id, "granted", placement.host.name)
    assert f.client(f.organization()).get("/api/v1/placements").json()["data"] == []


# --- rules of placing
RULES = {
    "topology": "leaf", "topology_required": True, "nvlink": "required", "spread_level": "host", "max_per_domain": 2,
    "labels": {"app": "train", "team": "nlp"}, "tolerations": ["dedicated=nlp"], "region": "us-tx", "price_limit": 9_000_000,
    "affinity": [
        {"rule": "near", "level": "leaf", "labels": {"app": "db"}},
        {"rule": "apart", "level": "host", "labels": {"app": "train", "team": "nlp"}},
    ],
    "on_replica_loss": "shrink", "min_replicas": 1, "replicas": 2, "gpus": 4,
}  # fmt: skip


def test_rules_of_placing_are_kept_and_shown(api, contract):
    answer = submit(api, contract, site=contract.site.public_id, **RULES)
    assert answer.status_code == 201, answer.json()
    shown = answer.json()
    assert {k: shown[k] for k in RULES} == RULES
    assert (shown["site"], shown["epoch"], shown["lost_ranks"]) == (contract.site.public_id, 0, [])
    job = Job.objects.get()
    assert (job.labels, job.ruled) == (["app=train", "team=nlp"], True)
    submit(api, contract, topology="pack")
    assert not Job.objects.latest("id").ruled


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"labels": {"a b": "c"}}, "/labels"),
        ({"labels": {"a": "b c"}}, "/labels/a"),
        ({"labels": {f"l{i}": "x" for i in range(17)}}, "/labels"),
        ({"affinity": [{"rule": "near", "level": "leaf", "labels": {}}]}, "/affinity"),
        ({"affinity": [{"rule": "near", "level": "moon", "labels": {"a": "b"}}]}, "/affinity/0/level"),
        ({"affinity": [{"rule": "near", "level": "leaf", "labels": {"a": "b"}, "x": 1}]}, "/affinity/0/x"),
        ({"tolerations": ["a taint"]}, "/tolerations/0"),
        ({"max_per_domain": 1}, "/max_per_domain"),
        ({"spread_level": "host"}, "/spread_level"),
        ({"topology": "leaf", "spread_level": "leaf"}, "/spread_level"),
        ({"on_replica_loss": "shrink", "replicas": 4}, "/min_replicas"),
        ({"on_replica_loss": "shrink", "replicas": 4, "min_replicas": 4}, "/min_replicas"),
        ({"min_replicas": 1}, "/min_replicas"),
        ({"movable": True, "checkpoint_grace_s": 0}, "/movable"),
        ({"site": "job_000000000000"}, "/site"),
    ],
)
def test_rules_that_make_no_sense_are_refused_by_name(api, contract, fields, pointer):
    answer = api.post(URL, body(contract) | fields, format="json")
    assert answer.status_code == 400, answer.content
    assert pointer in {e["pointer"] for e in answer.json()["errors"]}
    assert not Job.objects.exists()


def test_another_site_region_or_price_can_never_be_had(api, contract):
    other = f.site(pdus=1)
    assert "/site" in error(submit(api, contract, site=other.public_id), 422, "never_fits")
    assert error(submit(api, contract, region="mars"), 422, "never_fits") == {"/region": "us-tx"}
    limit = contract.price - 1
    assert "/price_limit" in error(submit(api, contract, price_limit=limit), 422, "never_fits")
    assert submit(api, contract, price_limit=contract.price).status_code == 201
    Contract.objects.update(kind="spot")  # its price moves: it waits
    assert submit(api, contract, price_limit=limit).status_code == 201
