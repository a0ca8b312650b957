"""What Stripe tells us: verified, kept once, then handled by asking Stripe what is true now.

An event's content is never acted on. Order, repetition and loss do not matter: a handler fetches the object again and our
state moves forward only; the sweep (billing.reconcile) finds what was never delivered.
"""

from __future__ import annotations

import logging
from datetime import datetime

from django.db.models import F
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.utils import timezone
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from billing import events, gateway, payments, payouts
from billing.invoices import open_case
from billing.models import BillingAccount, BillingCase, OperatorAccount, StripeEvent
from marketplace.errors import MarketError

log = logging.getLogger(__name__)

MAX_BODY = 1 << 20
MAX_ATTEMPTS = 8
# One family of events per thing: invoices for money in, setup for cards, accounts for operators.
INVOICE_EVENTS = frozenset(
    {"invoice.paid", "invoice.payment_failed", "invoice.payment_action_required", "invoice.voided"}
)
CARD_ADDED = frozenset({"checkout.session.completed", "setup_intent.succeeded"})
CARD_EVENTS = frozenset({"payment_method.attached", "payment_method.detached", "customer.updated"})
ACCOUNT_EVENTS = frozenset({"account.updated", "v2.core.account[configuration.recipient].capability_status_updated"})


@csrf_exempt
@require_POST
def stripe_webhook(request: HttpRequest) -> HttpResponse:
    """The receiver's view: 200 once the event is kept, 400 for a wrong signature or body. Route it, unauthenticated."""
    try:
        fresh = receive(request.body, request.headers.get("Stripe-Signature"), now=timezone.now())
    except MarketError as error:
        problem = {"title": error.kind.title, "status": error.kind.status, "code": error.code, "detail": error.detail}
        return JsonResponse(problem, status=error.kind.status, content_type="application/problem+json")
    return JsonResponse({"received": True, "new": fresh})


def receive(body: bytes, signature: str | None, *, now: datetime) -> bool:
    """Verify and keep one event by its raw body; returns whether it was new. MarketError `signature_invalid` (400)."""
    if len(body) > MAX_BODY:
        raise MarketError("invalid_request", f"A webhook body of {len(body)} bytes is more than {MAX_BODY}.")
    try:
        event = gateway.verify(body, signature)
    except gateway.SignatureInvalid as error:
        raise MarketError("signature_invalid", str(error)) from error
    except (ValueError, KeyError, AttributeError) as error:
        raise MarketError("invalid_request", "The body is no Stripe event.") from error
    return events.keep(event, now=now)


def handle(event_id: int, *, now: datetime) -> None:
    """Bring our rows in line with what the event's object is now. Raises gateway.GatewayError: the outbox repeats it."""
    event = StripeEvent.objects.get(pk=event_id)
    if event.handled_at is not None:
        return
    StripeEvent.objects.filter(pk=event_id).update(attempts=F("attempts") + 1)
    try:
        _dispatch(event, now)
    except Exception as error:
        StripeEvent.objects.filter(pk=event_id).update(last_error=f"{type(error).__name__}: {error}"[:200])
        if event.attempts + 1 >= MAX_ATTEMPTS:
            open_case(BillingCase.Kind.RECONCILE, event.event_id, f"{event.type}: {error}", now=now)
        raise
    StripeEvent.objects.filter(pk=event_id, handled_at=None).update(handled_at=now, last_error="")


def _dispatch(event: StripeEvent, now: datetime) -> None:
    if event.type in INVOICE_EVENTS or event.type.startswith("invoice_payment."):
        payments.sync_invoice(event.object_id, now=now)
    elif event.type in CARD_ADDED or event.type in CARD_EVENTS:
        account = BillingAccount.objects.filter(stripe_customer=gateway.event_customer(event.object_id)).first()
        if account is None:
            return
        if event.type in CARD_ADDED:
            payments.use_newest_card(account.organization, now=now)
        else:
            payments.refresh_card(account.organization, now=now)
    elif event.type in ACCOUNT_EVENTS:
        operator = OperatorAccount.objects.filter(stripe_account=event.object_id).first()
        if operator is not None:
            payouts.refresh_recipient(operator.organization, now=now)
