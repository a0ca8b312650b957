"""The driver of a site whose hosts and meters are reached over one HTTP management interface (the simulated site's BMC)."""

from __future__ import annotations

from typing import Any

import httpx

from agent.hosts import HostError, HostReading, Poll

TIMEOUT_S = 5.0


def reading(row: dict[str, Any]) -> HostReading:
    return HostReading(
        row["name"],
        bool(row["alive"]),
        row["power_state"],
        tuple(int(w) for w in row["limits_w"]),
        int(row["measured_w"]),
        tuple(row["gpu_errors"]),
    )


class Bmc:
    """Raises HostError with the code of the interface (`host_unreachable`, `host_off`, ...) or `no_answer`."""

    def __init__(self, url: str) -> None:
        self.url = url
        # Loopback or a management network: never through a proxy of the environment.
        self.client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False)
        self.version = 0
        self.boot = ""

    async def call(self, method: str, path: str, body: Any = None) -> httpx.Response:
        try:
            response = await self.client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise HostError(f"no_answer: {self.url}{path}: {type(error).__name__}") from error
        if response.status_code >= 400:
            try:
                problem = response.json()["error"]
                text = f"{problem['code']}: {problem['message']}"
            except (ValueError, KeyError, TypeError):
                text = f"http_{response.status_code}"
            raise HostError(text)
        return response

    async def inventory(self) -> dict[str, list[dict[str, Any]]]:
        found = (await self.call("GET", "/inventory")).json()
        return {"hosts": found["hosts"], "miners": found["miners"]}

    async def poll(self) -> Poll:
        since = self.version
        state = (await self.call("GET", f"/state?since={since}")).json()
        if since and (state["boot"] != self.boot or state["version"] < since):
            # The interface was restarted and counts anew: look at everything again.
            since = 0
            state = (await self.call("GET", "/state?since=0")).json()
        self.version, self.boot = state["version"], state["boot"]
        meters = [(str(node), int(watts), float(at)) for node, watts, at in state["meters"]]
        return Poll(float(state["at"]), [reading(row) for row in state["hosts"]], meters, state["work"], since == 0)

    async def read(self, name: str) -> HostReading:
        return reading((await self.call("GET", f"/hosts/{name}")).json())

    async def set_limits(self, name: str, limits_w: list[int]) -> tuple[int, ...]:
        answer = (await self.call("POST", f"/hosts/{name}/limits", {"limits_w": limits_w})).json()
        return tuple(int(w) for w in answer["limits_w"])

    async def power(self, name: str, *, on: bool) -> None:
        await self.call("POST", f"/hosts/{name}/power", {"state": "on" if on else "off"})

    async def attach(self, name: str, key: str, gpus: tuple[int, ...], utilisation: float) -> None:
        body = {"id": key, "gpus": list(gpus), "utilisation": utilisation}
        await self.call("POST", f"/hosts/{name}/workloads", body)

    async def detach(self, name: str, key: str) -> None:
        await self.call("DELETE", f"/hosts/{name}/workloads/{key}")

    async def close(self) -> None:
        await self.client.aclose()
