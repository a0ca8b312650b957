"""The browser policy of the two admins, and of nothing else (settings.CONTENT_SECURITY_POLICY leaves their prefixes out).

Weaker than the market's in two ways, because unfold's pages are built so:
- `script-src 'unsafe-inline' 'unsafe-eval'`: Alpine.js evaluates the expressions in unfold's attributes, and its templates
  carry inline scripts without a nonce;
- `style-src 'unsafe-inline'`: the theme's colours are an inline style element, and Alpine.js sets style attributes.
All else is as strict: no host but our own is contacted, nothing is framed, forms go to us (and, for an operator's onboarding, to
Stripe's page by redirect).
"""

from collections.abc import Callable

from django.conf import settings
from django.http import HttpRequest, HttpResponse

PREFIXES = ("/operator/", "/staff/")
STRIPE = settings.STRIPE_BASE_URL or "https://connect.stripe.com"
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "frame-ancestors 'none'",
        f"form-action 'self' {STRIPE}",
        "base-uri 'none'",
        "object-src 'none'",
    )
)


class AdminPolicyMiddleware:
    """Sets the header on every answer under PREFIXES, refusals included."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self.get_response(request)
        if request.path.startswith(PREFIXES):
            response["Content-Security-Policy"] = POLICY
        return response
