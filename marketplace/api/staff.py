"""Our own people's doors: close a period through a past instant, look at what must be zero, reconcile now."""

from django.db.models import Count
from django.urls import path
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from billing import invoices, ledger, reconcile
from billing.models import BillingCase, Invoice
from marketplace.api.base import PublicId, Resource, Shape
from marketplace.api.invoices import shown
from marketplace.api.money_shapes import ClosedShape, InvariantsShape, ReconciliationShape
from marketplace.models import Job, Organization, OutboxMessage, Placement
from marketplace.services import audit


class CloseShape(Shape):
    organization = PublicId("org")
    through = serializers.DateTimeField(help_text="a past instant; floored to a second")


class StaffView(Resource):
    model_queryset = Organization.objects.all()
    prefix = "org"


class ClosePeriod(StaffView):
    actions = {"POST": "staff"}

    @extend_schema(tags=["staff"], operation_id="staff_close_period", request=CloseShape, responses={200: ClosedShape})
    def post(self, request: Request) -> Response:
        """Bill an organization through a past instant as an interim invoice; repeating it answers the same invoice."""
        body = self.read(CloseShape)
        organization = Organization.objects.all().visible_to(self.actor).filter(pk=body["organization"]).first()
        if organization is None:
            return Response({"invoice": None})
        now = timezone.now()
        invoice = invoices.close_period(organization, body["through"], Invoice.Kind.INTERIM, now=now)
        audit.record(
            self.actor, "billing.period_closed", organization.public_id, now=now, organization_id=organization.pk
        )
        del request
        return Response({"invoice": shown(invoice) if invoice else None})


class Health(StaffView):
    actions = {"GET": "staff"}

    @extend_schema(tags=["staff"], operation_id="staff_invariants", responses={200: InvariantsShape})
    def get(self, request: Request) -> Response:  # noqa: ARG002
        """Counts that must be zero, the ledger's balances, and what waits."""
        now = timezone.now()
        waiting = OutboxMessage.objects.values("topic").annotate(n=Count("id")).order_by("topic")
        return Response(
            {
                "object": "invariants",
                "invariants": {**reconcile.invariants(), "unmetered_seconds": reconcile.unmetered(now)},
                "ledger": ledger.totals("USD"),
                "trial_balance": ledger.trial_balance(),
                "open_cases": BillingCase.objects.all().visible_to(self.actor).filter(closed_at=None).count(),
                "jobs": _by_state(Job),
                "placements": _by_state(Placement),
                "outbox": {row["topic"]: row["n"] for row in waiting},
                "parked": OutboxMessage.objects.exclude(parked_at=None).count(),
            }
        )


def _by_state(model: type[Job] | type[Placement]) -> dict[str, int]:
    rows = model.objects.values("state").annotate(n=Count("id")).order_by("state")
    return {row["state"]: row["n"] for row in rows}


class Reconcile(StaffView):
    actions = {"POST": "staff"}

    @extend_schema(tags=["staff"], operation_id="staff_reconcile", request=None, responses={200: ReconciliationShape})
    def post(self, request: Request) -> Response:  # noqa: ARG002
        """Compare with Stripe now: missed events, mirrored invoices, ledger projections."""
        now = timezone.now()
        return Response(
            {"object": "reconciliation", "swept": reconcile.sweep(now), "compared": reconcile.reconcile(now)}
        )


urlpatterns = [
    path("staff/close-period", ClosePeriod.as_view(), name="staff-close-period"),
    path("staff/invariants", Health.as_view(), name="staff-invariants"),
    path("staff/reconcile", Reconcile.as_view(), name="staff-reconcile"),
]
