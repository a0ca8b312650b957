"""The process for what waits, as an ASGI application on real PostgreSQL and Redis: at once on news, else on the bell, else late."""

import asyncio
import gzip
import json
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from django.core.cache import cache
from django.db import connection

from marketplace import stream
from marketplace.models import Agent, LogChunk, Placement, Site
from marketplace.services import placements
from tests import factories as f

pytestmark = pytest.mark.django_db(transaction=True)
LONG_S = 20


@pytest.fixture(autouse=True)
def connections():
    """The connections of the process's threads go with the test."""
    yield
    count = len(stream._pool._threads)
    barrier = threading.Barrier(max(count, 1))

    def close():
        barrier.wait(30)
        connection.close()

    for closed in [stream._pool.submit(close) for _ in range(count)]:
        closed.result(30)


@pytest.fixture
def site():
    return f.site()


class Call:
    """One request, in flight; `gone` hangs up."""

    def __init__(self, path, *, token="", body=None, method="POST", packed=False):
        raw = b"" if body is None else json.dumps(body, default=str).encode()
        headers = [(b"authorization", f"Bearer {token}".encode())] if token else []
        if packed:
            raw, headers = gzip.compress(raw), [*headers, (b"content-encoding", b"gzip")]
        self.scope = {"type": "http", "path": path, "method": method, "headers": headers, "query_string": b""}
        self.incoming = asyncio.Queue()
        self.incoming.put_nowait({"type": "http.request", "body": raw, "more_body": False})
        self.status, self.headers, self.body = 0, {}, b""

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.body += message["body"]

    async def __call__(self):
        await stream.application(self.scope, self.incoming.get, self.send)
        return self

    def hang_up(self):
        self.incoming.put_nowait({"type": "http.disconnect"})

    @property
    def json(self):
        return json.loads(self.body)


def report(wait_s=0, sequence=1, **fields):
    return {"boot": "b1", "sequence": sequence, "agent_time": datetime.now(UTC), "wait_s": wait_s, **fields}


def sync(token, **fields):
    return Call("/api/v1/agent/sync", token=token, body=report(**fields))


def run(act):
    """The coroutine's answer, the seconds it took; the bell's listener is ended."""

    async def whole():
        start = time.monotonic()
        answer = await act
        if stream.bell.task:
            stream.bell.task.cancel()
            await asyncio.gather(stream.bell.task, return_exceptions=True)
        stream.bell = stream.Bell()  # a bell belongs to one event loop
        return answer, time.monotonic() - start

    return asyncio.run(whole())


def change(site):
    """Something new shall be at the site: as services do it, in a transaction, with the nudge after its commit."""
    from django.db import transaction

    with transaction.atomic():
        placements.touch_sites([site.pk])


def test_news_is_answered_at_once(site):
    _, token = f.agent(site)
    Site.objects.update(desired_generation=7)
    answer, seconds = run(sync(token, wait_s=LONG_S, known_generation=6)())
    assert (answer.status, answer.json["generation"]) == (200, 7)
    assert answer.json["acknowledged_sequence"] == 1
    assert seconds < LONG_S / 2
    agent = Agent.objects.get()
    assert agent.last_sync_at is not None
    assert agent.lease_until > agent.last_sync_at + timedelta(minutes=10)


def test_without_news_it_waits_its_time_and_then_says_what_is(site):
    _, token = f.agent(site)
    answer, seconds = run(sync(token, wait_s=0.6, known_generation=0)())
    assert (answer.status, answer.json["generation"]) == (200, 0)
    assert seconds >= 0.6


async def until(done):
    for _ in range(3000):
        if done():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


async def waiting_then(site, call, *, act):
    task = asyncio.create_task(call())
    await until(lambda: stream.bell.events.get(site.pk))
    await asyncio.sleep(0.3)
    assert not task.done()
    await stream.in_thread(act)
    return await task


def test_a_change_wakes_who_waits(site):
    _, token = f.agent(site)
    answer, seconds = run(waiting_then(site, sync(token, wait_s=LONG_S, known_generation=0), act=lambda: change(site)))
    assert answer.json["generation"] == 1
    assert seconds < LONG_S / 2


def test_a_change_elsewhere_wakes_nobody_here(site):
    _, token = f.agent(site)
    other = f.site()
    answer, seconds = run(waiting_then(site, sync(token, wait_s=1.0, known_generation=0), act=lambda: change(other)))
    assert (answer.json["generation"], seconds >= 1.0) == (0, True)


def test_without_redis_it_looks_each_second(site, settings):
    settings.REDIS_URL = "redis://127.0.0.1:1/0"
    _, token = f.agent(site)
    bump = lambda: Site.objects.filter(pk=site.pk).update(desired_generation=5)  # noqa: E731
    answer, seconds = run(waiting_then(site, sync(token, wait_s=LONG_S, known_generation=0), act=bump))
    assert answer.json["generation"] == 5
    assert seconds < LONG_S / 2
    assert not stream.bell.alive


def test_who_hangs_up_waits_no_longer(site):
    _, token = f.agent(site)

    async def act():
        call = sync(token, wait_s=LONG_S, known_generation=0)
        task = asyncio.create_task(call())
        await until(lambda: stream.bell.events.get(site.pk))
        assert stream._waiting == 1
        call.hang_up()
        await task
        return stream._waiting

    left, seconds = run(act())
    assert left == 0
    assert seconds < LONG_S / 2


def test_an_inventory_is_asked_for_also_after_a_wait(site):
    _, token = f.agent(site)
    answer, _ = run(sync(token, wait_s=0.2, known_generation=0)())
    assert answer.json["inventory_wanted"] is True
    f.host(site)
    answer, _ = run(sync(token, wait_s=0, sequence=2)())
    assert answer.json["inventory_wanted"] is False


def test_refusals_are_problem_documents(site):
    _, token = f.agent(site)
    cases = [
        (sync(""), 401, "not_authenticated"),
        (sync("agk_unknown"), 401, "key_invalid"),
        (Call("/api/v1/agent/sync", token=token, body={}), 400, "invalid_request"),
        (Call("/api/v1/nothing", token=token), 404, "not_found"),
        (Call("/api/v1/agent/sync", token=token, body={**report(), "agent_time": "2020-01-01T00:00:00Z"}), 409, "clock_skew"),
    ]  # fmt: skip
    broken = Call("/api/v1/agent/sync", token=token, packed=True)
    broken.scope["headers"].append((b"content-encoding", b"gzip"))
    broken.incoming.get_nowait()
    broken.incoming.put_nowait({"type": "http.request", "body": b"no gzip", "more_body": False})
    for call, status, code in [*cases, (broken, 400, "invalid_request")]:
        answer, _ = run(call())
        assert (answer.status, answer.json["code"]) == (status, code)
        assert answer.headers[b"content-type"] == b"application/problem+json"
    assert Agent.objects.get().last_sync_at is None


def test_a_packed_report_is_taken(site):
    _, token = f.agent(site)
    answer, _ = run(Call("/api/v1/agent/sync", token=token, body=report(), packed=True)())
    assert answer.status == 200


def test_beyond_the_cap_it_says_come_back(site, monkeypatch):
    _, token = f.agent(site)
    monkeypatch.setattr(stream, "MAX_WAITING", 0)
    answer, _ = run(sync(token)())
    assert (answer.status, answer.json["code"]) == (503, "service_unavailable")
    assert answer.headers[b"retry-after"] == b"5"


def test_a_log_is_followed_to_its_end(site):
    host = f.host(site)
    organization = f.organization()
    job = f.job(f.contract(f.listing(site, hosts=[host]), organization))
    placement = f.placement(job, host, state="running")
    LogChunk.objects.create(placement=placement, stream="stdout", offset=0, size=6, data="first\n")
    _, token = f.key(organization, ["jobs:read"])
    _, foreign = f.key(f.organization(), ["jobs:read"])
    path = f"/api/v1/jobs/{job.public_id}/logs/follow"

    def more():
        LogChunk.objects.create(placement=placement, stream="stdout", offset=6, size=5, data="last\n")
        Placement.objects.update(state="released")

    async def act():
        call = Call(path, token=token, method="GET")
        task = asyncio.create_task(call())
        await until(lambda: b"first" in call.body)
        await stream.in_thread(more)
        return await task

    answer, _ = run(act())
    assert answer.headers[b"content-type"] == b"text/event-stream"
    events = [json.loads(line[6:]) for line in answer.body.decode().splitlines() if line.startswith('data: {"')]
    assert [(e["offset"], e["data"]) for e in events] == [(0, "first\n"), (6, "last\n")]
    assert answer.body.endswith(b"event: end\ndata: {}\n\n")
    assert run(Call(path, token=foreign, method="GET")())[0].status == 404
    assert run(Call(path, method="GET")())[0].status == 401
    _, blind = f.key(organization, ["quotes:read"])
    assert run(Call(path, token=blind, method="GET")())[0].json["code"] == "scope_missing"


def test_health_asks_nothing_of_anybody():
    cache.clear()
    answer, _ = run(Call("/api/v1/health", method="GET")())
    assert answer.json["status"] == "ok"
