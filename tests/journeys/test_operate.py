"""Journey 7: operate. A site by CSV, its agent enrolled with the one command, an offer, a host drained under a running job, maintenance
with its notice to the tenant, and the power chart.

Web, stream, the site with its machines, and the agent are real, over sockets; the workers' turns are taken by `until`.
"""

import json
import os
import subprocess
import sys
from datetime import timedelta

import httpx
import pytest
from django.db import connection
from django.utils import timezone

import billing.tasks  # noqa: F401 - with the next line: the handlers of all messages
import scheduler.tasks  # noqa: F401
from marketplace import ids, tasks
from marketplace.services import feeds
from sandbox.client import Client, Person, RefusedError, wait_for
from sandbox.demo.config import agent_config
from sandbox.processes import ROOT
from sandbox.servers import ports
from sandbox.site.spec import host, miner, node
from sandbox.smoke.world import nodes_csv, rows_csv
from scheduler import site_loop
from tests import factories as f
from tests.faults.yard import PRICES

pytestmark = pytest.mark.django_db(transaction=True)
WAIT_S = 120  # nothing here takes so long on an idle machine; how long it takes is not what is tested
H100 = (60, 1100, 4600, 200, 700)


def hall():
    """Two hosts of eight GPUs and four machines, with watts for all of them at once."""
    port = ports.free_port()
    miners = [miner(i, "S21", "pdu-1", port, 77) for i in range(4)]
    return {
        "name": "hall", "seed": 1, "miner_port": port,
        "nodes": [
            node("site", None, "site", 80_000, fixed_w=500, gpu=1250, miner=1050),
            node("pdu-1", "site", "pdu", 60_000),
        ],
        "hosts": [host(f"h{i}", "pdu-1", "H100-SXM", 8, H100) for i in (1, 2)],
        "miners": miners,
    }  # fmt: skip


class Grounds:
    """What stands beside the web, each a process of its own; ended with the test."""

    def __init__(self, folder, web):
        self.folder, self.web, self.spec = folder, web, hall()
        self.running, self.people = [], []
        self.site_url, self.stream_url = (f"http://{ports.LOOPBACK}:{ports.free_port()}" for _ in range(2))
        self.site = None  # its id

    def command(self, *words, **environment):
        """A command of ours, to its end."""
        return subprocess.run(
            [sys.executable, "-m", *words], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
            timeout=WAIT_S, check=False,
        )  # fmt: skip

    def start(self, *words, answers=None, **environment):
        with (self.folder / f"{words[0]}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *words], cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=log
            )
        self.running.append(process)
        if answers is not None:
            wait_for(words[0], lambda: answered(answers), seconds=WAIT_S, every=0.1)

    def meets(self, person):
        self.people.append(person)
        return person

    def end(self):
        for person in self.people:
            person.http.close()
        for process in reversed(self.running):
            process.terminate()
        for process in self.running:
            process.wait(WAIT_S)

    def until(self, what, done):
        """The workers' turns, until it is so."""

        def turn():
            tasks.market_clock()
            tasks.drain_outbox()
            site_loop.run(ids.decode("sit", self.site), now=timezone.now())
            return done()

        return wait_for(what, turn, seconds=WAIT_S, every=0.2)


def answered(url):
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def grounds(live_server, settings, tmp_path):
    made = Grounds(tmp_path, live_server.url)
    settings.PUBLIC_URL, settings.STREAM_URL = live_server.url, made.stream_url
    here = connection.settings_dict
    database = "postgresql://{USER}:{PASSWORD}@{HOST}:{PORT}/{NAME}".format(**here)
    for kind, value in PRICES.items():
        feeds.store(kind, value, source="test", observed_at=now(), now=now())
    try:
        address = made.stream_url.rpartition("/")[2].split(":")
        serve = ("uvicorn", "marketplace.stream:application", "--host", address[0], "--port", address[1])
        made.start(*serve, answers=f"{made.stream_url}/api/v1/health", DATABASE_URL=database)
        yield made
    finally:
        made.end()


def refused(act):
    with pytest.raises(RefusedError) as caught:
        act()
    return caught.value


def now():
    """To the minute."""
    return timezone.now().replace(second=0, microsecond=0)


def book(api, listing, kind, **more):
    quote = api.post("quotes", {"listing": listing, "kind": kind, "gpu_count": 8, **more})
    return api.post("contracts", quote["accept"]["body"])["id"]


def window(days):
    starts = now() + timedelta(days=days)
    return {"starts_at": starts.isoformat(), "ends_at": (starts + timedelta(hours=4)).isoformat()}


def test_from_an_empty_account_to_a_site_that_works(grounds, mailoutbox):
    boss = grounds.meets(Person(grounds.web)).sign_up("boss@caprock.example", "correct-horse-battery")
    boss.post("organizations", {"name": "Caprock", "livemode": False, "is_operator": True, "is_customer": False})

    # --- the site, by CSV: a dry run first, in which a mistake is named and nothing is kept
    root, *below = grounds.spec["nodes"]
    site = boss.post(
        "sites",
        {
            "name": "West Hall", "region": "us-tx", "contract_power_w": root["cap_w"], "fixed_w": root["fixed_w"],
            "pue_permille": 1250, "miner_pue_permille": 1050, "metering": "meter",
        },
    )["id"]  # fmt: skip
    grounds.site = site
    tables = {
        "power_nodes": nodes_csv(below), "hosts": rows_csv(grounds.spec["hosts"]), "miners": rows_csv(grounds.spec["miners"]),
    }  # fmt: skip
    boss.post(f"sites/{site}/import", {"kind": "power_nodes", "csv": tables["power_nodes"]})
    wrong = {"kind": "hosts", "csv": tables["hosts"].replace("pdu-1", "pdu-9", 1)}
    report = boss.post(f"sites/{site}/import?dry_run=true", wrong)
    assert [(e["line"], e["column"], e["value"]) for e in report["errors"]] == [(2, "power_node", "pdu-9")]
    for kind in ("hosts", "miners"):
        assert boss.post(f"sites/{site}/import?dry_run=true", {"kind": kind, "csv": tables[kind]})["error_count"] == 0
        assert boss.get(kind, site=site)["data"] == [], "a dry run keeps nothing"
        boss.post(f"sites/{site}/import", {"kind": kind, "csv": tables[kind]})
    hosts = {row["name"]: row["id"] for row in boss.get("hosts", site=site)["data"]}
    assert (sorted(hosts), len(boss.get("miners", site=site)["data"])) == (["h1", "h2"], 4)

    # --- the agent, with one command
    spec, config, state = (grounds.folder / name for name in ("spec.json", "agent.json", "state"))
    spec.write_text(json.dumps(grounds.spec))
    quick = {"report_s": 1, "miner_poll_s": 1, "beat_s": 1}
    config.write_text(json.dumps({**agent_config("west", grounds.site_url, runtime="virtual"), **quick}))
    port = grounds.site_url.rpartition(":")[2]
    grounds.start(
        "sandbox.site", "--spec", str(spec), "--port", port, "--speed", "20", answers=f"{grounds.site_url}/meters"
    )
    token = boss.post(f"sites/{site}/enrolment-tokens")
    enrol = (
        "agent",
        "enrol",
        "--url",
        token["url"],
        "--token",
        token["token"],
        "--state",
        str(state),
        "--config",
        str(config),
    )
    done = grounds.command(*enrol)
    assert (done.returncode, "at West Hall" in done.stdout) == (0, True), done.stderr
    grounds.start("agent", "run", "--state", str(state))
    grounds.until("a word of the agent", lambda: boss.get(f"sites/{site}/agents")["data"][0]["last_sync_at"])
    grounds.until("readings", lambda: all(n["measured_w"] for n in boss.get(f"sites/{site}/power")["nodes"]))
    grounds.until("beats", lambda: all(h["beat_at"] for h in boss.get("hosts", site=site)["data"]))

    # --- an offer, and somebody who takes it
    terms = {"site": site, "title": "H100 at West Hall", "on_demand_price": 2_500_000, "reserved_price": 2_000_000}
    empty = boss.post("listings", {**terms, "gpu_model": "H100-SXM"})["id"]
    assert refused(lambda: boss.post(f"listings/{empty}/publish")).code == "listing_incomplete"
    offer = boss.post("listings", {**terms, "gpu_model": "H100-SXM", "hosts": sorted(hosts.values())})["id"]
    assert boss.post(f"listings/{offer}/publish")["state"] == "published"
    lab = f.organization("Ada Labs", livemode=False)
    f.member(lab, person=f.user("ada@example.org"))
    ada = grounds.meets(Client(grounds.web, f.key(lab)[1]))
    (found,) = ada.get("listings", gpu_model="H100-SXM", count=8, level="host")["data"]
    assert (found["id"], found["stock"]["gpus"]) == (offer, 8)
    contract = book(ada, offer, "on_demand")
    train = {"contract": contract, "command": ["train", "600", "5"], "gpus": 8, "checkpoint_grace_s": 20}
    job = ada.post("jobs", train)["id"]

    def runs(*, attempt):
        shown = ada.get(f"jobs/{job}")
        return shown["state"] == "running" and shown["attempt"] == attempt and shown["placements"][0]["host"]

    first = grounds.until("the job to run", lambda: runs(attempt=1))

    # --- a host is drained: its job saves its state and goes on elsewhere
    drained = hosts[first]
    asked = boss.post(f"hosts/{drained}/drain", {"reason": "a fan", "evict": True})
    assert asked["state"] in {"draining", "maintenance"}
    second = grounds.until("the job to go on", lambda: runs(attempt=2))
    assert second != first
    left = ada.get(f"jobs/{job}")["placements"][-1]
    assert (left["host"], left["exit_code"]) == (first, 143)
    log = grounds.until("its log", lambda: ada.get(f"jobs/{job}/logs", placement=left["id"])["data"])
    assert log == f"virtual run of train 600 5 on {first}\ncheckpoint written\n"
    state = lambda: boss.get(f"hosts/{drained}")  # noqa: E731
    grounds.until("it to be empty and in maintenance", lambda: state()["state"] == "maintenance")
    idle = state()
    assert (idle["state_reason"], idle["gpu_free"]) == ("a fan", [1000] * 8)
    assert boss.post(f"hosts/{drained}/undrain")["state"] == "active"

    # --- maintenance under a firm contract: a week's notice, and who is touched reads it
    firm = book(ada, offer, "reserved", ends_at=(now() + timedelta(days=20)).isoformat())
    body = {"site": site, "scope": "hosts", "hosts": [drained], "category": "hardware", "text": "New fans."}
    soon = boss.post("maintenances", {**body, **window(days=3)})["id"]
    early = refused(lambda: boss.post(f"maintenances/{soon}/announce"))
    assert (early.status, early.code, early.body["contracts"]) == (409, "notice_too_short", [firm])
    work = boss.post("maintenances", {**body, **window(days=9)})["id"]
    impact = boss.get(f"maintenances/{work}/impact")
    assert [(c["contract"], c["gpus"]) for c in impact["contracts"]] == [(firm, 8)]
    assert ada.get("maintenances")["data"] == []
    assert boss.post(f"maintenances/{work}/announce")["state"] == "announced"
    (told,) = ada.get("maintenances")["data"]
    assert (told["id"], told["text"], [c["contract"] for c in told["contracts"]]) == (work, "New fans.", [firm])
    assert [m["id"] for m in ada.get(f"listings/{offer}")["maintenance"]] == [work]
    grounds.until("the mail", lambda: [m for m in mailoutbox if m.to == ["ada@example.org"] and "New fans." in m.body])

    # --- the chart: what the site drew, by use, and the page that draws it
    def hashes():
        return boss.get(f"sites/{site}/minutes")["data"][-1]["hashing_w"] > 4 * 2000

    grounds.until("the machines to hash", hashes)
    chart = boss.get(f"sites/{site}/minutes")
    last = chart["data"][-1]
    assert min(last["firm_w"], last["idle_gpu_w"], last["hashing_w"], last["overhead_w"]) > 0
    assert last["metered_w"] < last["cap_w"] == 80_000
    assert chart["sums"]["ai_mwh"] > 0
    assert [row["start"] for row in chart["data"]] == sorted({row["start"] for row in chart["data"]})
    page = boss.http.get("/operator/").text
    assert "<svg" in page
    assert "Hashing" in page
    truth = httpx.get(f"{grounds.site_url}/truth").json()
    assert (truth["trips"], truth["over_instants"]) == ([], [])
