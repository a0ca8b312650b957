"""A world with one operator and one customer, and the Stripe sandbox as a process of its own."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count
from typing import Any

import pytest
from django.db.models import Sum

from billing import invoices, ledger, payments, reconcile, usage
from billing.gateway import wire
from billing.models import BillingAccount, Invoice, InvoiceLine
from marketplace import outbox
from marketplace.models import Contract, Host, Organization, OutboxMessage, Placement, PlacementEvent
from marketplace.services import ai_revenue
from tests import factories
from tests.factories import NOW

_rank = count(1)
SECRETS = ["whsec_new", "whsec_old"]


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


@dataclass
class World:
    operator: Organization
    customer: Organization
    listing: Any
    host: Host
    contract: Contract

    def ran(
        self,
        start: float,
        seconds: float | None,
        *,
        gpus: int = 1,
        gpu_milli: int = 1000,
        contract: Contract | None = None,
        events: list[tuple[float, str, str]] = (),
        **fields: Any,
    ) -> Placement:
        """A placement that ran from NOW + start for `seconds` (None: still runs); `events` are (at, state, reason)."""
        job = factories.job(contract or self.contract, gpus=gpus, gpu_milli=gpu_milli, state="running")
        ended = None if seconds is None else after(start + seconds)
        columns = {"running_at": after(start), "granted_at": after(start), "attempt": next(_rank)}
        if ended is not None:
            columns |= {"release_requested_at": ended, "finished_at": ended, "exit_code": 0}
        state = "released" if ended is not None else "running"
        wanted = fields.pop("state", state)
        made = factories.placement(job, self.host, list(range(gpus)), state="released", **columns | fields)
        Placement.objects.filter(pk=made.pk).update(state=wanted)
        steps = [(start, "running", ""), *events]
        if ended is not None and wanted == state:
            steps.append((start + seconds, state, ""))
        before = "granted"
        for at, to, reason in steps:
            PlacementEvent.objects.create(
                placement=made, at=after(at), actor="agent", from_state=before, to_state=to, reason=reason
            )
            before = to
        made.refresh_from_db()
        return made

    def close(self, seconds: float, *, now: float | None = None, kind: str = "interim") -> Invoice | None:
        return invoices.close_period(self.customer, after(seconds), kind, now=after(seconds if now is None else now))

    @property
    def account(self) -> BillingAccount:
        return invoices.account_of(self.customer, now=NOW)


@pytest.fixture
def world(db: None) -> World:
    return make_world()


def make_world(**contract: Any) -> World:
    operator = factories.organization("Basin Power", is_operator=True, is_customer=False)
    customer = factories.organization("Aurora Models", standing="no_card")
    factories.member(customer)
    factories.member(operator)
    site = factories.site(operator)
    host = factories.host(site)
    listing = factories.listing(site, hosts=[host])
    return World(operator, customer, listing, host, factories.contract(listing, customer, **contract))


@pytest.fixture(autouse=True)
def quiet_outbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handlers fail here on purpose by the dozen; a pretty traceback of each costs half a second."""
    monkeypatch.setattr(logging.getLogger("marketplace.outbox"), "disabled", True)


# --- Stripe


@dataclass
class Stripe:
    """Handle on the sandbox's process; `control` posts to its `/_sandbox` switches."""

    url: str

    def control(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/_sandbox/{path}", data=data, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    def objects(self, kind: str) -> list[dict[str, Any]]:
        return self.control(f"objects/{kind}", method="GET")["data"]

    def api(self, path: str, **fields: str) -> dict[str, Any]:
        from urllib.parse import urlencode

        request = urllib.request.Request(
            f"{self.url}{path}",
            data=urlencode(fields).encode(),
            headers={"Authorization": "Bearer sk_test_tailrace_sandbox"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    def attach_card(self, customer: str, token: str = "pm_card_visa") -> str:
        return self.api(f"/v1/payment_methods/{token}/attach", customer=customer)["id"]


@pytest.fixture(scope="session")
def _stripe_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stripe]:
    state = tmp_path_factory.mktemp("stripe") / "state.sqlite"
    process = subprocess.Popen(
        [sys.executable, "-m", "sandbox.stripe", "--port", "0", "--state", str(state)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    assert "http://" in first, first
    yield Stripe("http://" + first.split("http://")[1].strip())
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=10)
    process.stdout.close()


@pytest.fixture
def stripe_api(
    _stripe_process: Stripe, settings: Any, transactional_db: None, monkeypatch: pytest.MonkeyPatch
) -> Stripe:
    """A forgetful sandbox, and a client that does not repeat by itself: our own repetition is what must be right."""
    monkeypatch.setattr(wire, "RETRIES", 0)
    wire._client.cache_clear()
    settings.STRIPE_BASE_URL = _stripe_process.url
    settings.STRIPE_WEBHOOK_SECRETS = SECRETS
    _stripe_process.control("faults", method="DELETE")
    _stripe_process.control("reset")
    _stripe_process.control("faults", {"settle_s": 0})
    return _stripe_process


@pytest.fixture
def paying(stripe_api: Stripe) -> World:
    """The world with a card on file."""
    made = make_world()
    add_card(stripe_api, made)
    return made


def add_card(stripe_api: Stripe, world: World, token: str = "pm_card_visa") -> str:
    customer = payments.ensure_customer(world.account)
    card = stripe_api.attach_card(customer, token)
    payments.use_newest_card(world.customer, now=NOW)
    return card


def drain(topic: str | None = None) -> int:
    """Handle every message that is due, with the handlers of billing.tasks."""
    import billing.tasks  # noqa: F401 - registers the handlers

    OutboxMessage.objects.exclude(topic__startswith="billing.").delete()
    OutboxMessage.objects.update(available_at=NOW)
    return outbox.drain(topic=topic)


def unclaim() -> None:
    """Time passes: what failed is due again."""
    OutboxMessage.objects.update(claimed_until=None, available_at=NOW)


def assert_invariants() -> None:
    """What is always true, whatever happened."""
    assert reconcile.invariants() == dict.fromkeys(reconcile.invariants(), 0)
    assert all(total == 0 for total in ledger.trial_balance().values())


BY_THE_CLOCK = (
    "usage",
    "commitment",
    "credit",
    "held_lower",
)  # what goes beyond a month's commitment is known at its end


def assert_known_at_once(world: World, *made: Invoice) -> None:
    """The site's P&L says what these invoices, which are all of its customers', give the operator: each line to the cent."""
    rows = InvoiceLine.objects.filter(invoice__in=made, kind__in=BY_THE_CLOCK)
    given = rows.aggregate(sum=Sum("operator_minor", default=0))["sum"]
    site, through = world.host.site, max(invoice.period_end for invoice in made)
    placements, contracts = Placement.objects.filter(site=site), Contract.objects.filter(site=site)
    flows = ai_revenue.flows(placements, contracts, NOW, through)
    told = ai_revenue.earned(flows, NOW, through).get("USD", 0)
    assert abs(told - given * 10_000) <= 10_000 * rows.count(), f"{told / 1e6} USD by the clock, {given / 100} billed"


def metered(world: World, at: float) -> int:
    return usage.meter(world.customer.pk, through=after(at), now=after(at))
