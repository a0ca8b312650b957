"""A small OpenADR 3 VTN on loopback: `python -m sandbox.vtn --port P [--secret S]`.

    POST /auth/token        client credentials (form) -> {"access_token", "token_type", "expires_in"}
    GET  /programs, /events?programID=&skip=&limit=, /events/{id}
    POST /reports           201, or 409 for a reportName that it has
    POST /control           {"program": {...}} | {"event": {...}} | {"delete": "id"} | {"fault": "" | "down" | "error" | "garbled"}
                            | {"expire": true}
    GET  /control           {"reports": [...], "tokens": N, "polls": N}

It speaks what OpenADR 3.0.1 says of those resources, and of `targets` also 3.1. It is ours: our VEN (marketplace.services.grid) is what
it checks. With `--secret` every resource wants a token, and the client is `ven`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from typing import Any
from urllib.parse import parse_qs
from uuid import uuid4

from sandbox.site.httpd import Drop, Httpd, Request

FAULTS = ("", "down", "error", "garbled")


class Vtn:
    def __init__(self, port: int = 0, *, secret: str = "") -> None:
        self.secret, self.fault = secret, ""
        self.programs: dict[str, dict[str, Any]] = {}
        self.events: dict[str, dict[str, Any]] = {}
        self.reports: list[dict[str, Any]] = []
        self.tokens: set[str] = set()
        self.given = self.polls = 0
        self.httpd = Httpd(self.handle, port)

    def control(self, body: dict[str, Any]) -> None:
        """Raises ValueError for an unknown fault, KeyError for an object without an id."""
        if body.get("fault", "") not in FAULTS:
            raise ValueError(f"unknown fault {body['fault']!r}; known: {', '.join(f for f in FAULTS if f)}")
        self.fault = body.get("fault", self.fault)
        for kind, kept in (("program", self.programs), ("event", self.events)):
            if kind in body:
                kept[body[kind]["id"]] = body[kind]
        self.events.pop(body.get("delete", ""), None)
        if body.get("expire"):
            self.tokens.clear()

    async def handle(self, request: Request) -> tuple[int, Any]:
        if request.path == "/control":
            if request.method == "POST":
                self.control(request.json())
            return 200, {"reports": self.reports, "tokens": self.given, "polls": self.polls}
        if self.fault == "down":
            raise Drop
        if self.fault == "error":
            return 503, {"title": "the VTN is being repaired", "status": 503}
        if request.path == "/auth/token":
            return self.token(request)
        if self.secret and request.headers.get("authorization", "").removeprefix("Bearer ") not in self.tokens:
            return 401, {"title": "Unauthorized", "status": 401}
        match [request.method, *(p for p in request.path.split("/") if p)]:
            case ["GET", "programs"]:
                return 200, self.page(list(self.programs.values()), request)
            case ["GET", "events"]:
                self.polls += 1
                if self.fault == "garbled":
                    return 200, {"events": "many"}
                of = request.query.get("programID")
                return 200, self.page([e for e in self.events.values() if of in {None, e.get("programID")}], request)
            case ["GET", "events", name] if name in self.events:
                return 200, self.events[name]
            case ["POST", "reports"]:
                return self.report(request.json())
        return 404, {"title": "Not Found", "status": 404}

    def token(self, request: Request) -> tuple[int, Any]:
        given = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
        wanted = {"grant_type": "client_credentials", "client_id": "ven", "client_secret": self.secret}
        if given != wanted:
            return 400, {"error": "invalid_client"}
        token = uuid4().hex
        self.tokens.add(token)
        self.given += 1
        return 200, {"access_token": token, "token_type": "Bearer", "expires_in": 3600}

    def page(self, rows: list[dict[str, Any]], request: Request) -> list[dict[str, Any]]:
        skip, limit = int(request.query.get("skip", "0")), int(request.query.get("limit", "50"))
        return rows[skip : skip + limit]

    def report(self, body: dict[str, Any]) -> tuple[int, Any]:
        if missing := {"programID", "eventID", "clientName", "resources"} - set(body):
            return 400, {"title": f"missing: {', '.join(sorted(missing))}", "status": 400}
        if any(r["reportName"] == body.get("reportName") for r in self.reports):
            return 409, {"title": "there is such a report", "status": 409}
        self.reports.append(body)
        return 201, {"id": str(len(self.reports)), **body}


async def serve(vtn: Vtn) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await vtn.httpd.start()
    print(f"vtn: {vtn.httpd.url}", flush=True)
    await stop.wait()
    await vtn.httpd.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sandbox.vtn", description="an OpenADR 3 VTN on loopback")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--secret", default="", help="of the client `ven`; empty: no token is asked for")
    args = parser.parse_args()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve(Vtn(args.port, secret=args.secret)))
    except OSError as error:
        print(f"vtn: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
