"""The process for what waits: agents' long poll and log follow; nothing else. An ASGI application of its own.

    uvicorn marketplace.stream:application --port 8001

It holds no database connection while it waits: it waits on Redis (`site:<id>`), and polls each second when Redis is away.
Beyond MAX_WAITING waiting requests it answers 503 with Retry-After.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "marketplace.settings")
import django

django.setup()

import redis.asyncio  # noqa: E402
from django.conf import settings  # noqa: E402
from django.db import close_old_connections  # noqa: E402
from django.utils import timezone  # noqa: E402
from rest_framework.utils.encoders import JSONEncoder  # noqa: E402

from marketplace import ids  # noqa: E402
from marketplace.api import agent as agent_api  # noqa: E402
from marketplace.api.auth import AgentAuthentication, KeyAuthentication  # noqa: E402
from marketplace.api.errors import translate  # noqa: E402
from marketplace.errors import MarketError  # noqa: E402
from marketplace.models import Agent, Job, Placement, Site  # noqa: E402
from marketplace.services import agents, job_views  # noqa: E402

MAX_WAITING = 2000
POLL_S = 1.0
FOLLOW_S = 600.0
_pool = ThreadPoolExecutor(max_workers=int(os.environ.get("STREAM_THREADS", "8")), thread_name_prefix="stream")
_waiting = 0

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class _Headers:
    """Just enough of a request for the API's own authentication classes."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.headers = {k.decode("latin1").title(): v.decode("latin1") for k, v in scope["headers"]}
        self.path = scope["path"]
        self.method = scope["method"]


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Run ORM code; its connection is given up when the process comes back."""

    def run() -> Any:
        close_old_connections()
        return function(*args)

    return await asyncio.get_running_loop().run_in_executor(_pool, run)


class Bell:
    """One Redis subscription for all who wait: `site:<id>` wakes those that wait for that site."""

    def __init__(self) -> None:
        self.events: dict[int, set[asyncio.Event]] = {}
        self.task: asyncio.Task[None] | None = None
        self.alive = False

    @contextlib.asynccontextmanager
    async def waiting_for(self, site_id: int) -> Any:
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._listen())
        event = asyncio.Event()
        self.events.setdefault(site_id, set()).add(event)
        try:
            yield event
        finally:
            self.events[site_id].discard(event)

    async def _listen(self) -> None:
        while True:
            try:
                client = redis.asyncio.from_url(settings.REDIS_URL)
                async with client.pubsub() as channel:
                    await channel.psubscribe("site:*")
                    self.alive = True
                    async for message in channel.listen():
                        name = message["channel"].decode() if message["type"] == "pmessage" else ""
                        if name.startswith("site:"):
                            for event in self.events.get(int(name[5:]), ()):
                                event.set()
            except (redis.exceptions.RedisError, OSError):
                self.alive = False
                await asyncio.sleep(POLL_S)


bell = Bell()


async def application(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
        return
    if scope["type"] != "http":
        return
    try:
        await _route(scope, receive, send)
    except Exception as error:
        known = translate(error)
        if known is None:
            await answer(
                send, 500, {"code": "internal", "title": "Something broke here; it is in our log", "status": 500}
            )
            raise
        retry = [(b"retry-after", b"1")] if known.kind.retry == "after" else []
        body = {
            "code": known.code,
            "title": known.kind.title,
            "status": known.kind.status,
            "detail": known.detail,
            "retry": known.kind.retry,
        }
        await answer(send, known.kind.status, body, retry)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _route(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    global _waiting
    where, method = scope["path"].rstrip("/"), scope["method"]
    if where == "/api/v1/health":
        await answer(send, 200, {"status": "ok", "waiting": _waiting, "redis": bell.alive})
        return
    if _waiting >= MAX_WAITING:
        await answer(
            send, 503, {"code": "service_unavailable", "title": "Too many wait here"}, [(b"retry-after", b"5")]
        )
        return
    _waiting += 1
    try:
        if where == "/api/v1/agent/sync" and method == "POST":
            await answer(send, 200, await sync(_Headers(scope), await read_json(scope, receive), receive))
        elif where.startswith("/api/v1/jobs/") and where.endswith("/logs/follow") and method == "GET":
            await follow(_Headers(scope), where.split("/")[4], send)
        else:
            raise MarketError("not_found", where)
    finally:
        _waiting -= 1


async def read_json(scope: dict[str, Any], receive: Receive) -> Any:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > agent_api.MAX_BODY:
            raise MarketError("invalid_request", f"The body is larger than {agent_api.MAX_BODY} bytes.")
    try:
        if any(k == b"content-encoding" and v == b"gzip" for k, v in scope["headers"]):
            body = agent_api.unpacked(body)
        return json.loads(body)
    except (ValueError, OSError, EOFError) as error:
        raise MarketError("invalid_request", f"The body is no JSON: {error}") from error


async def answer(send: Send, status: int, body: Any, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    raw = json.dumps(body, cls=JSONEncoder).encode()
    kind = b"application/json" if status < 400 else b"application/problem+json"
    await send(
        {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *(headers or [])]}
    )
    await send({"type": "http.response.body", "body": raw})


async def sync(request: _Headers, body: Any, receive: Receive) -> dict[str, Any]:
    """Take the report in; answer at once when something is new, else when it becomes so, else after `wait_s`.

    An agent that hangs up gives its place here to another.
    """
    agent, report, first = await in_thread(_take_in, request, body)
    if report["wait_s"] <= 0 or first["generation"] != report["known_generation"]:
        return first
    deadline = asyncio.get_running_loop().time() + report["wait_s"]
    async with bell.waiting_for(agent.site_id) as rung:
        left_us = asyncio.create_task(_hung_up(receive, rung))
        try:
            while (left := deadline - asyncio.get_running_loop().time()) > 0 and not left_us.done():
                step = left if bell.alive else min(left, POLL_S)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(rung.wait(), timeout=min(step, 5.0))
                rung.clear()
                if await in_thread(_generation, agent.site_id) != report["known_generation"]:
                    break
        finally:
            left_us.cancel()
    return await in_thread(_desired, agent, report, first["inventory_wanted"])


async def _hung_up(receive: Receive, rung: asyncio.Event) -> None:
    """Ends when the peer is gone, and wakes who waits for it."""
    while (await receive())["type"] != "http.disconnect":
        pass
    rung.set()


def _take_in(request: _Headers, body: Any) -> tuple[Agent, dict[str, Any], dict[str, Any]]:
    found = AgentAuthentication().authenticate(request)  # type: ignore[arg-type]
    if found is None:
        raise MarketError("not_authenticated", "Send the agent's key as a bearer token.")
    agent, now = found[0], timezone.now()
    report = agent_api.checked(body)
    wanted = agents.observe(agent, report, now=now)
    return agent, report, agents.desired(agent, report, now=now, inventory_wanted=wanted)


def _desired(agent: Agent, report: dict[str, Any], inventory_wanted: bool) -> dict[str, Any]:
    return agents.desired(agent, report, now=timezone.now(), inventory_wanted=inventory_wanted)


def _generation(site_id: int) -> int:
    return Site.objects.values_list("desired_generation", flat=True).get(pk=site_id)


async def follow(request: _Headers, public_id: str, send: Send) -> None:
    """Server-sent events with new output of rank 0 until the placement is over."""
    job = await in_thread(_job, request, public_id)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    offset, loop = 0, asyncio.get_running_loop()
    deadline = loop.time() + FOLLOW_S
    while loop.time() < deadline:
        found = await in_thread(_newest, job, offset)
        offset = found["next"]
        if found["data"]:
            event = json.dumps({"offset": found["offset"], "data": found["data"]})
            await send(
                {"type": "http.response.body", "body": f"id: {offset}\ndata: {event}\n\n".encode(), "more_body": True}
            )
        if found["complete"]:
            break
        await asyncio.sleep(POLL_S)
    await send({"type": "http.response.body", "body": b"event: end\ndata: {}\n\n"})


def _job(request: _Headers, public_id: str) -> Job:
    found = KeyAuthentication().authenticate(request)  # type: ignore[arg-type]
    if found is None:
        raise MarketError("not_authenticated", "Send an API key as a bearer token.")
    actor = found[1]
    if not actor.may("jobs:read"):
        raise MarketError("scope_missing", "The key needs the scope jobs:read.")
    job: Job | None = Job.objects.all().visible_to(actor).filter(pk=ids.decode("job", public_id) or 0).first()
    if job is None:
        raise MarketError("not_found", public_id)
    return job


def _newest(job: Job, offset: int) -> dict[str, Any]:
    placement = Placement.objects.filter(job=job).order_by("-attempt", "rank").first()
    return job_views.logs(placement, "stdout", offset)
