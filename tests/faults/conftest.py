"""The company really running, on free ports and servers of its own, so that its parts can be taken away."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from sandbox import processes
from sandbox.client import Client, RefusedError, wait_for
from sandbox.servers import Cluster, children, ports
from sandbox.site.spec import host, miner, node
from sandbox.smoke.world import PlantedSite, Tenant, World

OURS = ("DATABASE_", "REDIS_", "STRIPE_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "DJANGO_SETTINGS_MODULE")
WAIT_S = 90  # nothing here takes so long on an idle machine; how long it takes is not what is tested


@dataclass
class Company:
    """Its servers (`cluster`), its processes (`world`), and who uses it."""

    cluster: Cluster
    world: World
    staff: Any
    operator: Tenant
    customer: Tenant
    site: PlantedSite

    def wait(self, what: str, done: Any) -> Any:
        def look() -> Any:
            self.world.supervisor.watch()
            return done()

        return wait_for(what, look, seconds=WAIT_S, every=0.3)

    def submit(self, script: str, **spec: Any) -> str:
        body = {"contract": self.customer.contracts["h100"], "command": ["/bin/sh", "-c", script], "gpus": 1, **spec}
        return str(self.customer.client.post("jobs", {"checkpoint_grace_s": 2, **body})["id"])

    def job(self, job: str) -> dict[str, Any]:
        return dict(self.customer.client.get(f"jobs/{job}"))

    def log(self, job: str) -> str:
        return str(self.customer.client.get(f"jobs/{job}/logs")["data"])

    def until(self, job: str, *states: str) -> dict[str, Any]:
        return dict(self.wait(f"{job} to be {states}", lambda: (j := self.job(job))["state"] in states and j))

    def moves(self, job: str) -> list[str]:
        return [e["to"] for e in self.customer.client.get(f"jobs/{job}/events", limit=100)["data"]]


def refusal(act: Any) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        act()
    return caught.value


def book(api: Client, listing: str, gpus: int) -> str:
    quote = api.post("quotes", {"listing": listing, "kind": "on_demand", "gpu_count": gpus})
    return str(api.post("contracts", quote["accept"]["body"])["id"])


def small_site() -> dict[str, Any]:
    """One host of 8 H100 and two miners, with watts enough for all of them."""
    h100 = (60, 1100, 4600, 200, 700)
    return {
        "name": "small",
        "seed": 1,
        "miner_port": ports.free_port(),
        "nodes": [
            node("site", None, "site", 60_000, fixed_w=500, gpu=1250, miner=1050),
            node("pdu-1", "site", "pdu", 40_000),
        ],
        "hosts": [host("h001", "pdu-1", "H100-SXM", 8, h100)],
        "miners": [miner(i, "S21", "pdu-1", 0, 77) for i in range(2)],
    }


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    others = [child.pid for child in psutil.Process().children()]  # of other tests in this process: not ours to end
    children.adopt_orphans()
    house = tmp_path_factory.mktemp("house")
    at = processes.Ports.free()
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.upper().startswith(OURS):
                patch.delenv(name)
        with Cluster() as cluster:
            env = processes.environment(at, house, cluster.environment())
            world = World(house, env, at, lambda _: None)
            world.supervisor.rows.pop("worker-2")  # one is enough here, and starts sooner
            try:
                world.start()
                yield open_for_business(cluster, world)
            finally:
                world.supervisor.stop_all(spare=[*others, *cluster.pids()])
                gc.collect()  # with the people of `World`, who leave without closing their connections


def open_for_business(cluster: Cluster, world: World) -> Company:
    """An operator with one site and a listing, a customer with a card and a contract."""
    operator = world.tenant("Basin Power", is_operator=True, is_customer=False)
    spec = small_site()
    for row in spec["miners"]:
        row["address"] = row["address"].replace(":0", f":{spec['miner_port']}")
    prices = {"on_demand_price": 180_000_000}  # dear: a minute of GPUs is worth an invoice
    site = world.plant(operator, spec, runtime="process", prices={"H100-SXM": prices})
    customer = world.tenant("Aurora Models")
    world.card(customer)
    customer.contracts["h100"] = book(customer.client, site.listings["H100-SXM"], 8)
    return Company(cluster, world, world.staff(), operator, customer, site)
