"""A screening service on loopback: `python -m sandbox.screening --port P [--key K] [--wait S]`.

    POST /screenings        Idempotency-Key, {"reference", "kind", "subject": {...}}
    GET  /screenings/{id}
    both answer {"id", "reference", "kind", "status": "pending" | "clear" | "match", "matches": [...]}
    POST /control           {"fault": "" | "down" | "error" | "garbled" | "hang", "wait": S, "forget": true}
    GET  /control           {"questions": N, "asked": N}

Names decide, wherever in the subject they stand: one with `denied` in it is found on a list, one with `slow` is looked at for ten
times as long; the rest is clear. An answer is `pending` for `--wait` seconds (0: none). The same Idempotency-Key is the same
question; with another body it is refused with 422. Without the right key, 401.

It is ours, and stands for no product: our client (marketplace.services.screening.remote) is what it checks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sandbox.site.httpd import Drop, Httpd, Request

FAULTS = ("", "down", "error", "garbled", "hang")
SLOW = 10


@dataclass
class Asked:
    id: str
    body: dict[str, Any]
    until: float


def names(value: Any) -> Iterator[str]:
    """Every text in the subject."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from names(part)


class Service:
    def __init__(
        self, port: int = 0, *, key: str = "", wait: float = 0.0, clock: Callable[[], float] = time.time
    ) -> None:
        self.key, self.wait, self.clock = key, wait, clock
        self.fault = ""
        self.asked = 0
        self.by_key: dict[str, Asked] = {}
        self.by_id: dict[str, Asked] = {}
        self.httpd = Httpd(self.handle, port)

    def control(self, body: dict[str, Any]) -> None:
        """Raises ValueError for an unknown fault."""
        fault = body.get("fault", self.fault)
        if fault not in FAULTS:
            raise ValueError(f"unknown fault {fault!r}; known: {', '.join(f for f in FAULTS if f)}")
        self.fault, self.wait = fault, float(body.get("wait", self.wait))
        if body.get("forget"):
            self.by_key.clear()
            self.by_id.clear()

    async def handle(self, request: Request) -> tuple[int, Any]:
        if request.path == "/control":
            if request.method == "POST":
                self.control(request.json())
            return 200, {"questions": len(self.by_key), "asked": self.asked}
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return 401, {"error": "the key is wrong"}
        self.asked += 1
        match self.fault:
            case "down":
                raise Drop
            case "error":
                return 503, {"error": "the service is being repaired"}
            case "garbled":
                return 200, {"state": "fine"}
            case "hang":
                await asyncio.sleep(60)
        match [request.method, *(p for p in request.path.split("/") if p)]:
            case ["POST", "screenings"]:
                return self.ask(request)
            case ["GET", "screenings", name] if name in self.by_id:
                return 200, self.answer(self.by_id[name])
        return 404, {"error": "there is no such screening"}

    def ask(self, request: Request) -> tuple[int, Any]:
        body = request.json()
        key = request.headers.get("idempotency-key", "")
        if not key or not {"reference", "kind", "subject"} <= set(body):
            return 400, {"error": "Idempotency-Key, reference, kind and subject are needed"}
        found = self.by_key.get(key)
        if found is not None and found.body != body:
            return 422, {"error": "another question had this key"}
        if found is None:
            slow = any("slow" in name.lower() for name in names(body["subject"]))
            found = Asked(f"scn_{len(self.by_key) + 1}", body, self.clock() + self.wait * (SLOW if slow else 1))
            self.by_key[key] = self.by_id[found.id] = found
        return 201, self.answer(found)

    def answer(self, asked: Asked) -> dict[str, Any]:
        head = {"id": asked.id, "reference": asked.body["reference"], "kind": asked.body["kind"]}
        if self.clock() < asked.until:
            return {**head, "status": "pending", "matches": []}
        denied = [n for n in names(asked.body["subject"]) if "denied" in n.lower()]
        matches = [{"name": n, "list": "Sandbox denied parties", "score": 97} for n in denied]
        return {**head, "status": "match" if matches else "clear", "matches": matches}


async def serve(service: Service) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await service.httpd.start()
    print(f"screening: {service.httpd.url}", flush=True)
    await stop.wait()
    await service.httpd.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sandbox.screening", description="a screening service on loopback")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--key", default="", help="asked for as a bearer token; empty: none is")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds for which an answer is pending")
    args = parser.parse_args()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve(Service(args.port, key=args.key, wait=args.wait)))
    except OSError as error:
        print(f"screening: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
