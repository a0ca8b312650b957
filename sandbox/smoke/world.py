"""Brings up the company on free ports, and makes sites and tenants in it as people would: sign-up, API, CSV, Stripe's pages."""

import csv
import io
import json
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox import processes
from sandbox.client import Client, Person, add_card, fill_in, wait_for
from sandbox.processes import Ports, SiteFiles
from sandbox.site.spec import Spec
from sandbox.supervisor import Supervisor, run_once

ALL_SCOPES = [
    "organization:read", "listings:read", "listings:write", "sites:read", "sites:write", "quotes:read", "quotes:write",
    "contracts:read", "contracts:write", "jobs:read", "jobs:write", "billing:read", "billing:write", "usage:read",
    "payouts:read", "payouts:write", "power:read", "power:write",
]  # fmt: skip


@dataclass
class Tenant:
    name: str
    id: str
    client: Client
    contracts: dict[str, str] = field(default_factory=dict)  # what for -> id


@dataclass
class PlantedSite:
    id: str
    files: SiteFiles
    number: int
    spec: Spec
    listings: dict[str, str] = field(default_factory=dict)  # GPU model ("" for a mixed pool) -> id


class World:
    """The running company and how to reach it. `quiet` receives the supervisor's sentences."""

    def __init__(self, house: Path, env: dict[str, str], at: Ports, quiet: Any) -> None:
        self.house, self.at, self.base = house, at, at.url("web")
        self.env = env
        self.supervisor = Supervisor(
            processes.table(at, house, env, traffic=False), env, house / "logs", say=quiet, restart=True
        )
        self.sites: list[PlantedSite] = []

    def start(self) -> None:
        owner = self.env | {"DATABASE_URL": self.env["DATABASE_OWNER_URL"]}
        run_once("migrate", processes.migrate(), owner, self.house / "migrate.log")
        self.supervisor.check()
        self.supervisor.start_all()

    def staff(self) -> Person:
        """Our own person, made as on any installation: `manage.py createsuperuser`."""
        password = secrets.token_urlsafe(12)
        env = self.env | {"DJANGO_SUPERUSER_EMAIL": "staff@tailrace.example", "DJANGO_SUPERUSER_PASSWORD": password}
        command = (sys.executable, "manage.py", "createsuperuser", "--no-input")
        run_once("createsuperuser", command, env, self.house / "staff.log")
        return Person(self.base).sign_in("staff@tailrace.example", password)

    def tenant(self, name: str, **kind: Any) -> Tenant:
        """Sign up, create a test-mode organization, issue a key."""
        person = Person(self.base).sign_up(
            f"{name.replace(' ', '.').lower()}@tenants.example", secrets.token_urlsafe(12)
        )
        organization = person.post("organizations", {"name": name, "livemode": False, **kind})
        return Tenant(name, organization["id"], Client(self.base, person.key("smoke", ALL_SCOPES)))

    def card(self, tenant: Tenant) -> None:
        """Add a card on Stripe's page; done when its webhook has put the account in good standing."""
        add_card(tenant.client)
        wait_for(
            f"the card of {tenant.name}", lambda: tenant.client.get("payment-methods")["standing"] == "good", seconds=30
        )

    def onboard(self, operator: Tenant) -> None:
        url = operator.client.post("payouts/account")["url"]
        fill_in(url, {"registered_name": operator.name, "result": "done"})
        wait_for(
            "the operator's onboarding", lambda: operator.client.get("payouts/account")["transfers_enabled"], seconds=30
        )

    # --- sites
    def plant(self, operator: Tenant, spec: Spec, *, runtime: str, prices: dict[str, dict[str, int]]) -> PlantedSite:
        """A site by API and CSV, its simulated physics and its agent started, its listings published.

        `prices`: GPU model -> prices; the key "" makes one mixed pool of all hosts.
        """
        number = len(self.sites)
        files = SiteFiles(spec["name"], self.house / "sites" / spec["name"])
        files.folder.mkdir(parents=True)
        root, *below = spec["nodes"]
        api = operator.client
        site = api.post(
            "sites",
            {
                "name": f"Site {spec['name']}", "region": "us-tx", "contract_power_w": root["cap_w"], "fixed_w": root["fixed_w"],
                "pue_permille": root["overhead_gpu_permille"], "miner_pue_permille": root["overhead_miner_permille"],
            },
        )["id"]  # fmt: skip
        for kind, text in (
            ("power_nodes", nodes_csv(below)),
            ("hosts", rows_csv(spec["hosts"])),
            ("miners", rows_csv(spec["miners"])),
        ):
            self._import(api, site, kind, text)
        planted = PlantedSite(site, files, number, spec)
        self._run(planted, api.post(f"sites/{site}/enrolment-tokens")["token"], runtime)
        self.sites.append(planted)
        hosts: dict[str, list[str]] = {}
        for row in api.every("hosts", site=site):
            hosts.setdefault("" if "" in prices else row["gpu_model"], []).append(row["id"])
        for model, terms in prices.items():
            body = {"site": site, "title": f"{model or 'Mixed GPUs'} at {spec['name']}", "hosts": hosts[model], **terms}
            listing = api.post("listings", {**body, "gpu_model": model or None})["id"]
            api.post(f"listings/{listing}/publish")
            planted.listings[model] = listing
        return planted

    def _import(self, api: Client, site: str, kind: str, text: str) -> None:
        dry = api.post(f"sites/{site}/import?dry_run=true", {"kind": kind, "csv": text})
        assert not dry["error_count"], dry["errors"][:3]
        api.post(f"sites/{site}/import", {"kind": kind, "csv": text})

    def _run(self, planted: PlantedSite, token: str, runtime: str) -> None:
        files = planted.files
        files.spec.write_text(json.dumps(planted.spec))
        from sandbox.demo.config import agent_config

        files.config.write_text(
            json.dumps(agent_config(files.name, self.at.url("site", planted.number), runtime=runtime))
        )
        files.token.write_text(token)
        for row in processes.site_rows(self.at, files, planted.number):
            self.supervisor.rows[row.name] = row
            if row.prepare:
                log = self.house / "logs" / f"{row.name}.prepare.log"
                run_once(f"preparing {row.name}", row.prepare, self.env | row.environment, log)
            self.supervisor.start(row.name)
            self.supervisor.await_ready(row.name)

    def truth(self, planted: PlantedSite) -> Any:
        """What the site's own physics recorded."""
        import httpx

        return httpx.get(self.at.url("site", planted.number) + "/truth", timeout=30).json()


def nodes_csv(nodes: list[dict[str, Any]]) -> str:
    rows = [
        {**{k: v for k, v in n.items() if k != "metered"}, "metering": "meter" if n["metered"] else "firmware"}
        for n in nodes
    ]
    return rows_csv(rows)


def rows_csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    for row in rows:
        writer.writerow({k: _cell(v) for k, v in row.items()})
    return out.getvalue()


def _cell(value: Any) -> Any:
    """Lists as the import reads them: numbers with blanks, ladders as name:watts:GH/s."""
    if not isinstance(value, list):
        return str(value).lower() if isinstance(value, bool) else value
    return " ".join(":".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)
