"""Break it and see it say so: each part taken away, each wrong thing tried, at the doors that people and programs use."""

import csv
import io
import subprocess
import sys
from datetime import UTC, datetime

import httpx
import pytest

from sandbox.client import DECLINED_CARD, Client, add_card
from sandbox.processes import ROOT
from sandbox.smoke import checks
from tests.faults.conftest import Company, book, refusal

pytestmark = [
    pytest.mark.serverless,  # it has servers of its own
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # the people of `World` leave without closing the door
]


# --- what is wrong is refused, by name
def test_booking_without_a_card_and_a_declined_card(company: Company):
    other = company.world.tenant("Cardless Labs")
    error = refusal(lambda: book(other.client, company.site.listings["H100-SXM"], 1))
    assert (error.status, error.code) == (402, "card_required")
    assert other.client.every("contracts") == []
    answer = add_card(other.client, DECLINED_CARD)
    assert answer.status_code == 402
    assert "declined" in answer.text
    shown = other.client.get("payment-methods")
    assert (shown["card"], shown["standing"]) == (None, "no_card")
    assert refusal(lambda: book(other.client, company.site.listings["H100-SXM"], 1)).code == "card_required"


def test_a_wrong_enrolment_token(company: Company, tmp_path):
    body = {"token": "enr_" + "x" * 40, "name": "stranger"}
    answer = httpx.post(company.world.base + "/api/v1/agent/enrol", json=body)
    assert (answer.status_code, answer.json()["code"]) == (401, "enrolment_token_invalid")
    spent = {"token": company.site.files.token.read_text(), "name": "stranger"}
    assert httpx.post(company.world.base + "/api/v1/agent/enrol", json=spent).status_code == 401
    command = [sys.executable, "-m", "agent", "enrol", "--url", company.world.base, "--config"]
    ended = subprocess.run(
        [*command, str(company.site.files.config), "--state", str(tmp_path / "agent")],
        env={**company.world.env, "TAILRACE_ENROLMENT_TOKEN": "enr_wrong"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 3
    assert "the enrolment token is wrong, used or expired: ask the operator for a new one" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "agent" / "identity.json").exists()


@pytest.mark.parametrize(
    ("spec", "code", "pointer", "says"),
    [
        ({"gpus": 9}, "over_ceiling", "/replicas", "at most 8"),
        ({"gpus": 2, "replicas": 5}, "over_ceiling", "/replicas", "at most 8"),
        ({"vram_mib": 100_000}, "never_fits", "/vram_mib", "81920"),
        ({"vcpu_milli": 500_000}, "never_fits", "/vcpu_milli", "192000"),
        ({"ram_mib": 4_000_000}, "never_fits", "/ram_mib", "2097152"),
        ({"gpu_models": ["B200"]}, "never_fits", "/gpu_models", "H100-SXM"),
    ],
)
def test_a_job_that_can_never_fit(company: Company, spec, code, pointer, says):
    error = refusal(lambda: company.submit("true", **spec))
    assert (error.status, error.code) == (422, code)
    ((named),) = error.body["errors"]
    assert named["pointer"] == pointer
    assert says in named["message"]
    assert says in error.body["detail"] or code == "over_ceiling"


@pytest.mark.parametrize("signature", [None, "", "t=1,v1=00", "t=notanumber,v1=zz"])
def test_a_webhook_that_stripe_did_not_sign(company: Company, signature):
    headers = {} if signature is None else {"Stripe-Signature": signature}
    body = {"id": "evt_forged", "object": "event", "type": "invoice.paid", "data": {"object": {"id": "in_1"}}}
    answer = httpx.post(company.world.base + "/api/v1/webhooks/stripe", json=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "signature_invalid")
    assert answer.headers["content-type"].startswith("application/problem+json")


def test_a_broken_csv_imports_nothing(company: Company):
    api = company.operator.client
    before = [h["id"] for h in api.every("hosts", site=company.site.id)]
    rows = [{**row, "name": f"new-{i}"} for i, row in enumerate(company.site.spec["hosts"] * 2)]
    rows[1]["gpus"] = "eight"
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows({**r, "nvlink_domains": "0 0 0 0 0 0 0 0", "cap_control": "true"} for r in rows)
    body = {"kind": "hosts", "csv": out.getvalue()}
    report = api.post(f"sites/{company.site.id}/import?dry_run=true", body)
    (error,) = report["errors"]
    assert (error["line"], error["column"], error["value"]) == (3, "gpus", "eight")
    assert "whole number" in error["message"]
    real = refusal(lambda: api.post(f"sites/{company.site.id}/import", body))
    assert (real.status, real.code) == (422, "import_invalid")
    assert "/line/3/gpus" in {e["pointer"] for e in real.body["errors"]}
    assert [h["id"] for h in api.every("hosts", site=company.site.id)] == before


# --- a server is away, and comes back
def test_redis_stops_in_the_middle(company: Company):
    before = company.submit("echo begin; sleep 4; echo end-before")
    company.until(before, "running")
    company.cluster.redis.stop()
    health = httpx.get(company.world.base + "/api/v1/health")
    assert (health.status_code, health.json()["redis"]) == (503, "does not answer")
    during = [company.submit(f"echo answer {i}", reference=f"no-redis-{i}") for i in range(3)]  # 201, each of them
    found = company.customer.client.get("jobs", reference="no-redis-1")["data"]
    assert [(j["id"], j["state"]) for j in found] == [(during[1], "queued")]
    company.until(before, "succeeded")  # the agent's reports need no Redis
    company.cluster.redis.start()
    for job in during:
        company.until(job, "succeeded")
    after = company.submit("echo after")
    company.until(after, "succeeded")
    company.wait("the rest of the log", lambda: company.log(before).endswith("end-before\n"))
    for job, says in [(before, "begin\nend-before\n"), *((j, f"answer {i}\n") for i, j in enumerate(during))]:
        assert company.log(job) == says
    for job in (before, *during, after):
        assert company.moves(job) == ["queued", "placed", "running", "succeeded"] or company.moves(job) == [
            "queued", "placed", "succeeded",  # over before its first report
        ]  # fmt: skip
        assert len(company.job(job)["placements"]) == 1
    assert httpx.get(company.world.base + "/api/v1/health").status_code == 200


TICKS = "i=0; while [ $i -lt {n} ]; do date +%s; sleep 0.5; i=$((i+1)); done; echo over"


def test_postgresql_stops_in_the_middle(company: Company):
    long = company.submit(TICKS.format(n=40))
    short = company.submit(TICKS.format(n=6))
    company.until(long, "running")
    company.until(short, "running", "succeeded")
    company.cluster.postgres.stop()
    gone = datetime.now(UTC)
    api = company.customer.client.http
    for answer in (api.get("jobs"), api.post("jobs", json={}, headers={"Idempotency-Key": "x"}), api.get("health")):
        assert answer.status_code == 503
        assert answer.headers["content-type"].startswith("application/problem+json")
        assert answer.json()["code"] == "service_unavailable"
    page = httpx.get(company.world.base + "/", follow_redirects=True)
    assert page.status_code in {200, 503}  # a page that asks the database nothing may stand; no page breaks
    company.wait("the short job to end", lambda: (datetime.now(UTC) - gone).total_seconds() > 6)
    company.cluster.postgres.start()
    back = datetime.now(UTC)
    for job, count in ((short, 6), (long, 40)):
        company.until(job, "succeeded")
        company.wait("the rest of the log", lambda j=job: "over" in company.log(j))
        *ticks, last = company.log(job).split()
        assert last == "over"
        assert len(ticks) == count  # each line once, in order: the log was neither lost nor doubled
        assert ticks == sorted(ticks)
    inside = [t for t in company.log(long).split()[:-1] if gone.timestamp() + 1 < int(t) < back.timestamp() - 1]
    assert inside  # it ran on while nobody could ask
    (placement,) = company.job(short)["placements"]
    assert datetime.fromisoformat(placement["finished_at"]) <= back  # the site's own word, not the time of our return
    company.until(company.submit("echo after"), "succeeded")


def test_after_the_outages_nothing_waits_and_nothing_is_parked(company: Company):
    """Every door answers, every job came to its end, every running second is metered."""
    company.wait("the metering", lambda: not company.staff.get("staff/invariants")["invariants"]["unmetered_seconds"])
    health = company.staff.get("staff/invariants")
    assert not {k: v for k, v in health["invariants"].items() if v}
    assert health["parked"] == 0
    assert set(health["placements"]) <= {"released"}
    assert set(health["jobs"]) == {"succeeded"}


def test_after_all_of_it_every_second_is_billed_once(company: Company):
    tenant, staff = company.customer, company.staff
    through = datetime.now(UTC).isoformat()
    staff.post("staff/close-period", {"organization": tenant.id, "through": through})
    again = staff.post("staff/close-period", {"organization": tenant.id, "through": through})
    company.wait(
        "the invoice to be paid",
        lambda: (rows := tenant.client.every("invoices")) and all(i["state"] == "paid" for i in rows),
    )
    assert len(tenant.client.every("invoices")) == 1
    assert again["invoice"] is None or again["invoice"]["id"] == tenant.client.every("invoices")[0]["id"]
    checks.every_running_second_is_billed_once([tenant])
    checks.invoices_add_up([tenant])
    checks.stripe_mirrors(company.world, [tenant])
    checks.sites_stayed_under_their_caps(company.world)


def test_a_key_that_is_wrong_is_said_so(company: Company):
    stranger = Client(company.world.base, "tr_test_wrong")
    error = refusal(lambda: stranger.get("jobs"))
    stranger.http.close()
    assert (error.status, error.code) == (401, "key_invalid")
    assert error.body["status"] == 401
