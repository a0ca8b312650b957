"""Two targets, one suite: our fake as a real process on a free loopback port, and real Stripe where a test key is given.

`pytest -m stripe_sandbox` with STRIPE_TEST_KEY runs the same contract against Stripe. STRIPE_TEST_RECIPIENT may name an
onboarded recipient account, as onboarding cannot be clicked through there.
"""

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import httpx
import pytest
import stripe

KEY = "sk_test_tailrace_contract"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(slots=True)
class Sandbox:
    """The running fake and how to reach it."""

    url: str
    state: Path
    process: subprocess.Popen[str]
    arguments: tuple[str, ...] = ()

    def client(self, key: str = KEY, **options: Any) -> stripe.StripeClient:
        options = {"max_network_retries": 0, **options}
        return stripe.StripeClient(key, base_addresses={"api": self.url}, **options)

    def control(self, name: str, data: Any = None, method: str | None = None) -> dict[str, Any]:
        method = method or ("GET" if data is None else "POST")
        response = httpx.request(method, f"{self.url}/_sandbox/{name}", json=data, timeout=20)
        response.raise_for_status()
        return response.json()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=10)
        self.process.stdout.close()


def start_sandbox(state: Path, *arguments: str, port: int = 0) -> Sandbox:
    command = [sys.executable, "-m", "sandbox.stripe", "--port", str(port), "--state", str(state), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    line = process.stdout.readline()
    assert line.startswith("stripe sandbox on "), line
    return Sandbox(line.split()[-1], state, process, arguments)


@pytest.fixture(scope="session")
def shared_sandbox(tmp_path_factory) -> Iterator[Sandbox]:
    sandbox = start_sandbox(tmp_path_factory.mktemp("stripe") / "state.db")
    yield sandbox
    sandbox.stop()


@pytest.fixture
def sandbox(shared_sandbox: Sandbox) -> Iterator[Sandbox]:
    """The shared process, with every fault and clock taken back afterwards."""
    yield shared_sandbox
    shared_sandbox.control("faults", method="DELETE")
    shared_sandbox.control("faults", {"settle_s": 0, "api_keys": []})
    shared_sandbox.control("clock", {"now": None})


@pytest.fixture(params=["fake", pytest.param("stripe", marks=pytest.mark.stripe_sandbox)])
def target(request) -> str:
    if request.param == "stripe" and not os.environ.get("STRIPE_TEST_KEY"):
        pytest.skip("STRIPE_TEST_KEY is not set: real Stripe was not asked")
    return request.param


@pytest.fixture
def api(target: str, request) -> stripe.StripeClient:
    """The official client against either target; a test that takes it states what Stripe does, not what we do."""
    if target == "fake":
        return request.getfixturevalue("sandbox").client()
    key = os.environ["STRIPE_TEST_KEY"]
    assert key.startswith(("sk_test_", "rk_test_")), "the contract suite never runs against live money"
    return stripe.StripeClient(key, max_network_retries=2)


@pytest.fixture
def customer(api) -> stripe.Customer:
    return api.v1.customers.create({"email": "ops@example.com", "name": "Contract", "metadata": {"suite": "contract"}})


@pytest.fixture
def card(api) -> Callable[..., stripe.PaymentMethod]:
    """card(customer, "pm_card_...") attaches a published test card and makes it the default."""

    def attach(customer: stripe.Customer, alias: str = "pm_card_bypassPending") -> stripe.PaymentMethod:
        method = api.v1.payment_methods.attach(alias, {"customer": customer.id})
        api.v1.customers.update(customer.id, {"invoice_settings": {"default_payment_method": method.id}})
        return method

    return attach


@pytest.fixture
def open_invoice(api) -> Callable[..., stripe.Invoice]:
    """open_invoice(customer, 1000, 234) -> finalized, as the product mirrors: no auto advance, pending items excluded."""

    def build(customer: stripe.Customer, *amounts: int) -> stripe.Invoice:
        draft = api.v1.invoices.create(
            {
                "customer": customer.id,
                "currency": "usd",
                "auto_advance": False,
                "collection_method": "charge_automatically",
                "pending_invoice_items_behavior": "exclude",
                "metadata": {"tailrace_invoice": uuid.uuid4().hex},
            }
        )
        lines = [{"amount": a, "description": f"GPU hours {i}"} for i, a in enumerate(amounts)]
        api.v1.invoices.add_lines(draft.id, {"lines": lines})
        return api.v1.invoices.finalize_invoice(draft.id, {"auto_advance": False})

    return build


@pytest.fixture
def recipient(target: str, api) -> str:
    """An account that may receive transfers."""
    if target == "stripe":
        account = os.environ.get("STRIPE_TEST_RECIPIENT")
        return account or pytest.skip("STRIPE_TEST_RECIPIENT is not set: onboarding cannot be clicked through here")
    account = new_recipient(api)
    httpx.post(onboarding_link(api, account.id).url, data={"result": "complete", "registered_name": "Hashrate GmbH"})
    return account.id


def new_recipient(api: stripe.StripeClient) -> Any:
    return api.v2.core.accounts.create(
        {
            "contact_email": "operator@example.com",
            "display_name": "Hashrate GmbH",
            "dashboard": "express",
            "identity": {"country": "us", "entity_type": "company"},
            "configuration": {
                "recipient": {"capabilities": {"stripe_balance": {"stripe_transfers": {"requested": True}}}}
            },
            "defaults": {"responsibilities": {"fees_collector": "application", "losses_collector": "application"}},
            "include": ["configuration.recipient", "requirements"],
        }
    )


def onboarding_link(api: stripe.StripeClient, account: str) -> Any:
    urls = {"refresh_url": "https://example.com/refresh", "return_url": "https://example.com/return"}
    return api.v2.core.account_links.create(
        {"account": account, "use_case": {"type": "account_onboarding", "account_onboarding": urls}}
    )


@dataclass(slots=True)
class Receiver:
    """A webhook receiver on loopback: keeps (body, signature), answers what `answers` says next, else 200."""

    url: str
    got: "Queue[tuple[bytes, str]]"
    answers: list[int]

    def take(self, count: int, *, timeout: float = 20.0) -> list[tuple[bytes, str]]:
        return [self.got.get(timeout=timeout) for _ in range(count)]


@contextlib.contextmanager
def receiving() -> Iterator[Receiver]:
    got: Queue[tuple[bytes, str]] = Queue()
    answers: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.put((body, self.headers.get("Stripe-Signature", "")))
            self.send_response(answers.pop(0) if answers else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield Receiver(f"http://127.0.0.1:{server.server_address[1]}/hook", got, answers)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made
