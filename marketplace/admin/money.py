"""What an operator is paid: transfers, what waits, and Stripe's onboarding page."""

from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed, HttpResponseRedirect
from django.urls import URLPattern, path
from django.utils import timezone
from unfold.decorators import display

from billing import payouts
from billing.models import OperatorAccount, Payout, PayoutLine
from marketplace.admin import look
from marketplace.admin.base import RowsInline, TenantAdmin
from marketplace.admin.doors import operator_site
from marketplace.admin.tenancy import own
from marketplace.errors import MarketError
from marketplace.models import Organization


class PayoutLines(RowsInline):
    model = PayoutLine
    fields = ("shown_line", "shown_amount")
    readonly_fields = ("shown_line", "shown_amount")
    verbose_name_plural = "what it settles"

    def get_queryset(self, request: HttpRequest) -> Any:
        return super().get_queryset(request).select_related("invoice_line", "payout")

    @display(description="Invoice line")
    def shown_line(self, row: PayoutLine) -> str:
        return row.invoice_line.description

    @display(description="Amount")
    def shown_amount(self, row: PayoutLine) -> str:
        return look.minor(row.amount_minor, row.payout.currency)


@admin.register(Payout, site=operator_site)
class PayoutAdmin(look.Shown, TenantAdmin):
    reads = "payouts:read"
    list_display = ("shown_id", "shown_amount", "shown_state", "created_at", "sent_at", "stripe_transfer")
    list_filter = ("state",)
    ordering = ("-id",)
    inlines = (PayoutLines,)
    list_before_template = "desk/payouts.html"
    fields = ("shown_id", "shown_amount", "shown_state", "stripe_transfer", "last_error", "created_at", "sent_at")
    readonly_fields = ("shown_id", "shown_amount", "shown_state")

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.onboarding)
        return [path("onboarding/", view, name=self._name("onboarding")), *super().get_urls()]

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> Any:
        actor = self.actor(request)
        account = OperatorAccount.objects.all().owned_by(actor.organization_id).first()
        waiting = (
            payouts.unsettled(actor.organization_id) if actor.organization_id and actor.may("payouts:read") else {}
        )
        return super().changelist_view(
            request,
            {
                **(extra_context or {}),
                "account": account,
                "waiting": [look.minor(amount, currency) for currency, amount in sorted(waiting.items())],
                "onboarding": self.url_of("onboarding") if actor.may("payouts:write") else None,
            },
        )

    def onboarding(self, request: HttpRequest) -> HttpResponse:
        """On to Stripe's page, where the operator says who it is and where money goes."""
        actor = self.actor(request)
        if not actor.may("payouts:write"):
            raise PermissionDenied
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        home, back = own(Organization, actor).get(), request.build_absolute_uri(self.url_of("changelist"))
        try:
            url = payouts.onboarding_link(home, refresh_url=back, return_url=back, now=timezone.now())
        except MarketError as error:
            messages.error(request, str(error))
            return HttpResponseRedirect(back)
        return HttpResponseRedirect(url)
