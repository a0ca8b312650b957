"""Cards: the one on file, adding one on Stripe's own page, and Stripe's portal. No card number passes through us."""

from typing import Any

from django.conf import settings
from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from billing import invoices, payments
from marketplace.api.base import Resource, Shape
from marketplace.api.money_shapes import LinkShape, PaymentMethodShape
from marketplace.errors import MarketError
from marketplace.models import BillingStanding, Organization


class SetupShape(Shape):
    success_url = serializers.URLField(required=False)
    cancel_url = serializers.URLField(required=False)


def own_url(url: str | None, default: str) -> str:
    """Redirects lead back to us alone: an open redirect would lend our name to anybody's page."""
    if url is None:
        return settings.PUBLIC_URL + default
    if not url.startswith((settings.PUBLIC_URL + "/", settings.PUBLIC_URL + "?")):
        raise MarketError(
            "invalid_request", f"A return address must begin with {settings.PUBLIC_URL}/.", {"/success_url": "not ours"}
        )
    return url


class PaymentMethodView(Resource):
    model_queryset = Organization.objects.all()
    prefix = "org"


class PaymentMethods(PaymentMethodView):
    actions = {"GET": "billing:read", "POST": "billing:write"}

    @extend_schema(tags=["billing"], operation_id="payment_methods_show", responses={200: PaymentMethodShape})
    def get(self, request: Request) -> Response:  # noqa: ARG002
        organization = self.organization()
        account = invoices.account_of(organization, now=timezone.now())
        standing = BillingStanding.objects.owned_by(organization).first()
        card: dict[str, Any] | None = None
        if account.payment_method:
            card = {"brand": account.card_brand, "last4": account.card_last4, "expires": account.card_expires}
        return Response(
            {"object": "payment_method", "card": card, "standing": standing.state if standing else "no_card"}
        )

    @extend_schema(tags=["billing"], operation_id="payment_methods_add", request=SetupShape, responses={201: LinkShape})
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """The address of Stripe's page on which the card is added."""
        body = self.read(SetupShape)
        url = payments.start_card_setup(
            self.organization(),
            success_url=own_url(body.get("success_url"), "/billing/card?added=1"),
            cancel_url=own_url(body.get("cancel_url"), "/billing/card"),
            now=timezone.now(),
        )
        return Response({"object": "card_setup", "url": url}, status=201)


class Portal(PaymentMethodView):
    actions = {"POST": "billing:write"}

    @extend_schema(tags=["billing"], operation_id="payment_methods_portal", request=None, responses={201: LinkShape})
    def post(self, request: Request) -> Response:  # noqa: ARG002
        url = payments.portal_url(
            self.organization(), return_url=settings.PUBLIC_URL + "/billing/card", now=timezone.now()
        )
        return Response({"object": "portal", "url": url}, status=201)


urlpatterns = [
    path("payment-methods", PaymentMethods.as_view(), name="payment-methods"),
    path("payment-methods/portal", Portal.as_view(), name="payment-portal"),
]
