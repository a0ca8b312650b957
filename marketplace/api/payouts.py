"""What an operator is paid: payouts, what waits, and Stripe's onboarding page."""

from typing import Any

from django.conf import settings
from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from billing import payouts
from billing.models import Payout
from marketplace.api.base import Resource
from marketplace.api.money_shapes import LinkShape, PayoutAccountShape, PayoutPage
from marketplace.api.shapes import amount
from marketplace.errors import MarketError
from marketplace.models import Organization


class PayoutResource(Resource):
    model_queryset = Payout.objects.all()
    prefix = Payout.PREFIX

    def represent(self, row: Payout) -> dict[str, Any]:
        return {
            "id": row.public_id,
            "object": "payout",
            "amount": amount(row.amount_minor, row.currency),
            "state": row.state,
            "stripe_transfer": row.stripe_transfer,
            "last_error": row.last_error,
            "created_at": row.created_at,
            "sent_at": row.sent_at,
        }

    def operator(self) -> Organization:
        found: Organization = self.organization()
        if not found.is_operator:
            raise MarketError("forbidden", f"{found.name} is no operator: only operators are paid out.")
        return found


class Payouts(PayoutResource):
    actions = {"GET": "payouts:read"}

    @extend_schema(tags=["payouts"], operation_id="payouts_list", responses={200: PayoutPage})
    def get(self, request: Request) -> Response:
        return self.listing(request)


class PayoutAccount(PayoutResource):
    actions = {"GET": "payouts:read", "POST": "payouts:write"}

    @extend_schema(tags=["payouts"], operation_id="payout_account_show", responses={200: PayoutAccountShape})
    def get(self, request: Request) -> Response:  # noqa: ARG002
        operator = self.operator()
        account = payouts.operator_account(operator, now=timezone.now())
        waiting = payouts.unsettled(operator.pk)
        return Response(
            {
                "object": "payout_account",
                "stripe_account": account.stripe_account,
                "transfers_enabled": account.transfers_enabled,
                "waiting": [amount(minor, currency) for currency, minor in sorted(waiting.items())],
            }
        )

    @extend_schema(tags=["payouts"], operation_id="payout_account_onboard", request=None, responses={201: LinkShape})
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """The address of Stripe's onboarding page."""
        back = settings.PUBLIC_URL + "/operator/"
        url = payouts.onboarding_link(self.operator(), refresh_url=back, return_url=back, now=timezone.now())
        return Response({"object": "onboarding", "url": url}, status=201)


urlpatterns = [
    path("payouts", Payouts.as_view(), name="payouts"),
    path("payouts/account", PayoutAccount.as_view(), name="payout-account"),
]
