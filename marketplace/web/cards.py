"""The payment method: the card on file, adding one on Stripe's own page, and Stripe's portal. No card number passes through us."""

from django.conf import settings
from django.contrib import messages
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import render
from django.urls import path, reverse
from django.utils import timezone

from billing import gateway, invoices, payments
from marketplace.errors import MarketError
from marketplace.models import BillingStanding, Organization
from marketplace.web.base import actor_of, back_to, done, failed, page

RETURN_KEY = "after_card"  # in the session: where the customer was going when the card was missing


def _organization(request: HttpRequest) -> Organization:
    found: Organization = Organization.objects.owned_by(actor_of(request).organization_id).get()
    return found


@page(GET="billing:read", POST="billing:write")
def card(request: HttpRequest) -> HttpResponse:
    organization = _organization(request)
    now = timezone.now()
    if request.method == "POST":
        return _add(request, organization)
    if request.GET.get("added") and actor_of(request).may("billing:write"):
        return _added(request, organization)
    if wanted := back_to(request, ""):
        request.session[RETURN_KEY] = wanted
    account = invoices.account_of(organization, now=now)
    standing = BillingStanding.objects.owned_by(organization.pk).first()
    context = {"account": account, "standing": standing.state if standing else "no_card", "organization": organization}
    return render(request, "card.html", context)


def _add(request: HttpRequest, organization: Organization) -> HttpResponse:
    here = settings.PUBLIC_URL + reverse("web:card")
    try:
        url = payments.start_card_setup(
            organization, success_url=f"{here}?added=1", cancel_url=here, now=timezone.now()
        )  # fmt: skip
    except MarketError as error:
        return failed(request, error, reverse("web:card"))
    return HttpResponseRedirect(url)


def _added(request: HttpRequest, organization: Organization) -> HttpResponse:
    """Back from Stripe: what it says counts, not the address that the browser came back with."""
    try:
        account = payments.use_newest_card(organization, now=timezone.now())
    except gateway.GatewayError:
        messages.warning(
            request, "Stripe does not answer just now. A card that you added shows up here within a minute."
        )
        return HttpResponseRedirect(reverse("web:card"))
    if not account.payment_method:
        messages.warning(request, "No card was added.")
        return HttpResponseRedirect(reverse("web:card"))
    to = request.session.pop(RETURN_KEY, None) or reverse("web:card")
    return done(request, f"Your {account.card_brand} card ending in {account.card_last4} is on file.", to)


@page(POST="billing:write")
def portal(request: HttpRequest) -> HttpResponse:
    here = reverse("web:card")
    try:
        url = payments.portal_url(_organization(request), return_url=settings.PUBLIC_URL + here, now=timezone.now())
    except MarketError as error:
        return failed(request, error, here)
    return HttpResponseRedirect(url)


urlpatterns = [
    path("billing/card", card, name="card"),
    path("billing/portal", portal, name="portal"),
]
