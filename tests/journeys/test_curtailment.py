"""Journey 5: curtailment. The grid calls a site down: machines go first, in seconds, then spot, then flexible contracts after their
notice and with their checkpoint grace; firm work never. Every step is on record, and what was not delivered is not charged.

The yard draws 48 kW: machines 24, two hosts of eight GPUs with spot on one, and half firm, half flexible on the other.
"""

from datetime import datetime, timedelta

import pytest

from marketplace import tasks
from marketplace.services import curtailment_notices
from tests.faults.yard import Yard
from tests.journeys.people import Member

pytestmark = pytest.mark.django_db
SECOND, MINUTE = timedelta(seconds=1), timedelta(minutes=1)
NOTICE, GRACE, SAVES, CALLED = 60 * SECOND, 30 * SECOND, 20 * SECOND, 10 * MINUTE


class Site(Yard):
    """Its operator, and a customer with a job under a contract of each kind."""

    def __init__(self):
        super().__init__()
        self.saves = SAVES
        self.turn(3)
        self.operator = Member(self, self.site.organization)
        self.customer = Member(self, self.contract.organization)
        self.node = self.operator.get(f"sites/{self.site.public_id}/power")["nodes"][0]["id"]
        offer = self.customer.get("listings", kind="flexible")["data"][0]["id"]
        terms = {"flexible_notice_s": NOTICE.seconds, "flexible_hours_per_month": 10}
        self.operator.patch(f"listings/{offer}", terms)
        ends = (self.now + timedelta(hours=6)).replace(second=0).isoformat()
        book = self.customer.book
        self.contracts = {
            "reserved": book(offer, "reserved", 4, ends_at=ends)["id"],
            "flexible": book(offer, "flexible", 4, ends_at=ends)["id"],
            "spot": book(offer, "spot", 8, limit_price=3_000_000)["id"],
        }
        self.jobs = {kind: self.start(kind, replicas=2 if kind == "spot" else 1) for kind in self.contracts}
        self.until(lambda: set(self.states().values()) == {"running"}, seconds=120)

    def start(self, kind, replicas):
        gang = {
            "contract": self.contracts[kind], "command": ["train"], "gpus": 4, "replicas": replicas, "vcpu_milli": 4000,
            "checkpoint_grace_s": GRACE.seconds,
        }  # fmt: skip
        return self.customer.post("jobs", gang)["id"]

    def call(self, cap_w):
        window = {"starts_at": self.now.isoformat(), "ends_at": (self.now + CALLED).isoformat()}
        return self.operator.post("curtailments", {"node": self.node, "cap_w": cap_w, "reference": "ERS-7", **window})

    def states(self):
        return {kind: self.customer.get(f"jobs/{job}")["state"] for kind, job in self.jobs.items()}

    def moves(self, kind):
        """{state: when first} of its job."""
        events = self.customer.get(f"jobs/{self.jobs[kind]}/events")["data"]
        return {e["to"]: datetime.fromisoformat(e["at"]) for e in reversed(events)}

    def awake(self):
        return self.operator.get(f"sites/{self.site.public_id}/power")["miners"]["awake"]

    def billed(self):
        """{kind: (kind of line, milli-GPU-seconds)} of an invoice made now."""
        lines = {line["contract"]: line for line in self.customer.get("invoices/preview")["lines"]}
        found = {kind: lines.get(contract) for kind, contract in self.contracts.items()}
        return {kind: line and (line["kind"], line["milli_gpu_seconds"]) for kind, line in found.items()}

    def notices(self, kind):
        events = self.customer.get(f"contracts/{self.contracts[kind]}/events")["data"]
        return [e["reason"].split()[2].strip(":") for e in events if e["reason"].startswith("notice: ")]

    def settled(self, call):
        """A minute a turn: nothing but hashing changes any more."""
        for _ in range(40):
            self.now += MINUTE
            self.turn()
            if (state := self.operator.get(f"curtailments/{call['id']}")["state"]) not in {"active", "restoring"}:
                return state
        raise AssertionError(state)


@pytest.fixture
def site():
    return Site()


def test_machines_then_spot_then_flexible_and_firm_never(site, mailoutbox):
    calm, awake_before = site.physics.true_w[0], site.awake()
    began, call = site.now, site.call(cap_w=15_800)
    site.turn()
    assert site.awake() == 0, "asked at once"
    site.turn()
    assert site.physics.true_w[0] < calm - 20_000, "in seconds"
    assert site.states() == {"reserved": "running", "flexible": "running", "spot": "preempting"}
    site.until(lambda: site.states()["spot"] == "requeued", seconds=GRACE.seconds)
    assert site.now < began + NOTICE
    assert site.states()["flexible"] == "running", "its notice"
    site.until(lambda: site.states()["flexible"] == "requeued", seconds=(NOTICE + GRACE).seconds)
    spot, flexible = site.moves("spot"), site.moves("flexible")
    assert began <= spot["preempting"] < spot["requeued"] < began + NOTICE <= flexible["preempting"]
    for left in (spot, flexible):  # it saves its state in peace
        assert SAVES <= left["requeued"] - left["preempting"] <= GRACE
    assert list(site.moves("reserved")) == ["running", "placed", "queued"], "firm work is neither moved nor held lower"
    site.turn(3)
    assert site.physics.true_w[0] <= 15_800

    so_far = site.operator.get(f"curtailments/{call['id']}/report", step_s=10)
    assert [(j["kind"], j["what"]) for j in so_far["jobs"]] == [("spot", "left"), ("flexible", "left")]
    assert (so_far["finished"], so_far["misses"]) == (False, [])
    assert 0 < so_far["under_after_s"] < NOTICE.seconds
    assert so_far["seconds"][-1]["delivered_w"] > 30_000

    site.now = began + CALLED
    site.until(lambda: set(site.states().values()) == {"running"}, seconds=60)
    assert site.settled(call) == "completed"
    assert site.awake() >= awake_before
    report = site.operator.get(f"curtailments/{call['id']}/report", step_s=60)
    assert report["finished"]
    assert report["delivered_wh"] == pytest.approx(sum(row["delivered_w"] for row in report["seconds"]) / 60, rel=0.02)

    billed = site.billed()  # both hold four GPUs from the same second on
    assert (billed["reserved"][0], billed["flexible"][0]) == ("commitment", "commitment")
    assert billed["reserved"][1] - billed["flexible"][1] == 4_000 * CALLED.seconds
    again = datetime.fromisoformat(site.customer.get("placements")["data"][-1]["running_at"])
    assert billed["spot"] == ("usage", 8_000 * int((site.now - again).total_seconds())), (
        "without its notice it was free"
    )
    assert site.notices("flexible") == ["announced", "over"]
    assert (site.notices("spot"), site.notices("reserved")) == (["over"], []), "spot is told when it was taken"
    tasks.drain_outbox(topic=curtailment_notices.NOTICE)
    assert [mail.subject.partition(" at ")[0] for mail in mailoutbox] == ["Grid call", "Over: grid call"]
    assert "10 minutes are not billed" in mailoutbox[1].body


def test_what_machines_can_give_alone_costs_no_job_anything(site):
    call = site.call(cap_w=30_000)
    site.until(lambda: site.physics.true_w[0] <= 30_000, seconds=30)
    site.turn(15)  # longer than anybody's notice
    assert set(site.states().values()) == {"running"}
    assert all(list(site.moves(kind)) == ["running", "placed", "queued"] for kind in site.jobs)
    assert site.operator.get(f"curtailments/{call['id']}/report")["jobs"] == []
    site.operator.post(f"curtailments/{call['id']}/cancel", status=200)
    billed = site.billed()
    assert billed["flexible"] == billed["reserved"]
    assert site.notices("flexible") == ["announced"]
